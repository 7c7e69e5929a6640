"""What a lookup costs in milliseconds before it is built: a linear cost model, fitted once on this machine.

In: tables as they would be stored, and how many ids a row looks up. Out: predicted ms of a Lookup, of a request and its
candidates, and of one more tier. The dense part is measured, not modelled, once per plan of it. One thread throughout.

A call costs a sum over counts of work (`work_of`), each times a cost of the machine: rows are decoded value by value,
ids are handed to every tier of their table, tiers are added up. Rows are taken to be read evenly within a tier, an
upper bound for tables beyond the cache, where ids that are asked for often stay in it.

Legend: K rows scored, F lookups, P pieces (tiers of lookups: the physical tables that a call passes), W work terms.
"""

from __future__ import annotations

import functools
import itertools
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from compress.catalogue import item_transform, request_transform
from compress.dense import Sides, make_runtime
from compress.lookup import Lookup, StoredTable, Tier, pieces_of, tier_views
from compress.methods.codec import quantize_rows, row_bytes
from compress.methods.dense import DensePlan
from trainer.data.batch import feature_of, to_batch
from trainer.data.encoded import Encoded
from trainer.data.schema import Config
from trainer.data.transform import TableInfo, Transform
from trainer.models import lookups_of, pooling_of

CANDIDATES = 500
CACHE_BYTES = 32 << 20  # of the last level: what lies beyond it is read from memory
LINE = 64
SHAPES = 56  # lookups that a machine is calibrated on
LARGE = ((8, 64, 1 << 19), (4, 32, 1 << 21))  # of which so many tables, of this dim and rows, lie beyond the cache
DISTINCT_ROWS = 1024  # rows coded for a calibration; larger tables repeat them
WARM_UP = 2
FEWEST_RUNS, HEAD_RUNS = 7, 15
QUANTILE = 0.25  # of the runs of a lookup: what other processes do to caches only ever adds
BITS = (2, 4, 8, 16, 32)
TERMS = (
    "call",
    "piece",
    "bag",
    "id",
    *(f"value_{bits}" for bits in BITS),
    "pooled",
    "split",
    "flat_id",
    "ragged_id",
    "added",
    "weighting",
    "weighted_bag",
    "weighted_id",
    "decoder",
    "decoder_flop",
    "widened",
    "line_beyond",
)


class MachineCosts(Config):
    """What work costs on one machine and thread. ns: nanoseconds of each term of `work_of`, none negative.

    relative_error: median over the calibration's own lookups of |predicted - measured| / measured.
    """

    version: Literal[1] = 1
    machine: str
    ns: dict[str, float]
    relative_error: float = Field(ge=0)
    lookups: int = Field(gt=0)

    @field_validator("ns")
    @classmethod
    def _of_all_terms(cls, value: dict[str, float]) -> dict[str, float]:
        if set(value) != set(TERMS) or not all(0 <= cost < math.inf for cost in value.values()):
            raise ValueError(f"ns holds a cost of 0 or more for each of {', '.join(TERMS)}: calibrate again")
        return value

    def ms(self, work: Mapping[str, float]) -> float:
        """Milliseconds of so much work."""
        return 1e-6 * sum(self.ns[term] * amount for term, amount in work.items())


@dataclass(frozen=True)
class Workload:
    """What one row looks up: mean ids by lookup, in order, and whether any are pooled with weights."""

    lengths: Mapping[str, float]
    weighted: bool = False


@dataclass(frozen=True)
class Request:
    """How candidates are ranked: what the request looks up once and each candidate looks up.

    Where one of the sides looks nothing up, the request is repeated beside each candidate (CompressedModel.rank), and
    `once` is None.
    """

    once: Workload | None
    each: Workload
    candidates: int = CANDIDATES

    def lookup_ms(
        self, tables: Sequence[StoredTable], costs: MachineCosts, shares: Mapping[str, Sequence[float]] | None = None
    ) -> float:
        """Predicted milliseconds of all lookups of the request and its candidates."""
        once = 0.0 if self.once is None else lookup_ms(tables, self.once, costs, 1, shares)
        return once + lookup_ms(tables, self.each, costs, self.candidates, shares)


