"""Which plans a search tries: pure functions of the tables, the SearchConfig and a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

from compress.config import Bits, CompressionPlan, SearchConfig, TablePlan
from compress.errors import PlanError
from compress.methods.codec import row_bytes
from trainer.data.transform import TableInfo


def packable(dim: int, bits: Bits) -> Bits:
    """The fewest bits, from `bits` up, at which rows of this dim fill whole bytes."""
    for more in (b for b in (2, 4, 8, 16) if b >= bits):
        try:
            row_bytes(dim, more)
        except PlanError:
            continue
        return more
    return 32


def uniform_plan(tables: Mapping[str, TableInfo], bits: Bits, coverage: float) -> CompressionPlan:
    """The same setting for every table, with more bits where a dim cannot be packed at these."""
    default = TablePlan(bits=bits, coverage=coverage)
    own = {n: packable(t.embedding_dim, bits) for n, t in tables.items()}
    return CompressionPlan(
        default=default,
        tables={n: TablePlan(bits=b, coverage=coverage) for n, b in own.items() if b != bits},
    )


def mixed_plan(tables: Mapping[str, TableInfo], search: SearchConfig, rng: random.Random) -> CompressionPlan:
    """A setting of its own for each table."""
    return CompressionPlan(
        tables={
            name: TablePlan(
                bits=packable(t.embedding_dim, rng.choice(search.bits)), coverage=rng.choice(search.coverage)
            )
            for name, t in tables.items()
        }
    )


def plans(tables: Mapping[str, TableInfo], search: SearchConfig) -> list[CompressionPlan]:
    """`search.trials` distinct plans: the grid of uniform ones (a spread of it when trials are fewer), then mixed ones.

    The most careful setting always comes first, so that a search has something to fall back on.
    """
    rng = random.Random(search.seed)
    careful = uniform_plan(tables, max(search.bits), max(search.coverage))
    grid = [uniform_plan(tables, b, c) for b, c in itertools.product(search.bits, search.coverage)]
    others = distinct(tables, [careful, *grid])[1:]
    if len(others) >= search.trials:
        return [careful, *rng.sample(others, search.trials - 1)]
    tries = [mixed_plan(tables, search, rng) for _ in range(4 * search.trials)]
    return distinct(tables, [careful, *others, *tries])[: search.trials]


def distinct(tables: Mapping[str, TableInfo], candidates: Sequence[CompressionPlan]) -> list[CompressionPlan]:
    """The first of the plans that do the same to every table, in order."""
    seen: dict[tuple[TablePlan, ...], CompressionPlan] = {}
    for plan in candidates:
        seen.setdefault(tuple(plan.of(name) for name in tables), plan)
    return list(seen.values())
