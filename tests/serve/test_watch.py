"""serve/watch.py and serve/health.py: counts by version, recent requests, what a failing version takes along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import version_builders as build

from compress.artifact import Artifact
from serve.errors import RequestError
from serve.health import Counter, Health, bucket_of, speed_quantile, total
from serve.ranker import Answer, Ranker
from serve.request import RankRequest, RankResponse, ScoreRequest
from serve.shelf import Served, Shelf
from serve.watch import MOST_VALUES, Recent, Watch, attempt, values_in

ITEMS = [f"i{n}" for n in range(20)]
GOOD = RankRequest(user={"user_id": 1003}, candidates=ITEMS, k=3)
WRONG = RankRequest(user={"age": "old"}, candidates=ITEMS)


class Brittle(Ranker):
    """A ranker with a defect: it breaks on a group that holds a certain user."""

    def answer_many(self, requests: Sequence[ScoreRequest]) -> list[Answer | RequestError]:
        if any(r.user.get("user_id") == 13 for r in requests):
            raise ZeroDivisionError("a defect")
        return super().answer_many(requests)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What artifacts of a session are named by."""
    return tmp_path_factory.getbasetemp()


def served(ranker: Ranker) -> Served:
    return Served(ranker.artifact.version, str(ranker.artifact.folder), ranker)


def test_answers_are_counted_by_version(artifact: Artifact, base: Path) -> None:
    watch = Watch(Shelf(served(Ranker(artifact))), 8, lambda request: request.count)
    watch.answer([GOOD, GOOD])
    new = served(Ranker(build.finer(base)))
    watch.shelf.add(new)
    watch.shelf.flip(new.version)
    watch.answer([GOOD])
    found = watch.health()
    assert {name: h.requests for name, h in found.items()} == {artifact.version: 2, new.version: 1}
    assert all(sum(h.speed.values()) == h.requests for h in found.values())
    watch.shelf.drop(set())
    assert set(watch.health()) == {new.version}


def test_request_that_breaks_a_version_takes_no_other_along(artifact: Artifact) -> None:
    bad = RankRequest(user={"user_id": 13}, candidates=ITEMS)
    watch = Watch(Shelf(served(Brittle(artifact))), 8, lambda request: request.count)
    first, broken, last = watch.answer([GOOD, bad, GOOD])
    assert isinstance(broken, ZeroDivisionError)
    alone = Ranker(artifact).rank(GOOD).items
    assert [a.items for a in (first, last) if isinstance(a, RankResponse)] == [alone, alone]
    assert watch.health()[artifact.version].errors == 1
    assert [r.user for r in watch.recent.copy()] == [GOOD.user, GOOD.user]


def test_on_probation_the_version_before_answers_and_the_failure_counts(artifact: Artifact, base: Path) -> None:
    old, new = served(Ranker(artifact)), served(Brittle(build.finer(base)))
    watch = Watch(Shelf(new), 8, lambda request: request.count)
    watch.shelf.fallback = old
    bad = RankRequest(user={"user_id": 13}, candidates=ITEMS)
    answers = watch.answer([bad, WRONG])
    assert isinstance(answers[0], RankResponse)
    assert answers[0].version == old.version
    assert answers[0].items == Ranker(artifact).rank(bad).items
    assert isinstance(answers[1], RequestError)
    assert watch.health()[new.version].errors == 1  # WRONG is the asker's own


def test_refused_requests_are_no_errors_of_a_version(artifact: Artifact) -> None:
    watch = Watch(Shelf(served(Ranker(artifact))), 8, lambda request: request.count)
    assert isinstance(watch.answer([WRONG])[0], RequestError)
    assert watch.health()[artifact.version].errors == 0
    assert watch.recent.copy() == []


def test_attempt_of_one_request_returns_its_exception(artifact: Artifact) -> None:
    bad = RankRequest(user={"user_id": 13}, candidates=ITEMS)
    assert isinstance(attempt(served(Brittle(artifact)), [bad])[0], ZeroDivisionError)


def test_recent_requests_are_bounded_in_number() -> None:
    recent = Recent(3)
    requests = [RankRequest(user={"n": n}, candidates=["a"]) for n in range(10)]
    recent.add(requests[:4])
    recent.add(requests[4:])
    assert [r.user["n"] for r in recent.copy()] == [7, 8, 9]
    assert recent.values == 6


def test_recent_requests_are_bounded_in_size() -> None:
    recent = Recent(1000)
    row = {f"c{n}": n for n in range(100)}
    wide = RankRequest(user={}, candidates=[row] * 1000)
    assert values_in(wide) == 100_000
    recent.add([wide] * 50)
    assert len(recent.copy()) == MOST_VALUES // 100_000
    huge = RankRequest(user={}, candidates=[row] * 10_000)
    recent.add([huge])
    assert huge not in recent.copy()
    assert recent.values <= MOST_VALUES


def test_speed_quantile_is_known_to_a_tenth() -> None:
    counter = Counter()
    for us in range(1, 1001):
        counter.count(1, 0, us * 1e-6)
    for q in (0.5, 0.95, 0.99):
        assert speed_quantile(counter.snapshot(), q) == pytest.approx(q * 1e-3, rel=0.1)
    assert speed_quantile(Health(), 0.95) is None
    assert bucket_of(0.0) == bucket_of(1e-9)


def test_total_adds_counts_and_buckets() -> None:
    parts = [Health(requests=2, errors=1, speed={3: 2}), Health(requests=3, speed={3: 1, 5: 2})]
    assert total(parts) == Health(requests=5, errors=1, speed={3: 3, 5: 2})
    assert total([]).error_share == 0
