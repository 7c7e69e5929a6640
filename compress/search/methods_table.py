"""One method at a time: what each costs and saves alone, the best combinations, and other people's quantization.

Each row of the table is one way of storing the tables of one checkpoint, scored on the same sample of a split: bytes,
time, delta AUC and delta NE against fp32, and the same on the rows that cuts hurt most, which averages hide.

Legend: N rows of the sample, T tasks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, cast, get_args

import numpy as np

from compress.compressor import ResolvedTable, resolve, table_bytes
from compress.config import Bits, CalibrationPlan, Clip, CompressionPlan, TablePlan
from compress.errors import PlanError
from compress.methods.calibrate import calibrate, with_head
from compress.methods.prune import Score
from compress.model import CompressedModel
from compress.peers import PEERS, whole_id_maps_bytes
from compress.search.budget import CODEBOOKS, parse_budget, plan_for_budget
from compress.search.objective import Quality, compare
from compress.search.profile import TableProfile, profile_tables
from compress.search.sensitivity import Predicted, predict, sensitivities
from compress.search.space import packable
from compress.search.working_set import WorkingSet, extract, score, trial
from trainer.checkpoint import Checkpoint
from trainer.data.batch import to_batch
from trainer.data.dataset import Dataset, SplitName
from trainer.data.reader import spread_rows
from trainer.data.transform import OOV_ROW
from trainer.progress import ReportProgress

BUDGETS = ("2%", "1%", "0.5%")
CALIBRATION_ROWS = 200_000  # of the training split at most: a working set of them is held in memory
CANDIDATES = 500
TIMED_RUNS = 15
KEPT_SHARE = 0.05  # of rows, where pruning scores are compared
TAIL_LOOKUPS = 0.1  # share of lookups that the rarest ids have together
SLICE_SHARE = 0.1  # of the sample: the rows that look up the most of what a slice is about
FEWEST = 50  # rows of either class, with which a slice is a slice


@dataclass(frozen=True)
class Method:
    """A row of the table. Bytes count rows, scales, padding, centroids and decoders; an id map's are apart.

    `milliseconds`: median time of 500 candidates on this thread, where the method is served here. `slices`: quality by
    name of the slice.
    """

    name: str
    row_bytes: int
    id_map_bytes: int
    quality: Quality
    slices: dict[str, Quality]
    milliseconds: float | None = None

    @property
    def table_bytes(self) -> int:
        """All bytes, the id map's included."""
        return self.row_bytes + self.id_map_bytes

    def describe(self) -> dict[str, Any]:
        """What JSON has of it, quality on all rows beside the sizes."""
        described = asdict(self)
        return {**described.pop("quality"), **described, "table_bytes": self.table_bytes}


@dataclass
class Bench:
    """A checkpoint, a sample of a split, and what methods are compared on."""

    checkpoint: Checkpoint
    dataset: Dataset
    split: SplitName
    limit: int
    progress: ReportProgress

    @cached_property
    def fp32_bytes(self) -> int:
        """Bytes of the fp32 rows."""
        return sum(t.fp32_bytes for t in self.dataset.transform.tables.values())

    @cached_property
    def fisher(self) -> dict[str, np.ndarray]:
        """Sensitivities of all tables."""
        return sensitivities(self.checkpoint, self.dataset, self.progress)

    def profiles(self, order: Score) -> dict[str, TableProfile]:
        """Profiles whose rows are ranked by a score."""
        books = CODEBOOKS if order == "fisher" else ()
        return profile_tables(self.checkpoint, self.dataset, self.progress, order, self.fisher, books)

    @cached_property
    def by_fisher(self) -> dict[str, TableProfile]:
        """Profiles whose rows are ranked by what the loss would lose."""
        return self.profiles("fisher")

    @cached_property
    def predicted(self) -> dict[str, Predicted]:
        """What coding and cutting are expected to cost."""
        rows = self.dataset.rows("train")
        return predict(self.checkpoint, self.by_fisher, self.fisher, rows, self.progress)

    def sample(self, split: SplitName, limit: int, profiles: Mapping[str, TableProfile]) -> WorkingSet:
        """Some rows of a split, with what they look up."""
        return extract(self.checkpoint, self.dataset.transform, profiles, spread_rows(self.dataset, split, limit))

    @cached_property
    def working(self) -> WorkingSet:
        """The sample that everything is scored on, ranked by Fisher score."""
        return self.sample(self.split, self.limit, self.by_fisher)

    @cached_property
    def reference(self) -> np.ndarray:
        """Log-odds (N, T) of the fp32 model."""
        return score(self.working, None)

    @cached_property
    def slices(self) -> dict[str, np.ndarray]:
        """Rows of the sample by slice."""
        return slices_of(self.working, self.by_fisher)

    def budget_plan(self, budget: str) -> CompressionPlan:
        """The plan of least predicted loss within a budget. Raises: PlanError below the floor."""
        size = parse_budget(budget, self.fp32_bytes)
        return plan_for_budget(self.by_fisher, self.predicted, size, checkpoint=self.checkpoint.version).plan

    def method(
        self,
        name: str,
        logits: np.ndarray,
        row_bytes: int,
        id_map_bytes: int,
        milliseconds: float | None = None,
    ) -> Method:
        """A row of the table."""
        labels, reference = self.working.labels, self.reference
        slices = {n: compare(labels[at], logits[at], reference[at]) for n, at in self.slices.items()}
        if labels.shape[1] > 1:
            for t, task in enumerate(self.working.transform.schema.tasks):
                slices[task.name] = compare(labels[:, [t]], logits[:, [t]], reference[:, [t]])
        return Method(name, row_bytes, id_map_bytes, compare(labels, logits, reference), slices, milliseconds)

    def planned(self, name: str, resolved: Mapping[str, ResolvedTable], working: WorkingSet) -> Method:
        """What a plan comes to, by a sample that is ranked as the plan is."""
        ids = sum(r.id_map_bytes for r in resolved.values())
        logits = score(working, resolved)
        return self.method(name, logits, table_bytes(resolved) - ids, ids, time_of_ranking(*trial(working, resolved)))


