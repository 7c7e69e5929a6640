"""The Ray Serve application: replicas that rank in process, and the fleet that says which version.

`build` is what a Ray Serve config file names (import_path serve.app:build); `start` is what `slimrank serve` calls.
"""

import asyncio
import logging
import socket
import sys
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from pydantic import Field, ValidationError
from ray import serve
from ray.serve.api import RunTarget
from ray.serve.handle import DeploymentHandle

from serve.api import make_api
from serve.config import ServeConfig
from serve.control import memory_file, remembered, version_at
from serve.fast_path import without_haproxy
from serve.fleet import Order, Place, Report, order_of
from serve.fleet_app import ADMIN_HOST, FleetApp
from serve.follower import Follower, follow, load_as
from serve.keys import checked
from serve.service import Service
from serve.shelf import Shelf
from trainer.config import describe
from trainer.data.schema import Config
from trainer.errors import ConfigError, SlimrankError

APP_NAME = "slimrank"
UNBOUNDED = 1_000_000  # requests at a replica: its own queue decides what is refused
ORDER_S = 20.0  # how long a replica that starts waits for the fleet, which may be starting too
STATUS_S = 1.0  # how often a start that takes long is asked whether it has failed
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # reaches replicas of its own node alone
QUIET = {"log_level": "WARNING", "enable_access_log": False, "encoding": "JSON"}


class AppArgs(Config):
    """What a Ray Serve config file gives under `args`. `run`: another one forgets which versions were deployed."""

    artifact: str = Field(min_length=1)
    config: ServeConfig = ServeConfig()
    run: str | None = None
    version: str | None = None


@serve.deployment
@serve.ingress()
class RankerApp:
    """One replica: tables mapped from their files, one thread that scores, and a task that follows the fleet."""

    async def __init__(  # type: ignore[misc]
        self, artifact: str, config: dict[str, Any], run: str, fleet: DeploymentHandle
    ) -> None:
        logging.getLogger().setLevel(logging.WARNING)
        torch.set_num_threads(1)
        options = ServeConfig.model_validate(config)
        order = await first_order(fleet, artifact, options, run)
        loader = partial(load_as, score=options.score, users=options.users)
        shelf = Shelf(await asyncio.to_thread(loader, order.live))
        self.service = Service(shelf, options)
        name = serve.get_replica_context().replica_id.unique_id
        self.fleet = fleet
        self.follower = Follower(name, self.service.watch, order, loader, self.service.report)
        self.following = asyncio.create_task(follow(self.follower, self.sync))

    async def sync(self, report: Report) -> Order:
        """Report to the fleet, and hear what it wants."""
        order = await self.fleet.sync.remote(report)
        self.service.replicas = order.replicas
        return order

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve calls for the routes."""
        return make_api(self.service, named=True)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve calls for the load that serve.scaling decides by."""
        return self.service.load.since_last(time.monotonic())


def autoscaling(config: ServeConfig) -> dict[str, Any]:
    """Replicas by candidates and waiting, not by Ray Serve's count of requests."""
    return {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "upscale_delay_s": 0,  # the policy's own: what is refused brings a replica without delay
        "downscale_delay_s": config.downscale_delay_s,
        "look_back_period_s": 2,
        # how often replicas tell of their load; deprecated for variables that Ray 2.60 reads and then does not use
        "metrics_interval_s": 0.25,
        "policy": {
            "policy_function": "serve.scaling:BusyPolicy",
            "policy_kwargs": {
                "target_busy": config.target_busy,
                "upscale_delay_s": config.upscale_delay_s,
                "waiting_ms": config.max_wait_ms / 2,
            },
        },
    }


async def first_order(fleet: DeploymentHandle, artifact: str, config: ServeConfig, run: str) -> Order:
    """What is live now: as the fleet says, else as this node remembers, else what the server was started with."""
    try:
        return await asyncio.wait_for(fleet.order.remote(), ORDER_S)
    except Exception:  # Ray raises many kinds for a fleet that is away
        known = remembered(memory_file(config), run)
    if known is not None:
        return order_of(known)
    return Order(generation=0, live=Place(version=await asyncio.to_thread(version_at, artifact), path=artifact))