@dataclass(frozen=True)
class Latency:
    """What time is worth: the nats of mean log loss that a millisecond of a request must gain, and its limit.

    head_ms: of the dense part, measured.
    """

    request: Request
    costs: MachineCosts
    head_ms: float
    nats_per_ms: float
    max_ms: float | None = None

    def ms(self, tables: Sequence[StoredTable]) -> float:
        """Predicted milliseconds of a request and its candidates: the lookups and the dense part."""
        return self.head_ms + self.request.lookup_ms(tables, self.costs)

    def tier_ms(self, infos: Sequence[TableInfo]) -> dict[str, float]:
        """Milliseconds that one more tier of each table costs, where it has two already."""
        plain = {t.name: StoredTable(t.name, t.embedding_dim, t.embedding_dim, (_ROW,), t.features) for t in infos}

        def with_tiers(name: str, count: int) -> float:
            tables = plain | {name: replace(plain[name], tiers=(_ROW,) * count)}
            return self.request.lookup_ms(list(tables.values()), self.costs)

        return {name: with_tiers(name, 3) - with_tiers(name, 2) for name in plain}


_ROW = Tier(1, 8)


def lookup_ms(
    tables: Sequence[StoredTable],
    workload: Workload,
    costs: MachineCosts,
    candidates: int = CANDIDATES,
    shares: Mapping[str, Sequence[float]] | None = None,
) -> float:
    """Predicted milliseconds of one call of a Lookup for so many rows. `shares` as in `work_of`."""
    return costs.ms(work_of(tables, workload, candidates, shares))


def work_of(
    tables: Sequence[StoredTable],
    workload: Workload,
    rows: int,
    shares: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, float]:
    """Amounts of each term of work in one call for `rows` rows.

    `shares`: of the lookups of a table, by name, those that each tier answers; without it the first, most read tier
    answers all, whose bits matter little beside the number of tiers.
    """
    owner = {feature: table for table in tables for feature in table.features}
    reads = [(owner[feature_of(name)], length) for name, length in workload.lengths.items()]
    split = any(len(table.tiers) > 1 for table, _ in reads)
    beyond = max(0.0, 1 - CACHE_BYTES / max(pieces_of(tables)[1], 1))
    work = dict.fromkeys(TERMS, 0.0)
    work["call"] = 1
    for table, length in reads:
        tiers, ids = len(table.tiers), rows * length
        work["piece"] += tiers
        work["bag"] += rows * tiers
        work["id"] += ids * tiers
        work["pooled"] += rows * tiers * table.width
        work["added"] += rows * (tiers - 1) * table.width
        own = None if shares is None else shares.get(table.name)
        for tier, share in zip(table.tiers, own or (1.0, *[0.0] * (tiers - 1)), strict=True):
            work[f"value_{tier.bits}"] += ids * share * table.width
            work["line_beyond"] += beyond * ids * share * (1 + (row_bytes(table.width, tier.bits) - 1) / LINE)
        if table.width < table.dim:
            work["decoder"] += 1
            work["decoder_flop"] += 2.0 * rows * table.width * table.dim
    if split:
        one_id_each = all(length == 1 for _, length in reads)
        work["split"] = 1
        work["flat_id" if one_id_each else "ragged_id"] = work["id"]
    if workload.weighted:
        work |= {"weighting": 1, "weighted_bag": rows * len(reads), "weighted_id": work["id"]}
    if work["decoder"]:
        work["widened"] = rows * sum(table.dim for table, _ in reads)
    return work


def request_of(transform: Transform, sample: Encoded, candidates: int = CANDIDATES, shared: bool = True) -> Request:
    """How a model of this data is asked, with the mean bag lengths of a sample.

    `shared`: whether its head can take a request's part once; an OnnxHead cannot.
    """
    sparse = to_batch(sample).sparse
    means = sparse.lengths().view(len(sparse.keys()), -1).float().mean(1).tolist()
    lengths = dict(zip(sparse.keys(), means, strict=True))

    def side(part: Transform) -> Workload:
        weighted = sparse.weights_or_none() is not None or any(pooling_of(part, f) == "mean" for f in part.sparse)
        return Workload({name: lengths[name] for name in lookups_of(part, list(part.sparse))}, weighted)

    once, each = side(request_transform(transform)), side(item_transform(transform))
    if not shared or not once.lengths or not each.lengths:
        return Request(None, side(transform), candidates)
    return Request(once, each, candidates)


