"""A byte budget becomes a plan in closed form: tiers by rank, cuts, and who forgets the ids it cuts.

In: profiles ranked by what the loss would lose, and predicted losses (compress/search/sensitivity.py). Out: a plan of
least predicted loss whose tables, everything counted, take no more bytes than the budget; nothing is tried out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from compress.compressor import SHARED_BITS, resolve, table_bytes
from compress.config import Bits, CompressionPlan, TablePlan, TierPlan, Unknown
from compress.errors import PlanError
from compress.ids import id_map_bytes, loose_bits, packed_bytes
from compress.lookup import TABLE_ALIGNMENT
from compress.methods.codec import row_bytes
from compress.search.allocate import Options, allocate, floor_bytes, knapsack, relaxed
from compress.search.profile import TableProfile
from compress.search.sensitivity import Predicted
from trainer.data.transform import RESERVED_ROWS

PRICE_ROUNDS = 3
CODEBOOKS = (4, 16, 64, 256)
ROUNDS = 8  # of fitting the exact bytes, alignment and all, into the budget
CLOSE = 0.002  # of the budget may be left over
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@dataclass(frozen=True)
class Budgeted:
    """A plan for a budget. predicted: nats of mean log loss that each table is expected to cost."""

    plan: CompressionPlan
    bytes: int
    predicted: dict[str, float]

    @property
    def loss(self) -> float:
        """Nats of mean log loss that the plan is expected to cost."""
        return sum(self.predicted.values())


def parse_budget(text: str, fp32_bytes: int) -> int:
    """Bytes of a budget such as "2%" (of the fp32 tables), "300MB" or "12000000".

    Raises: PlanError for anything else.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[kKMGT]?B)?\s*", text)
    if found is None or float(found[1]) <= 0:
        raise PlanError(f"budget {text!r}: give a share of the fp32 tables (2%) or bytes (300MB)")
    number, unit = float(found[1]), found[2] or ""
    return int(fp32_bytes * number / 100 if unit == "%" else number * UNITS[unit.upper()])


def plan_for_budget(
    profiles: Mapping[str, TableProfile],
    predicted: Mapping[str, Predicted],
    budget: int,
    *,
    per_table: bool = False,
    checkpoint: str | None = None,
) -> Budgeted:
    """The plan of least predicted loss within `budget` bytes.

    `per_table` gives every table one number of bits and no cut (an exact knapsack) in place of tiers.
    Raises: PlanError when the budget is below the floor, with the floor and what holds it up.
    """
    spare, least = budget, 0
    best: Budgeted | None = None
    for _ in range(ROUNDS):
        try:
            chosen = _uniform(profiles, predicted, spare) if per_table else _tiered(profiles, predicted, spare)
        except PlanError:
            if best is None:
                raise
            break
        tables = {name: plan for name, (plan, _) in chosen.items()}
        plan = CompressionPlan(order="fisher", tables=tables, checkpoint=checkpoint)
        taken = table_bytes(resolve(plan, profiles))
        found = Budgeted(plan, taken, {name: loss for name, (_, loss) in chosen.items()})
        if taken <= budget and (best is None or found.loss < best.loss):
            best = found
        least = min(least or taken, taken)
        if 0 <= budget - taken <= CLOSE * budget or (per_table and taken <= budget):
            break
        spare += budget - taken  # bytes are estimated before tiers are known: what was left over is given out
    if best is None:
        raise PlanError(f"budget {budget:,} bytes: too tight for the tables' alignment: give {least:,} bytes")
    return best


def _tiered(
    profiles: Mapping[str, TableProfile], predicted: Mapping[str, Predicted], budget: int
) -> dict[str, tuple[TablePlan, float]]:
    """Tiers by rank. Each table has the ways of cutting that cost least at the price that the budget sets."""
    base = sum(_base_bytes(p) for p in profiles.values())
    ways = {name: ways_of(profile) for name, profile in profiles.items()}
    options = {n: [bucket_options(profiles[n], predicted[n], way) for way in ways[n]] for n in profiles}
    chosen = dict.fromkeys(profiles, 0)  # forgetting what is cut: the smallest there is
    found = allocate(_picked(options, chosen), _above_floor(_picked(options, chosen), budget - base, base))
    for _ in range(PRICE_ROUNDS):
        again = {}
        for name, several in options.items():
            costs = relaxed(several, found.multiplier)
            again[name] = int(np.argmin(costs.loss + found.multiplier * costs.bytes))
        try:
            better = allocate(_picked(options, again), budget - base)
        except PlanError:  # what these ways need at the least does not fit
            break
        if better.loss.sum() >= found.loss.sum():
            break
        chosen, found = again, better
    plans = {}
    for index, (name, profile) in enumerate(profiles.items()):
        way = ways[name][chosen[name]]
        plans[name] = tiers_of(profile, predicted[name], found.choices[index], way), float(found.loss[index])
    return plans


def _picked(options: Mapping[str, list[Options]], chosen: Mapping[str, int]) -> list[Options]:
    return [several[chosen[name]] for name, several in options.items()]


@dataclass(frozen=True)
class Way:
    """How a table cuts rows: whether the last are forgotten, and how many centroids others read (1: their mean)."""

    forget: bool
    centroids: int


def ways_of(profile: TableProfile) -> list[Way]:
    """The ways a table may cut rows; the first takes the fewest bytes."""
    return [Way(forget, count) for forget in (True, False) for count in (1, *profile.codebooks)]


