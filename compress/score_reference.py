"""How a model's scores are spread over validation rows: what the scores that a server gives are compared with.

Written into the manifest under metrics.score_reference, by task; validated there, as a server acts on it.
Legend: N rows, T tasks, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

REFERENCE_ROWS = 20_000  # of the validation split: a share of .1 is then known within .004 (two standard errors)
BINS = 10
MOST_BINS = 100
MARGIN = 1e-4  # relative; edges lie so much above their quantile, so that rounding takes no tied score over an edge
DIGITS = 6  # a score's; of the shares too

Probability = Annotated[float, Field(ge=0, le=1)]


class ScoreReference(BaseModel):
    """The spread of one task's probabilities: bin b holds those above edge b - 1, up to and with edge b.

    edges (B - 1,) rise; shares (B,) of the rows; mean probability; rows that were scored.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    edges: list[Annotated[float, Field(ge=0, le=1 + 2 * MARGIN)]] = Field(min_length=1, max_length=MOST_BINS - 1)
    shares: list[Probability] = Field(min_length=2, max_length=MOST_BINS)
    mean: Probability
    rows: int = Field(ge=1, le=1 << 53)

    @model_validator(mode="after")
    def _fits(self) -> ScoreReference:
        if len(self.shares) != len(self.edges) + 1:
            raise ValueError(f"{len(self.edges)} edges part {len(self.edges) + 1} shares, {len(self.shares)} are given")
        if any(b <= a for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("edges must rise")
        if abs(sum(self.shares) - 1) > 1e-3:
            raise ValueError(f"shares must add up to 1, they add up to {sum(self.shares):g}")
        return self


def count_scores(scores_N: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many of some probabilities (N,) fall into each bin: (B,) int64."""
    return np.bincount(np.searchsorted(edges, scores_N, side="left"), minlength=len(edges) + 1)


def reference_of(scores_N: np.ndarray) -> dict[str, Any] | None:
    """The spread of probabilities (N,) in tenths, fewer where many are tied; None where some are not finite."""
    if not len(scores_N) or not np.isfinite(scores_N).all():
        return None
    scores = scores_N.astype(np.float64)
    quantiles = np.quantile(scores, np.arange(1, BINS) / BINS, method="lower")
    edges = np.unique([float(f"{q * (1 + MARGIN):.{DIGITS}g}") for q in quantiles])
    counts = count_scores(scores, edges)
    return {
        "edges": edges.tolist(),
        "shares": [round(float(s), DIGITS) for s in counts / len(scores)],
        "mean": float(f"{scores.mean():.{DIGITS}g}"),
        "rows": len(scores),
    }


def references_of(scores_NT: np.ndarray, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """References by task, of those tasks that have one."""
    found = {task: reference_of(scores_NT[:, t]) for t, task in enumerate(tasks)}
    return {task: reference for task, reference in found.items() if reference is not None}


def stored_references(manifest: Mapping[str, Any]) -> dict[str, ScoreReference]:
    """The references in a validated manifest, by task; none in an artifact of before."""
    stored = manifest["metrics"].get("score_reference") or {}
    return {task: ScoreReference.model_validate(reference) for task, reference in stored.items()}
