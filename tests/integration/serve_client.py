"""A server of its own process, what HAProxy tells of it, and clients good and bad."""

from __future__ import annotations

import csv
import http.client
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120
LOST = (ConnectionError, http.client.HTTPException, TimeoutError)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Server:
    """`slimrank serve`, running."""

    process: subprocess.Popen
    port: int
    stats_port: int
    temp: Path

    def replicas(self) -> dict[str, int]:
        """Requests that each replica which HAProxy takes for up was given so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.stats_port}/stats;csv", timeout=10) as answer:
            rows = csv.DictReader(io.StringIO(answer.read().decode().removeprefix("# ")))
            return {
                row["svname"]: int(row["stot"])
                for row in rows
                if row["svname"].startswith("SERVE_REPLICA") and row["status"].startswith("UP")
            }

    def wait_for(self, replicas: int) -> None:
        """Until so many replicas were given requests, and no others are there."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                now = self.replicas()
            except LOST + (OSError,):  # HAProxy is being replaced
                now = {}
            if len(now) == replicas and all(now.values()):
                return
            assert time.monotonic() < deadline, f"{now}, {replicas} wanted"
            time.sleep(0.1)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)


@contextmanager
def serving(artifact: Path, config: Path) -> Iterator[Server]:
    """A server with its own Ray, in a temp folder of its own."""
    temp = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # socket paths have a limit: keep it short
    port, stats_port = free_port(), free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_ADDRESS", "RAY_SERVE_"))}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(temp), "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port)}
    words = ["--artifact", str(artifact), "--config", str(config), "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert "serving" in line, process.communicate()[1]
        yield Server(process, port, stats_port, temp)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            shutil.rmtree(temp, ignore_errors=True)


@dataclass
class Load:
    """Clients that ask one after the other, each retrying once what was lost or refused for good."""

    server: Server
    body: bytes
    clients: int
    pause_s: float = 0.0
    outcomes: Counter = field(default_factory=Counter)
    lost_begun: list[float] = field(default_factory=list)  # when each request was begun whose connection broke
    gone: list[float] = field(default_factory=list)  # when the application was first found to be gone, by each client

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _client(self) -> None:
        connection = self.server.connect()
        while not self._stop.wait(self.pause_s):
            begun = time.monotonic()
            outcome = ask(connection, self.body)
            self._note(begun, outcome)
            if outcome in (200, 429):
                self.outcomes[outcome] += 1
                continue
            self.outcomes["retried"] += 1
            connection.close()
            begun = time.monotonic()
            outcome = ask(connection, self.body)
            self._note(begun, outcome)
            self.outcomes[outcome] += 1

    def _note(self, begun: float, outcome: int | str) -> None:
        if outcome in (404, "refused"):
            self.gone.append(time.monotonic())
        elif str(outcome).startswith("lost"):
            self.lost_begun.append(begun)


def ask(connection: http.client.HTTPConnection, body: bytes) -> int | str:
    """The status of a whole answer, or how it was lost."""
    try:
        connection.request("POST", "/v1/rank", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except LOST as error:
        connection.close()
        refused = isinstance(error, ConnectionRefusedError)
        return "refused" if refused else f"lost: {type(error).__name__}"
