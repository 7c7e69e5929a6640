"""A byte budget becomes a plan in closed form: tiers by rank, cuts, and who forgets the ids it cuts.

In: profiles ranked by what the loss would lose, and predicted losses (compress/search/sensitivity.py). Out: a plan of
least predicted loss whose tables, everything counted, take no more bytes than the budget; nothing is tried out. Where
latency counts (compress/search/latency.py), each tier must gain what its time is worth.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from compress.compressor import SHARED_BITS, resolve, table_bytes
from compress.config import Bits, CompressionPlan, TablePlan, TierPlan, Unknown
from compress.errors import PlanError
from compress.ids import id_map_bytes
from compress.lookup import TABLE_ALIGNMENT
from compress.methods.codec import row_bytes
from compress.search.allocate import Menus, Options, floor_bytes, knapsack
from compress.search.latency import Latency
from compress.search.profile import TableProfile
from compress.search.sensitivity import Predicted
from trainer.data.transform import RESERVED_ROWS

CODEBOOKS = (4, 16, 64, 256)
ROUNDS = 8  # of fitting the exact bytes, alignment and all, into the budget
CLOSE = 0.002  # of the budget may be left over
CHEAPEST, DEAR, DEAREST = 1e-6, 10.0, 1e5  # nats a millisecond: at the last no table has a second tier
MS_ROUNDS = 7  # of raising the price of a millisecond until a plan is fast enough, by ratio
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@dataclass(frozen=True)
class Budgeted:
    """A plan for a budget. predicted: nats of mean log loss that each table is expected to cost.

    ms: predicted time of a request and its candidates, where latency counts.
    """

    plan: CompressionPlan
    bytes: int
    predicted: dict[str, float]
    ms: float | None = None

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
    latency: Latency | None = None,
) -> Budgeted:
    """The plan of least predicted loss within `budget` bytes.

    `per_table` gives every table one number of bits and no cut (an exact knapsack) in place of tiers. With `latency`
    the time of a request counts at its price, and stays within its limit where it has one; without, bytes alone count.
    Raises: PlanError when the budget is below the floor, with the floor and what holds it up; when no plan is fast
    enough, with the ms of the fastest.
    """

    def within(tier_nats: Mapping[str, float]) -> Budgeted:
        return _within(profiles, predicted, budget, tier_nats, per_table, checkpoint)

    if latency is None:
        return within(dict.fromkeys(profiles, 0.0))
    return _priced(within, profiles, latency)


def _priced(
    within: Callable[[Mapping[str, float]], Budgeted], profiles: Mapping[str, TableProfile], latency: Latency
) -> Budgeted:
    """The best of the plans at the price of a millisecond, with one tier a table, and at prices that keep the limit.

    The first tier that any table has costs more than the next ones, which no price of a table's own can say: so the
    plan without any is always compared.
    """
    tier_ms = latency.tier_ms([p.info for p in profiles.values()])
    limit = latency.max_ms or math.inf

    def at(nats_per_ms: float) -> Budgeted:
        plan = within({name: nats_per_ms * ms for name, ms in tier_ms.items()})
        return replace(plan, ms=latency.ms([part.stored for part in resolve(plan.plan, profiles).values()]))

    found = [at(DEAREST), at(latency.nats_per_ms)]
    fastest = min(_ms(plan) for plan in found)
    if fastest > limit:
        raise PlanError(
            f"max-ms {limit:g}: with one tier a table {latency.request.candidates} candidates are predicted to take "
            f"{fastest:.3g} ms, {latency.head_ms:.3g} of them in the dense part: allow that much, or make the dense "
            "part smaller"
        )
    low, high = max(latency.nats_per_ms, CHEAPEST), DEAR
    for _ in range(MS_ROUNDS if _ms(found[-1]) > limit else 0):
        middle = math.sqrt(low * high)
        found.append(at(middle))
        low, high = (middle, high) if _ms(found[-1]) > limit else (low, middle)
    fast = [plan for plan in found if _ms(plan) <= limit]
    return min(fast, key=lambda plan: plan.loss + latency.nats_per_ms * _ms(plan))


def _ms(plan: Budgeted) -> float:
    assert plan.ms is not None, "latency counts here"
    return plan.ms


def _within(
    profiles: Mapping[str, TableProfile],
    predicted: Mapping[str, Predicted],
    budget: int,
    tier_nats: Mapping[str, float],
    per_table: bool,
    checkpoint: str | None,
) -> Budgeted:
    """The plan of least predicted loss and prices: `tier_nats` is what one more tier of each table must gain."""
    tables = None if per_table else TieredTables(profiles, predicted, tier_nats)
    spare, least = budget, 0
    best: tuple[float, Budgeted] | None = None
    for _ in range(ROUNDS):
        try:
            chosen, cost, told = _uniform(profiles, predicted, spare) if tables is None else tables.within(spare)
        except PlanError:
            if best is None:
                raise
            break
        plan = CompressionPlan(
            order="fisher", tables={name: plan for name, (plan, _) in chosen.items()}, checkpoint=checkpoint
        )
        taken = table_bytes(resolve(plan, profiles))
        found = Budgeted(plan, taken, {name: loss for name, (_, loss) in chosen.items()})
        if taken <= budget and (best is None or cost < best[0]):
            best = cost, found
        least = min(least or taken, taken)
        if 0 <= budget - taken <= CLOSE * budget or (per_table and taken <= budget):
            break
        # bytes are estimated before tiers are known: what was left over is given out, and what was too much comes off
        # the estimate itself, which may lie below what it was given
        spare = (told if taken > budget else spare) + budget - taken
    if best is None:
        raise PlanError(f"budget {budget:,} bytes: too tight for the tables' alignment: give {least:,} bytes")
    return best[1]


class TieredTables:
    """Tables with tiers by rank, each with all its ways of cutting; plans of any number of bytes.

    `tier_nats`: what one more tier of each table must gain.
    """

    def __init__(
        self,
        profiles: Mapping[str, TableProfile],
        predicted: Mapping[str, Predicted],
        tier_nats: Mapping[str, float],
    ) -> None:
        self.profiles, self.predicted = profiles, predicted
        self.base = sum(_base_bytes(p) for p in profiles.values())
        self.ways = {name: ways_of(predicted[name]) for name in profiles}
        self.options = {
            n: [bucket_options(profiles[n], predicted[n], w, tier_nats[n]) for w in self.ways[n]] for n in profiles
        }
        self.menus = Menus(list(self.options.values()))
        self.floors = floor_bytes([several[0] for several in self.options.values()])

    def within(self, budget: int) -> tuple[dict[str, tuple[TablePlan, float]], float, int]:
        """The plan and predicted loss of each table, what all cost with their prices, and about how many bytes.

        Raises: PlanError when the budget is below the floor.
        """
        picks, found = self.menus.allocate(
            _above_floor(list(self.profiles), self.floors, budget - self.base, self.base)
        )
        plans = {}
        for index, (name, profile) in enumerate(self.profiles.items()):
            way = self.ways[name][picks[index]]
            plan = tiers_of(profile, self.predicted[name], found.choices[index], way)
            plans[name] = plan, float(found.loss[index])
        return plans, found.cost, self.base + int(found.bytes.sum())


def floor_bytes_of(profiles: Mapping[str, TableProfile], predicted: Mapping[str, Predicted]) -> int:
    """The fewest bytes that tables with tiers can take together, before alignment between tiers."""
    options = [bucket_options(p, predicted[name], ways_of(predicted[name])[0]) for name, p in profiles.items()]
    return sum(_base_bytes(p) for p in profiles.values()) + int(floor_bytes(options).sum())


@dataclass(frozen=True)
class Way:
    """How a table cuts rows: whether the last are forgotten, and how many centroids others read (1: their mean)."""

    forget: bool
    centroids: int


def ways_of(predicted: Predicted) -> list[Way]:
    """The ways a table may cut rows; the first takes the fewest bytes."""
    return [Way(forget, count) for forget in (True, False) for count in (1, *predicted.nearest)]


def _above_floor(names: list[str], floors: np.ndarray, budget: int, base: int) -> int:
    """The budget itself. Raises: PlanError when it is below what the tables (T,) need at the least."""
    if budget < floors.sum():
        largest = sorted(zip(floors, names, strict=True), reverse=True)[:5]
        held = ", ".join(f"{name} {int(size):,}" for size, name in largest if size)
        raise PlanError(
            f"budget {budget + base:,} bytes: the floor is {base + int(floors.sum()):,}: {base:,} of reserved and "
            f"shared rows{', id maps of ' + held if held else ''}: give more bytes"
        )
    return budget


def bucket_options(profile: TableProfile, predicted: Predicted, way: Way, tier_nats: float = 0.0) -> Options:
    """What each bucket of a table may become: cut (option 0), reading a centroid (1), coded at the predicted bits.

    `tier_nats`: predicted loss that one more physical tier must gain. A table has one for each number of bits it uses,
    and one of reserved rows where its first rows have fewer bits than those (compressor.physical_tiers).
    """
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
        own, loose = profile.key_bytes
        bytes_EB[:, 0] += 0 if way.forget else loose
        bytes_EB[:, 1] += loose
        bytes_EB[:, 2:] += own[:, None]
    price = tier_nats * np.array([0.0, 0.0, *[1.0] * len(bits)])
    apart = tier_nats * np.array([1.0, 1.0, *[float(b < SHARED_BITS) for b in bits]])
    sizes_EB, once_B = (np.ceil(size).astype(np.int64) for size in (bytes_EB, fixed))
    return Options(profile.info.name, sizes_EB, loss_EB, once_B, price, apart)


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
) -> tuple[dict[str, tuple[TablePlan, float]], float, int]:
    """One number of bits a table, all rows kept, the loss and about how many bytes."""
    options = []
    for name, profile in profiles.items():
        rows, dim = profile.info.num_embeddings, profile.info.embedding_dim
        ids = _id_bytes(profile, rows, forget=True)
        sizes = [-(-rows * row_bytes(dim, b) // TABLE_ALIGNMENT) * TABLE_ALIGNMENT + ids for b in predicted[name].bits]
        options.append(Options(name, np.array([sizes], dtype=np.int64), predicted[name].loss.sum(0)[None]))
    found = knapsack(options, _above_floor(list(profiles), floor_bytes(options), budget, 0))
    plans = {}
    for (name, p), option in zip(predicted.items(), found.choices, strict=True):
        plans[name] = (
            TablePlan(bits=bits_of(p, option), clip=p.clip(slice(None), option)),
            float(p.loss[:, option].sum()),
        )
    return plans, found.loss, found.bytes
