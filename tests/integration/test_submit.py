"""`slimrank submit -- tune` on a cluster of several raylets that wants a token: results, exit codes, what is lost."""

from __future__ import annotations

import json
import os
import pty
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "compress"))

from compress_builders import World, build_world  # noqa: E402

PATIENCE_S = 240


@dataclass
class Raylets:
    """A running cluster (raylets.py): its dashboard, and the environment that holds its token."""

    process: subprocess.Popen
    url: str
    environment: dict[str, str]

    def ask(self, line: str) -> Any:
        """What the cluster's process answers to a line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    folder = tempfile.mkdtemp(prefix="slimrank-nodes-", dir="/tmp")  # socket paths have a limit: keep it short
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("raylets.py")), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Raylets(process, json.loads(process.stdout.readline())["url"], environment)
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Prepared data and a checkpoint, under a folder that commands run in."""
    return build_world(tmp_path_factory.mktemp("small"), rows=20_000, tune={"calibrate": None, "finalists": 1})


def start(raylets: Raylets, cwd: Path, *words: object, **changes: Any) -> subprocess.Popen:
    """`slimrank submit WORDS`, running in `cwd`."""
    environment = {**raylets.environment, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "cluster", "submit", *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, text=True, **pipes | {"env": environment} | changes)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, out, err


def submitted(raylets: Raylets, cwd: Path, *words: object, **changes: Any) -> tuple[int, str, str]:
    """What `slimrank submit WORDS` ends with on the cluster."""
    return finish(start(raylets, cwd, "--address", raylets.url, *words, **changes))


def search_of(world: World, out: str, trials: int) -> list[str]:
    """A search as its user types it, in the world's folder."""
    data, checkpoint = (os.path.relpath(p, world.folder) for p in (world.dataset.folder, world.checkpoint.folder))
    return ["tune", "--checkpoint", checkpoint, "--data", data, "--trials", str(trials), "--out", out]


def trials_of(out: Path) -> list[dict[str, Any]]:
    """Lines of trials.jsonl that are whole."""
    path = out / "trials.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_until(process: subprocess.Popen, out: Path, trials: int) -> None:
    """Until a running search has come to its trials and finished so many."""
    deadline = time.monotonic() + PATIENCE_S
    while not (out / "search.json").exists() or len(trials_of(out)) < trials:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{len(trials_of(out))} trials after {PATIENCE_S} s"
        time.sleep(0.1)


def status_of(raylets: Raylets, job: str) -> str:
    return raylets.ask(f"status {job}")


# -- refusals --------------------------------------------------------------------------------------------------------


def one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert len(err.splitlines()) == 1, err
    for word in ("error: ", *words):
        assert word in err


def test_submit_without_a_server_ends_in_one_line(raylets: Raylets, tmp_path: Path) -> None:
    process = start(raylets, tmp_path, "--address", "http://127.0.0.1:9", "--", "doctor")
    one_line(finish(process), "no job server at http://127.0.0.1:9", "--address")


@pytest.mark.parametrize("token", [None, "wrong"])
def test_submit_names_the_token_that_is_missing_or_wrong(raylets: Raylets, tmp_path: Path, token: str | None) -> None:
    without = {k: v for k, v in raylets.environment.items() if not k.startswith("RAY_AUTH")}
    without |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    asked = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    result = submitted(raylets, tmp_path, "--", "doctor", env=without | asked)
    one_line(result, f"{'no' if token is None else 'the wrong'} token", raylets.url, "RAY_AUTH_TOKEN")
    assert raylets.environment["RAY_AUTH_TOKEN"] not in result[2]


def test_submit_passes_on_the_exit_code_of_a_job_that_fails(raylets: Raylets, tmp_path: Path) -> None:
    code, out, _ = submitted(raylets, tmp_path, "checkpoint", "show", "nowhere")
    assert code == 2
    assert out.splitlines()[-1].startswith(f"error: {tmp_path / 'nowhere'}: ")


# -- searches --------------------------------------------------------------------------------------------------------


