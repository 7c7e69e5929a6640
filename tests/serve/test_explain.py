"""serve/explain.py: contributions are what the score loses when a feature is missing."""

from __future__ import annotations

import numpy as np
import pytest

from serve.errors import RequestError
from serve.explain import MOST_EXPLAINED
from serve.ranker import Ranker
from serve.request import RankRequest

USER = {"user_id": 1003, "age": 31.5, "town": "town-2", "recent": ["i1", "i4"], "income": 4000}
ROWS = [{"item_id": f"i{n}", "genres": "War|Noir", "price": 3.5 + n} for n in range(20)]
SOURCES = {"user_id": "user_id", "age": "age", "city": "town", "recent": "recent", "income": "income"}


def odds(p: float) -> float:
    return float(np.log(p / (1 - p)))


def test_contributions_are_the_log_odds_lost_without_a_feature(ranker: Ranker) -> None:
    """Against requests that leave the feature out."""
    answer = ranker.rank(RankRequest(user=USER, candidates=ROWS, k=3, explain=True))
    for item in answer.items:
        assert item.contributions is not None
        assert list(item.contributions) == [f.name for f in ranker.reader.whole.schema.features]
        row = next(r for r in ROWS if r["item_id"] == item.id)
        for feature, column in SOURCES.items():
            user = {c: v for c, v in USER.items() if c != column}
            without = ranker.rank(RankRequest(user=user, candidates=[row])).items[0].score
            assert item.contributions[feature] == pytest.approx(odds(item.score) - odds(without), abs=1e-4), feature
        for column in ("item_id", "genres", "price"):
            less = {c: v for c, v in row.items() if c != column}
            without = ranker.rank(RankRequest(user=USER, candidates=[less])).items[0].score
            assert item.contributions[column] == pytest.approx(odds(item.score) - odds(without), abs=1e-4), column
    assert any(abs(v) > 0.01 for v in (answer.items[0].contributions or {}).values())


def test_a_feature_that_is_missing_contributes_nothing(ranker: Ranker) -> None:
    answer = ranker.rank(RankRequest(user={"age": 30}, candidates=["i1", "i2"], explain=True))
    for item in answer.items:
        assert item.contributions is not None
        for feature in ("user_id", "recent", "city", "income"):
            assert item.contributions[feature] == pytest.approx(0, abs=1e-6)


def test_explaining_changes_neither_order_nor_scores(ranker: Ranker) -> None:
    ids = [f"i{n}" for n in range(40)]
    plain = ranker.rank(RankRequest(user=USER, candidates=ids, k=7))
    explained = ranker.rank(RankRequest(user=USER, candidates=ids, k=7, explain=True))
    assert all(i.contributions is None for i in plain.items)
    assert [(i.id, i.score) for i in plain.items] == [(i.id, i.score) for i in explained.items]


def test_with_a_formula_contributions_are_of_its_value(two_task_ranker: Ranker) -> None:
    ranker = Ranker(two_task_ranker.artifact, "click + 10 * buy")
    candidates = [{"item_id": "i1", "genres": "War"}]
    answer = ranker.rank(RankRequest(user={"user_id": 1001}, candidates=candidates, explain=True)).items[0]
    without = ranker.rank(RankRequest(user={}, candidates=candidates)).items[0]
    assert answer.contributions is not None
    assert answer.contributions["user_id"] == pytest.approx(answer.score - without.score, abs=1e-5)


def test_more_items_than_may_be_explained_are_refused(ranker: Ranker) -> None:
    ids = [f"i{n}" for n in range(MOST_EXPLAINED + 1)]
    with pytest.raises(RequestError, match=f"at most {MOST_EXPLAINED} items are explained") as caught:
        ranker.rank(RankRequest(user={}, candidates=ids, k=10**30, explain=True))
    assert caught.value.field == "k"
    request = RankRequest(user={}, candidates=ids[:-1], k=10**30, explain=True)
    assert len(ranker.rank(request).items) == MOST_EXPLAINED
    assert ranker.rows(request) == MOST_EXPLAINED * (2 + len(ranker.explainer.features))
