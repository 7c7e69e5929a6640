"""All that a search needs before its first trial: profiles, predicted losses, samples, heads, what time costs.

Whole tables are streamed past once; what comes out is as large as the samples are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.compressor import HEAD_ROWS, convert_head, resolve
from compress.config import Choice, Range, SearchConfig, Space
from compress.dense import make_runtime, sides_of
from compress.errors import PlanError
from compress.methods.dense import DensePlan, simplify
from compress.model import SCORE_ROWS
from compress.onnx_head import head_of
from compress.search.budget import CODEBOOKS, floor_bytes_of, parse_budget
from compress.search.decide import split_rows
from compress.search.halving import rung_ends
from compress.search.latency import HeadTimes, Latency, MachineCosts, calibrate_machine, request_of
from compress.search.overhead import fixed_bytes, head_bytes
from compress.search.planner import Planner, correction
from compress.search.profile import TableProfile, profile_tables
from compress.search.sensitivity import predict, sensitivities
from compress.search.space import first_of, knobs, label, setting
from compress.search.trials import Sample, Shared, Variant
from compress.search.working_set import WorkingSet, extract, score, trial
from trainer.checkpoint import Checkpoint
from trainer.data.batch import to_batch
from trainer.data.dataset import Dataset
from trainer.data.reader import Rows, spread_rows
from trainer.metrics import row_losses
from trainer.progress import ReportProgress

MEASURED_ROWS = 20_000  # of the search's sample: what each table's own loss is measured on
MEASURED_TABLES = 64  # at most, those that are predicted to lose most
ABOVE_FLOOR = 1.01  # times the fewest bytes: where budgets begin

Parallel = Callable[[Callable[[Any, Any], Any], Any, Sequence[Any]], list[Any]]
"""`work(shared, item)` of each item, side by side."""


@dataclass(frozen=True)
class Lessons:
    """Rows that heads are converted by and gated on, as fp32 tables are read."""

    train: WorkingSet
    held: WorkingSet

    def convert(self, head: nn.Module, plan: DensePlan) -> nn.Module:
        """A head as a plan asks. Raises: PlanError where it cannot be had."""
        return convert_head(head, plan, inputs_of(self.train), inputs_of(self.held), self.held.labels)


@dataclass(frozen=True)
class Preparation:
    """What a search works on. profiles: whole, for writing the artifact; those of `shared` are slim.

    search_rows: the search's sample, in no order: heads are converted and fine-tuned by some of them.
    """

    checkpoint: Checkpoint
    dataset: Dataset
    search: SearchConfig
    profiles: dict[str, TableProfile]
    shared: Shared
    search_rows: Rows
    selection: Sample
    gate_rows: Rows
    lessons: Lessons

    @property
    def rungs(self) -> list[int]:
        """Rows of the search's sample after which trials are judged."""
        return np.cumsum([len(r.labels) for r in self.shared.rungs]).tolist()

    def sample(self, rows: Rows) -> Sample:
        """Some rows, and what the fp32 model says of them."""
        return sample_of(self.checkpoint, self.dataset, self.profiles, rows)


def prepare(
    checkpoint: Checkpoint,
    dataset: Dataset,
    search: SearchConfig,
    parallel: Parallel,
    progress: ReportProgress,
    costs: MachineCosts | None = None,
) -> Preparation:
    """Profile, predict, draw samples, convert heads, time the machine (`costs`: as timed before).

    Raises: PlanError for a space that no plan is in; DataError with too few rows.
    """
    fisher = sensitivities(checkpoint, dataset, progress)
    profiles = profile_tables(checkpoint, dataset, progress, "fisher", fisher, CODEBOOKS)
    predicted = predict(checkpoint, profiles, fisher, dataset.rows("train"), progress)
    asked = (search.sample_rows, search.selection_rows, search.gate_rows)
    rows, selection, gate_rows = split_rows(spread_rows(dataset, "val", sum(asked)), asked, search.seed)
    whole = sample_of(checkpoint, dataset, profiles, rows)
    ends = rung_ends(len(rows), search.rungs)
    rungs = tuple(whole.take(np.arange(a, b)) for a, b in zip([0, *ends[:-1]], ends, strict=True))
    held = rows.take(np.arange(min(len(rows), HEAD_ROWS)))  # of the search's: the gate's rows have no part in a head
    lessons = Lessons(
        *(extract(checkpoint, dataset.transform, None, r) for r in (spread_rows(dataset, "train", HEAD_ROWS), held))
    )
    progress("time lookups", 0, 1)
    request = request_of(dataset.transform, rows.take(np.arange(min(len(rows), 10_000))).encoded)
    variants = convert_heads(lessons, search.space, HeadTimes(sides_of(dataset.transform), request), progress)
    check_time(variants, search.max_ms)
    nats = sum(
        float(row_losses(whole.labels[:, t], whole.reference[:, t]).mean()) for t in range(whole.labels.shape[1])
    )
    latency = Latency(request, costs or calibrate_machine(), 0.0, nats)
    progress("time lookups", 1, 1)
    slim = {name: p.slim() for name, p in profiles.items()}
    planner = Planner(slim, predicted, dict.fromkeys(slim, 1.0), checkpoint.version, latency)
    space = within_reach(search.space, planner, search.max_table_bytes)
    some = whole.take(np.arange(min(len(rows), MEASURED_ROWS)))
    planner = replace(planner, corrections=measured_corrections(planner, space, some, parallel, progress))
    shared = Shared(space, planner, rungs, variants, fixed_bytes(checkpoint, dataset), search.seed)
    return Preparation(
        checkpoint,
        dataset,
        search,
        profiles,
        shared,
        rows,
        sample_of(checkpoint, dataset, profiles, selection),
        gate_rows,
        lessons,
    )


