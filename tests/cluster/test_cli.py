"""The command on bad input: one clear line, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from cluster.cli import main, metric_lines

CONFIG = {
    "name": "small",
    "data": {
        "input": "log.parquet",
        "split": {"by": "row", "fractions": [0.8, 0.1, 0.1]},
        "tasks": [{"name": "click", "column": "label"}],
        "features": [{"name": "user", "kind": "categorical"}, {"name": "age", "kind": "numeric"}],
    },
}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    rows = 400
    log = pa.table(
        {"label": [i % 3 == 0 for i in range(rows)], "user": [i % 20 for i in range(rows)], "age": [1.0] * rows}
    )
    pq.write_table(log, tmp_path / "log.parquet")
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output + str(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def write_config(folder: Path, **changes: object) -> Path:
    content = json.loads(json.dumps(CONFIG))
    for path, value in changes.items():
        at = content
        *parents, last = path.split("__")
        for key in parents:
            at = at[key]
        at[last] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trian": {}}, ["trian", "unknown key"]),
        ({"train": {"epochz": 3}}, ["train.epochz", "unknown key"]),
        ({"tune": {"trails": 3}}, ["tune", "trails", "unknown key"]),
        ({"serve": {"prot": 1}}, ["serve", "prot", "unknown key"]),
        ({"data__features": [{"name": "user", "kind": "category"}]}, ["features", "category"]),
        ({"data__tasks": []}, ["tasks"]),
        ({"data__split": {"by": "timestamp"}}, ["timestamp"]),
    ],
)
def test_prepare_refuses_bad_config(workdir: Path, changes: dict, words: list[str]) -> None:
    config = write_config(workdir, **changes)
    refused(run("data", "prepare", "--config", config, "--out", workdir / "out"), "run.yaml", *words)
    assert not (workdir / "out").exists()


def test_prepare_refuses_missing_config(workdir: Path) -> None:
    refused(
        run("data", "prepare", "--config", workdir / "none.yaml", "--out", workdir / "out"), "none.yaml", "no such file"
    )


def test_prepare_refuses_full_output_folder(workdir: Path) -> None:
    config = write_config(workdir)
    refused(run("data", "prepare", "--config", config, "--out", workdir), "not empty")
    assert (workdir / "log.parquet").exists()


def test_evaluate_refuses_what_is_not_prepared(workdir: Path) -> None:
    refused(run("evaluate", "--model", workdir, "--data", workdir), "not a prepared data set")


@pytest.mark.parametrize("command", ["serve", "rank"])
def test_artifact_commands_refuse_what_is_no_artifact(workdir: Path, command: str) -> None:
    (workdir / "request.json").write_text(json.dumps({"user": {}, "candidates": ["1"]}))
    extra = ["--request", workdir / "request.json"] if command == "rank" else []
    refused(run(command, "--artifact", workdir, *extra), "not an artifact")


def test_tune_refuses_what_is_no_checkpoint(workdir: Path) -> None:
    result = run("tune", "--checkpoint", workdir, "--data", workdir, "--out", workdir / "out")
    refused(result, "not a checkpoint")
    assert not (workdir / "out").exists()


def test_synth_writes_a_log_and_a_run_that_fits_it(tmp_path: Path) -> None:
    result = run("data", "synth", "--rows", 2000, "--max-ids", 100, "--out", tmp_path / "synth", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.strip().splitlines()[-1])
    assert 0.6 < told["attainable_auc"] < 0.95
    assert pq.read_table(tmp_path / "synth" / "raw").num_rows == 2000


@pytest.mark.parametrize(
    "command",
    [[], ["data", "fetch"], ["data", "synth"], ["data", "prepare"], ["train"], ["evaluate"], ["compress"], ["tune"]]
    + [["serve"], ["rank"], ["demo"], ["plan"], ["doctor"], ["report"], ["submit"]],
)
def test_every_command_has_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "cluster", "--help"], capture_output=True, text=True, check=True)
    assert "Train a TorchRec ranker" in done.stdout


def test_metric_lines_of_several_tasks_name_each() -> None:
    quality = {"auc": 0.7, "ne": 0.9, "log_loss": 0.5, "calibration": 1.0}
    lines = metric_lines({"rows": 100, "click": quality, "buy": quality}, "test")
    assert [line.split(":")[0] for line in lines] == ["test click", "test buy"]


def test_metric_lines_tell_what_is_there_in_two_lines_of_80_columns() -> None:
    quality = {"auc": 0.7, "ne": 0.9, "log_loss": 0.5, "calibration": 1.0, "precision": 0.1, "f1": 0.25}
    quality |= {"gauc": None, "ndcg@10": 0.375, "recall@10": 0.5}
    lines = metric_lines(quality, "test")
    assert lines[0] == "test: AUC 0.70000  NE 0.90000  log loss 0.50000  calibration 1.0000  GAUC -"
    assert lines[1] == "  NDCG@10 0.3750  F1 0.2500"
    lines = metric_lines({"watched_to_the_end": quality, "buy": quality}, "test")
    assert len(lines) == 4
    assert max(map(len, lines)) <= 80


def test_prepare_refuses_a_missing_column_before_ray_starts(workdir: Path) -> None:
    import ray

    config = write_config(workdir, data__features=[{"name": "city", "kind": "categorical"}])
    refused(run("data", "prepare", "--config", config, "--out", workdir / "out"), "'city'", "log.parquet")
    assert not ray.is_initialized()