def application(args: AppArgs) -> serve.Application:
    """The two deployments, wired."""
    run = args.run or args.artifact
    config = args.config.model_dump(mode="json")
    fleet = FleetApp.options(  # type: ignore[attr-defined]
        name="fleet",
        num_replicas=1,
        max_ongoing_requests=1000,  # heartbeats wait for news here
        graceful_shutdown_timeout_s=1,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )
    ranker = RankerApp.options(  # type: ignore[attr-defined]
        name="ranker",
        max_ongoing_requests=UNBOUNDED,
        autoscaling_config=autoscaling(args.config),
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
        logging_config=QUIET,
    )
    return ranker.bind(args.artifact, config, run, fleet.bind(args.artifact, config, run, args.version))


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a Ray Serve config file (`import_path: serve.app:build`, `args` as AppArgs).

    Raises: ConfigError naming the key.
    """
    try:
        return application(AppArgs.model_validate(args))
    except ValidationError as error:
        raise ConfigError(describe(error, "args")) from None


def check_port(host: str, port: int, option: str = "another --port") -> None:
    """Raises: SlimrankError when something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SlimrankError(f"{host}:{port} cannot be listened on ({error.strerror}): pass {option}") from None


def start(artifact: Path, config: ServeConfig, version: str | None = None) -> str:
    """Deploy an artifact on the connected Ray, wait until it answers, and return its URL.

    `version`: of the artifact, where the caller has opened it.
    Raises: SlimrankError when a port is taken, serve.keys is no file of keys, or the server does not come up in time.
    """
    check_port(config.host, config.port)
    if word := without_haproxy():
        print(word, file=sys.stderr)
    check_port(ADMIN_HOST, config.admin, "another --port, or serve.admin_port")
    config = config.model_copy(update={"keys": checked(config.keys)})
    if logging.getLogger().level >= logging.ERROR:  # Serve sets its logger's level itself, to tell of every step
        logging.getLogger("ray.serve").addFilter(is_error)
    serve.start(
        proxy_location="HeadOnly" if config.host in LOOPBACK else "EveryNode",
        http_options={"host": config.host, "port": config.port},
        logging_config={"log_level": "WARNING"},
    )
    args = AppArgs(artifact=str(Path(artifact).absolute()), config=config, run=uuid.uuid4().hex, version=version)
    # whether requests are answered is seen below: Serve itself waits for more, and looks once in a while
    serve.run_many([RunTarget(application(args), name=APP_NAME)], wait_for_applications_running=False)
    url = f"http://{config.host}:{config.port}"
    for answering in (f"{url}/readyz", f"{admin_url(config)}/healthz"):
        wait_ready(answering, config.ready_timeout_s)
    return url


def is_error(record: logging.LogRecord) -> bool:
    """A log filter."""
    return record.levelno >= logging.ERROR


def admin_url(config: ServeConfig) -> str:
    """Where the admin routes are."""
    return f"http://{ADMIN_HOST}:{config.admin}"


def wait_ready(url: str, timeout_s: float) -> None:
    """Raises: SlimrankError when `url` does not answer in time, or the application has failed."""
    deadline = time.monotonic() + timeout_s
    look = time.monotonic() + STATUS_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > look:
            check_failed()
            look = time.monotonic() + STATUS_S
        time.sleep(0.05)
    raise SlimrankError(f"{url} did not answer within {timeout_s:.0f} s: see the Ray Serve logs, or run with --debug")


def check_failed() -> None:
    """Raises: SlimrankError with the reason when Ray Serve has given the application up."""
    found = serve.status().applications.get(APP_NAME)
    if found is not None and found.status == "DEPLOY_FAILED":
        reasons = [d.message for d in found.deployments.values() if d.message] or [found.message]
        lines = [line.strip() for line in reasons[0].splitlines() if line.strip()]
        raise SlimrankError(f"the server did not start: {lines[-1] if lines else 'no reason given'}")


def stop() -> None:
    """Take the application down; Ray and its Serve instance are left to whoever started them."""
    serve.delete(APP_NAME)
