"""The whole stack of `slimrank serve` under bad clients, a step of load, and while replicas go away."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_tree import descendants, parents
from serve_client import PATIENCE_S, Load, Server, ask, serving

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "compress"))

from compress_builders import build_world  # noqa: E402

USER = {"user_id": 1003, "age": 31.5}
CONFIG = "max_replicas: 2\nmax_wait_ms: 5\ndownscale_delay_s: 3\nmax_body_bytes: 200000\n"
SMALL = json.dumps({"user": USER, "candidates": [f"i{n}" for n in range(20)]}).encode()
LARGE = json.dumps({"user": USER, "candidates": [f"i{n % 40}" for n in range(5000)]}).encode()
HEAD = b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    world = build_world(tmp_path_factory.mktemp("serve"))
    config = world.folder / "serve.yaml"
    config.write_text(CONFIG)
    with serving(world.artifact(world.uniform(8)).folder, config) as running:
        yield running


def opened(server: Server, text: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(text)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def assert_served(server: Server, times: int = 20) -> None:
    connection = server.connect()
    assert [ask(connection, SMALL) for _ in range(times)] == [200] * times
    connection.close()


def test_others_are_served_beside_idle_slow_and_half_sent_requests(server: Server) -> None:
    idle = [opened(server) for _ in range(1000)]
    half = [opened(server, HEAD + b"content-length: 1000\r\n\r\n" + b"{") for _ in range(100)]
    slow = [opened(server, HEAD) for _ in range(20)]
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.2):
            for connection in slow:
                connection.send(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        assert_served(server, 100)
        answer = read_all(half[0])  # not waited for longer than a body may take
        assert answer.startswith(b"HTTP/1.1 408"), answer
    finally:
        stop.set()
        dripping.join()
        for connection in idle + half + slow:
            connection.close()
    assert_served(server)


def test_headers_of_megabytes_are_refused(server: Server) -> None:
    connection = opened(server)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # cut off while it is still being sent
        connection.sendall(HEAD + b"x-large: " + b"x" * 4_000_000 + b"\r\n\r\n")
    answer = read_all(connection)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")), answer[:100]
    connection.close()
    assert_served(server)


def test_a_body_without_end_is_cut_off(server: Server) -> None:
    connection = opened(server, HEAD + b"transfer-encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    sent = 0
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # an answer, and then nobody listens
        while sent < 500_000_000:
            connection.sendall(chunk)
            sent += len(chunk)
    assert sent < 500_000_000
    connection.close()
    assert_served(server)


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    def text(k: int, end: bool) -> bytes:
        body = json.dumps({"user": USER, "candidates": ["i1", "i2", "i3"], "k": k}).encode()
        close = b"connection: close\r\n" if end else b""
        return HEAD + close + b"content-length: %d\r\n\r\n" % len(body) + body

    connection = opened(server, text(1, False) + text(2, False) + text(3, True))
    answers = read_all(connection).split(b"HTTP/1.1 ")[1:]
    assert [a[:3] for a in answers] == [b"200"] * 3
    assert [a.count(b'"score"') for a in answers] == [1, 2, 3]


def test_a_step_of_load_brings_a_second_replica_and_its_end_takes_one_away_without_a_loss(server: Server) -> None:
    assert_served(server)
    with Load(server, LARGE, clients=6) as step:
        server.wait_for(2)
    assert step.outcomes[200] > 0
    assert set(step.outcomes) <= {200, 429}, step.outcomes
    with Load(server, SMALL, clients=2, pause_s=0.02) as light:
        server.wait_for(1)
        time.sleep(2)  # the replica that left is drained and gone by now
    assert light.outcomes[200] > 20
    assert set(light.outcomes) <= {200, 429, "retried"}, light.outcomes


def test_a_server_that_is_stopped_answers_what_it_has_taken(server: Server) -> None:
    """The last test of the server."""
    (haproxy, *_) = descendants(server.process.pid, "slimrank-ha-")
    folder = Path(re.search(r"/tmp/slimrank-ha-\w+", parents()[haproxy][1])[0])
    assert folder.stat().st_mode & 0o777 == 0o700
    with Load(server, SMALL, clients=4, pause_s=0.01) as load:
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) in (0, 143)
    assert load.outcomes[200] > 5
    # 404: HAProxy no longer knows the application; refused: nobody listens any more
    assert not [code for code in load.outcomes if isinstance(code, int) and code >= 500], load.outcomes
    # a connection may break when HAProxy itself goes, but no request that was begun while the application was there
    assert all(begun >= min(load.gone) for begun in load.lost_begun), load.outcomes
    assert not folder.exists()
