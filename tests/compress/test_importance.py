"""What mattered: the knobs that have an effect get the shares, and chance gets none."""

from __future__ import annotations

import random

import pytest
from search_builders import trial

from compress.search.importance import importance, is_choice, spread_out, varying


def planted(count: int, shuffled: bool = False) -> list:
    """Trials in which bits and clip decide how good a plan is for its size; the other knobs do little or nothing."""
    rng = random.Random(count)
    trials = [trial(n, rng, []) for n in range(count)]
    values = [(t["table_bytes"], t["delta_ne"]) for t in trials]
    if shuffled:
        rng.shuffle(values)
    return [(t["params"], v) for t, v in zip(trials, values, strict=True)]


@pytest.mark.parametrize("count", [60, 150])
def test_the_planted_knobs_are_found(count: int) -> None:
    shares = importance(planted(count))
    assert set(list(shares)[:2]) == {"bits", "clip"}
    assert shares["bits"] + shares["clip"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_without_effects_few_knobs_beat_chance() -> None:
    found = [knob for count in (40, 50, 60) for knob, v in importance(planted(count, shuffled=True)).items() if v > 0]
    assert len(found) <= 3  # of 21, each with one chance in twenty


def test_too_few_trials_and_knobs_that_do_not_vary_tell_nothing() -> None:
    assert importance(planted(15)) == {}
    assert importance([({"bits": 8}, (n, 1.0 / n)) for n in range(1, 30)]) == {}


def test_knobs_that_only_some_trials_have() -> None:
    rng = random.Random(0)
    trials = [({"a": n % 2, **({"b": rng.random()} if n % 3 else {})}, (1.0 + n % 2, 2.0 + n % 2)) for n in range(40)]
    assert next(iter(importance(trials))) == "a"


def test_kinds_of_knobs() -> None:
    assert varying([{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]) == ["a"]
    assert is_choice(["2,4", "8"])
    assert is_choice([4, 16, 64] * 10)
    assert not is_choice([n / 10 for n in range(20)])
    assert not is_choice([float(n) for n in range(20)])
    assert is_choice([float("nan"), *range(20)])
    assert spread_out([10.0**-n for n in range(9)])
    assert not spread_out([n / 10 for n in range(1, 20)])
    assert not spread_out([0.0, 1.0, 10.0])
    assert not spread_out([2.0, 2.0])