class HeadTimes:
    """Milliseconds of the dense part of a request, measured once for each plan of it on one thread."""

    def __init__(self, sides: Sides, request: Request) -> None:
        self.sides = sides
        self.request = request
        self.known: dict[DensePlan, float] = {}

    def ms(self, plan: DensePlan, make: Callable[[], nn.Module]) -> float:
        """Of a head that `make` gives, converted as the plan says, in the runtime that would serve it."""
        if plan not in self.known:
            self.known[plan] = self._measured(make(), plan)
        return self.known[plan]

    def _measured(self, head: nn.Module, plan: DensePlan) -> float:
        request_dense, request_looked_up, item_dense, item_looked_up = self.sides.example(self.request.candidates)
        if self.request.once is not None:
            run = partial(
                make_runtime(head, self.sides, plan).rank, request_dense, request_looked_up, item_dense, item_looked_up
            )
        else:
            rows = self.request.candidates
            dense = torch.cat([request_dense.expand(rows, -1), item_dense], dim=1)
            run = partial(head, dense, torch.cat([request_looked_up.expand(rows, -1), item_looked_up], dim=1))
        with one_thread():
            times = [_timed(run) for _ in range(HEAD_RUNS + WARM_UP)]
        return float(np.quantile(times[WARM_UP:], QUANTILE))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, without gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


def _timed(run: Callable[[], object]) -> float:
    """Milliseconds of this thread alone, whoever else wants its core."""
    begun = time.thread_time()
    run()
    return 1e3 * (time.thread_time() - begun)


# -- calibration -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A lookup to be measured: tables with a feature each, mean bag lengths, rows scored."""

    tables: tuple[StoredTable, ...]
    workload: Workload
    rows: int

    @property
    def work(self) -> dict[str, float]:
        """Its work, with ids spread over the tiers by their rows, as `example` draws them."""
        shares = {t.name: [tier.rows / t.rows for tier in t.tiers] for t in self.tables}
        return work_of(self.tables, self.workload, self.rows, shares)


def drawn_shapes(count: int, seed: int, most_tables: int = 40) -> list[Shape]:
    """Lookups of 1 to `most_tables` tables of dims 8 to 64, 1 to 4 tiers, mixed bits, bags, weights and decoders."""
    rng = random.Random(seed)
    return [_drawn(rng, most_tables) for _ in range(count)]


def _drawn(rng: random.Random, most_tables: int) -> Shape:
    bags, most_tiers = rng.random() < 0.35, rng.choice((1, 1, 2, 3, 4))
    dims, narrow = rng.choice(((8,), (16,), (32,), (64,), (8, 64))), rng.random() < 0.25
    tables, lengths = [], {}
    for index in range(rng.randint(1, most_tables)):
        dim = rng.choice(dims)
        bits = sorted(rng.sample(BITS, rng.randint(1, most_tiers)), reverse=True)
        tiers = tuple(Tier(rng.choice((64, 512, 4096)), each) for each in bits)
        width = dim // 2 if narrow and dim > 8 else dim
        tables.append(StoredTable(f"t{index}", dim, width, tiers, (f"t{index}",)))
        lengths[f"t{index}"] = rng.choice((1.0, 1.0, 2.0, 5.0)) if bags else 1.0
    rows = rng.choice((1, 100, 500, 500))
    return Shape(tuple(tables), Workload(lengths, bags and rng.random() < 0.5), rows)


