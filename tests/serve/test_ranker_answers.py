"""serve/ranker.py and serve/offline.py: scores, order, ids, and requests answered together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compress_builders import World

from compress.artifact import Artifact
from serve.errors import RequestError
from serve.offline import rank_file
from serve.ranker import Ranker
from serve.request import RankRequest, RankResponse
from trainer.data.batch import to_batch
from trainer.data.encoded import concatenate
from trainer.errors import SlimrankError
from trainer.metrics import sigmoid

USER = {"user_id": 1003, "age": 31.5, "town": "town-2", "recent": ["i1", "i4"], "income": 4000}
ITEMS = [f"i{n}" for n in range(40)]


def ask(ranker: Ranker, candidates: list, k: int = 100, user: dict[str, Any] | None = None) -> RankResponse:
    return ranker.rank(RankRequest(user=USER if user is None else user, candidates=candidates, k=k))


def scores_of(answer: RankResponse | RequestError) -> dict[Any, float]:
    assert isinstance(answer, RankResponse)
    return {i.id: i.score for i in answer.items}


# -- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_log_rows(world: World, artifact: Artifact, ranker: Ranker) -> None:
    """A request made of a log row gets the probability that evaluation gives the row."""
    raw = world.dataset.sample().slice(0, 40)
    expected = sigmoid(artifact.model.score_encoded(artifact.model.transform.encode(raw))).ravel()
    columns = ("user_id", "recent", "town", "age", "income")
    for row, score in zip(raw.to_pylist(), expected, strict=True):
        answer = ask(ranker, [row["item_id"]], user={c: row[c] for c in columns})
        assert answer.items[0].score == pytest.approx(score, abs=1e-6)
    assert expected.std() > 0.05


def test_scores_are_the_oracles(artifact: Artifact, ranker: Ranker) -> None:
    encoded, _ = ranker.reader.read(USER, ITEMS)
    expected = sigmoid(artifact.model.oracle_logits(to_batch(encoded))).ravel()
    found = scores_of(ask(ranker, ITEMS))
    np.testing.assert_allclose([found[i] for i in ITEMS], expected, atol=1e-5)


def test_candidates_as_objects_score_as_catalogue_ids(world: World, ranker: Ranker) -> None:
    rows = {r["item_id"]: {c: r[c] for c in ("item_id", "genres", "price")} for r in world.raw.to_pylist()}
    by_id = scores_of(ask(ranker, ITEMS))
    by_columns = scores_of(ask(ranker, [rows[i] for i in ITEMS]))
    assert by_columns == pytest.approx(by_id, abs=1e-6)


def test_unknown_user_and_item_are_ranked(ranker: Ranker) -> None:
    answer = ask(ranker, ["i1", "nobody", "i2"], user={"user_id": "stranger"})
    assert {i.id for i in answer.items} == {"i1", "nobody", "i2"}
    assert all(0 < i.score < 1 for i in answer.items)
    two = scores_of(ask(ranker, ["nobody", "never"]))
    assert two["nobody"] == pytest.approx(two["never"], abs=1e-7)
    strangers = [scores_of(ask(ranker, ["i1"], user={"user_id": u}))["i1"] for u in ("stranger", "another", None)]
    assert strangers[0] == strangers[1] != strangers[2]


def test_user_without_any_feature_is_ranked(ranker: Ranker) -> None:
    assert len(ask(ranker, ITEMS, user={}).items) == 40


def test_user_features_matter(ranker: Ranker) -> None:
    base = scores_of(ask(ranker, ["i1"]))["i1"]
    for column, value in (("user_id", 1000), ("age", 75), ("town", "town-9"), ("recent", ["i9"]), ("income", 90)):
        assert scores_of(ask(ranker, ["i1"], user={**USER, column: value}))["i1"] != base, column


# -- order and ids ---------------------------------------------------------------------------------------------------


def test_items_fall_by_score(ranker: Ranker) -> None:
    answer = ask(ranker, ITEMS)
    scores = [i.score for i in answer.items]
    assert scores == sorted(scores, reverse=True)
    assert {i.id for i in answer.items} == set(ITEMS)


@pytest.mark.parametrize("k", [1, 3, 39])
def test_top_k_are_the_first_of_all(ranker: Ranker, k: int) -> None:
    whole = ask(ranker, ITEMS).items
    assert ask(ranker, ITEMS, k=k).items == whole[:k]


@pytest.mark.parametrize("k", [40, 41, 10**6, 10**30])
def test_k_beyond_the_candidates_gives_them_all(ranker: Ranker, k: int) -> None:
    assert len(ask(ranker, ITEMS, k=k).items) == 40


def test_equal_scores_keep_the_order_of_the_request(ranker: Ranker) -> None:
    answer = ask(ranker, ["n3", "n1", "n2"])  # all unknown: one score
    assert [i.id for i in answer.items] == ["n3", "n1", "n2"]


def test_repeated_candidates_are_answered_each(ranker: Ranker) -> None:
    answer = ask(ranker, ["i1", "i2", "i1"])
    assert sorted(i.id for i in answer.items) == ["i1", "i1", "i2"]  # type: ignore[type-var]


def test_ids_come_back_as_given(ranker: Ranker) -> None:
    ids = ["i1", 7, "7", "", "nobody", -3]
    found = [i.id for i in ask(ranker, ids).items]
    assert sorted(map(repr, found)) == sorted(map(repr, ids))


def test_candidates_as_objects_answer_by_id_or_by_place(ranker: Ranker) -> None:
    candidates = [{"genres": "War"}, {"item_id": "i5"}, {"item_id": 12}, {"item_id": None}]
    assert {i.id for i in ask(ranker, candidates).items} == {0, "i5", 12, 3}


def test_titles_come_from_the_catalogue(world: World, ranker: Ranker) -> None:
    titles = dict(zip(world.raw["item_id"].to_pylist(), world.raw["item_title"].to_pylist(), strict=True))
    found = {i.id: i.title for i in ask(ranker, [*ITEMS, "nobody"]).items}
    assert found == {**{i: titles[i] for i in ITEMS}, "nobody": None}


def test_answer_names_version_request_and_ignored_keys(artifact: Artifact, ranker: Ranker) -> None:
    first, second = ask(ranker, ["i1"]), ask(ranker, ["i1"], user={**USER, "zodiac": "leo"})
    assert first.version == second.version == artifact.version
    assert first.request_id != second.request_id
    assert first.ms > 0
    assert first.ignored is None
    assert second.ignored == ["zodiac"]


def test_one_task_gives_no_scores_by_task(ranker: Ranker) -> None:
    assert ask(ranker, ["i1"]).items[0].scores is None


def test_several_tasks_are_ranked_by_the_first(two_task_ranker: Ranker) -> None:
    answer = ask(two_task_ranker, [{"item_id": f"i{n}", "genres": "War"} for n in range(20)])
    for item in answer.items:
        assert item.scores is not None
        assert list(item.scores) == ["click", "buy"]
        assert item.scores["click"] == item.score != item.scores["buy"]
    assert [i.score for i in answer.items] == sorted((i.score for i in answer.items), reverse=True)
    buys = [i.scores["buy"] for i in answer.items if i.scores]
    assert buys != sorted(buys, reverse=True)


# -- together --------------------------------------------------------------------------------------------------------


def some_requests() -> list[RankRequest]:
    """Of different sizes and shapes."""
    return [
        RankRequest(user=USER, candidates=ITEMS, k=40),
        RankRequest(user={}, candidates=["i1"], k=3),
        RankRequest(
            user={"user_id": 1001, "recent": ["i3"]}, candidates=[{"item_id": "i3", "genres": "War|Noir"}], k=1
        ),
        RankRequest(user={"user_id": "stranger"}, candidates=["nobody", "i9", 4], k=2),
    ]


def test_requests_together_score_as_alone(ranker: Ranker) -> None:
    requests = some_requests()
    for request, together in zip(requests, ranker.answer_many(requests), strict=True):
        alone = ranker.rank(request)
        assert isinstance(together, RankResponse)
        assert [(i.id, i.title) for i in together.items] == [(i.id, i.title) for i in alone.items]
        np.testing.assert_allclose([i.score for i in together.items], [i.score for i in alone.items], atol=1e-6)


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_bad_request_does_not_harm_the_others(ranker: Ranker, at: int) -> None:
    requests = some_requests()
    requests.insert(at, RankRequest(user={"age": "old"}, candidates=["i1"]))
    answers = ranker.answer_many(requests)
    bad = answers.pop(at)
    assert isinstance(bad, RequestError)
    assert bad.field == "user.age"
    for found, expected in zip(answers, ranker.answer_many(some_requests()), strict=True):
        assert scores_of(found) == pytest.approx(scores_of(expected), abs=1e-6)


def test_text_that_is_no_unicode_does_not_harm_the_others(ranker: Ranker) -> None:
    bad = json.loads('{"user": {"user_id": "\\ud800"}, "candidates": ["i1"]}')
    answers = ranker.answer_many([*some_requests(), RankRequest(**bad)])
    assert isinstance(answers[-1], RequestError)
    assert all(isinstance(a, RankResponse) for a in answers[:-1])


def test_bad_requests_alone_are_answered(ranker: Ranker) -> None:
    bad = RankRequest(user={"age": "old"}, candidates=["i1"])
    assert [type(a) for a in ranker.answer_many([bad, bad])] == [RequestError, RequestError]
    with pytest.raises(RequestError, match="user.age"):
        ranker.rank(bad)


def test_no_requests_get_no_answers(ranker: Ranker) -> None:
    assert ranker.answer_many([]) == []


def test_concatenated_requests_lie_one_after_another(ranker: Ranker) -> None:
    parts = [ranker.reader.read(r.user, r.candidates)[0] for r in some_requests()]
    whole = concatenate(parts)
    assert len(whole) == 40 + 1 + 1 + 3
    last = whole.take(np.arange(42, 45))
    for name, ragged in parts[3].sparse.items():
        assert np.array_equal(last.sparse[name].values, ragged.values)


# -- offline ---------------------------------------------------------------------------------------------------------


def test_rank_file_answers_as_the_ranker(artifact: Artifact, ranker: Ranker, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"user": USER, "candidates": ITEMS, "k": 5}))
    answer = rank_file(artifact.folder, path)
    assert answer["items"] == [i.model_dump(exclude_none=True) for i in ask(ranker, ITEMS, k=5).items]
    assert answer["version"] == artifact.version
    json.dumps(answer)


@pytest.mark.parametrize("text", ["", "{", "nonsense", "\0"])
def test_rank_file_of_no_json_names_the_file(artifact: Artifact, tmp_path: Path, text: str) -> None:
    path = tmp_path / "request.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"body: .*request\.json"):
        rank_file(artifact.folder, path)


def test_rank_file_that_is_not_there(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="none.json"):
        rank_file(artifact.folder, tmp_path / "none.json")


def test_rank_file_nested_without_end(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text("[" * 100_000)
    with pytest.raises(RequestError):
        rank_file(artifact.folder, path)


@pytest.mark.parametrize(
    ("body", "field"),
    [([], "body"), ({"user": {}}, "candidates"), ({"user": {"age": "old"}, "candidates": ["i1"]}, "user.age")],
)
def test_rank_file_refuses_as_the_server_does(artifact: Artifact, tmp_path: Path, body: Any, field: str) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps(body))
    with pytest.raises(RequestError) as caught:
        rank_file(artifact.folder, path)
    assert caught.value.field == field


def test_rank_file_of_no_artifact(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"user": {}, "candidates": ["i1"]}))
    with pytest.raises(SlimrankError, match="not an artifact"):
        rank_file(tmp_path, path)