def test_submitted_search_prints_its_result(raylets: Raylets, small: World) -> None:
    code, out, err = submitted(
        raylets, small.folder, "--json", "--name", "nightly", "--", *search_of(small, "found", 20)
    )
    assert code == 0, err
    job = err.split("Running entrypoint for job ")[1].split(":")[0]
    assert job.startswith("nightly-")
    (line,) = out.splitlines()
    assert Path(json.loads(line)["artifact"]) == small.folder / "found" / "artifact"
    written = json.loads((small.folder / "found" / "tune.json").read_text(encoding="utf-8"))
    assert written["chosen"] == json.loads(line)["chosen"]
    assert len(trials_of(small.folder / "found")) == 20


@pytest.mark.drill
def test_ctrl_c_leaves_the_job_where_nobody_can_answer(raylets: Raylets, small: World) -> None:
    process = start(raylets, small.folder, "--address", raylets.url, "--", *search_of(small, "left", 200))
    wait_until(process, small.folder / "left", 0)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    told = err.splitlines()[-1]
    job = told.split()[1]
    assert f"job {job} goes on" in told
    assert status_of(raylets, job) == "RUNNING"
    stop = told.split("stop it with ")[1].split()
    command = [str(Path(sys.executable).with_name(stop[0])), *stop[1:]]
    subprocess.run(command, env=raylets.environment, check=True, capture_output=True, timeout=PATIENCE_S)
    assert status_of(raylets, job) == "STOPPED"


@pytest.mark.drill
def test_ctrl_c_stops_the_job_where_the_user_says_so(raylets: Raylets, small: World) -> None:
    ours, terminal = pty.openpty()
    words = ["--address", raylets.url, "--", *search_of(small, "stopped", 200)]
    process = start(raylets, small.folder, *words, stdin=terminal)
    try:
        wait_until(process, small.folder / "stopped", 1)
        process.send_signal(signal.SIGINT)
        os.write(ours, b"y\n")
        code, out, err = finish(process)
    finally:
        os.close(ours)
        os.close(terminal)
    assert code == 130
    job = err.split("stop job ")[1].split()[0]
    assert status_of(raylets, job) == "STOPPED"
    assert out.count("Running entrypoint") == 1
    result = json.loads((small.folder / "stopped" / "tune.json").read_text(encoding="utf-8"))
    assert result["interrupted"]  # as by Ctrl-C, not killed
    assert 1 <= result["trials"] == len(trials_of(small.folder / "stopped")) < 200
    assert (small.folder / "stopped" / "artifact" / "manifest.json").exists()


@pytest.mark.drill
def test_submitted_server_answers_until_its_job_is_stopped(raylets: Raylets, small: World) -> None:
    artifact = os.path.relpath(small.artifact(small.uniform(8)).folder, small.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--artifact", artifact, "--port", port]
    process = start(raylets, small.folder, "--address", raylets.url, "--", *words)
    deadline = time.monotonic() + PATIENCE_S
    while not answers(port):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.5)
    asked = httpx.post(f"http://127.0.0.1:{port}/v1/rank", json={"user": {}, "candidates": ["i1", "i2"]}, timeout=30)
    assert asked.status_code == 200, asked.text
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    told = err.splitlines()[-1]
    stop = told.split("stop it with ")[1].split()
    command = [str(Path(sys.executable).with_name(stop[0])), *stop[1:]]
    subprocess.run(command, env=raylets.environment, check=True, capture_output=True, timeout=PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while answers(port):
        assert time.monotonic() < deadline, "the server outlives its job"
        time.sleep(0.5)


def answers(port: int) -> bool:
    """Whether a server is ready there."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.drill
def test_search_runs_on_every_node_and_loses_no_trial_with_one(raylets: Raylets, small: World) -> None:
    """The last test of the cluster: it leaves one node."""
    trials = 100
    process = start(raylets, small.folder, "--address", raylets.url, "--json", "--", *search_of(small, "lost", trials))
    while len({t["node"] for t in trials_of(small.folder / "lost")}) < 2:  # the second may have started much later
        wait_until(process, small.folder / "lost", len(trials_of(small.folder / "lost")) + 1)
    assert raylets.ask("remove node1") == "node1"
    at_removal = len(trials_of(small.folder / "lost"))
    assert at_removal < trials
    code, out, err = finish(process)
    assert code == 0, err
    found = trials_of(small.folder / "lost")
    assert len(found) == trials
    assert [t for t in found if "error" in t] == []
    assert json.loads(out)["trials"] == trials
