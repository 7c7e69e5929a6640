"""One trial: a setting becomes a plan, and the plan is scored on more and more rows of the search's sample.

In: what all trials of a search share, read without a copy from Ray's object store. Out: plain results. No Ray here.

Legend: N rows, T tasks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import nn

from compress.compressor import ResolvedTable, resolve, table_bytes
from compress.config import CompressionPlan, Space
from compress.errors import PlanError
from compress.search.objective import ONE_SIDED, by_task, delta_ne, top_overlap, worst
from compress.search.overhead import plan_bytes
from compress.search.planner import Planner
from compress.search.space import Params, label, setting
from compress.search.working_set import WorkingSet, score


@dataclass(frozen=True)
class Variant:
    """What a plan of the dense part came to: its head (None: the checkpoint's own), bytes of its files, its ms."""

    head: nn.Module | None
    bytes: int
    ms: float


@dataclass(frozen=True)
class Sample:
    """Rows that plans are scored on, and the fp32 model's log-odds (N, T) of them."""

    working: WorkingSet
    reference: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Labels (N, T)."""
        return self.working.labels

    def take(self, index: np.ndarray) -> Sample:
        """Some of the rows."""
        return Sample(self.working.take(index), self.reference[index])


@dataclass(frozen=True)
class Shared:
    """What all trials read. rungs: the sample in parts, each scored by those that came so far.

    other_bytes: of an artifact's files that are the same whatever the plan.
    """

    space: Space
    planner: Planner
    rungs: tuple[Sample, ...]
    variants: Mapping[str, Variant]
    other_bytes: int
    seed: int


@dataclass
class Running:
    """A trial under way. Raises: PlanError for a setting that cannot be planned."""

    shared: Shared
    params: Params
    plan: CompressionPlan = field(init=False)
    resolved: dict[str, ResolvedTable] = field(init=False)
    logits: list[np.ndarray] = field(init=False, default_factory=list)
    seconds: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        """Plan it."""
        begun = time.monotonic()
        chosen = setting(self.shared.space, self.params)
        self.plan = self.shared.planner.plan(chosen).plan
        self.resolved = resolve(self.plan, self.shared.planner.profiles)
        self.sizes = sizes(self.shared, self.plan, self.resolved, self.shared.variants[label(chosen["dense"])])
        self.head = self.shared.variants[label(chosen["dense"])].head
        self.seconds = time.monotonic() - begun

    def step(self) -> dict[str, Any]:
        """Score the next part of the sample; `done` comes with the last one, and with bounds by resampling."""
        begun = time.monotonic()
        rungs = self.shared.rungs
        at = len(self.logits)
        self.logits.append(score(rungs[at].working, self.resolved, self.head))
        if not np.isfinite(self.logits[-1]).all():
            raise PlanError("its scores are not finite")
        parts = rungs[: at + 1]
        labels = np.concatenate([p.labels for p in parts])
        reference = np.concatenate([p.reference for p in parts])
        logits = np.concatenate(self.logits)
        done = len(parts) == len(rungs)
        estimate, error = delta_ne(labels, logits, reference)
        # what the bound on the whole sample will be, if all rows are like those that were scored
        projected = estimate + ONE_SIDED * error * math.sqrt(len(labels) / sum(len(r.labels) for r in rungs))
        found = quality(labels, logits, reference, self.tasks, self.shared.seed) if done else {}
        self.seconds += time.monotonic() - begun
        return {
            "rung": at,
            "rows": len(labels),
            **self.sizes,
            "delta_ne": estimate,
            "delta_ne_error": error,
            "delta_ne_upper": projected,
            **found,
            "seconds": self.seconds,
            "done": done,
        }

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return [t.name for t in self.shared.rungs[0].working.transform.schema.tasks]


def sizes(
    shared: Shared, plan: CompressionPlan, resolved: Mapping[str, ResolvedTable], variant: Variant
) -> dict[str, float]:
    """Bytes of the tables and of the whole artifact, and predicted milliseconds of a request."""
    tables = table_bytes(resolved)
    latency = shared.planner.latency
    lookup_ms = latency.request.lookup_ms([r.stored for r in resolved.values()], latency.costs)
    return {
        "table_bytes": tables,
        "artifact_bytes": tables + variant.bytes + plan_bytes(plan, resolved) + shared.other_bytes,
        "ms": lookup_ms + variant.ms,
    }


def quality(
    labels: np.ndarray,
    logits: np.ndarray,
    reference: np.ndarray,
    tasks: list[str],
    seed: int,
) -> dict[str, Any]:
    """The worst task's changes and bounds, the overlap with the fp32 ranking, and each task's."""
    each = by_task(labels, logits, reference, seed)
    found: dict[str, Any] = {**asdict(worst(each)), "overlap": top_overlap(logits, reference)}
    if len(tasks) > 1:
        found["tasks"] = {name: asdict(q) for name, q in zip(tasks, each, strict=True)}
    return found
