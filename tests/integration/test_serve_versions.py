"""Versions on a real `slimrank serve`: HAProxy, replicas and the fleet as processes of their own, asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "compress"), str(TESTS / "serve")]

import version_builders as build  # noqa: E402
from compress_builders import artifact_in  # noqa: E402
from process_tree import descendants  # noqa: E402

from compress.artifact import Artifact  # noqa: E402
from serve.fast_path import free_ports  # noqa: E402
from serve.fleet import LEAST_ERRORS  # noqa: E402
from serve.ranker import Ranker  # noqa: E402
from serve.request import RankRequest  # noqa: E402

PATIENCE_S = 120.0
BODY = {"user": {"user_id": 1003, "age": 31.5}, "candidates": [f"i{n}" for n in range(40)], "k": 10}


@dataclass
class Running:
    """A server: its addresses, and its process."""

    url: str
    admin: str
    process: subprocess.Popen

    def rank(self) -> dict[str, Any]:
        """An answer, which must be one."""
        answer = httpx.post(f"{self.url}/v1/rank", json=BODY, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def command(self, *words: str) -> subprocess.CompletedProcess:
        """A subcommand against this server."""
        line = [sys.executable, "-m", "cluster", *words, "--server", self.admin, "--json"]
        return subprocess.run(line, check=False, capture_output=True, text=True, timeout=PATIENCE_S)

    def fleet(self) -> list[int]:
        """The process of the fleet's replica."""
        return descendants(self.process.pid, "slimrank:fleet")


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What artifacts of a session are named by."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Running]:
    """`slimrank serve` of the mixed plan's artifact, until the module's tests are done."""
    folder = Path(tempfile.mkdtemp(prefix="slimrank-serve-"))
    port, admin_port = free_ports(2)
    swap = "swap: {min_overlap: 0.6, probation_s: 600}"
    (folder / "serve.yaml").write_text(f"{swap}\nmax_wait_ms: 10000\nadmin_port: {admin_port}\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    line = [sys.executable, "-m", "cluster", "serve", "--json", "--port", str(port)]
    line += ["--artifact", str(artifact_in(base).folder), "--config", str(folder / "serve.yaml")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stdout.readline()
    assert first, process.stderr.read()
    said = json.loads(first)
    running = Running(said["url"], said["admin"], process)
    try:
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert errors == ""  # nothing of the libraries reached the terminal


def expected(artifact: Artifact) -> list[tuple[str, Any]]:
    """What a version answers to BODY."""
    return [(i.id, pytest.approx(i.score, abs=1e-5)) for i in Ranker(artifact).rank(RankRequest(**BODY)).items]


def test_deploy_under_load_fails_no_request_and_mixes_no_answer(server: Running, base: Path) -> None:
    old, new = artifact_in(base), build.finer(base)
    answers: list[dict[str, Any]] = []
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            answers.append(server.rank())

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(answers) >= 20)
        result = server.command("deploy", str(new.folder))
        seen = len(answers)
        until(lambda: len(answers) >= seen + 20)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["live"] == new.version
    right = {old.version: expected(old), new.version: expected(new)}
    assert right[old.version] != right[new.version]
    assert {a["version"] for a in answers} == set(right)
    for answer in answers:
        assert [(i["id"], i["score"]) for i in answer["items"]] == right[answer["version"]]
    agreement = json.loads(result.stdout)["versions"][0]["agreement"]
    assert agreement["source"] == "requests"
    back = server.command("rollback")
    assert json.loads(back.stdout)["live"] == old.version
    assert server.rank()["version"] == old.version


def test_damaged_and_disagreeing_artifacts_are_refused_in_one_line(server: Running, base: Path, tmp_path: Path) -> None:
    live = server.rank()["version"]
    for path, why in (
        (build.damaged(build.finer(base), tmp_path / "bad"), "altered"),
        (build.stranger(base).folder, "overlap"),
    ):
        refused = server.command("deploy", str(path))
        assert refused.returncode == 2
        assert why in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert server.rank()["version"] == live
    taken = server.command("deploy", str(path), "--override", "overlap", "--override", "calibration")
    assert taken.returncode == 0, taken.stderr
    answer = server.rank()
    assert [(i["id"], i["score"]) for i in answer["items"]] == expected(build.stranger(base))
    assert json.loads(server.command("rollback").stdout)["live"] == live


def test_fleet_that_is_killed_comes_back_with_what_it_knew(server: Running, base: Path) -> None:
    before = json.loads(server.command("versions").stdout)
    killed = server.fleet()
    assert len(killed) == 1
    os.kill(killed.pop(), signal.SIGKILL)
    assert server.rank()["version"] == before["live"]  # replicas go on without it

    def back() -> bool:
        asked = server.command("versions")
        return asked.returncode == 0 and len(json.loads(asked.stdout)["replicas"]) == len(before["replicas"])

    until(back)
    after = json.loads(server.command("versions").stdout)
    assert {k: after[k] for k in ("live", "previous", "versions")} == {
        k: before[k] for k in ("live", "previous", "versions")
    }
    assert server.command("deploy", str(build.finer(base).folder)).returncode == 0
    assert server.rank()["version"] == build.finer(base).version


def test_version_that_fails_is_taken_back_by_itself(server: Running, base: Path) -> None:
    live, bad = server.rank()["version"], build.without_catalogue(base)
    forced = server.command("deploy", str(bad.folder), "--override", "overlap", "--override", "calibration")
    assert forced.returncode == 0, forced.stderr
    assert json.loads(forced.stdout)["live"] == bad.version
    for _ in range(2 * LEAST_ERRORS):
        assert server.rank()["version"] == live  # what the new one cannot answer, the one before does
    until(lambda: json.loads(server.command("versions").stdout)["live"] == live)
    entry = next(v for v in json.loads(server.command("versions").stdout)["versions"] if v["version"] == bad.version)
    assert entry["state"] == "refused"
    assert "requests that the version before it answered" in entry["reason"]
