"""Exact order statistics of a column too large to hold: the value at a rank, by rounds of counting in bins.

Each fragment summarizes its values within a bracket; the summaries add up in any order, and each round narrows the
bracket to the bin that holds the rank, until the distinct values in it can be held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

EXACT_VALUES = 65_536  # distinct values of a bracket that are held with their counts
BINS = 4096


@dataclass
class Bracket:
    """Values from `low` to `high`: how many lie below, and either the distinct ones with counts or counts in bins."""

    low: float = -np.inf
    high: float = np.inf
    rows: int = 0
    below: int = 0
    seen: tuple[float, float] = (np.inf, -np.inf)
    exact: tuple[np.ndarray, np.ndarray] | None = field(
        default_factory=lambda: (np.zeros(0), np.zeros(0, dtype=np.int64))
    )
    bins: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    def observe(self, values: np.ndarray) -> Bracket:
        """This empty bracket, with values (N,) float64 of one fragment in it."""
        self.rows, self.below = len(values), int((values < self.low).sum())
        inside = values[(values >= self.low) & (values <= self.high)]
        if len(inside):
            self.seen = float(inside.min()), float(inside.max())
        distinct, counts = np.unique(inside, return_counts=True)
        self.exact = (distinct, counts) if len(distinct) <= EXACT_VALUES else None
        if np.isfinite(self.low):
            self.bins = np.bincount(self._bin_of(inside), minlength=BINS)
        return self

    def merge(self, other: Bracket) -> None:
        """Add another fragment's summary of the same bracket."""
        self.rows += other.rows
        self.below += other.below
        self.seen = min(self.seen[0], other.seen[0]), max(self.seen[1], other.seen[1])
        self.bins = self.bins + other.bins
        if self.exact is None or other.exact is None:
            self.exact = None
            return
        distinct, inverse = np.unique(np.concatenate([self.exact[0], other.exact[0]]), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([self.exact[1], other.exact[1]]), len(distinct)).astype(np.int64)
        self.exact = (distinct, counts) if len(distinct) <= EXACT_VALUES else None

    def value_at(self, rank: int) -> float | None:
        """The value at a rank, or None when only a narrower bracket can tell."""
        if self.exact is None:
            return None
        distinct, counts = self.exact
        return float(distinct[np.searchsorted(np.cumsum(counts), rank - self.below, side="right")])

    def narrow(self, rank: int) -> Bracket:
        """An empty bracket that holds the value at a rank: one bin of this one."""
        if not np.isfinite(self.low):
            return Bracket(*self.seen)
        edges = self._edges()
        bin_ = int(np.searchsorted(np.cumsum(self.bins), rank - self.below, side="right"))
        return Bracket(max(float(edges[bin_]), self.seen[0]), min(float(edges[bin_ + 1]), self.seen[1]))

    def _edges(self) -> np.ndarray:
        edges = np.linspace(self.low, self.high, BINS + 1)
        edges[0], edges[-1] = self.low, self.high
        return edges

    def _bin_of(self, values: np.ndarray) -> np.ndarray:
        return np.clip(np.searchsorted(self._edges(), values, side="right") - 1, 0, BINS - 1)


def values_at(
    shares: Sequence[float], summarize: Callable[[list[Bracket]], Iterable[list[Bracket]]]
) -> tuple[float, ...]:
    """The values at some shares of all rows, in sorted order: at rank round(rows * share), or the last.

    `summarize` makes one pass: it gives, for each fragment, `observe` of a copy of each bracket.
    """
    brackets = dict.fromkeys(range(len(shares)), Bracket())
    found: dict[int, float] = {}
    while brackets:
        wholes = {index: Bracket(b.low, b.high) for index, b in brackets.items()}
        for summaries in summarize(list(brackets.values())):
            for whole, summary in zip(wholes.values(), summaries, strict=True):
                whole.merge(summary)
        for index, whole in wholes.items():
            rank = min(round(whole.rows * shares[index]), whole.rows - 1)
            value = whole.value_at(rank)
            if value is None:
                brackets[index] = whole.narrow(rank)
            else:
                found[index] = value
                del brackets[index]
    return tuple(found[index] for index in range(len(shares)))