def _above_floor(options: list[Options], budget: int, base: int) -> int:
    """The budget itself. Raises: PlanError when it is below what the tables need at the least."""
    floors = floor_bytes(options)
    if budget < floors.sum():
        largest = sorted(zip(floors, (o.name for o in options), strict=True), reverse=True)[:5]
        held = ", ".join(f"{name} {int(size):,}" for size, name in largest if size)
        raise PlanError(
            f"budget {budget + base:,} bytes: the floor is {base + int(floors.sum()):,}: {base:,} of reserved and "
            f"shared rows{', id maps of ' + held if held else ''}: give more bytes"
        )
    return budget


def bucket_options(profile: TableProfile, predicted: Predicted, way: Way) -> Options:
    """What each bucket of a table may become: cut (option 0), reading a centroid (1), coded at the predicted bits."""
    edges, dim = profile.edges, profile.info.embedding_dim
    sizes = np.diff(edges).astype(np.float64)
    bits = predicted.bits
    bytes_EB = np.stack([0 * sizes, 0 * sizes, *(sizes * row_bytes(dim, b) for b in bits)], axis=1)
    cut = predicted.shared if way.forget else predicted.cut
    near = predicted.nearest.get(way.centroids, np.full(len(sizes), np.inf))
    dropped = cut[:-1] - cut[1:] if way.forget or way.centroids == 1 else np.full(len(sizes), np.inf)
    loss_EB = np.column_stack([dropped, near, predicted.loss])
    fixed = np.array([0.0, way.centroids * row_bytes(dim, SHARED_BITS), *[float(TABLE_ALIGNMENT)] * len(bits)])
    number_bits = np.log2(way.centroids)
    if profile.key_bits is None:  # each row has the number of what it reads
        fixed[1] += sizes.sum() * number_bits / 8
    else:
        bytes_EB[:, 1] += sizes * number_bits / 8
    if profile.key_bits is None:
        bytes_EB[0] += _id_bytes(profile, int(edges[0]), way.forget)  # whatever is cut
    else:
        own, loose = (
            np.maximum(np.diff([packed_bytes(int(e) - RESERVED_ROWS, width) for e in edges]), 0)
            for width in (profile.key_bits, loose_bits(int(edges[-1])))
        )
        bytes_EB[:, 0] += 0 if way.forget else loose
        bytes_EB[:, 1] += loose
        bytes_EB[:, 2:] += own[:, None]
    return Options(profile.info.name, np.ceil(bytes_EB).astype(np.int64), loss_EB, np.ceil(fixed).astype(np.int64))


def _id_bytes(profile: TableProfile, kept: int, forget: bool) -> int:
    """Bytes of the id map with rows of their own before rank `kept`, the others forgotten or known."""
    rows = profile.info.num_embeddings
    return id_map_bytes(rows, [kept - RESERVED_ROWS], [] if forget else [rows - kept], profile.key_bits)


def _base_bytes(profile: TableProfile) -> int:
    """What a table takes whatever is cut: reserved rows and a centroid, padded."""
    dim = profile.info.embedding_dim
    size = (RESERVED_ROWS + 1) * row_bytes(dim, SHARED_BITS)
    return -(-size // TABLE_ALIGNMENT) * TABLE_ALIGNMENT


def tiers_of(profile: TableProfile, predicted: Predicted, choice: np.ndarray, way: Way) -> TablePlan:
    """The plan of a table whose buckets were given these options (E - 1,)."""
    unknown: Unknown = "shared" if way.forget else "own"
    tiers: list[TierPlan] = []
    at = 0
    for option, run in itertools.groupby(choice.tolist()):
        first, at = at, at + len(list(run))
        rows = int(profile.edges[at])
        if option == 1:
            tiers.append(TierPlan(bits=0, rows=rows))
        elif option:
            clip = predicted.clip(slice(first, at), option - 2)
            tiers.append(TierPlan(bits=bits_of(predicted, option - 2), rows=rows, clip=clip))
    centroids = way.centroids if tiers and tiers[-1].bits == 0 else 1
    if len(tiers) == 1 and tiers[0].rows == profile.info.num_embeddings and tiers[0].bits:
        return TablePlan(bits=cast(Bits, tiers[0].bits), clip=tiers[0].clip or "search")
    if not tiers or tiers[0].bits == 0:
        tiers.insert(0, TierPlan(bits=SHARED_BITS, rows=RESERVED_ROWS))
    return TablePlan(tiers=tuple(tiers), unknown=unknown, centroids=centroids)


def bits_of(predicted: Predicted, option: int) -> Bits:
    """The bits of an option of a prediction."""
    return cast(Bits, predicted.bits[option])


def _uniform(
    profiles: Mapping[str, TableProfile], predicted: Mapping[str, Predicted], budget: int
) -> dict[str, tuple[TablePlan, float]]:
    """One number of bits a table, all rows kept."""
    options = []
    for name, profile in profiles.items():
        rows, dim = profile.info.num_embeddings, profile.info.embedding_dim
        ids = _id_bytes(profile, rows, forget=True)
        sizes = [-(-rows * row_bytes(dim, b) // TABLE_ALIGNMENT) * TABLE_ALIGNMENT + ids for b in predicted[name].bits]
        options.append(Options(name, np.array([sizes], dtype=np.int64), predicted[name].loss.sum(0)[None]))
    found = knapsack(options, _above_floor(options, budget, 0))
    plans = {}
    for (name, p), option in zip(predicted.items(), found.choices, strict=True):
        plans[name] = (
            TablePlan(bits=bits_of(p, option), clip=p.clip(slice(None), option)),
            float(p.loss[:, option].sum()),
        )
    return plans