def methods_table(
    checkpoint: Checkpoint,
    dataset: Dataset,
    progress: ReportProgress,
    split: SplitName = "test",
    limit: int = 100_000,
) -> list[Method]:
    """Every method on its own, the best combinations, calibrated ones with their control, and the peers.

    `dataset` as compress.compressor.data_of gives it; `limit` rows of the split at most are scored. A method that
    cannot be had (a dim that cannot be packed, a budget below the floor) has no row.
    """
    bench = Bench(checkpoint, dataset, split, limit, progress)
    ids = whole_id_maps_bytes(bench.by_fisher)
    methods = [
        bench.method("fp32", bench.reference, bench.fp32_bytes, ids, time_of_ranking(*trial(bench.working, None)))
    ]
    methods += _plans_in_turn(bench)
    for make in (scored_prunings, combined):
        methods += make(bench)
    for peer in PEERS:
        try:
            tables = dataset.transform.tables
            methods.append(bench.method(peer.label, peer.logits(bench.working), peer.table_bytes(tables), ids))
        except PlanError:
            continue
        progress("methods", len(methods), len(methods))
    return methods


def single_plans(bench: Bench) -> Iterator[tuple[str, Callable[[], CompressionPlan]]]:
    """Names and plans of methods that need rows ranked by Fisher score, or no ranks."""
    tables = bench.dataset.transform.tables

    def uniform(bits: Bits, clip: Clip) -> CompressionPlan:
        plans = {n: TablePlan(bits=packable(t.embedding_dim, bits), clip=clip) for n, t in tables.items()}
        return CompressionPlan(tables=plans)

    yield "FP16", lambda: uniform(16, "search")
    for bits in cast(tuple[Bits, ...], (8, 4, 2)):
        for clip in get_args(Clip):
            yield f"INT{bits} {clip}", partial(uniform, bits, clip)
    yield "half of the columns", lambda: narrowed(bench, "columns")
    yield "half of the rank", lambda: narrowed(bench, "rank")
    tiers = ({"bits": 32, "keep": KEPT_SHARE}, {"bits": 0})
    centroids = {"tiers": tiers, "centroids": 16, "unknown": "shared"}
    yield (
        f"{KEPT_SHARE:.0%} of rows, 16 centroids",
        lambda: CompressionPlan(order="fisher", default=TablePlan.model_validate(centroids)),
    )


