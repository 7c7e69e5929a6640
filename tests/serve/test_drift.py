"""Live scores against the scores of validation rows."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest

from compress.artifact import Artifact
from compress.score_reference import BINS, ScoreReference, count_scores, reference_of, stored_references
from serve.drift import HALF_LIFE_S, LEAST_SCORES, Drift, ScoreCounter, mean_ratio, psi
from serve.ranker import Ranker
from serve.shelf import Served

RNG = np.random.default_rng(5)
SCORES = RNG.beta(2, 8, 20_000)


def counter(scores: np.ndarray = SCORES) -> ScoreCounter:
    return ScoreCounter(["click"], {"click": ScoreReference.model_validate(reference_of(scores))})


def recent(scores: np.ndarray) -> deque[np.ndarray]:
    return deque(np.array_split(scores[:, None], 10))


def figures(of: ScoreCounter, sums: dict) -> tuple[float | None, float | None]:
    expected = of.expected()["click"]
    return psi(expected["shares"], sums["counts"]), mean_ratio(expected["mean"], sums["counts"], sums["sum"])


def test_psi_is_that_of_its_definition() -> None:
    expected, live = [0.25, 0.25, 0.5], [0.5, 0.25, 0.25]
    by_hand = 0.25 * math.log(2) + 0 - 0.25 * math.log(0.5)
    assert psi(expected, [x * 4000 for x in live]) == pytest.approx(by_hand)
    assert psi(expected, [x * 4000 for x in expected]) == 0


def test_psi_says_nothing_of_few_scores() -> None:
    assert psi([0.5, 0.5], [LEAST_SCORES - 1, 0]) is None
    assert mean_ratio(0.5, [LEAST_SCORES - 1, 0], 1.0) is None
    assert mean_ratio(0.0, [LEAST_SCORES, 0], 1.0) is None


def test_psi_of_an_empty_bin_is_finite() -> None:
    assert psi([0.5, 0.5], [4000, 0]) == pytest.approx(0.5 * math.log(2) + (1e-4 - 0.5) * math.log(1e-4 / 0.5))


def test_scores_like_the_reference_drift_little_and_others_much() -> None:
    same = counter()
    found = figures(same, same.report(recent(RNG.beta(2, 8, 20_000)), 0.0)["click"])
    assert found[0] == pytest.approx(0, abs=0.01)
    assert found[1] == pytest.approx(1, abs=0.02)
    other = counter()
    found = figures(other, other.report(recent(RNG.beta(4, 6, 20_000)), 0.0)["click"])
    assert found[0] is not None
    assert found[0] > 0.25
    assert found[1] == pytest.approx(2, abs=0.05)


def test_counts_fade_by_half_in_a_half_life() -> None:
    fading = counter()
    first = fading.report(recent(SCORES[:8000]), 50.0)["click"]
    later = fading.report(deque(), 50.0 + HALF_LIFE_S)["click"]
    np.testing.assert_allclose(later["counts"], np.array(first["counts"]) / 2)
    assert later["sum"] == pytest.approx(first["sum"] / 2)


def test_reports_of_two_replicas_add_up_to_that_of_one() -> None:
    halves, whole = [counter(), counter()], counter()
    parts = [c.report(recent(s), 1.0)["click"] for c, s in zip(halves, np.array_split(SCORES, 2), strict=True)]
    together = {
        "counts": np.add(parts[0]["counts"], parts[1]["counts"]).tolist(),
        "sum": parts[0]["sum"] + parts[1]["sum"],
    }
    assert figures(whole, together) == pytest.approx(figures(whole, whole.report(recent(SCORES), 1.0)["click"]))


def test_scores_that_are_no_numbers_count_for_nothing() -> None:
    of = counter()
    sums = of.report(deque([np.array([[0.1], [np.nan], [np.inf], [0.2]])]), 0.0)["click"]
    assert sum(sums["counts"]) == 2
    assert sums["sum"] == pytest.approx(0.3)


def test_tied_scores_stay_in_their_bin_when_rounding_moves_them() -> None:
    tied = RNG.choice([0.1, 0.25, 0.6], 5000)
    reference = ScoreReference.model_validate(reference_of(tied))
    moved = tied * (1 + RNG.choice([-1e-6, 1e-6], 5000))
    np.testing.assert_array_equal(count_scores(tied, np.array(reference.edges)) / 5000, reference.shares)
    np.testing.assert_array_equal(count_scores(moved, np.array(reference.edges)) / 5000, reference.shares)


def test_reference_of_one_value_has_two_bins_and_of_no_numbers_is_none() -> None:
    assert reference_of(np.full(100, 0.3))["shares"] == [1.0, 0.0]  # type: ignore[index]
    ScoreReference.model_validate(reference_of(np.ones(100)))
    ScoreReference.model_validate(reference_of(np.zeros(100)))
    assert reference_of(np.array([0.1, np.nan])) is None
    assert reference_of(np.array([])) is None


def test_an_artifact_says_how_its_validation_scores_are_spread(artifact: Artifact) -> None:
    reference = stored_references(artifact.manifest)["click"]
    assert len(reference.shares) == BINS
    assert reference.shares == pytest.approx([0.1] * BINS, abs=0.02)
    assert reference.edges[0] < reference.mean < reference.edges[-1]
    assert reference.rows == 600  # the whole validation split


def test_a_ranker_is_counted_and_forgotten_with_its_version(artifact: Artifact) -> None:
    ranker, drift = Ranker(artifact), Drift()
    ranker.recent.append(np.full((40, 1), 0.5))
    found = drift.report({"v1": Served("v1", "", ranker)}, 0.0)
    assert sum(found["scores"]["v1"]["click"]["counts"]) == 40
    assert set(found["expected"]["v1"]) == {"click"}
    assert not ranker.recent
    assert drift.report({}, 1.0) == {"scores": {}, "expected": {}}
