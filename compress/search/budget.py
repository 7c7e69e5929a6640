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

from compress.compressor import resolve, table_bytes
from compress.config import Bits, Clip, CompressionPlan, TablePlan, TierPlan, Unknown
from compress.errors import PlanError
from compress.ids import Layout, id_map_bytes
from compress.lookup import TABLE_ALIGNMENT
from compress.methods.codec import row_bytes
from compress.search.allocate import Allocation, Options, allocate, floor_bytes, knapsack, relaxed
from compress.search.profile import TableProfile
from compress.search.sensitivity import Predicted
from trainer.data.transform import RESERVED_ROWS

FLOOR_BITS = 8  # of the reserved rows where no other row is kept
ROUNDS = 8  # of fitting the exact bytes, alignment and all, into the budget
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@dataclass(frozen=True)
class Budgeted:
    """A plan for a budget. predicted: nats of mean log loss that each table is expected to cost."""

    plan: CompressionPlan
    bytes: int
    predicted: dict[str, float]


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
    clip: Clip = "search",
    checkpoint: str | None = None,
) -> Budgeted:
    """The plan of least predicted loss within `budget` bytes.

    `per_table` gives every table one number of bits and no cut (an exact knapsack) in place of tiers.
    Raises: PlanError when the budget is below the floor, with the floor and what holds it up.
    """
    spare = budget
    for _ in range(ROUNDS):
        chosen = _uniform(profiles, predicted, spare) if per_table else _tiered(profiles, predicted, spare)
        tables = {name: plan.model_copy(update={"clip": clip}) for name, (plan, _) in chosen.items()}
        plan = CompressionPlan(order="fisher", tables=tables, checkpoint=checkpoint)
        taken = table_bytes(resolve(plan, profiles))
        if taken <= budget:
            return Budgeted(plan, taken, {name: loss for name, (_, loss) in chosen.items()})
        spare -= taken - budget
    raise PlanError(f"budget {budget:,} bytes: too tight for the tables' alignment: give {taken:,} bytes")


def _tiered(
    profiles: Mapping[str, TableProfile], predicted: Mapping[str, Predicted], budget: int
) -> dict[str, tuple[TablePlan, float]]:
    """Tiers by rank. Each table forgets the ids it cuts where that costs less at the price that the budget sets."""
    base = sum(_base_bytes(p) for p in profiles.values())
    shared = [bucket_options(p, predicted[n], forget=True) for n, p in profiles.items()]
    own = [bucket_options(p, predicted[n], forget=False) for n, p in profiles.items()]
    price = allocate(shared, _above_floor(shared, budget - base, base)).multiplier
    cost = [_costs(relaxed(options, price), price) for options in (own, shared)]
    forget = cost[1] <= cost[0]
    mixed = [s if f else o for s, o, f in zip(shared, own, forget, strict=True)]
    try:
        found = allocate(mixed, budget - base)
    except PlanError:  # remembering what is cut may not fit
        mixed, forget = shared, np.ones(len(shared), dtype=bool)
        found = allocate(mixed, budget - base)
    plans = {}
    for index, (name, profile) in enumerate(profiles.items()):
        choice, loss = found.choices[index], float(found.loss[index])
        plans[name] = tiers_of(profile, predicted[name], choice, forget=bool(forget[index])), loss
    return plans


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


def _costs(found: Allocation, price: float) -> np.ndarray:
    return found.loss + price * found.bytes


def bucket_options(profile: TableProfile, predicted: Predicted, *, forget: bool) -> Options:
    """What each bucket of a table may become: cut (option 0), or coded at each of the predicted bits."""
    edges, dim = profile.edges, profile.info.embedding_dim
    sizes = np.diff(edges)
    bytes_EB = np.stack([np.zeros(len(sizes)), *(sizes * row_bytes(dim, b) for b in predicted.bits)], axis=1)  # noqa: N806
    cut = predicted.shared if forget else predicted.cut
    loss_EB = np.column_stack([cut[:-1] - cut[1:], predicted.loss])  # noqa: N806
    fixed = np.array([0.0, *(float(TABLE_ALIGNMENT) for _ in predicted.bits)])
    bytes_EB[0] += _id_bytes(profile, int(edges[0]), forget=forget)  # whatever is cut
    if forget:  # a key costs its bytes where its row is kept
        ids = np.diff([_id_bytes(profile, int(edge), forget=True) for edge in edges])
        bytes_EB[:, 1:] += np.maximum(ids, 0)[:, None]
    return Options(profile.info.name, bytes_EB.astype(np.int64), loss_EB, fixed.astype(np.int64))


def _id_bytes(profile: TableProfile, cut: int, *, forget: bool) -> int:
    rows = profile.info.num_embeddings
    layout = Layout(
        np.zeros(0, dtype=np.int64), (cut,), () if forget or cut == rows else (rows,), forget and cut < rows
    )
    if profile.key_bits is None:
        return id_map_bytes(rows, layout, None)
    place = np.searchsorted(profile.edges, cut) if forget else -1
    return id_map_bytes(rows, layout, int(profile.key_bits[place]))


def _base_bytes(profile: TableProfile) -> int:
    """What a table takes whatever is cut: reserved rows and a centroid, padded."""
    dim = profile.info.embedding_dim
    size = (RESERVED_ROWS + 1) * row_bytes(dim, FLOOR_BITS)
    return -(-size // TABLE_ALIGNMENT) * TABLE_ALIGNMENT


def tiers_of(profile: TableProfile, predicted: Predicted, choice: np.ndarray, *, forget: bool) -> TablePlan:
    """The plan of a table whose buckets were given these options (E - 1,), 0 for cut."""
    unknown: Unknown = "shared" if forget else "own"
    tiers, at = [], 0
    for option, run in itertools.groupby(choice.tolist()):
        at += len(list(run))
        if option:
            tiers.append(TierPlan(bits=bits_of(predicted, option - 1), rows=int(profile.edges[at])))
    if not tiers:
        return TablePlan(tiers=(TierPlan(bits=FLOOR_BITS, rows=RESERVED_ROWS),), unknown=unknown)
    if tiers[-1].rows == profile.info.num_embeddings and len(tiers) == 1:
        return TablePlan(bits=tiers[0].bits)
    return TablePlan(tiers=tuple(tiers), unknown=unknown)


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
        ids = _id_bytes(profile, rows, forget=False)
        sizes = [-(-rows * row_bytes(dim, b) // TABLE_ALIGNMENT) * TABLE_ALIGNMENT + ids for b in predicted[name].bits]
        options.append(Options(name, np.array([sizes], dtype=np.int64), predicted[name].loss.sum(0)[None]))
    found = knapsack(options, _above_floor(options, budget, 0))
    plans = {}
    for (name, p), option in zip(predicted.items(), found.choices, strict=True):
        plans[name] = TablePlan(bits=bits_of(p, option)), float(p.loss[:, option].sum())
    return plans
