"""The public HTTP routes over a Service. Knows nothing of Ray: the same app runs under Ray Serve and bare uvicorn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from serve.access import Access, open_ring
from serve.arrow_body import MEDIA_TYPE, encode_arrow, parse_arrow
from serve.body import read_body
from serve.errors import RequestError
from serve.gate import Gate
from serve.headers import VERSION, Identified, request_id
from serve.openapi import describe, operation
from serve.pages import add_pages
from serve.ranker import Answer
from serve.request import Kind, RankRequest, RankResponse, ScoreRequest, ScoreResponse, parse_body
from serve.service import Service

UNREAD = (408, 413)  # part of the body was not read, and who goes on sending it must not be listened to
WEB = Path(__file__).parent / "web"


def make_api(service: Service, *, named: bool = False) -> FastAPI:
    """The routes of one replica, and the page; `named`: what is in front adds x-request-id to its answers.

    Raises: SlimrankError when serve.keys is no file of keys, or the page's reference does not fit.
    """
    api = FastAPI(
        title="slimrank",
        version="1",
        description="Ranks candidates for a user with a compressed TorchRec model.",
        docs_url=None,
        redoc_url=None,
    )
    describe(api, lambda: service.shelf.live.ranker)
    # the last one added is the first that a request passes
    api.add_middleware(Gate, engine=service.engine, guarded=frozenset({"/v1/rank", "/v1/score"}))
    api.add_middleware(Access, service=service, ring=open_ring(service.config), refuse=refusal)
    api.add_middleware(Identified, version=lambda: service.shelf.live.version, named=named)
    refuse_plainly(api)

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """A page to read the API and try it; it loads nothing from elsewhere."""
        return HTMLResponse((WEB / "docs.html").read_text(encoding="utf-8"))

    @api.post("/v1/rank", response_model=None, **operation(RankRequest, RankResponse))
    async def rank(request: Request) -> Response:
        """The top k of the candidates for a user."""
        return answer_with(request, await service.rank(await read_request(request, service, RankRequest)))

    @api.post("/v1/score", response_model=None, **operation(ScoreRequest, ScoreResponse))
    async def score(request: Request) -> Response:
        """The scores of all candidates, in the order of the request."""
        return answer_with(request, await service.score(await read_request(request, service, ScoreRequest)))

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this replica is alive."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Whether this replica can answer, and with which version."""
        return {"status": "ready", "version": service.shelf.live.version}

    add_pages(api, service)
    return api


# -- requests --------------------------------------------------------------------------------------------------------


async def read_request(request: Request, service: Service, kind: Kind) -> Any:
    """The request that a body holds, as JSON or Arrow by its content type.

    Raises: RequestError naming what is wrong with it.
    """
    headers = request.headers
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError("content-encoding", f"{encoding[:40]!r} is not read: send the body as it is", 415)
    body = await read_body(request, service.config.max_body_bytes)
    is_arrow = headers.get("content-type", "").partition(";")[0].strip().lower() == MEDIA_TYPE
    asked = (parse_arrow if is_arrow else parse_body)(body, service.config.max_candidates, kind)
    asked.request_id = request_id(request.scope)
    return asked


# -- answers ---------------------------------------------------------------------------------------------------------


def answer_with(request: Request, answer: Answer) -> Response:
    """An answer as Arrow where its caller accepts that, else as JSON; its headers name the version that scored."""
    headers = {VERSION: answer.version}
    if MEDIA_TYPE in request.headers.get("accept", ""):
        return Response(encode_arrow(answer), media_type=MEDIA_TYPE, headers=headers)
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json", headers=headers)


def refusal(error: RequestError, name: str | None = None) -> JSONResponse:
    """What a refused request gets: the field, the rule, and where it helps, when to try again."""
    headers = {} if error.retry_after is None else {"retry-after": error.retry_after}
    if error.status in UNREAD:
        headers["connection"] = "close"
    return problem(error.status, error.field, error.message, name, headers)


def problem(status: int, field: str, message: str, name: str | None, headers: Any = None) -> JSONResponse:
    """An error as JSON; `name` is the request's id."""
    content = {"error": message, "field": field} | ({"request_id": name} if name else {})
    return JSONResponse(content, status_code=status, headers=headers)


def refuse_plainly(api: FastAPI) -> None:
    """Make every error of an app JSON that names a field and the request."""

    @api.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return refusal(error, request_id(request.scope))

    @api.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> JSONResponse:
        field = "method" if error.status_code == 405 else "path"
        return problem(error.status_code, field, str(error.detail), request_id(request.scope), error.headers)

    @api.exception_handler(RequestValidationError)
    async def bad_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return problem(422, str(first["loc"][-1]), first["msg"], request_id(request.scope))

    @api.exception_handler(Exception)
    async def defect(request: Request, _error: Exception) -> JSONResponse:
        return problem(500, "server", "an internal error; the log tells of it by request_id", request_id(request.scope))
