"""Gradual pruning: the cuts of a plan reached little by little, with lessons for the head between.

Source: Zhu and Gupta, To prune, or not to prune, 2017: the share that is gone rises as 1 - (1 - t)^3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from compress.compressor import ResolvedTable
from compress.config import CompressionPlan, TablePlan, TierBits, TierPlan

WAYS = {"bits", "keep", "coverage", "rows", "tiers"}  # of saying what stays


def on_the_way(plan: CompressionPlan, resolved: Mapping[str, ResolvedTable], done: float) -> CompressionPlan:
    """The plan with a part of its cuts made, from none (`done` 0) to all (1): fewer rows go, bits are the plan's own.

    `resolved`: the plan itself, in rows, by whole profiles.
    """
    gone = 1.0 - (1.0 - done) ** 3
    tables = {}
    for name, part in resolved.items():
        asked, layout = plan.of(name), part.layout
        total = len(layout.order)
        ends = [*layout.cuts[:-1], total - round((total - layout.kept) * gone)]
        tiers = [
            TierPlan(bits=cast(TierBits, b), rows=e, clip=part.clips[b]) for b, e in zip(part.bits, ends, strict=True)
        ]
        if layout.count and asked.unknown == "shared":
            tiers.append(TierPlan(bits=0, rows=max(total - round((total - layout.zone) * gone), ends[-1])))
        kept = asked.model_dump(exclude=WAYS)
        tables[name] = TablePlan.model_validate({**kept, "tiers": [t.model_dump() for t in tiers]})
    return plan.model_copy(update={"tables": tables})
