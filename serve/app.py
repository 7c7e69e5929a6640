"""The Ray Serve application: one deployment whose replicas look up, score and pick the top k in process."""

import logging
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from ray import serve

from serve.api import make_api
from serve.config import ServeConfig
from serve.service import Service
from serve.shelf import Shelf, load
from trainer.errors import SlimrankError

APP_NAME = "slimrank"
UNBOUNDED = 1_000_000  # requests at a replica: its own queue decides what is refused


@serve.deployment
@serve.ingress()
class RankerApp:
    """One replica: an artifact's tables mapped from its file, and one thread that scores."""

    def __init__(self, artifact: str, config: dict[str, Any]) -> None:
        logging.getLogger().setLevel(logging.WARNING)
        torch.set_num_threads(1)
        self.service = Service(Shelf(load(artifact)), ServeConfig.model_validate(config))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls for the routes."""
        return make_api(self.service)


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
        max_ongoing_requests=UNBOUNDED,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            "look_back_period_s": 2,
        },
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    serve.run(
        deployment.bind(str(Path(artifact).absolute()), config.model_dump(mode="json")), name=APP_NAME, route_prefix="/"
    )
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
