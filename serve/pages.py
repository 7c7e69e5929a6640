"""The page for people at `/`, and what it asks: known users, items, and the live version beside a reference.

The reference is an artifact that never goes live, scored by a thread of its own: a page that is looked at takes the
live version no more of its thread than a request does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from compress.artifact import Artifact, read_manifest
from serve.body import read_body
from serve.compare import COMPARE_SCHEMA, CompareResponse, compared, parse_compare
from serve.config import ServeConfig
from serve.engine import Engine, Limits
from serve.formula import formula_for
from serve.openapi import refusals
from serve.ranker import ALONE, Answer, Ranker
from serve.request import RankResponse, ScoreRequest
from serve.service import Service
from serve.shelf import Served, load
from serve.users import open_users
from trainer.data.schema import BagFeature, DataConfig, NumericFeature
from trainer.errors import SlimrankError

WEB = Path(__file__).parent / "web"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
MOST = 500  # users or items in one answer
Limit = Annotated[int, Query(ge=1, le=MOST, description="How many at most")]


def add_pages(api: FastAPI, service: Service) -> None:
    """Add the page and its routes, where `serve.page` is true; loads the reference.

    Raises: SlimrankError when the reference cannot be loaded, or ranks other items than the live version does.
    """
    if not service.config.page:
        return
    reference = load_reference(service)
    limits = Limits(service.config.max_wait_ms / 1000, service.config.batch_candidates)
    engine: Engine[ScoreRequest, Answer] | None = None
    if reference is not None:
        engine = Engine(reference.ranker.answer_many, lambda request: request.count, ALONE, limits)
    turns = itertools.count()
    _add_files(api)
    _add_lists(api, service)

    @api.post(
        "/v1/compare",
        responses={200: {"model": CompareResponse}, **refusals()},
        response_model=None,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": COMPARE_SCHEMA}}}},
    )
    async def compare(request: Request) -> Response:
        """The live version's top k beside that of the reference, and the rank of each item in the other."""
        config = service.config
        body = await read_body(request, config.max_body_bytes)
        reader = service.shelf.live.ranker.reader
        asked = parse_compare(body, reader, config.max_candidates)
        every = asked.model_copy(update={"k": len(asked.candidates)})
        first = next(turns) % 2 == 1  # who comes second finds warm caches: take turns
        other = await engine.ask(every) if engine is not None and first else None
        answer = await service.rank(every)
        if engine is not None and not first:
            other = await engine.ask(every)
        live = service.shelf.loaded.get(answer.version, service.shelf.live).ranker.artifact
        beside = None
        if reference is not None and isinstance(other, RankResponse):
            beside = reference.ranker.artifact, other
        user = asked.user if reader.users is None else {**asked.user, **reader.users.fill(asked.user)}
        result = compared(asked.k, user, (live, answer), beside)
        return Response(result.model_dump_json(exclude_none=True), media_type="application/json")


def check_files(artifact: Artifact, config: ServeConfig) -> None:
    """Look at what a server will read beside its artifact, so that a mistake shows before it starts.

    Raises: SlimrankError naming the file, or the part of the formula, and the rule.
    """
    formula_for(config.score, artifact.model.tasks)
    if config.users is not None:
        open_users(config.users, artifact.model.transform.schema)
    if config.reference is not None and config.page:
        read_manifest(config.reference)


def load_reference(service: Service) -> Served | None:
    """The artifact to compare with, if one is configured. Raises: SlimrankError when it ranks other things."""
    path = service.config.reference
    if path is None:
        return None
    reference = load(str(path), service.config.score, service.config.users)
    live, other = (ranker.artifact.model.transform.schema for ranker in (service.shelf.live.ranker, reference.ranker))
    if live.ids != other.ids or [t.name for t in live.tasks] != [t.name for t in other.tasks]:
        raise SlimrankError(f"serve.reference: {path}: has other ids or tasks than what is served: give one of its run")
    return reference


def _add_files(api: FastAPI) -> None:
    for path, (name, kind) in FILES.items():
        content = (WEB / name).read_bytes()

        def file(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

        api.add_api_route(path, file, include_in_schema=False, response_class=Response)


def _add_lists(api: FastAPI, service: Service) -> None:
    @api.get("/v1/users")
    async def users(
        id: Annotated[str | None, Query(max_length=1000, description="This user alone")] = None, limit: Limit = 50
    ) -> dict[str, Any]:
        """Some known users, or one, with their raw features; and which features a user may have."""
        ranker = service.shelf.live.ranker
        schema = ranker.artifact.model.transform.schema
        found = users_of(ranker, id, limit)
        return {"id_column": schema.ids.user, "features": describe_features(schema), **found}

    @api.get("/v1/items")
    async def items(limit: Limit = 50) -> dict[str, Any]:
        """Some items of the catalogue with their titles, and how many there are."""
        catalogue = service.shelf.live.ranker.artifact.catalogue
        if catalogue is None:
            return {"total": 0, "items": []}
        some = zip(catalogue.ids[:limit], catalogue.titles[:limit], strict=True)
        return {"total": len(catalogue), "items": [{"id": plain(i), "title": t} for i, t in some]}


def users_of(ranker: Ranker, wanted: str | None, limit: int) -> dict[str, Any]:
    """Users of the users' file, else of the artifact's golden rows: `total` known, and some `users` of them."""
    known = ranker.reader.users
    if known is None:
        rows = golden_users(ranker.artifact)
        some = rows if wanted is None else [row for row in rows if str(row["id"]) == wanted]
        return {"total": len(rows), "source": "golden rows", "users": some[:limit]}
    if wanted is None:
        places = range(min(limit, len(known)))
    else:
        at = known.find(wanted)
        places = range(0) if at is None else range(at, at + 1)
    rows = [{"id": known.ids[at].as_py(), "features": jsonable(known.row(at))} for at in places]
    return {"total": len(known), "source": "users", "users": rows}


def golden_users(artifact: Artifact) -> list[dict[str, Any]]:
    """The users of the golden rows, each once, with the raw columns of their side."""
    schema = artifact.model.transform.schema
    golden = artifact.golden
    columns = [f.source for f in schema.features if f.side == "user" and f.source in golden.column_names]
    if schema.ids.user is None or schema.ids.user not in golden.column_names:
        return []
    found: dict[Any, dict[str, Any]] = {}
    for row in golden.select(list(dict.fromkeys([schema.ids.user, *columns]))).to_pylist():
        user = plain(row.pop(schema.ids.user))
        if user is not None:
            found.setdefault(user, {"id": user, "features": jsonable(row)})
    return list(found.values())


def describe_features(schema: DataConfig) -> list[dict[str, str]]:
    """The columns that a request's user may hold beside the id, and the kind of each: number, id, or list."""
    kinds: dict[str, str] = {}
    for feature in schema.features:
        if feature.side != "item" and feature.source != schema.ids.user:
            several = isinstance(feature, BagFeature) and feature.separator is None
            kinds[feature.source] = "list" if several else "number" if isinstance(feature, NumericFeature) else "id"
    return [{"column": column, "kind": kind} for column, kind in kinds.items()]


def jsonable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Raw values as JSON holds them; missing ones left out."""
    return {name: value for name, value in ((k, plain(v)) for k, v in row.items()) if value is not None}


def plain(value: Any) -> Any:
    """A raw value as JSON: numbers, text and lists of them; what is neither (a date) as its text, NaN as None."""
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)
