"""`slimrank deploy`, `versions` and `rollback` where the server is not there, or is another one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cluster.cli import main
from cluster.serve_commands import deployed_lines, versions_lines
from serve.agreement import Agreement
from serve.config import ServeConfig
from serve.control import Control
from serve.fast_path import free_ports
from serve.fleet import Place, Report, begin, propose, refuse, take


class Stranger(BaseHTTPRequestHandler):
    """A server of something else."""

    def do_GET(self) -> None:
        body = b'{"hello": "world"}' if self.path == "/v1/versions" else b"<html>"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def stranger() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize("words", [["versions"], ["rollback"], ["deploy", "/somewhere"]])
def test_server_that_is_not_there_is_one_line(words: list[str]) -> None:
    result = run(*words, "--server", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert result.exit_code == 2
    assert "give the admin address" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://127.0.0.1", "http://[", "http://127.0.0.1:99999"])
def test_address_that_is_none_is_one_line(url: str) -> None:
    result = run("versions", "--server", url)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output


def test_another_server_is_not_taken_for_ours(stranger: str) -> None:
    result = run("versions", "--server", stranger)
    assert result.exit_code == 2
    assert "not the admin routes of slimrank" in result.stderr


def test_unknown_check_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    result = run("deploy", str(tmp_path), "--override", "speed")
    assert result.exit_code == 2
    assert "'speed' is not one of" in result.stderr


def test_what_people_read_of_versions() -> None:
    agreement = Agreement(source="requests", requests=9, unreadable=0, overlap=0.25, calibration={"a": 1.5, "b": None})
    fleet = propose(begin("v1", "/a/1", 1.0), Place(version="v2", path="/a/2"), ("overlap",), 2.0)
    entry = fleet.versions["v2"].model_copy(update={"agreement": agreement, "overridden": ("overlap",)})
    fleet = take(fleet.model_copy(update={"versions": {**fleet.versions, "v2": entry}}), 3.0)
    fleet = refuse(propose(fleet, Place(version="v3", path="/a/3"), (), 4.0), "tables.bin: altered")
    control = Control(fleet, ServeConfig())
    control.heard["r"] = (float("inf"), Report(replica="r", live="v2", loaded=("v1", "v2"), error="no space"))
    text = "\n".join(versions_lines(control.describe()))
    for words in ("live, on probation", "v3: tables.bin: altered", "v3: /a/3", "0.250", "holds v1, v2; no space"):
        assert words in text
    assert deployed_lines(control.describe()) == [
        "v2 is live; v1 stays loaded for 'slimrank rollback'",
        "top-k overlap 0.250 on 9 requests, mean score new/old: a 1.500, b -",
        "overridden: overlap",
    ]