def sample_of(checkpoint: Checkpoint, dataset: Dataset, profiles: dict[str, TableProfile], rows: Rows) -> Sample:
    """Some rows, what they look up, and what the fp32 model says of them."""
    working = extract(checkpoint, dataset.transform, profiles, rows)
    return Sample(working, score(working, None))


@torch.inference_mode()
def inputs_of(working: WorkingSet) -> list[tuple[Tensor, Tensor]]:
    """What the head is given for the rows of a working set: batches of (dense (B, I), looked up (B, L))."""
    model, sample = trial(working, None)
    batches = [
        to_batch(sample.take(np.arange(at, min(at + SCORE_ROWS, len(sample)))))
        for at in range(0, len(sample), SCORE_ROWS)
    ]
    return [(b.dense, model.lookup(b.sparse)) for b in batches]


def own_head(working: WorkingSet) -> nn.Module:
    """The checkpoint's head."""
    return head_of(working.run, working.transform, {k: torch.tensor(v) for k, v in working.dense.items()})


def convert_heads(lessons: Lessons, space: Space, times: HeadTimes, progress: ReportProgress) -> dict[str, Variant]:
    """The dense part under each of the plans of a space, by label: converted once, and timed."""
    variants = {}
    for index, plan in enumerate(space.dense.choice):
        own = own_head(lessons.train)
        plain = plan == DensePlan()
        head = simplify(own) if plain else lessons.convert(own, plan)
        size = head_bytes(own if plain else make_runtime(head, times.sides, plan))
        ms = times.ms(plan, lambda head=head: head)  # type: ignore[misc]
        variants[label(plan)] = Variant(None if plain else head, size, ms)
        progress("heads", index + 1, len(space.dense.choice))
    return variants


def check_time(variants: dict[str, Variant], max_ms: float | None) -> None:
    """Raises: PlanError when the dense part alone takes longer than is allowed, whichever of its plans."""
    name = min(variants, key=lambda name: variants[name].ms)
    if max_ms is not None and variants[name].ms > max_ms:
        raise PlanError(
            f"max-ms {max_ms:g}: the dense part alone takes {variants[name].ms:.3g} ms at the least ({name}): allow "
            "more, or give tune.space.dense a narrower plan"
        )


def within_reach(space: Space, planner: Planner, max_table_bytes: str | None) -> Space:
    """A space whose budgets are no less than the tables' floor, and no more than what is allowed.

    Raises: PlanError when nothing is left.
    """
    most = 1.0 if max_table_bytes is None else parse_budget(max_table_bytes, planner.fp32_bytes) / planner.fp32_bytes
    floor = ABOVE_FLOOR * floor_bytes_of(planner.profiles, planner.predicted) / planner.fp32_bytes
    knob = space.budget
    if isinstance(knob, Range):
        low, high = max(knob.low, floor), min(knob.high, most)
        between = [low, high] if low < high else [high] * (low == high)
    else:
        between = [v for v in knob.choice if floor <= v <= most]
    if not between:
        values = [knob.low, knob.high] if isinstance(knob, Range) else list(knob.choice)
        raise PlanError(
            f"tune.space.budget {values}: the tables take {floor:.4g} of fp32 at the least"
            f"{'' if most == 1.0 else f', and max_table_bytes allows {most:.4g}'}: give budgets between"
        )
    if isinstance(knob, Range) and len(between) > 1:
        reach: Range | Choice[float] = knob.model_copy(update={"low": low, "high": high})
    else:
        reach = Choice[float](choice=tuple(between))
    return space.model_copy(update={"budget": reach})


def measured_corrections(
    planner: Planner, space: Space, sample: Sample, parallel: Parallel, progress: ReportProgress
) -> dict[str, float]:
    """By how much each table loses more than predicted, by a plan in the middle of the budgets, tried on it alone.

    All 1 where the space does not ask how far to trust it.
    """
    if space.trust == Choice[float](choice=(0.0,)):
        return dict.fromkeys(planner.profiles, 1.0)
    middle = {name: first_of(knob) for name, knob in knobs(space).items()}
    chosen = setting(space, middle)
    budgets = space.budget
    values = (budgets.low, budgets.high) if isinstance(budgets, Range) else (min(budgets.choice), max(budgets.choice))
    chosen["budget"] = float(np.sqrt(values[0] * values[1]))
    found = planner.plan(chosen)
    losing = sorted(found.predicted, key=lambda name: -found.predicted[name])[:MEASURED_TABLES]
    resolved = resolve(found.plan, planner.profiles)
    progress("measure tables", 0, len(losing))
    measured = parallel(measured_loss, (sample, resolved), losing)
    progress("measure tables", len(losing), len(losing))
    own = {n: correction(found.predicted[n], *m) for n, m in zip(losing, measured, strict=True)}
    return dict.fromkeys(planner.profiles, 1.0) | own


def measured_loss(shared: tuple[Sample, Any], table: str) -> tuple[float, float]:
    """What compressing one table alone costs on a sample, summed over tasks, and its standard error: nats."""
    sample, resolved = shared
    logits = score(sample.working, {table: resolved[table]})
    tasks = range(logits.shape[1])
    change = np.sum(
        [
            row_losses(sample.labels[:, t], logits[:, t]) - row_losses(sample.labels[:, t], sample.reference[:, t])
            for t in tasks
        ],
        axis=0,
    )
    return float(change.mean()), float(change.std() / np.sqrt(len(change)))
