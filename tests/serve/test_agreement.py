"""serve/agreement.py and serve/rehearsal.py: how alike two versions rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import version_builders as build

from compress.artifact import Artifact
from serve.agreement import Agreement, disagreements, merged
from serve.config import SwapConfig
from serve.ranker import Ranker
from serve.rehearsal import compare, ratios, top_overlap
from serve.request import RankRequest

ITEMS = [f"i{n}" for n in range(40)]
REQUESTS = [RankRequest(user={"user_id": 1000 + n}, candidates=ITEMS, k=10) for n in range(6)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What artifacts of a session are named by."""
    return tmp_path_factory.getbasetemp()


def test_a_version_agrees_with_itself(artifact: Artifact) -> None:
    found = compare(Ranker(artifact), Ranker(artifact), REQUESTS)
    assert (found.source, found.requests, found.unreadable, found.overlap) == ("requests", 6, 0, 1.0)
    assert found.calibration == {"click": pytest.approx(1.0)}


def test_overlap_and_calibration_are_those_of_the_answers(artifact: Artifact, base: Path) -> None:
    old, new = Ranker(artifact), Ranker(build.stranger(base))
    overlaps, sums = [], np.zeros(2)
    for request in REQUESTS:
        whole = [r.rank(request.model_copy(update={"k": len(ITEMS)})).items for r in (old, new)]
        first, second = ({i.id for i in r.rank(request).items} for r in (old, new))
        overlaps.append(len(first & second) / 10)
        sums += [sum(i.score for i in items) for items in whole]
    found = compare(old, new, REQUESTS)
    assert found.overlap == pytest.approx(np.mean(overlaps))
    assert found.calibration["click"] == pytest.approx(sums[1] / sums[0], rel=1e-5)
    assert 0 < found.overlap < 0.8


def test_overlap_is_of_what_items_are_ordered_by(artifact: Artifact) -> None:
    plain, upside_down = Ranker(artifact), Ranker(artifact, "1 - click")
    assert compare(upside_down, upside_down, REQUESTS).overlap == 1.0
    assert compare(plain, upside_down, REQUESTS).overlap < 0.5
    assert compare(plain, upside_down, []).overlap < 0.5  # the golden rows


def test_other_bits_agree_more_than_other_weights(artifact: Artifact, base: Path) -> None:
    old = Ranker(artifact)
    same, other = (compare(old, Ranker(a), REQUESTS) for a in (build.finer(base), build.stranger(base)))
    assert same.overlap > other.overlap + 0.2


def test_request_that_only_the_old_version_reads_is_a_disagreement(artifact: Artifact, base: Path) -> None:
    found = compare(Ranker(artifact), Ranker(build.without_catalogue(base)), REQUESTS)
    assert (found.unreadable, found.overlap) == (6, 0.0)
    assert "6 of them unreadable" in disagreements(found, SwapConfig())["overlap"]


def test_request_that_no_version_reads_tells_nothing(artifact: Artifact, base: Path) -> None:
    wrong = RankRequest(user={"age": "old"}, candidates=ITEMS)
    found = compare(Ranker(artifact), Ranker(build.finer(base)), [wrong, REQUESTS[0]])
    assert (found.requests, found.unreadable) == (1, 0)


@pytest.mark.parametrize("requests", [[], [RankRequest(user={}, candidates=["i1"])]])
def test_golden_rows_stand_in_where_no_request_has_an_order(
    artifact: Artifact, base: Path, requests: list[RankRequest]
) -> None:
    found = compare(Ranker(artifact), Ranker(build.finer(base)), requests)
    assert (found.source, found.requests) == ("golden rows", len(artifact.golden))
    assert found.overlap > 0.7
    assert found.calibration["click"] == pytest.approx(1, abs=0.2)


def test_task_that_the_new_version_lacks_is_not_calibrated(artifact: Artifact, base: Path) -> None:
    two = build.without_catalogue(base)
    row = {c: v for c, v in two.golden.slice(0, 1).to_pylist()[0].items() if c not in ("_expected",)}
    request = RankRequest(user={}, candidates=[{"price": 1.0 + n, "user_id": n} for n in range(4)])
    assert row
    found = compare(Ranker(two), Ranker(artifact), [request])
    missing = set(two.model.tasks) - set(artifact.model.tasks)
    assert missing
    assert all(found.calibration[task] is None for task in missing)
    assert "calibration" in disagreements(found, SwapConfig(min_overlap=0))


def test_top_overlap_is_of_at_most_half_the_candidates() -> None:
    old, new = np.array([4.0, 3, 2, 1]), np.array([1.0, 2, 3, 4])
    assert top_overlap(old, new, 10) == 0.0  # the top four of four would always agree
    assert top_overlap(old, old, 10) == 1.0
    assert top_overlap(old, np.array([4.0, 1, 2, 3]), 2) == 0.5
    assert top_overlap(old, np.full(4, np.nan), 2) == 0.0


def test_ratio_of_nothing_is_none() -> None:
    sums = np.array([[2.0, 0.0, 1.0], [3.0, 1.0, np.nan]])
    assert ratios(["a", "b", "c"], sums) == {"a": 1.5, "b": None, "c": None}


def test_merged_of_nothing_is_nothing() -> None:
    assert merged([]) is None
    one = Agreement(source="golden rows", requests=0, unreadable=0, overlap=1.0, calibration={"a": 1.0})
    assert merged([one]) == one
