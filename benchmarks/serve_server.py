"""A running `slimrank serve` of one's own for benchmarks/serve.py: start, look at its processes, kill one, stop.

What it runs is found below its own process in /proc, and what HAProxy has passed to which replica in HAProxy's socket.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from serve.fast_path import free_ports

ROOT = Path(__file__).resolve().parents[1]
READY_S = 180.0
REPLICA, PROXY = "ray::ServeReplica:slimrank:ranker", "haproxy"  # in the commands of their processes
SERVER = "SERVE_REPLICA_slimrank-ranker"  # how HAProxy's names of replicas begin
SOCKET = "haproxy.sock"
TICKS = os.sysconf("SC_CLK_TCK")


class Process:
    """A server process that was started here, in a session of its own; ended with all that it started."""

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, url: str) -> None:
        """Raises: SystemExit with the end of its log when it ends, or does not answer 200 in time."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until and self.child.poll() is None:
            try:
                if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        self.stop()
        raise SystemExit(f"{url} did not answer:\n{self.log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        """Ask it to end, and after a while kill it and what is left below it."""
        below = descendants(self.child.pid)
        self.child.terminate()
        try:
            self.child.wait(60)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        for pid, began in below.items():
            if started(pid) == began:  # still the process that it was
                os.kill(pid, signal.SIGKILL)


class Server:
    """`slimrank serve` of an artifact, with some keys of its `serve` section; a context."""

    def __init__(self, artifact: Path, replicas: tuple[int, int] = (1, 1), **options: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # socket paths have a limit: keep it short
        self.port, self.admin_port = free_ports(2)
        self.url, self.admin = (f"http://127.0.0.1:{port}" for port in (self.port, self.admin_port))
        least, most = replicas
        config = {"admin_port": self.admin_port, "min_replicas": least, "max_replicas": most, **options}
        (self.folder / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = ["-m", "cluster", "serve", "--artifact", str(artifact), "--config", str(self.folder / "serve.yaml")]
        environment = {"RAY_TMPDIR": str(self.folder), "RAY_SERVE_HAPROXY_SOCKET_PATH": str(self.folder / SOCKET)}
        self.process = Process([*command, "--port", str(self.port), "--json"], self.folder, environment)
        self.least = least

    def __enter__(self) -> Server:
        try:
            self.process.wait(f"{self.url}/healthz")
            until = time.monotonic() + READY_S
            while len(self.answered()) < self.least:
                if time.monotonic() > until:
                    raise SystemExit(f"HAProxy knows {len(self.answered())} replicas, not {self.least}")
                time.sleep(0.1)
        except BaseException:
            self.process.stop()
            raise
        return self

    def __exit__(self, _kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        self.process.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def replicas(self) -> list[int]:
        """The processes that rank."""
        return sorted(descendants(self.process.child.pid, REPLICA))

    def cpu_s(self) -> float:
        """CPU seconds that ranking and its proxy have taken so far."""
        proxies = descendants(self.process.child.pid, PROXY)
        return sum(cpu_s(pid) for pid in {*self.replicas(), *proxies})

    def answered(self) -> dict[str, int]:
        """Requests that each replica in rotation has answered with 2xx, as HAProxy counts them."""
        mine = [r for r in self._stats() if r["svname"].startswith(SERVER) and r["status"].startswith("UP")]
        return {row["svname"]: int(row["hrsp_2xx"] or 0) for row in mine}

    def _stats(self) -> list[dict[str, str]]:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as own:
                own.connect(str(next(self.folder.glob(f"*/{SOCKET}"))))  # Ray puts it into a folder of the session's
                own.sendall(b"show stat\n")
                text = b"".join(iter(lambda: own.recv(1 << 16), b"")).decode()
        except (OSError, StopIteration):
            return []  # not up yet
        return list(csv.DictReader(io.StringIO(text)))


# -- /proc -------------------------------------------------------------------------------------------------------------


def descendants(root: int, word: str = "") -> dict[int, int]:
    """When each process below `root` whose command holds `word` was started, by its id."""
    stats = {int(p.name): stat for p in Path("/proc").glob("[0-9]*") if (stat := _stat(int(p.name)))}

    def below(pid: int) -> bool:
        while pid in stats and pid != root:
            pid = int(stats[pid][1])
        return pid == root

    return {pid: int(s[19]) for pid, s in stats.items() if pid != root and below(pid) and word in _command(pid)}


def started(pid: int) -> int | None:
    """Clock ticks after boot at which a process started; None when it is not there."""
    stat = _stat(pid)
    return int(stat[19]) if stat else None


def cpu_s(pid: int) -> float:
    """CPU seconds of a process; 0 when it has gone."""
    stat = _stat(pid)
    return (int(stat[11]) + int(stat[12])) / TICKS if stat else 0.0


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on (proc(5) counts it as the third)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
