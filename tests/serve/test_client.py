"""The Python client: against the real routes, and against servers that refuse, break, stall and talk nonsense."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import uvicorn
from http_servers import Handler, answer, listening, read_request

from serve.api import make_api
from serve.client import (
    AnswerError,
    AsyncRankClient,
    RankClient,
    Ranking,
    RefusedError,
    Scores,
    UnreachableError,
)
from serve.client_messages import Reply, wait_s
from serve.config import ServeConfig
from serve.errors import RequestError
from serve.ranker import Ranker
from serve.request import RankRequest
from serve.service import Service
from serve.shelf import Served, Shelf
from trainer.errors import SlimrankError

USER = {"user_id": 1003, "age": 31.5}
ITEMS = [f"i{n}" for n in range(40)]
FOUND = {"version": "v", "request_id": "r", "ms": 1.5}
RANKED = json.dumps({**FOUND, "items": [{"id": "a", "score": 0.5, "new": 1}], "new": 2}).encode()


@pytest.fixture(scope="module")
def url(ranker: Ranker) -> Iterator[str]:
    """The real routes over the small artifact, on bare uvicorn."""
    served = Served(ranker.artifact.version, str(ranker.artifact.folder), ranker)
    service = Service(Shelf(served), ServeConfig(max_candidates=100, max_wait_ms=60_000))
    server = uvicorn.Server(uvicorn.Config(make_api(service), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    service.engine.stop()


def replies(*outcomes: bytes) -> tuple[Handler, list[dict[str, str]]]:
    """A handler that gives each request the next outcome (the last one again and again), and the headers it saw.

    b"" closes the connection without an answer.
    """
    seen: list[dict[str, str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        while True:
            seen.append((await read_request(reader))[1])
            outcome = outcomes[min(len(seen), len(outcomes)) - 1]
            writer.write(outcome)
            if not outcome:
                return

    return serve, seen


Ask = Callable[..., Ranking]


def _sync(url: str, *asked: Any, **options: Any) -> Ranking:
    with RankClient(url, **options) as client:
        return client.rank(*(asked or ({}, ["a"])))


def _async(url: str, *asked: Any, **options: Any) -> Ranking:
    async def ask() -> Ranking:
        async with AsyncRankClient(url, **options) as client:
            return await client.rank(*(asked or ({}, ["a"])))

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [_sync, _async], ids=["sync", "async"])


# -- against the real routes -------------------------------------------------------------------------------------------


@both
def test_rank_gives_what_the_ranker_gives(ask: Ask, url: str, ranker: Ranker) -> None:
    expected = ranker.rank(RankRequest(user=USER, candidates=ITEMS, k=5))
    found = ask(url, USER, ITEMS, 5, timeout_s=30)
    assert [(i.id, i.title) for i in found.items] == [(i.id, i.title) for i in expected.items]
    assert [i.score for i in found.items] == pytest.approx([i.score for i in expected.items], abs=1e-6)
    assert found.version == ranker.artifact.version
    assert found.ms > 0


@both
def test_rank_of_rows_with_numpy_values(ask: Ask, url: str) -> None:
    rows = [{"item_id": "i1", "price": np.float32(3.5)}, {"item_id": "i2"}]
    assert {item.id for item in ask(url, USER, rows, timeout_s=30).items} == {"i1", "i2"}


@both
def test_refusal_names_field_status_and_request(ask: Ask, url: str) -> None:
    with pytest.raises(RefusedError) as caught:
        ask(url, USER, [f"i{n}" for n in range(101)], timeout_s=30)
    assert (caught.value.field, caught.value.status) == ("candidates", 413)
    assert "101 given" in caught.value.message
    assert len(caught.value.request_id) == 32
    assert caught.value.request_id in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.status) == (str(caught.value), 413)


def test_unknown_keys_of_the_user_are_told(url: str) -> None:
    assert _sync(url, {**USER, "shoe_size": 43}, ITEMS, timeout_s=30).ignored == ("shoe_size",)


@both
def test_columns_rows_and_arrow_are_ranked_alike(ask: Ask, url: str) -> None:
    pytest.importorskip("serve.arrow_body", reason="this server takes rows alone")
    columns = {"item_id": ITEMS, "price": [float(n % 7) for n in range(len(ITEMS))]}
    table = pa.table(columns)
    forms = (table.to_pylist(), columns, table, pa.concat_tables([table.slice(0, 9), table.slice(9)]))
    answers = [ask(url, USER, form, 5, True, timeout_s=30) for form in forms]
    for found in answers:
        assert [i.id for i in found.items] == [i.id for i in answers[0].items]
        assert [i.score for i in found.items] == pytest.approx([i.score for i in answers[0].items], abs=1e-6)
        assert all(i.contributions for i in found.items)
        assert found.version == answers[0].version


def test_scores_are_those_of_the_ranking(url: str) -> None:
    pytest.importorskip("serve.arrow_body", reason="this server has no /v1/score")
    with RankClient(url, timeout_s=30) as client:
        best = client.rank(USER, ITEMS, k=1).items[0]
        scored = client.score(USER, ITEMS)
        assert client.score(USER, pa.table({"item_id": ITEMS})).scores == pytest.approx(scored.scores, abs=1e-6)
    assert len(scored.scores) == len(ITEMS)
    assert max(scored.scores) == pytest.approx(best.score, abs=1e-6)
    assert scored.scores[ITEMS.index(str(best.id))] == pytest.approx(best.score, abs=1e-6)


# -- asking again ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("first", [b"", answer(502), answer(503), answer(504), answer(429, more="retry-after: 0\r\n")])
def test_what_another_replica_may_answer_is_asked_once_more(ask: Ask, first: bytes) -> None:
    serve, seen = replies(first, answer(200, RANKED))
    with listening(serve) as url:
        assert ask(url, timeout_s=30).items[0].id == "a"
    assert len(seen) == 2
    assert seen[0]["x-request-id"] == seen[1]["x-request-id"]


@both
@pytest.mark.parametrize("status", [400, 401, 404, 422, 500])
def test_what_would_be_refused_again_is_asked_once(ask: Ask, status: int) -> None:
    serve, seen = replies(answer(status, b'{"field": "k", "error": "no"}'))
    with listening(serve) as url, pytest.raises(RefusedError) as caught:
        ask(url, timeout_s=30)
    assert (caught.value.field, caught.value.message, caught.value.status) == ("k", "no", status)
    assert len(seen) == 1


@both
def test_retries_end(ask: Ask) -> None:
    serve, seen = replies(b"")
    with listening(serve) as url, pytest.raises(UnreachableError, match="see whether the server is up"):
        ask(url, timeout_s=30, retries=2)
    assert len(seen) == 3


@both
def test_overload_beyond_the_budget_is_not_waited_for(ask: Ask) -> None:
    serve, seen = replies(answer(429, b'{"field": "server", "error": "overloaded"}', "retry-after: 60\r\n"))
    with listening(serve) as url, pytest.raises(RefusedError) as caught:
        ask(url, timeout_s=5)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 60.0)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("reply", "left_s", "wait"),
    [
        (ConnectionError(), 0.5, 0.0),
        (ConnectionError(), 0.0, None),
        (Reply(429, {"retry-after": "2"}, b""), 3.0, 2.0),
        (Reply(429, {"retry-after": "2"}, b""), 2.0, None),
        (Reply(503, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, b""), 1.0, 0.02),
        (Reply(503, {"retry-after": "nan"}, b""), 1.0, 0.02),
        (Reply(503, {"retry-after": "-5"}, b""), 1.0, 0.02),
        (Reply(500, {}, b""), 9.0, None),
        (Reply(200, {}, b""), 9.0, None),
    ],
)
def test_wait_before_the_next_attempt(reply: Reply | Exception, left_s: float, wait: float | None) -> None:
    assert wait_s(reply, left_s) == wait


# -- time and connections ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("drip", [b"", answer(200, RANKED)[:20]])
def test_a_server_that_stalls_is_given_up(ask: Ask, drip: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(drip)
        await asyncio.sleep(60)

    with listening(serve) as url, pytest.raises(UnreachableError, match="no answer within 0.3 s"):
        ask(url, timeout_s=0.3)


@both
def test_an_answer_that_drips_for_ever_is_cut_off(ask: Ask) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    with listening(serve) as url, pytest.raises(UnreachableError, match="no answer within 0.3 s"):
        ask(url, timeout_s=0.3)


@both
def test_nothing_listens(ask: Ask) -> None:
    with pytest.raises(UnreachableError, match="http://127.0.0.1:1: .*see whether the server is up"):
        ask("http://127.0.0.1:1")


def test_connections_are_kept_and_keys_are_sent() -> None:
    numbers: set[int] = set()
    keys: set[str] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            keys.add((await read_request(reader))[1]["authorization"])
            numbers.add(number)
            writer.write(answer(200, RANKED))

    with listening(serve) as url, RankClient(url + "/", key="secret", timeout_s=30) as client:
        assert [client.rank({}, ["a"], request_id="mine").version for _ in range(5)] == ["v"] * 5
    assert numbers == {0}
    assert keys == {"Bearer secret"}


# -- bodies and answers ------------------------------------------------------------------------------------------------


def test_arrow_table_goes_and_comes_back_as_arrow() -> None:
    got: list[tuple[dict[str, str], bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        while True:
            line, headers, body = await read_request(reader)
            got.append((headers, body))
            columns = {"id": ["b", "a"], "score": [0.75, 0.5]}
            columns |= (
                {"scores.t": [0.1, 0.2]}
                if "score HTTP" in line
                else {"title": ["B", None], "contributions.f.g": [1, 2]}
            )
            table = pa.table(columns).replace_schema_metadata({b"slimrank": json.dumps(FOUND)})
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            writer.write(answer(200, sink.getvalue().to_pybytes(), f"content-type: {headers['accept']}\r\n"))

    table = pa.table({"item_id": ["a", "b"], "price": [1.0, None]})
    with listening(serve) as url, RankClient(url, timeout_s=30) as client:
        ranked = client.rank({"age": 3}, table, k=2)
        scored = client.score({"age": 3}, table)
    assert [(i.id, i.score, i.title) for i in ranked.items] == [("b", 0.75, "B"), ("a", 0.5, None)]
    assert (ranked.version, ranked.request_id, ranked.ms) == ("v", "r", 1.5)
    assert [item.contributions for item in ranked.items] == [{"f.g": 1}, {"f.g": 2}]
    assert scored == Scores("v", "r", 1.5, [0.75, 0.5], {"t": [0.1, 0.2]})
    for (headers, body), options in zip(got, [{"k": 2}, {}], strict=True):
        assert headers["content-type"] == "application/vnd.apache.arrow.stream"
        sent = pa.ipc.open_stream(body).read_all()
        assert json.loads(sent.schema.metadata[b"slimrank"]) == {"user": {"age": 3}, **options}
        assert sent.equals(table)


def test_columns_and_options_are_sent_as_json() -> None:
    got: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        while True:
            got.append(json.loads((await read_request(reader))[2]))
            writer.write(answer(200, json.dumps({**FOUND, "items": [], "scores": [1], "tasks": {"t": [1]}}).encode()))

    with listening(serve) as url, RankClient(url, timeout_s=30) as client:
        client.rank({}, {"item_id": np.array([1, 2])}, explain=True)
        assert client.score({}, ["a"]) == Scores("v", "r", 1.5, [1.0], {"t": [1]})
    assert got == [
        {"user": {}, "candidates": {"item_id": [1, 2]}, "k": 10, "explain": True},
        {"user": {}, "candidates": ["a"]},
    ]


@both
@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), {1, 2}, b"x"])
def test_values_that_are_not_json_are_refused_here(ask: Ask, value: Any) -> None:
    with pytest.raises(RequestError, match="body: "):
        ask("http://127.0.0.1:1", {"age": value}, ["a"])


@both
@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"version": "v", "request_id": "r", "ms": 1, "items": [3]}', b"\xff"]
)
def test_an_answer_that_is_none_is_named(ask: Ask, body: bytes) -> None:
    serve, _ = replies(answer(200, body))
    with listening(serve) as url, pytest.raises(AnswerError, match="not one of a ranker"):
        ask(url, timeout_s=30)


def test_arrow_answer_that_is_none_is_named() -> None:
    serve, _ = replies(answer(200, b"ARROW?", "content-type: application/vnd.apache.arrow.stream\r\n"))
    with listening(serve) as url, pytest.raises(AnswerError, match="not one of a ranker"):
        _sync(url, timeout_s=30)


@pytest.mark.parametrize("options", [{"url": "127.0.0.1"}, {"timeout_s": 0}, {"retries": -1}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SlimrankError, match="must be"):
        RankClient(**{"url": "http://127.0.0.1:1", **options})


def test_client_imports_nothing_heavy() -> None:
    heavy = ["torch", "ray", "numpy", "pyarrow", "pydantic", "fastapi"]
    code = f"import sys, serve.client; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
