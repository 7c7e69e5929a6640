"""The page's routes: users and items to choose from, the live version beside a reference."""

from __future__ import annotations

import asyncio
import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from compress_builders import World, quiet
from fastapi import FastAPI

from compress.artifact import Artifact
from serve.api import make_api
from serve.compare import overlap, table_bytes
from serve.config import ServeConfig
from serve.pages import FILES, check_files, golden_users, plain
from serve.ranker import Ranker
from serve.request import RankRequest
from serve.service import Service
from serve.shelf import Shelf, load
from trainer.data.users import write_users
from trainer.errors import SlimrankError


class Client:
    """Asks an app without a network, all in one event loop."""

    def __init__(self, api: FastAPI) -> None:
        self.asking = httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test", timeout=60)
        self.runner = asyncio.Runner()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.runner.run(self.asking.get(path, **options))

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.runner.run(self.asking.post(path, **options))


def client_of(artifact: Artifact, **config: Any) -> Client:
    options = ServeConfig.model_validate({"max_wait_ms": 60_000} | config)
    live = load(str(artifact.folder), options.score, options.users)
    return Client(make_api(Service(Shelf(live), options)))


@pytest.fixture(scope="module")
def fp32(world: World) -> Artifact:
    """The same checkpoint with tables of 32 bits."""
    return world.artifact(world.uniform(32))


@pytest.fixture(scope="module")
def users(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("users") / "users.arrow"
    write_users(world.run.data, path, quiet)
    return path


@pytest.fixture(scope="module")
def client(artifact: Artifact, fp32: Artifact, users: Path) -> Client:
    return client_of(artifact, users=str(users), reference=str(fp32.folder))


def test_both_sides_are_ordered_by_the_formula(artifact: Artifact, fp32: Artifact) -> None:
    client = client_of(artifact, reference=str(fp32.folder), score="2 + click")
    answer = client.post("/v1/compare", json={"user": {}, "k": 5}).json()
    assert all(2 < item["score"] < 3 for side in ("live", "reference") for item in answer[side]["items"])


def test_a_formula_of_unknown_tasks_is_refused_before_the_server_starts(artifact: Artifact) -> None:
    with pytest.raises(SlimrankError, match="'buy' is no task of this model"):
        check_files(artifact, ServeConfig(score="buy * 2"))


def test_page_loads_nothing_from_elsewhere(client: Client) -> None:
    for path, (_, kind) in FILES.items():
        answer = client.get(path)
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "//" not in answer.text.replace("// ", "")  # no address, comments apart
    assert "<script src=" in client.get("/").text
    assert "innerHTML" not in client.get("/page.js").text


def test_page_and_its_routes_can_be_left_out(artifact: Artifact, fp32: Artifact) -> None:
    client = client_of(artifact, page=False, reference=str(fp32.folder))
    assert [client.get(path).status_code for path in ("/", "/page.js", "/v1/users", "/v1/items")] == [404] * 4
    assert client.post("/v1/compare", json={"user": {}}).status_code == 404
    assert client.post("/v1/rank", json={"user": {}, "candidates": ["i1"]}).status_code == 200


def test_users_come_from_the_file(client: Client, world: World) -> None:
    told = client.get("/v1/users", params={"limit": 3}).json()
    assert told["id_column"] == "user_id"
    assert told["total"] == len(set(world.raw["user_id"].to_pylist()))
    assert len(told["users"]) == 3
    columns = {f["column"]: f["kind"] for f in told["features"]}
    assert columns == {"recent": "list", "town": "id", "age": "number", "income": "number"}
    again = client.get("/v1/users", params={"id": told["users"][2]["id"]}).json()
    assert again["users"] == told["users"][2:]
    assert client.get("/v1/users", params={"id": "nobody"}).json()["users"] == []


def test_users_without_a_file_are_those_of_the_golden_rows(artifact: Artifact) -> None:
    told = client_of(artifact).get("/v1/users", params={"limit": 500}).json()
    golden = set(artifact.golden["user_id"].to_pylist())
    assert {user["id"] for user in told["users"]} == golden
    assert told["total"] == len(golden)
    first = told["users"][0]
    line = next(row for row in artifact.golden.to_pylist() if row["user_id"] == first["id"])
    assert first["features"] == {c: line[c] for c in ("recent", "town", "age") if line[c] is not None}


def test_items_are_those_of_the_catalogue(client: Client, artifact: Artifact) -> None:
    assert artifact.catalogue is not None
    told = client.get("/v1/items", params={"limit": 2}).json()
    assert told["total"] == len(artifact.catalogue)
    assert told["items"] == [{"id": artifact.catalogue.ids[i], "title": artifact.catalogue.titles[i]} for i in (0, 1)]


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "limit=x", "limit=", "limit=1e2"])
@pytest.mark.parametrize("path", ["/v1/users", "/v1/items"])
def test_bad_query_is_refused_naming_its_field(client: Client, path: str, query: str) -> None:
    answer = client.get(f"{path}?{query}")
    assert (answer.status_code, answer.json()["field"]) == (422, "limit")


