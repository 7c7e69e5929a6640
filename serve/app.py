"""The Ray Serve application: one deployment that looks up, scores and picks the top k in process.

Requests that wait together are scored together, without waiting for more to come; large ones are scored alone.
"""

import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from ray import serve

from compress.artifact import load_artifact
from serve.config import ServeConfig
from serve.errors import RequestError
from serve.ranker import Ranker
from serve.request import RankRequest, RankResponse, parse_request, refuse_constant
from trainer.errors import SlimrankError

APP_NAME = "slimrank"
WEB = Path(__file__).parent / "web"

api = FastAPI(
    title="slimrank",
    version="1",
    description="Ranks candidates for a user with a compressed TorchRec model.",
    docs_url=None,
    redoc_url=None,
)


@api.exception_handler(RequestError)
async def _refuse(_request: Request, error: RequestError) -> JSONResponse:
    return JSONResponse({"error": error.message, "field": error.field}, status_code=error.status)


@api.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """A page to read the API and try it; it loads nothing from elsewhere."""
    return HTMLResponse((WEB / "docs.html").read_text(encoding="utf-8"))


async def read_json(request: Request, limit: int) -> Any:
    """The decoded body. Raises: RequestError (413 or 400) when it is too large or not JSON."""
    size = 0
    parts = []
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise RequestError("body", f"larger than {limit:,} bytes", 413)
        parts.append(part)
    try:
        return json.loads(b"".join(parts), parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        raise RequestError("body", "is not valid JSON", 400) from None


# Ray Serve pickles the API when the class below is decorated: all that its routes call stands above it.


@serve.deployment
@serve.ingress(api)
class RankerApp:
    """One replica: an artifact's tables mapped from its file, and one thread that scores."""

    def __init__(self, artifact: str, config: dict[str, Any]) -> None:
        logging.getLogger().setLevel(logging.WARNING)
        torch.set_num_threads(1)
        self.config = ServeConfig.model_validate(config)
        self.ranker = Ranker(load_artifact(Path(artifact)))
        self.batched.set_max_batch_size(self.config.batch_requests)

    @api.post(
        "/v1/rank",
        response_model=RankResponse,
        response_model_exclude_none=True,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": RankRequest.model_json_schema()}},
            }
        },
        responses={413: {"description": "Too many candidates or too large a body"}, 422: {"description": "Bad field"}},
    )
    async def rank(self, request: Request) -> RankResponse:
        """The top k of the candidates for a user."""
        body = await read_json(request, self.config.max_body_bytes)
        answer = await self.batched(parse_request(body, self.config.max_candidates))
        if isinstance(answer, RequestError):
            raise answer
        return answer

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Whether this replica can answer, and with which version."""
        return {"status": "ok", "version": self.ranker.artifact.version}

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0)
    async def batched(self, requests: list[RankRequest]) -> list[RankResponse | RequestError]:
        """Score requests that wait together, in groups of at most `batch_candidates` candidates."""
        answers: list[RankResponse | RequestError] = []
        group: list[RankRequest] = []
        for request in requests:
            waiting = sum(len(r.candidates) for r in group)
            if group and waiting + len(request.candidates) > self.config.batch_candidates:
                answers += self.ranker.rank_many(group)
                group = []
            group.append(request)
        return answers + self.ranker.rank_many(group)


def check_port(host: str, port: int) -> None:
    """Raises: SlimrankError when something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SlimrankError(
                f"{host}:{port} cannot be listened on ({error.strerror}): pass another --port"
            ) from None


def start(artifact: Path, config: ServeConfig) -> str:
    """Deploy an artifact on the connected Ray, wait until it answers, and return its URL.

    Raises: SlimrankError when the port is taken or the server does not come up in time.
    """
    check_port(config.host, config.port)
    quiet = logging.getLogger().level >= logging.ERROR
    serve.start(http_options={"host": config.host, "port": config.port}, logging_config={"log_level": "WARNING"})
    if quiet:  # starting Serve has just set its logger up to tell of every step
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    deployment = RankerApp.options(  # type: ignore[attr-defined]
        name="ranker",
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": 3,
            "downscale_delay_s": 60,
            "look_back_period_s": 5,
        },
        ray_actor_options={"num_cpus": 0.5, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    serve.run(deployment.bind(str(Path(artifact).absolute()), config.model_dump()), name=APP_NAME, route_prefix="/")
    url = f"http://{config.host}:{config.port}"
    wait_ready(url, config.ready_timeout_s)
    return url


def wait_ready(url: str, timeout_s: float) -> None:
    """Raises: SlimrankError when /healthz does not answer in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SlimrankError(f"{url} did not answer within {timeout_s:.0f} s: see the Ray Serve logs, or run with --debug")


def stop() -> None:
    """Take the application down; Ray and its Serve instance are left to whoever started them."""
    serve.delete(APP_NAME)
