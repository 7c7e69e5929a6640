"""Training survives what it meets: workers killed, the driver killed, a node lost. Nothing is lost, nothing seen twice.

Every epoch that completes has accounted for its rows (trainer/loop.py, check_seen): the digest of the rows that reached
the weights travels in the checkpoint, so a row skipped or repeated over a kill ends the run with an error.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from process_tree import descendants

from trainer.checkpoint import open_checkpoint
from trainer.config import RunConfig, load_run
from trainer.data.prepare import prepare
from trainer.data.sources.synthetic import write_synthetic
from trainer.ray_train import train

ROWS = 40_000
TRAIN_ROWS = int(ROWS * 0.8)
EPOCHS = 2
SETTINGS: dict[str, Any] = {
    "epochs": EPOCHS,
    "batch_size": 256,
    "patience": 100,
    "evals_per_epoch": 3,
    "keep_checkpoints": 20,
}


def quietly(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def synthetic(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The YAML of a run, and its prepared data."""
    folder = tmp_path_factory.mktemp("faults")
    write_synthetic(folder / "log", ROWS, max_ids=500, progress=quietly)
    config = folder / "log" / "run.yaml"
    prepare(load_run(config), folder / "prepared", quietly)
    text = config.read_text(encoding="utf-8")
    assert "train:" not in text
    config.write_text(f"{text}\ntrain: {json.dumps(SETTINGS)}\n", encoding="utf-8")
    return config, folder / "prepared"


def with_train(run: RunConfig, **changes: Any) -> RunConfig:
    return run.model_copy(update={"train": run.train.model_copy(update=changes)})


@pytest.fixture(scope="module")
def whole(synthetic: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupts."""
    config, data = synthetic
    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(load_run(config), data, out, resume=False, show=quietly)
    assert result["samples"] == EPOCHS * TRAIN_ROWS
    assert result["recoveries"] == []
    return out


def assert_equal_runs(left: Path, right: Path) -> None:
    """The last checkpoints of two runs hold the same bits."""
    last = f"step-{EPOCHS * TRAIN_ROWS:012d}"
    first, second = open_checkpoint(left / last), open_checkpoint(right / last)
    assert first.position == second.position
    assert first.metrics == second.metrics
    for key in first.keys():  # noqa: SIM118
        assert torch.equal(first.read(key), second.read(key)), key


class Killer:
    """Kills one training worker with SIGKILL when the run has come as far as each of some points."""

    def __init__(self, points: list[int]) -> None:
        self.points = points
        self.killed: list[int] = []

    def __call__(self, latest: dict[str, Any], events: list[Any]) -> None:  # noqa: ARG002
        """What the driver is told of progress."""
        if self.points and latest.get("samples", 0) >= self.points[0]:
            workers = descendants(os.getpid(), "RayTrainWorker")
            if workers:
                os.kill(random.choice(workers), signal.SIGKILL)
                self.killed.append(self.points.pop(0))


def test_run_whose_workers_were_killed_equals_the_whole_run(
    synthetic: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    config, data = synthetic
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    points = sorted(chosen.sample(range(3_000, EPOCHS * TRAIN_ROWS - 6_000), 2))
    killer = Killer(list(points))
    result = train(load_run(config), data, tmp_path / "run", resume=False, show=killer)
    assert killer.killed == points
    assert result["samples"] == EPOCHS * TRAIN_ROWS
    assert 1 <= len(result["recoveries"]) <= 2  # the second kill may hit workers that are only starting
    checkpoints = {0, *(int(f.name.removeprefix("step-")) for f in (tmp_path / "run").glob("step-*"))}
    between = -(-TRAIN_ROWS // SETTINGS["evals_per_epoch"]) + SETTINGS["batch_size"]
    for lost in result["recoveries"]:
        assert lost["from_samples"] in checkpoints
        assert 0 <= lost["samples_redone"] <= between  # a kill right after a checkpoint redoes nothing
        assert lost["seconds_down"] > 0
    assert_equal_runs(whole, tmp_path / "run")


def slimrank(*arguments: str) -> subprocess.Popen:
    """The command, in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "cluster", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )


def kill_tree(root: int) -> None:
    """End a process and all below it, as a machine that loses power does."""
    below = descendants(root)
    os.kill(root, signal.SIGKILL)
    for pid in below:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def killed_driver(config: Path, data: Path, out: Path, after: int) -> None:
    """Start a run and kill its driver with everything below it once `after` samples are done."""
    process = slimrank("train", "--config", str(config), "--data", str(data), "--out", str(out))
    deadline = time.monotonic() + 150
    heartbeat = out / ".heartbeat.json"
    try:
        while not (heartbeat.exists() and json.loads(heartbeat.read_text())["samples"] >= after):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the run does not come so far"
            time.sleep(0.05)
    finally:
        kill_tree(process.pid)
        process.communicate()


def resumed(config: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    """What the supervisor's second start prints."""
    process = slimrank(
        "train", "--config", str(config), "--data", str(data), "--out", str(out), "--resume", "--json", *more
    )
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


@pytest.mark.drill
def test_run_whose_driver_was_killed_goes_on_under_its_supervisor(
    synthetic: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    config, data = synthetic
    after = random.randrange(TRAIN_ROWS // 3 + 500, TRAIN_ROWS)
    killed_driver(config, data, tmp_path / "run", after)
    result = resumed(config, data, tmp_path / "run")
    assert result["samples"] == EPOCHS * TRAIN_ROWS
    assert_equal_runs(whole, tmp_path / "run")


def test_other_number_of_workers_sees_each_row_once_after_a_kill(synthetic: tuple[Path, Path], tmp_path: Path) -> None:
    config, data = synthetic
    killed_driver(config, data, tmp_path / "run", TRAIN_ROWS // 2)
    result = resumed(config, data, tmp_path / "run", "--workers", "1")
    assert result["samples"] == EPOCHS * TRAIN_ROWS
    assert [m["estimate"]["rank"] for m in result["memory"]] == [0]
    assert open_checkpoint(tmp_path / "run" / f"step-{EPOCHS * TRAIN_ROWS:012d}").manifest["world_size"] == 1


@pytest.mark.drill
def test_elastic_run_goes_on_without_a_lost_node(synthetic: tuple[Path, Path], tmp_path: Path) -> None:
    config, data = synthetic
    script = Path(__file__).with_name("elastic_run.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(config), str(data), str(tmp_path / "run"), str(TRAIN_ROWS // 2)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=280)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    assert process.returncode == 0, stderr[-3000:]
    result = json.loads(stdout.splitlines()[-1])
    assert result["node_lost"]
    assert result["samples"] == EPOCHS * TRAIN_ROWS
    assert len(result["recoveries"]) >= 1  # one attempt may find the lost node still listed
    folders = sorted((tmp_path / "run").glob("step-*"))
    assert int(folders[-1].name.removeprefix("step-")) == EPOCHS * TRAIN_ROWS
    first, last = (open_checkpoint(f, verify=False) for f in (folders[0], folders[-1]))
    assert (first.manifest["world_size"], last.manifest["world_size"]) == (2, 1)
