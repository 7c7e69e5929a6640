"""serve/admin.py: the admin routes over a real Control, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.admin import MOST_BYTES, make_admin
from serve.config import ServeConfig
from serve.control import Control
from serve.fleet import Place, Report, begin, propose, take


class Client:
    """Asks an ASGI app, each time in a loop of its own."""

    def __init__(self, api: FastAPI) -> None:
        self.api = api

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.api)
            async with httpx.AsyncClient(transport=transport, base_url="http://admin") as http:
                return await http.request(method, path, **more)

        return asyncio.run(ask())

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self._ask("GET", path, **more)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return self._ask("POST", path, **more)


async def chunks() -> AsyncIterator[bytes]:
    yield b"{}"


def client(token: str | None = None, **more: Any) -> Client:
    fleet = begin("v1", "/artifacts/v1", 1.0)
    fleet = take(propose(fleet, Place(version="v2", path="/artifacts/v2"), (), 2.0), 2.0)
    return Client(make_admin(Control(fleet, ServeConfig()), token, **more))


def test_versions_and_rollback() -> None:
    admin = client()
    assert admin.get("/healthz").json() == {"status": "ok", "version": "v2"}
    found = admin.get("/v1/versions").json()
    assert (found["live"], found["previous"]) == ("v2", "v1")
    assert [v["version"] for v in found["versions"]] == ["v2", "v1"]
    assert admin.post("/v1/rollback").json()["live"] == "v1"
    assert admin.get("/v1/versions").json()["live"] == "v1"


@pytest.mark.parametrize(
    ("body", "status", "field", "said"),
    [
        ({"artifact": "/nowhere"}, 422, "artifact", "not an artifact"),
        ({"artifact": "relative"}, 422, "artifact", "absolute path"),
        ({"artifact": "s3://"}, 422, "artifact", "s3"),
        ({"artifact": "/a\0b"}, 422, "artifact", ""),
        ({"artifact": 7}, 422, "artifact", "string"),
        ({"artifact": ""}, 422, "artifact", ""),
        ({}, 422, "artifact", "required"),
        ({"artifact": "/x", "overide": []}, 422, "overide", ""),
        ({"artifact": "/x", "override": "overlap"}, 422, "override", "list"),
        ([], 422, "body", ""),
    ],
)
def test_deploy_that_cannot_be_names_the_field(body: Any, status: int, field: str, said: str) -> None:
    answer = client().post("/v1/deploy", json=body)
    assert (answer.status_code, answer.json()["field"]) == (status, field)
    assert said in answer.json()["error"]


def test_body_that_is_no_json_or_too_large_is_refused() -> None:
    headers = {"content-type": "application/json"}
    assert client().post("/v1/deploy", content=b"{", headers=headers).status_code == 422
    assert client().post("/v1/deploy", content=b" " * (MOST_BYTES + 1), headers=headers).status_code == 413
    chunked = client().post("/v1/deploy", content=chunks(), headers=headers)
    assert chunked.status_code == 413


def test_rollback_without_a_version_before_is_a_conflict() -> None:
    admin = Client(make_admin(Control(begin("v1", "/x", 1.0), ServeConfig())))
    answer = admin.post("/v1/rollback")
    assert answer.status_code == 409
    assert "no version before v1" in answer.json()["error"]


def test_token_is_asked_for_where_there_is_one() -> None:
    admin = client(token="secret")
    assert admin.get("/healthz").status_code == 200
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "secret"},
        {"authorization": b"Bearer \xff"},
    ):
        answer = admin.get("/v1/versions", headers=headers)
        assert (answer.status_code, answer.json()["field"]) == (401, "authorization")
    assert admin.get("/v1/versions", headers={"authorization": "Bearer secret"}).status_code == 200


def test_metrics_are_of_living_replicas() -> None:
    control = Control(begin("v1", "/x", 1.0), ServeConfig())
    admin = Client(make_admin(control, metrics=lambda meters: repr(sorted(meters.items())).encode()))
    control.heard["r"] = (float("inf"), Report(replica="r", live="v1", meter={"answers": 3}))
    control.heard["gone"] = (float("-inf"), Report(replica="gone", live="v1", meter={"answers": 9}))
    assert admin.get("/metrics").text == "[('r', {'answers': 3})]"
    assert client().get("/metrics").status_code == 404
