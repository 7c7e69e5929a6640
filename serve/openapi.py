"""What the OpenAPI description says beyond the routes' own signatures: bodies, answers, errors, headers, examples.

Examples are made for the artifact that is live, so that each can be sent as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve.arrow_body import MEDIA_TYPE
from serve.headers import REQUEST_ID, VERSION
from serve.ranker import Ranker
from serve.request import Kind, Problem, RankRequest
from trainer.data.schema import columns_of

ERRORS = {
    400: "The body is not valid JSON, or not a plain Arrow stream",
    413: "Too many candidates, or too large a body",
    415: "A content-encoding that is not read",
    422: "A field that breaks its rule",
    401: "An API key is required, or this one is not known",
    403: "The API key is revoked",
    408: "The body did not arrive in time",
    429: "Overloaded, or at the limit of the API key: try again after Retry-After seconds",
    504: "The deadline passed",
}
HEADERS = {
    REQUEST_ID: {"description": "The caller's id of the request, or a new one", "schema": {"type": "string"}},
    VERSION: {"description": "The version of the artifact that answered", "schema": {"type": "string"}},
}
RETRY = {"retry-after": {"description": "Seconds after which to try again", "schema": {"type": "integer"}}}
ARROW_IN = (
    "An Arrow IPC stream of uncompressed record batches: columns of candidates (or the column of the item's id alone, "
    "for ids of the catalogue). The rest of the request is a JSON object in the schema's metadata under `slimrank`."
)
ARROW_OUT = "Asked for by `accept`: an Arrow IPC stream; what is not of the items is JSON in the metadata's `slimrank`."
SHOWN = 3  # candidates of an example


def operation(body: Kind, answer: type[BaseModel]) -> dict[str, Any]:
    """How a route that takes `body` and gives `answer`, each as JSON or Arrow, is described to FastAPI."""
    binary = {"type": "string", "format": "binary"}
    good = {
        "model": answer,
        "description": (answer.__doc__ or "").partition("\n")[0],
        "headers": HEADERS,
        "content": {MEDIA_TYPE: {"schema": {**binary, "description": ARROW_OUT}}},
    }
    content = {
        "application/json": {"schema": body.model_json_schema()},
        MEDIA_TYPE: {"schema": {**binary, "description": ARROW_IN}},
    }
    name = {"name": REQUEST_ID, "in": "header", "required": False, "schema": {"type": "string", "maxLength": 128}}
    extra = {"requestBody": {"required": True, "content": content}, "parameters": [name]}
    return {"responses": {200: good, **refusals()}, "openapi_extra": extra}


def refusals() -> dict[int | str, dict[str, Any]]:
    """How the errors of a route are described to FastAPI."""
    return {
        status: {"description": why, "model": Problem, "headers": HEADERS | (RETRY if status == 429 else {})}
        for status, why in ERRORS.items()
    }


def describe(api: FastAPI, live: Callable[[], Ranker]) -> None:
    """Make the app's description hold examples for the ranker that is live."""
    made: dict[str, dict[str, Any]] = {}

    def openapi() -> dict[str, Any]:
        ranker = live()
        version = ranker.artifact.version
        if version not in made:
            made.clear()
            made[version] = _with_examples(api, ranker)
        return made[version]

    api.openapi = openapi  # type: ignore[method-assign]


def _with_examples(api: FastAPI, ranker: Ranker) -> dict[str, Any]:
    described = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
    ranked = examples(ranker)
    for path, cases in (("/v1/rank", ranked), ("/v1/score", {k: _scored(v) for k, v in ranked.items()})):
        body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        body["examples"] = {name: {"summary": name, "value": value} for name, value in cases.items() if value}
    return described


def examples(ranker: Ranker) -> dict[str, dict[str, Any]]:
    """Bodies of POST /v1/rank by what they show, for the artifact of a ranker.

    Values are those of its golden rows. A user's columns are taken from different rows, and their id is made up, so
    that nobody's own row is shown.
    """
    reader = ranker.reader
    rows = [{k: v for k, v in row.items() if _is_json(v)} for row in ranker.artifact.golden.to_pylist()]
    items = {c for f in reader.of_items.schema.features for c in columns_of(f)} | {reader.item_column}
    user: dict[str, Any] = {}
    for at, feature in enumerate(reader.of_request.schema.features):
        # all columns of one feature from one row: weights belong to their ids
        values = itertools.islice(itertools.cycle(rows), at, at + len(rows))
        row = next((r for r in values if r.get(feature.source) is not None), {})
        user |= {c: row[c] for c in columns_of(feature) if c in row}
    if reader.whole.schema.ids.user in user:
        user[str(reader.whole.schema.ids.user)] = "somebody"
    candidates = [{c: v for c, v in row.items() if c in items and v is not None} for row in rows[:SHOWN]]
    shared = sorted(set.intersection(*(set(c) for c in candidates))) if candidates else []
    bodies: dict[str, dict[str, Any]] = {}
    if reader.catalogue is not None and len(reader.catalogue):
        ids = [i if isinstance(i, int) else str(i) for i in itertools.islice(reader.catalogue.ids, SHOWN)]
        bodies["item ids"] = {"user": user, "candidates": ids, "k": 2}
        bodies["item ids, explained"] = {"user": user, "candidates": ids, "k": 2, "explain": True}
    bodies["objects"] = {"user": user, "candidates": candidates, "k": 2}
    if shared:
        columns = {c: [row[c] for row in candidates] for c in shared}
        bodies["columns"] = {"user": user, "candidates": columns, "k": 2, "timeout_ms": 1000}
    return bodies


def _scored(body: dict[str, Any]) -> dict[str, Any]:
    """The same body for POST /v1/score; nothing for one that asks what is not scored."""
    if body.get("explain"):
        return {}
    return {
        key: value for key, value in body.items() if key in RankRequest.model_fields and key not in ("k", "explain")
    }


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_json(v) for v in value)
    return value is None or isinstance(value, str | int | bool) or (isinstance(value, float) and value == value)
