"""Candidates as columns, of JSON and of Arrow: what objects of the same values would give, alone as in company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bare_server import stream_of
from compress_builders import World

from compress.artifact import Artifact
from serve.arrow_body import encode_arrow, parse_arrow
from serve.errors import RequestError
from serve.offline import rank_file
from serve.ranker import Ranker
from serve.request import RankRequest, RankResponse, ScoreRequest

USER = {"user_id": 1003, "age": 31.5, "town": "town-2", "recent": ["i1", "i4"], "income": 4000}
LIMIT = 1000


def arrow(columns: dict[str, Any], rest: Any = None, **options: Any) -> bytes:
    table = pa.table(columns).replace_schema_metadata(
        {"slimrank": json.dumps({"user": USER} if rest is None else rest)}
    )
    return stream_of(table, **options)


def items_of(world: World, count: int, price: str = "price") -> list[dict[str, Any]]:
    """Item-side columns of different items of the log, of which some lack genres or a price."""
    rows = {r["item_id"]: {c: r[c] for c in ("item_id", "genres", price)} for r in world.raw.to_pylist()}
    return [rows[i] for i in sorted(rows)[:count]]


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {c: [row[c] for row in rows] for c in rows[0]}


def in_every_form(user: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> dict[str, RankRequest]:
    """The same request as objects, as columns of JSON, and as Arrow."""
    columns = columns_of(rows)
    return {
        "objects": RankRequest(user=user, candidates=rows, **more),
        "columns": RankRequest(user=user, candidates=columns, **more),
        "Arrow": parse_arrow(arrow(columns, {"user": user, **more}), LIMIT),
    }


def answer_of(answer: RankResponse | RequestError) -> list[tuple[Any, float]]:
    assert isinstance(answer, RankResponse)
    return [(i.id, i.score) for i in answer.items]


@pytest.mark.parametrize("count", [1, 5, 15, 16, 60])
def test_every_form_gives_one_answer(world: World, ranker: Ranker, count: int) -> None:
    rows = items_of(world, count)
    answers = {form: answer_of(ranker.rank(r)) for form, r in in_every_form(USER, rows, k=100).items()}
    assert answers["columns"] == answers["Arrow"] == answers["objects"]
    by_id = dict(answer_of(ranker.rank(RankRequest(user=USER, candidates=[r["item_id"] for r in rows], k=100))))
    assert dict(answers["columns"]) == pytest.approx(by_id, abs=1e-6)


@pytest.mark.parametrize("column", ["town", "age", "recent", "user_id"])
def test_candidates_may_bring_columns_of_the_users_side(world: World, ranker: Ranker, column: str) -> None:
    """They win over the user's, and everything else stays the user's."""
    rows = items_of(world, 20)
    own = {"town": "town-5", "age": 60, "recent": ["i9"], "user_id": 1001}[column]
    mixed = [{**row, column: own} for row in rows]
    expected = dict(answer_of(ranker.rank(RankRequest(user={**USER, column: own}, candidates=rows, k=100))))
    for form, request in in_every_form(USER, mixed, k=100).items():
        assert dict(answer_of(ranker.rank(request))) == pytest.approx(expected, abs=1e-6), form
    assert expected != dict(answer_of(ranker.rank(RankRequest(user=USER, candidates=rows, k=100))))


def test_user_fills_in_item_columns_that_candidates_lack(world: World, ranker: Ranker) -> None:
    ids = [{"item_id": r["item_id"], "price": 4.5} for r in items_of(world, 20)]
    expected = answer_of(ranker.rank(RankRequest(user=USER, candidates=[{**i, "genres": "War"} for i in ids], k=100)))
    for form, request in in_every_form({**USER, "genres": "War"}, ids, k=100).items():
        answer = ranker.rank(request)
        assert answer_of(answer) == expected, form
        assert answer.ignored is None


def test_id_column_alone_is_ids_of_the_catalogue(ranker: Ranker, two_task_ranker: Ranker) -> None:
    ids = [f"i{n}" for n in range(30)] + ["nobody"]
    expected = ranker.rank(RankRequest(user=USER, candidates=ids, k=100)).items
    assert any(item.title for item in expected)
    for request in (
        RankRequest(user=USER, candidates={"item_id": ids}, k=100),
        parse_arrow(arrow({"item_id": ids}, {"user": USER, "k": 100}), LIMIT),
    ):
        assert ranker.rank(request).items == expected
        assert [i.id for i in two_task_ranker.rank(request).items] != ids  # no catalogue: a column as others are


def test_a_score_does_not_depend_on_its_neighbours(world: World, ranker: Ranker) -> None:
    """Neither those in its request nor other requests, in any form; requests of both kinds together."""
    rows = items_of(world, 40)
    forms = in_every_form(USER, rows, k=100)
    few = in_every_form(USER, rows[:3], k=100)
    scored = ScoreRequest(user=USER, candidates=columns_of(rows))
    requests = [*forms.values(), scored, *few.values(), RankRequest(user={}, candidates=["i1", 7], k=3)]
    together = ranker.answer_many(requests)
    whole = dict(answer_of(ranker.rank(forms["objects"])))
    for answer in together[:3]:
        assert dict(answer_of(answer)) == whole  # type: ignore[arg-type]
    assert together[3].scores == [whole[r["item_id"]] for r in rows]  # type: ignore[union-attr]
    for answer in together[4:7]:
        assert dict(answer_of(answer)) == pytest.approx({i: whole[i] for i in dict(answer_of(answer))}, abs=1e-6)  # type: ignore[arg-type]
    for row in rows[:5]:
        alone = ranker.rank(RankRequest(user=USER, candidates=columns_of([row])))
        assert alone.items[0].score == pytest.approx(whole[row["item_id"]], abs=1e-6)


def test_columns_that_no_feature_reads_are_told(ranker: Ranker) -> None:
    columns = {"item_id": ["i1", "i2"], "price": [1, 2], "shelf": [3, 4]}
    for request in (
        RankRequest(user={"zodiac": 1}, candidates=columns),
        RankRequest(user={"zodiac": 1}, candidates=[{"item_id": "i1"}, {"shelf": 3, "price": 4}]),
        parse_arrow(arrow(columns, {"user": {"zodiac": 1}}), LIMIT),
    ):
        assert ranker.rank(request).ignored == ["zodiac", "candidates.shelf"]


def test_items_without_an_id_are_named_by_their_place(ranker: Ranker) -> None:
    for candidates in ({"price": [3.5, 4, 5]}, {"item_id": [None, 1.5, True], "price": [3.5, 4, 5]}):
        answer = ranker.rank(RankRequest(user=USER, candidates=candidates))
        assert sorted(i.id for i in answer.items) == [0, 1, 2]  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"price": ["cheap", 1]}, "candidates.price"),
        ({"price": [[1], [2]]}, "candidates.price"),
        ({"item_id": [["a"], ["b"]], "price": [1, 2]}, "candidates.item_id"),
        ({"genres": [{}, {}]}, "candidates.genres"),
        ({"city": ["a", "b"], "town": ["a", "b"]}, "candidates.town"),
        ({"item_id": [1.5, 2.5]}, "candidates.item_id"),
        ({"item_id": ["a", None]}, "candidates.item_id"),
    ],
)
def test_column_that_cannot_be_read_is_named(ranker: Ranker, columns: dict[str, list], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        ranker.rank(RankRequest(user=USER, candidates=columns))
    assert caught.value.field == field
    if not any(isinstance(v, dict) for values in columns.values() for v in values):
        with pytest.raises(RequestError) as caught:
            ranker.rank(parse_arrow(arrow(mixed_as_text(columns)), LIMIT))
        assert caught.value.field == field


def mixed_as_text(columns: dict[str, list]) -> dict[str, list]:
    """Arrow columns hold one kind."""
    kinds = {c: {type(v) for v in values if v is not None} for c, values in columns.items()}
    return {c: [str(v) for v in values] if len(kinds[c]) > 1 else values for c, values in columns.items()}


def test_a_long_list_of_the_users_is_not_read_for_each_candidate(ranker: Ranker) -> None:
    """Beside 1,000 candidates, 200,000 ids of the user are 200 million were they repeated first."""
    user = {"recent": [f"i{n}" for n in range(200_000)]}
    columns = {"item_id": [f"i{n}" for n in range(1000)], "town": ["town-1"] * 1000}
    before = pa.total_allocated_bytes()
    answer = ranker.rank(RankRequest(user=user, candidates=columns, k=1))
    assert len(answer.items) == 1
    assert pa.total_allocated_bytes() - before < 1 << 20
    assert pa.default_memory_pool().max_memory() < 1 << 30


# -- Arrow -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint16(), pa.float32(), pa.float64(), pa.string()])
def test_arrow_numbers_of_any_width_are_one_number(ranker: Ranker, kind: pa.DataType) -> None:
    prices = pa.array([3, 7, 11]).cast(kind)
    answer = ranker.rank(parse_arrow(arrow({"item_id": ["i1", "i2", "i3"], "price": prices}), LIMIT))
    expected = RankRequest(user=USER, candidates={"item_id": ["i1", "i2", "i3"], "price": [3, 7, 11]})
    assert answer.items == ranker.rank(expected).items


def test_arrow_lists_are_bags(ranker: Ranker) -> None:
    genres = [["Drama", "War"], None, [], ["Noir"]]
    ids = ["i1", "i2", "i3", "i4"]
    expected = ranker.rank(RankRequest(user=USER, candidates={"item_id": ids, "genres": genres}))
    for kind in (pa.list_(pa.string()), pa.large_list(pa.large_string())):
        body = arrow({"item_id": ids, "genres": pa.array(genres, kind)})
        assert ranker.rank(parse_arrow(body, LIMIT)).items == expected.items


def test_arrow_batches_are_read_as_one(world: World, ranker: Ranker) -> None:
    columns = columns_of(items_of(world, 30))
    schema = pa.table(columns).replace_schema_metadata({"slimrank": json.dumps({"user": USER, "k": 30})}).schema
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema), max_chunksize=7)
    several = parse_arrow(sink.getvalue().to_pybytes(), LIMIT)
    whole = RankRequest(user=USER, candidates=columns, k=30)
    assert ranker.rank(several).items == ranker.rank(whole).items


def test_arrow_columns_stay_where_they_lie_in_the_body() -> None:
    body = arrow({"price": np.arange(900.0)})
    before = pa.total_allocated_bytes()
    request = parse_arrow(body, LIMIT)
    assert pa.total_allocated_bytes() - before < 900 * 8
    assert request.candidates["price"].to_numpy().sum() == 899 * 450


@pytest.mark.parametrize(("ids", "kind"), [([1, 2], int), ([1, 2, 2**70], str), (["a", 2, 3], str), (["a"], str)])
def test_arrow_answer_holds_the_ids_as_one_kind(ranker: Ranker, ids: list, kind: type) -> None:
    answer = ranker.rank(RankRequest(user={}, candidates=ids))
    table = pa.ipc.open_stream(encode_arrow(answer)).read_all()
    assert table["id"].to_pylist() == [kind(i.id) for i in answer.items]


def test_arrow_answer_holds_what_json_does(two_task_ranker: Ranker) -> None:
    rows = [{"genres": genre} for genre in ("War", "Noir", "Drama")]
    answer = two_task_ranker.rank(RankRequest(user={"x": 1}, candidates=rows, explain=True))
    table = pa.ipc.open_stream(encode_arrow(answer)).read_all()
    for row, item in zip(table.to_pylist(), answer.items, strict=True):
        assert (row["id"], row["score"], row["title"]) == (item.id, item.score, None)
        assert item.scores == {t: row[f"scores.{t}"] for t in ("click", "buy")}
        assert item.contributions is not None
        assert all(row[f"contributions.{f}"] == v for f, v in item.contributions.items())
    rest = json.loads(table.schema.metadata[b"slimrank"])
    assert rest == {"request_id": answer.request_id, "version": answer.version, "ms": answer.ms, "ignored": ["x"]}
    scored = two_task_ranker.score(ScoreRequest(user={}, candidates=rows))
    table = pa.ipc.open_stream(encode_arrow(scored)).read_all()
    assert table["score"].to_pylist() == scored.scores
    assert {t: table[f"scores.{t}"].to_pylist() for t in ("click", "buy")} == scored.tasks


def test_rank_file_reads_every_form(world: World, artifact: Artifact, ranker: Ranker, tmp_path: Path) -> None:
    rows = items_of(world, 20)
    for form, request in in_every_form(USER, rows, k=5, explain=True).items():
        path = tmp_path / form
        if form == "Arrow":
            path.write_bytes(arrow(columns_of(rows), {"user": USER, "k": 5, "explain": True}))
        else:
            path.write_text(request.model_dump_json())
        answer = rank_file(artifact.folder, path)
        assert answer["items"] == [i.model_dump(exclude_none=True) for i in ranker.rank(request).items]