@functools.cache
def calibrate_machine(seconds: float = 4.0) -> MachineCosts:
    """Fit the costs of this machine on real lookups of drawn shapes, in about so many seconds on one thread."""
    shapes = drawn_shapes(SHAPES, seed=0)
    for count, dim, rows in LARGE:
        tables = tuple(StoredTable(f"t{i}", dim, dim, (Tier(rows, 8),), (f"t{i}",)) for i in range(count))
        shapes.append(Shape(tables, Workload({t.name: 1.0 for t in tables}), CANDIDATES))
    return fit_costs([shape.work for shape in shapes], measure_shapes(shapes, seconds))


def fit_costs(work: Sequence[Mapping[str, float]], measured_ms: Sequence[float]) -> MachineCosts:
    """Costs of least squared relative error, none of them negative."""
    work_NW = np.array([[each[term] for term in TERMS] for each in work])
    ns_N = 1e6 * np.asarray(measured_ms)
    ns_W = _nonnegative(work_NW / ns_N[:, None], np.ones(len(ns_N)))
    error = float(np.median(np.abs(work_NW @ ns_W / ns_N - 1)))
    return MachineCosts(
        machine=platform.processor() or platform.machine(),
        ns=dict(zip(TERMS, ns_W.tolist(), strict=True)),
        relative_error=error,
        lookups=len(ns_N),
    )


def _nonnegative(matrix_NW: np.ndarray, target_N: np.ndarray) -> np.ndarray:
    """The x (W,) >= 0 of least |matrix x - target|^2, by coordinate descent on columns of unit length."""
    length_W = np.linalg.norm(matrix_NW, axis=0)
    unit_NW = matrix_NW / np.where(length_W > 0, length_W, 1.0)
    gram_WW, toward_W = unit_NW.T @ unit_NW, unit_NW.T @ target_N
    x_W = np.zeros(len(length_W))
    for _ in range(3000):
        for index in np.flatnonzero(length_W):
            x_W[index] = max(0.0, x_W[index] + toward_W[index] - gram_WW[index] @ x_W)
    return x_W / np.where(length_W > 0, length_W, 1.0)


def measure_shapes(shapes: Sequence[Shape], seconds: float) -> list[float]:
    """Milliseconds of processor time of each lookup on one thread, taken in turns, FEWEST_RUNS times at least."""
    taken: list[list[float]] = [[] for _ in shapes]
    built = [(_lookup(shape), _inputs(shape)) for shape in shapes]
    begun = time.perf_counter()
    with one_thread():
        for turn in itertools.count():
            for (lookup, inputs), times in zip(built, taken, strict=True):
                times.append(_timed(partial(lookup, next(inputs))))
            if turn >= FEWEST_RUNS + WARM_UP and time.perf_counter() - begun > seconds:
                break
    return [float(np.quantile(times[WARM_UP:], QUANTILE)) for times in taken]


def _lookup(shape: Shape) -> Lookup:
    block = torch.zeros(pieces_of(shape.tables)[1], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for table, views in zip(shape.tables, tier_views(block, shape.tables), strict=True):
        for tier, view in zip(table.tiers, views, strict=True):
            values = torch.randn((min(tier.rows, DISTINCT_ROWS), table.width), generator=generator)
            rows = quantize_rows(values, tier.bits, "minmax")
            for first in range(0, tier.rows, DISTINCT_ROWS):
                view[first : first + DISTINCT_ROWS] = rows[: tier.rows - first]
    decoders = {t.name: torch.randn((t.width, t.dim)) for t in shape.tables if t.width < t.dim}
    mean = {t.name for t in shape.tables} if shape.workload.weighted else set()
    return Lookup(shape.tables, list(shape.workload.lengths), mean, block, decoders)


def _inputs(shape: Shape) -> Iterator[KeyedJaggedTensor]:
    """Ids drawn evenly from all rows, other ones each time."""
    generator = torch.Generator().manual_seed(0)
    names, lengths = list(shape.workload.lengths), list(shape.workload.lengths.values())
    counts = torch.tensor([int(n) for n in lengths]).repeat_interleave(shape.rows)
    while True:
        values = [
            torch.randint(t.rows, (int(n) * shape.rows,), generator=generator)
            for t, n in zip(shape.tables, lengths, strict=True)
        ]
        yield KeyedJaggedTensor(names, torch.cat(values), lengths=counts)