def test_comparison_is_both_rankings_and_what_moved(client: Client, artifact: Artifact, fp32: Artifact) -> None:
    ids = [f"i{i}" for i in range(60)]
    user = {"user_id": 1003, "age": 33}
    told = client.post("/v1/compare", json={"user": user, "candidates": ids, "k": 7}).json()
    expected = {}
    for name, opened in (("live", artifact), ("reference", fp32)):
        ranker = Ranker(opened)
        asked = RankRequest(user=told["user"], candidates=ids, k=60)
        expected[name] = [(i.id, i.score) for i in ranker.rank(asked).items]
        assert [(i["id"], i["score"]) for i in told[name]["items"]] == expected[name][:7]
        assert told[name]["version"] == opened.version
        assert told[name]["ms"] > 0
        assert told[name]["artifact_bytes"] == opened.sizes["artifact_bytes"]
    ranks = {name: {i: rank for rank, (i, _) in enumerate(every, 1)} for name, every in expected.items()}
    for item in told["live"]["items"]:
        assert (item["rank"], item["other_rank"]) == (ranks["live"][item["id"]], ranks["reference"][item["id"]])
    both = {i for i, _ in expected["live"][:7]} & {i for i, _ in expected["reference"][:7]}
    assert told["overlap"] == len(both) / 7
    assert told["candidates"] == 60
    assert told["user"]["age"] == 33
    assert "town" in told["user"] or "recent" in told["user"]  # what the file knows of 1003 besides


def test_comparison_without_candidates_takes_the_catalogue(client: Client, artifact: Artifact) -> None:
    assert artifact.catalogue is not None
    told = client.post("/v1/compare", json={"user": {"user_id": 1000}}).json()
    assert told["candidates"] == min(500, len(artifact.catalogue))
    assert len(told["live"]["items"]) == len(told["reference"]["items"]) == 10


def test_comparison_without_reference_has_one_side(artifact: Artifact) -> None:
    told = client_of(artifact).post("/v1/compare", json={"user": {}, "k": 3}).json()
    assert "reference" not in told
    assert "overlap" not in told
    assert [i["rank"] for i in told["live"]["items"]] == [1, 2, 3]
    assert all("other_rank" not in i for i in told["live"]["items"])


BAD: dict[str, tuple[Any, int, str]] = {
    "a list": ([1], 422, "body"),
    "no user": ({}, 422, "user"),
    "user is text": ({"user": "x"}, 422, "user"),
    "k is zero": ({"user": {}, "k": 0}, 422, "k"),
    "no candidates": ({"user": {}, "candidates": []}, 422, "candidates"),
    "candidates are null": ({"user": {}, "candidates": None}, 422, "candidates"),
    "candidates are columns": ({"user": {}, "candidates": {"item_id": ["i1"]}}, 422, "candidates"),
    "too many candidates": ({"user": {}, "candidates": ["i1"] * 10_001}, 413, "candidates"),
    "unknown key": ({"user": {}, "explain": True}, 422, "explain"),
    "age is an object": ({"user": {"age": {}}}, 422, "user.age"),
    "id is a list": ({"user": {"user_id": [1]}}, 422, "user.user_id"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_comparison_is_refused_naming_its_field(client: Client, name: str) -> None:
    body, status, field = BAD[name]
    answer = client.post("/v1/compare", json=body)
    assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text


def test_body_that_is_no_json_or_too_long_is_refused(client: Client) -> None:
    assert client.post("/v1/compare", content=b"{").status_code == 400
    assert client.post("/v1/compare", content=b'{"user": {"age": NaN}}').status_code == 400
    assert client.post("/v1/compare", content=b" " * 4_000_001).status_code == 413


def test_model_without_catalogue_says_so(two_task_ranker: Ranker) -> None:
    client = client_of(two_task_ranker.artifact)
    assert client.get("/v1/items").json() == {"total": 0, "items": []}
    answer = client.post("/v1/compare", json={"user": {}})
    assert (answer.status_code, answer.json()["field"]) == (422, "candidates")
    rows = [{"item_id": "i1", "price": 2}, {"item_id": "i2"}]
    assert client.post("/v1/compare", json={"user": {}, "candidates": rows}).json()["candidates"] == 2


def test_reference_of_another_schema_is_refused_at_the_start(artifact: Artifact, two_task_ranker: Ranker) -> None:
    with pytest.raises(SlimrankError, match=r"serve\.reference.*other ids or tasks"):
        client_of(artifact, reference=str(two_task_ranker.artifact.folder))


def test_table_bytes_of_fp32_count_rows_alone(artifact: Artifact, fp32: Artifact) -> None:
    assert table_bytes(fp32) == fp32.sizes["table_bytes_fp32"]
    assert table_bytes(artifact) == artifact.sizes["table_bytes"] < table_bytes(fp32)


def test_overlap_is_the_share_of_ids_in_both() -> None:
    assert overlap(["a", "b", "c", "d"], ["d", "x", "a", "y"]) == 0.5
    assert overlap(["a"], ["a"]) == 1
    assert overlap(["a", "a", "b"], ["a", "b"]) == 1


def test_raw_values_become_json() -> None:
    assert plain(datetime.date(2020, 1, 2)) == "2020-01-02"
    assert plain([1, float("nan"), None, "x"]) == [1, None, None, "x"]
    assert plain(float("inf")) is None


def test_golden_rows_without_the_users_column_give_no_users(artifact: Artifact) -> None:
    from dataclasses import replace

    assert golden_users(replace(artifact, golden=artifact.golden.drop_columns(["user_id"]))) == []
