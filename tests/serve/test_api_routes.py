"""serve/api.py over HTTP: routes, headers, errors, deadlines, and the examples of the OpenAPI description."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import pyarrow as pa
import pytest
from bare_server import bare_server, stream_of

from compress.artifact import Artifact
from serve.api import make_api
from serve.arrow_body import MEDIA_TYPE
from serve.config import ServeConfig
from serve.ranker import Ranker
from serve.request import RankRequest, RankResponse, ScoreResponse
from serve.service import Service
from serve.shelf import Served, Shelf

USER = {"user_id": 1003, "age": 31.5, "town": "town-2", "recent": ["i1", "i4"], "income": 4000}
IDS = [f"i{n}" for n in range(30)]


def test_rank_answers_as_the_ranker(server: str, ranker: Ranker) -> None:
    answer = httpx.post(f"{server}/v1/rank", json={"user": USER, "candidates": IDS, "k": 4})
    expected = ranker.rank(RankRequest(user=USER, candidates=IDS, k=4))
    assert answer.status_code == 200
    assert RankResponse.model_validate(answer.json()).items == expected.items
    assert answer.headers["x-slimrank-version"] == answer.json()["version"] == expected.version


def test_score_gives_every_candidate_in_order(server: str) -> None:
    body = {"user": USER, "candidates": IDS}
    ranked = httpx.post(f"{server}/v1/rank", json={**body, "k": 30}).json()["items"]
    answer = httpx.post(f"{server}/v1/score", json=body)
    scored = ScoreResponse.model_validate(answer.json())
    assert dict(zip(IDS, scored.scores, strict=True)) == {i["id"]: i["score"] for i in ranked}
    assert scored.tasks is None
    assert answer.headers["x-slimrank-version"] == scored.version
    assert answer.headers["x-request-id"] == scored.request_id


@pytest.mark.parametrize("field", ["k", "explain"])
def test_score_refuses_what_only_ranking_has(server: str, field: str) -> None:
    answer = httpx.post(f"{server}/v1/score", json={"user": {}, "candidates": ["i1"], field: 1})
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert "not part of a score request" in answer.json()["error"]


def test_explained_items_hold_contributions(server: str) -> None:
    items = httpx.post(f"{server}/v1/rank", json={"user": USER, "candidates": IDS, "k": 2, "explain": True}).json()
    assert all("town" not in i["contributions"] and "city" in i["contributions"] for i in items["items"])


# -- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "shop-7:Checkout_1.2", "x" * 128])
@pytest.mark.parametrize("path", ["/v1/rank", "/v1/score"])
def test_request_id_of_the_caller_is_kept(server: str, name: str, path: str) -> None:
    answer = httpx.post(f"{server}{path}", json={"user": {}, "candidates": ["i1"]}, headers={"x-request-id": name})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == name


@pytest.mark.parametrize("name", ["", "x" * 129, "two words", "a;b", "é".encode(), b"\xff", '"quoted"'])
def test_request_id_that_is_not_sane_is_replaced(server: str, name: Any) -> None:
    answer = httpx.post(
        f"{server}/v1/rank", json={"user": {}, "candidates": ["i1"]}, headers=[(b"x-request-id", name)] if name else {}
    )
    assert answer.status_code == 200
    assert len(answer.headers["x-request-id"]) == 32
    assert answer.headers["x-request-id"] == answer.json()["request_id"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "field"),
    [
        ("POST", "/v1/rank", b"{", 400, "body"),
        ("POST", "/v1/rank", b"{}", 422, "user"),
        ("POST", "/v1/rank", b'{"user": {"age": "old"}, "candidates": ["i1"]}', 422, "user.age"),
        ("POST", "/v1/rank", b'{"user": {}, "candidates": {"price": ["cheap"]}}', 422, "candidates.price"),
        ("POST", "/v1/rank", b" " * 4_000_001, 413, "body"),
        ("GET", "/v1/rank", b"", 405, "method"),
        ("GET", "/v2/rank", b"", 404, "path"),
    ],
)
def test_errors_name_the_field_and_the_request(
    server: str, method: str, path: str, content: bytes, status: int, field: str
) -> None:
    answer = httpx.request(method, f"{server}{path}", content=content, headers={"x-request-id": "mine"})
    assert answer.status_code == status
    assert answer.json()["field"] == field
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine"
    assert answer.headers["x-slimrank-version"]


def test_a_body_without_an_announced_length_is_cut_off(server: str) -> None:
    answer = httpx.post(f"{server}/v1/rank", content=(b" " * 100_000 for _ in range(50)))
    assert (answer.status_code, answer.json()["field"]) == (413, "body")


def test_a_compressed_body_is_refused_by_name(server: str) -> None:
    answer = httpx.post(f"{server}/v1/rank", content=b"x", headers={"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["field"]) == (415, "content-encoding")


def test_health_and_readiness(server: str, artifact: Artifact) -> None:
    assert httpx.get(f"{server}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server}/readyz").json() == {"status": "ready", "version": artifact.version}


# -- forms of a request ----------------------------------------------------------------------------------------------


def test_arrow_is_answered_where_it_is_accepted(server: str) -> None:
    body = {"user": USER, "candidates": IDS, "k": 3}
    plain = httpx.post(f"{server}/v1/rank", json=body).json()
    answer = httpx.post(f"{server}/v1/rank", json=body, headers={"accept": MEDIA_TYPE, "x-request-id": "r1"})
    assert answer.headers["content-type"] == MEDIA_TYPE
    table = pa.ipc.open_stream(answer.content).read_all()
    assert table.to_pylist() == [{k: i.get(k) for k in ("id", "score", "title")} for i in plain["items"]]
    rest = json.loads(table.schema.metadata[b"slimrank"])
    assert (rest["request_id"], rest["version"]) == ("r1", plain["version"])


def test_arrow_request_is_answered_as_json_unless_asked(server: str) -> None:
    table = pa.table({"item_id": IDS}).replace_schema_metadata({"slimrank": json.dumps({"user": USER, "k": 3})})
    answer = httpx.post(f"{server}/v1/rank", content=stream_of(table), headers={"content-type": MEDIA_TYPE})
    plain = httpx.post(f"{server}/v1/rank", json={"user": USER, "candidates": IDS, "k": 3})
    assert answer.json()["items"] == plain.json()["items"]


# -- deadlines -------------------------------------------------------------------------------------------------------


class SlowRanker(Ranker):
    """A ranker that waits to be let go."""

    go = threading.Event()

    def answer_many(self, requests: Any) -> Any:
        self.go.wait(60)
        return super().answer_many(requests)


@pytest.mark.parametrize("of", ["request", "server"])
def test_an_answer_that_takes_too_long_is_given_up(artifact: Artifact, of: str) -> None:
    ranker = SlowRanker(artifact)
    body = {"user": {}, "candidates": ["i1"]} | ({"timeout_ms": 50} if of == "request" else {})
    try:
        with bare_server(ranker, timeout_ms=None if of == "request" else 50) as url:
            answer = httpx.post(f"{url}/v1/rank", json=body, timeout=30)
            assert (answer.status_code, answer.json()["field"]) == (504, "timeout_ms")
            ranker.go.set()
            assert httpx.post(f"{url}/v1/rank", json={**body, "timeout_ms": 30_000}, timeout=30).status_code == 200
    finally:
        ranker.go.clear()


@pytest.mark.parametrize("value", [0, -1, "50", True, 600_001, [1], 1e400])
def test_timeout_that_is_none_is_refused(server: str, value: Any) -> None:
    text = json.dumps({"user": {}, "candidates": ["i1"], "timeout_ms": value}).replace("Infinity", "1e400")
    answer = httpx.post(f"{server}/v1/rank", content=text)
    assert (answer.status_code, answer.json()["field"]) == (422, "timeout_ms")


# -- the description -------------------------------------------------------------------------------------------------


def examples_of(url: str) -> list[tuple[str, str, Any]]:
    """Path, name and body of each example that the description of a server holds."""
    described = httpx.get(f"{url}/openapi.json").json()
    return [
        (path, name, example["value"])
        for path, verbs in described["paths"].items()
        for verb in verbs.values()
        for content in verb.get("requestBody", {}).get("content", {}).values()
        for name, example in content.get("examples", {}).items()
    ]


@pytest.mark.parametrize("which", ["server", "two_task_server"])
def test_every_example_of_the_description_runs(which: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(which)
    found = examples_of(url)
    assert {path for path, _, _ in found} >= {"/v1/rank", "/v1/score"}
    assert {name for _, name, _ in found} >= {"objects", "columns"}
    assert ("item ids" in {name for _, name, _ in found}) == (which == "server")
    for path, name, body in found:
        answer = httpx.post(f"{url}{path}", json=body)
        assert answer.status_code == 200, (path, name, answer.text)
        assert "ignored" not in answer.json(), (path, name)


def test_examples_show_nobodys_row(ranker: Ranker, server: str) -> None:
    user = examples_of(server)[0][2]["user"]
    assert user["user_id"] == "somebody"
    assert set(user) == {"user_id", "age", "town", "recent", "income"}
    rows = [{c: row[c] for c in user if c != "user_id"} for row in ranker.artifact.golden.to_pylist()]
    assert {c: v for c, v in user.items() if c != "user_id"} not in rows


def test_description_lists_bodies_answers_errors_and_headers(server: str) -> None:
    paths = httpx.get(f"{server}/openapi.json").json()["paths"]
    for path in ("/v1/rank", "/v1/score"):
        post = paths[path]["post"]
        assert set(post["requestBody"]["content"]) == {"application/json", MEDIA_TYPE}
        assert set(post["responses"]["200"]["content"]) == {"application/json", MEDIA_TYPE}
        assert set(post["responses"]) >= {"200", "400", "413", "415", "422", "429", "504"}
        assert set(post["responses"]["200"]["headers"]) == {"x-request-id", "x-slimrank-version"}
        assert "retry-after" in post["responses"]["429"]["headers"]


def test_description_follows_the_version_that_is_live(ranker: Ranker, two_task_ranker: Ranker) -> None:
    async def texts() -> list[str]:
        shelf = Shelf(Served(ranker.artifact.version, "a", ranker))
        service = Service(shelf, ServeConfig())
        api = make_api(service)
        shelf.add(Served(two_task_ranker.artifact.version, "b", two_task_ranker))
        first = json.dumps(api.openapi())
        shelf.flip(two_task_ranker.artifact.version)
        second = json.dumps(api.openapi())
        service.engine.stop()
        return [first, second]

    first, second = asyncio.run(texts())
    assert "item ids, explained" in first
    assert "item ids, explained" not in second
