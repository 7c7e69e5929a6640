"""The admin routes over a Control: deploy, roll back, versions, metrics; on a port of their own. No Ray."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, StrictStr

from serve.control import Control, Refused
from serve.fleet import FleetError
from trainer.errors import SlimrankError

Metrics = Callable[[Mapping[str, Mapping[str, Any]]], bytes]
MOST_BYTES = 64_000  # of a body


class DeployRequest(BaseModel):
    """Which artifact to deploy: an absolute path on the server, or a URI; checks that it may fail, by name.

    `catalogue`: an absolute path on the server of one that takes the place of the artifact's own.
    """

    model_config = ConfigDict(extra="forbid")

    artifact: Annotated[StrictStr, Field(min_length=1, max_length=4096)]
    catalogue: Annotated[StrictStr, Field(min_length=1, max_length=4096)] | None = None
    override: list[StrictStr] = Field(default=[], max_length=16)


def make_admin(control: Control, token: str | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The admin routes. With a `token`, all but /healthz ask for it as `Authorization: Bearer`."""
    api = FastAPI(title="slimrank admin", version="1", docs_url=None, redoc_url=None)

    @api.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        if not allowed(request, token):
            return problem(401, "authorization", "this server asks for 'Bearer' and the value of SLIMRANK_ADMIN_TOKEN")
        if not sized(request):
            return problem(413, "body", f"must say its length, of at most {MOST_BYTES:,} bytes")
        return await go_on(request)

    @api.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return problem(422, str(first["loc"][1] if len(first["loc"]) > 1 else "body"), first["msg"])

    @api.exception_handler(SlimrankError)
    async def refuse(_request: Request, error: SlimrankError) -> JSONResponse:
        if isinstance(error, Refused | FleetError):
            return problem(409, "version", str(error))
        return problem(422, "artifact", str(error))

    @api.post("/v1/deploy")
    async def deploy(asked: DeployRequest) -> dict[str, Any]:
        """Load, verify and compare an artifact in all replicas; answered when it is live, or refused (409)."""
        return await control.deploy(asked.artifact, tuple(asked.override), asked.catalogue)

    @api.post("/v1/rollback")
    async def rollback() -> dict[str, Any]:
        """Go back to the previous version, which is still loaded."""
        return await control.roll_back()

    @api.get("/v1/versions")
    async def versions() -> dict[str, Any]:
        """The versions known, and what each replica has loaded."""
        return control.describe()

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the admin routes answer."""
        return {"status": "ok", "version": control.fleet.live}

    if metrics is not None:

        @api.get("/metrics")
        async def scrape() -> Response:
            """Counts of all replicas, as Prometheus reads them."""
            return PlainTextResponse(metrics(control.meters()), media_type="text/plain; version=0.0.4; charset=utf-8")

    return api


def allowed(request: Request, token: str | None) -> bool:
    """Whether a request may do what it asks for."""
    if token is None or request.url.path == "/healthz":
        return True
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


def sized(request: Request) -> bool:
    """Whether a body says that it is small enough to be read."""
    length = request.headers.get("content-length", "0")
    return "transfer-encoding" not in request.headers and length.isdigit() and int(length) <= MOST_BYTES


def problem(status: int, field: str, message: str) -> JSONResponse:
    """What a refused request gets."""
    return JSONResponse({"error": message, "field": field}, status_code=status)
