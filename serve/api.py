"""The public HTTP routes over a Service. Knows nothing of Ray: the same app runs under Ray Serve and bare uvicorn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from serve.errors import RequestError
from serve.request import RankRequest, RankResponse, parse_body
from serve.service import Service

WEB = Path(__file__).parent / "web"
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is not valid JSON"},
    413: {"description": "Too many candidates or too large a body"},
    422: {"description": "Bad field"},
    429: {"description": "Overloaded: try again after Retry-After seconds"},
    504: {"description": "The deadline passed"},
}


def make_api(service: Service) -> FastAPI:
    """The routes of one replica."""
    api = FastAPI(
        title="slimrank",
        version="1",
        description="Ranks candidates for a user with a compressed TorchRec model.",
        docs_url=None,
        redoc_url=None,
    )

    @api.exception_handler(RequestError)
    async def refuse(_request: Request, error: RequestError) -> JSONResponse:
        return refusal(error)

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """A page to read the API and try it; it loads nothing from elsewhere."""
        return HTMLResponse((WEB / "docs.html").read_text(encoding="utf-8"))

    @api.post(
        "/v1/rank",
        responses={200: {"model": RankResponse}, **REFUSALS},
        response_class=JSONResponse,
        response_model=None,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": RankRequest.model_json_schema()}},
            }
        },
    )
    async def rank(request: Request) -> Response:
        """The top k of the candidates for a user."""
        service.engine.admit()
        asked = parse_body(await read_body(request, service.config.max_body_bytes), service.config.max_candidates)
        answer = await service.rank(asked)
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this replica can answer, and with which version."""
        return {"status": "ok", "version": service.shelf.live.version}

    return api


def refusal(error: RequestError) -> JSONResponse:
    """What a refused request gets: the field, the rule, and where it helps, when to try again."""
    wait = error.retry_after_s
    headers = None if wait is None else {"retry-after": str(max(1, round(wait + 0.5)))}
    return JSONResponse({"error": error.message, "field": error.field}, status_code=error.status, headers=headers)


async def read_body(request: Request, limit: int) -> bytes:
    """The body. Raises: RequestError 413 when it is longer than `limit` bytes."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise RequestError("body", f"larger than {limit:,} bytes", 413)
        parts.append(part)
    return b"".join(parts)
