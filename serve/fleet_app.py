"""The Ray Serve deployment that has the authority over versions, with the admin routes on a port of their own."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from ray import serve

from serve.admin import make_admin
from serve.config import ServeConfig
from serve.control import Control, memory_file, remembered, version_at
from serve.exposition import prometheus_text
from serve.fleet import Order, Report, begin, order_of

TOKEN = "SLIMRANK_ADMIN_TOKEN"
ADMIN_HOST = "127.0.0.1"
BIND_S = 15.0  # how long the port may still be held by the replica before this one


@serve.deployment
class FleetApp:
    """One replica, without a CPU of its own. What it knows outlives it: on disk, and in the replicas that rank."""

    async def __init__(  # type: ignore[misc]
        self, artifact: str, config: dict[str, Any], run: str, version: str | None = None
    ) -> None:
        options = ServeConfig.model_validate(config)
        file = memory_file(options)
        file.parent.mkdir(parents=True, exist_ok=True)
        fleet = remembered(file, run)
        if fleet is None:
            first = version if version is not None else await asyncio.to_thread(version_at, artifact)
            fleet = begin(first, artifact, time.time())
        self.control = Control(fleet, options, file, run)
        admin = make_admin(self.control, os.environ.get(TOKEN), prometheus_text)
        listener = await listening(ADMIN_HOST, options.admin)
        server = Server(uvicorn.Config(admin, log_config=None, access_log=False, lifespan="off"))
        self.tasks = [asyncio.create_task(server.serve([listener])), asyncio.create_task(self.control.tick())]

    async def sync(self, report: Report) -> Order:
        """A replica's heartbeat, and what it shall hold."""
        return await self.control.sync(report)

    async def order(self) -> Order:
        """What a replica that starts shall hold."""
        return order_of(self.control.fleet)


class Server(uvicorn.Server):
    """A server inside another one's process, whose signals are not its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


async def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises: OSError when another process still holds the port after BIND_S."""
    deadline = time.monotonic() + BIND_S
    while True:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            listener.close()
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
            continue
        listener.setblocking(False)
        return listener