def narrowed(bench: Bench, way: str) -> CompressionPlan:
    """fp32 rows of half the width."""
    tables = bench.dataset.transform.tables
    plans = {n: TablePlan.model_validate({"bits": 32, way: max(t.embedding_dim // 2, 4)}) for n, t in tables.items()}
    return CompressionPlan(order="fisher", tables=plans)


def _plans_in_turn(bench: Bench) -> Iterator[Method]:
    for name, make in single_plans(bench):
        try:
            yield bench.planned(name, resolve(make(), bench.by_fisher), bench.working)
        except PlanError:
            continue
        bench.progress("methods", 1, 1)


def scored_prunings(bench: Bench) -> Iterator[Method]:
    """The same share of fp32 rows kept by each score, the others reading one centroid; tiers by frequency."""
    pruned = TablePlan(bits=32, keep=KEPT_SHARE, unknown="shared")
    tiers = TablePlan.model_validate(
        {
            "tiers": [{"bits": 8, "coverage": 0.8}, {"bits": 4, "coverage": 0.95}],
            "unknown": "shared",
        }
    )
    for order in get_args(Score):
        profiles = bench.by_fisher if order == "fisher" else bench.profiles(order)
        working = bench.working if order == "fisher" else bench.sample(bench.split, bench.limit, profiles)
        plans = {f"{KEPT_SHARE:.0%} of rows by {order}": pruned}
        if order == "frequency":
            plans["tiers by frequency"] = tiers
        for name, plan in plans.items():
            try:
                yield bench.planned(name, resolve(CompressionPlan(order=order, default=plan), profiles), working)
            except PlanError:
                continue
            bench.progress("methods", 1, 1)


def combined(bench: Bench) -> Iterator[Method]:
    """The best plan within each budget, as it is and calibrated; the fp32 model calibrated the same way."""
    train = bench.sample("train", CALIBRATION_ROWS, bench.by_fisher)
    asked = CalibrationPlan()
    held = bench.sample("val", asked.held_rows, bench.by_fisher)
    control: Method | None = None
    for budget in BUDGETS:
        try:
            resolved = resolve(bench.budget_plan(budget), bench.by_fisher)
        except PlanError:
            continue
        plain = bench.planned(f"tiers within {budget}", resolved, bench.working)
        yield plain
        tuned = calibrate(train, held, resolved, asked, bench.dataset.negative_rate, bench.progress)
        logits = score(with_head(bench.working, tuned.compressed.dense), resolved)
        yield bench.method(
            f"the same, calibrated ({budget})", logits, plain.row_bytes, plain.id_map_bytes, plain.milliseconds
        )
        if control is None:
            fp32 = score(with_head(bench.working, tuned.control.dense), None)
            ids = whole_id_maps_bytes(bench.by_fisher)
            control = bench.method("control: fp32, calibrated", fp32, bench.fp32_bytes, ids)
    if control is not None:
        yield control


# -- slices and time ---------------------------------------------------------------------------------------------------


def slices_of(working: WorkingSet, profiles: Mapping[str, TableProfile]) -> dict[str, np.ndarray]:
    """Rows (numbers in the sample) that look up rare ids and unknown ones; what has too few rows is left out.

    "tail ids": the tenth of the sample with the most lookups of ids that have the last tenth of a table's lookups.
    "unknown users": rows whose user training never saw, where the schema names a user; else "unknown ids": the tenth
    with the most lookups of unknown ids.
    """
    tail, unknown = np.zeros(len(working.labels)), np.zeros(len(working.labels))
    user = working.transform.schema.ids.user
    found = {}
    for name, ragged in working.sample.sparse.items():
        table = working.transform.table_of(name).name
        profile, ranks = profiles[table], working.ranks[table]
        rare = profile.counts[profile.order[ranks]] < tail_count(profile.counts)
        unseen = ranks == OOV_ROW
        lengths = np.ones(len(ragged), dtype=np.int64) if ragged.lengths is None else ragged.lengths
        bag = np.repeat(np.arange(len(ragged)), lengths)
        tail += np.bincount(bag, weights=rare[ragged.values] & ~unseen[ragged.values], minlength=len(ragged))
        own = np.bincount(bag, weights=unseen[ragged.values], minlength=len(ragged))
        unknown += own
        if name == user:
            found["unknown users"] = np.flatnonzero(own > 0)
    found["tail ids"] = most(tail)
    if user is None:
        found["unknown ids"] = most(unknown)
    positives = {name: working.labels[at].sum(0) for name, at in found.items()}
    return {
        name: at
        for name, at in found.items()
        if min(positives[name].min(), (len(at) - positives[name]).min()) >= FEWEST
    }


def tail_count(counts_N: np.ndarray) -> int:
    """The fewest lookups of a row with which it is not among the rarest, which have TAIL_LOOKUPS of all together."""
    falling = np.sort(counts_N)[::-1]
    before = np.cumsum(falling)
    return int(falling[min(np.searchsorted(before, (1 - TAIL_LOOKUPS) * before[-1]), len(falling) - 1)])


def most(amount_N: np.ndarray) -> np.ndarray:
    """The rows with the largest amounts, SLICE_SHARE of all at most; none with nothing."""
    chosen = np.argsort(-amount_N, kind="stable")[: int(SLICE_SHARE * len(amount_N))]
    return np.sort(chosen[amount_N[chosen] > 0])


def time_of_ranking(model: CompressedModel, sample: Any) -> float:
    """Median milliseconds of scoring 500 packed rows on this thread; tables are as large as the sample touches."""
    rows = np.resize(np.arange(len(sample)), CANDIDATES)
    batch = to_batch(sample.take(rows))
    times = []
    for _ in range(TIMED_RUNS):
        begun = time.perf_counter()
        model.logits(batch)
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)
