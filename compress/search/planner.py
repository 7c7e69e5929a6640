"""A setting becomes a plan in closed form: the tiers of least predicted loss within its share of bytes.

What a setting changes is what the closed form believes and may use: at which bits rows are coded, whether a tail reads
centroids, how far predictions are corrected by measurement, and what a millisecond is worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compress.config import CompressionPlan
from compress.search.budget import Budgeted, plan_for_budget
from compress.search.latency import Latency
from compress.search.profile import TableProfile
from compress.search.sensitivity import Predicted

LEAST, MOST = 0.25, 16.0  # a measured loss corrects a predicted one by so much at most: it is noisy, and of one plan
SURE = 2.0  # standard errors that a measured loss must be above 0 to correct anything


@dataclass(frozen=True)
class Planner:
    """All that plans are made of: profiles without what grows with the tables, predicted losses, and corrections.

    corrections: by table, measured loss / predicted loss of a plan that was tried on each table alone. latency: of a
    request's lookups; its price of a millisecond is the fp32 model's whole log loss, of which a setting takes a share.
    """

    profiles: Mapping[str, TableProfile]
    predicted: Mapping[str, Predicted]
    corrections: Mapping[str, float]
    checkpoint: str
    latency: Latency

    @property
    def fp32_bytes(self) -> int:
        """Bytes of the fp32 tables."""
        return sum(p.info.fp32_bytes for p in self.profiles.values())

    def plan(self, setting: Mapping[str, Any]) -> Budgeted:
        """The plan of a setting (compress/search/space.py). Raises: PlanError for a budget below the floor."""
        believed = {
            name: scaled(
                restricted(p, setting["bits"], setting["centroids"]), self.corrections[name] ** setting["trust"]
            )
            for name, p in self.predicted.items()
        }
        latency = replace(self.latency, nats_per_ms=setting["tier_price"] * self.latency.nats_per_ms)
        found = plan_for_budget(
            self.profiles,
            believed,
            int(setting["budget"] * self.fp32_bytes),
            checkpoint=self.checkpoint,
            latency=latency,
        )
        plan = found.plan.model_copy(update={"dense": setting["dense"]})
        return replace(found, plan=CompressionPlan.model_validate(plan.model_dump()))


def restricted(predicted: Predicted, bits: tuple[int, ...], centroids: int) -> Predicted:
    """What is predicted for some bits, and the next ones up where a dim packs at none of them."""
    packs = [b for b in predicted.bits if b in bits] or [b for b in predicted.bits if b > min(bits)][:1]
    columns = [predicted.bits.index(b) for b in packs or predicted.bits[-1:]]
    return replace(
        predicted,
        bits=tuple(predicted.bits[c] for c in columns),
        coded={clip: loss[:, columns] for clip, loss in predicted.coded.items()},
        nearest={count: loss for count, loss in predicted.nearest.items() if count <= centroids},
    )


def scaled(predicted: Predicted, factor: float) -> Predicted:
    """All losses times a factor."""
    return replace(
        predicted,
        coded={clip: factor * loss for clip, loss in predicted.coded.items()},
        nearest={count: factor * loss for count, loss in predicted.nearest.items()},
        cut=factor * predicted.cut,
        shared=factor * predicted.shared,
    )


def correction(predicted: float, measured: float, error: float) -> float:
    """By what a table's predicted losses are multiplied; 1 where its measured loss may be noise.

    Units: nats of mean log loss; `error` is the standard error of `measured`.
    """
    if predicted <= 0 or measured < SURE * error:
        return 1.0
    return float(np.clip(measured / predicted, LEAST, MOST))
