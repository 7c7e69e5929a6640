"""trainer/data/cuts.py: values at ranks are those of the sorted whole, however few values may be held."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainer.data import cuts
from trainer.data.cuts import Bracket, values_at

SHARES = (0.8, 0.9)
RNG = np.random.default_rng(0)
COLUMNS = {
    "few values": RNG.integers(0, 9, 5000).astype(float),
    "seconds": np.sort(RNG.integers(1_700_000_000, 1_700_600_000, 5000)).astype(float),
    "microseconds": RNG.integers(1_700_000_000_000_000, 1_700_000_600_000_000, 5000).astype(float),
    "one far away": np.append(RNG.random(4999), 1e300),
    "two heaps": np.concatenate([RNG.normal(0, 1e-9, 2500), RNG.normal(1e9, 1, 2500)]),
    "negative": -RNG.lognormal(10, 5, 5000),
    "all equal": np.full(100, 7.0),
    "one": np.array([3.0]),
    "mostly one value": np.concatenate([np.full(4500, 5.0), RNG.random(500) * 10]),
}


def passes(parts: list[np.ndarray], rounds: list[int]):
    def summarize(brackets: list[Bracket]):
        rounds.append(len(brackets))
        return [[Bracket(b.low, b.high).observe(part) for b in brackets] for part in parts]

    return summarize


@pytest.mark.parametrize("held", [4, 100, 1 << 16])
@pytest.mark.parametrize("fragments", [1, 7])
@pytest.mark.parametrize("name", COLUMNS)
def test_cuts_are_those_of_the_sorted_column(monkeypatch, name, fragments, held):
    monkeypatch.setattr(cuts, "EXACT_VALUES", held)
    column = COLUMNS[name]
    rounds: list[int] = []
    got = values_at(SHARES, passes(np.array_split(column, fragments), rounds))
    expected = tuple(np.sort(column)[min(round(len(column) * s), len(column) - 1)] for s in SHARES)
    assert got == expected
    assert len(rounds) <= 8
    if held > len(column):
        assert len(rounds) == 1, "one pass where the distinct values can be held"


def test_brackets_merge_in_any_order():
    parts = np.array_split(COLUMNS["seconds"][:60], 4)
    low, high = COLUMNS["seconds"][10], COLUMNS["seconds"][50]
    seen = []
    for order in itertools.permutations(range(4)):
        whole = Bracket(low, high)
        for part in order:
            whole.merge(Bracket(low, high).observe(parts[part]))
        seen.append((whole.rows, whole.below, whole.seen, whole.bins.tolist(), [x.tolist() for x in whole.exact]))
    assert all(s == seen[0] for s in seen)
    assert seen[0][:2] == (60, 10)


def test_brackets_hold_a_bounded_number_of_values(monkeypatch):
    monkeypatch.setattr(cuts, "EXACT_VALUES", 50)
    whole = Bracket()
    for part in np.array_split(np.arange(1000.0), 40):
        whole.merge(Bracket().observe(part))
        assert whole.exact is None or len(whole.exact[0]) <= 50
    assert whole.value_at(5) is None
