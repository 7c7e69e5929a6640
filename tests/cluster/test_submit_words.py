"""What a submitted job is given and how its log is told, without a cluster."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails, JobStatus, JobType

from cluster.cli import main
from cluster.job_command import Place, job_words
from cluster.submit import LogLines, exit_code, job_id, parse_env, source_tree
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[2]
SEARCH = ["tune", "--checkpoint", "run", "--data", "/shared/data", "--out", "../tuned", "--trials", "8", "--resume"]


def words(given: list[str], same_disk: bool = True, as_json: bool = False, cwd: Path = ROOT) -> list[str]:
    """The words of a job that is submitted from `cwd`, the source tree by default."""
    context = click.Context(main, info_name="slimrank")
    return job_words(context, given, Place(cwd, ROOT, same_disk), as_json=as_json)


def option(given: list[str], name: str) -> str:
    return given[given.index(name) + 1]


# -- paths -----------------------------------------------------------------------------------------------------------


def test_paths_become_absolute_where_the_cluster_reads_this_disk(tmp_path: Path) -> None:
    found = words(SEARCH, cwd=tmp_path)
    assert option(found, "--checkpoint") == str(tmp_path / "run")
    assert option(found, "--data") == "/shared/data"
    assert option(found, "--out") == str(tmp_path.parent / "tuned")
    assert (found[0], option(found, "--trials"), "--resume" in found) == ("tune", "8", True)


@pytest.mark.parametrize("name", ["--checkpoint", "--data", "--out"])
def test_relative_folders_are_refused_where_it_does_not(name: str) -> None:
    given = [v for n in ("--checkpoint", "--data", "--out") for v in (n, "configs" if n == name else "/shared/x")]
    with pytest.raises(ConfigError, match=f"{name} configs is relative.*absolute path") as error:
        words(["tune", *given], same_disk=False)
    assert "\n" not in str(error.value)


def test_absolute_paths_and_uris_are_the_clusters_own() -> None:
    given = ["tune", "--checkpoint", "s3://bucket/run", "--data", "gs://b/d", "--out", "/shared/tuned"]
    for same_disk in (True, False):
        found = words(given, same_disk)
        assert [option(found, n) for n in ("--checkpoint", "--data", "--out")] == [given[2], given[4], given[6]]


def test_a_config_of_the_source_tree_travels_with_the_job() -> None:
    found = words(["data", "prepare", "--config", "movielens.yaml", "--out", "/shared/p"], False, cwd=ROOT / "configs")
    assert option(found, "--config") == "configs/movielens.yaml"


def test_a_config_outside_of_the_source_tree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: mine\n", encoding="utf-8")
    given = ["data", "prepare", "--config", "run.yaml", "--out", "/shared/p"]
    with pytest.raises(ConfigError, match=f"--config run.yaml: no file of {ROOT}.*copy it"):
        words(given, same_disk=False, cwd=tmp_path)
    assert option(words(given, cwd=tmp_path), "--config") == str(tmp_path / "run.yaml")


def test_an_output_file_never_goes_into_the_upload() -> None:
    given = ["plan", "--config", "configs/movielens.yaml", "--topology", "1x1xCPU-8GB", "--out", "README.md"]
    with pytest.raises(ConfigError, match="--out README.md is relative"):
        words(given, same_disk=False)


def test_a_relative_glob_of_a_log_is_a_path_too(tmp_path: Path) -> None:
    given = ["data", "prepare", "--config", "/a.yaml", "--input", "logs/*.parquet", "--out", "/p"]
    assert option(words(given, cwd=tmp_path), "--input") == str(tmp_path / "logs" / "*.parquet")


# -- words -----------------------------------------------------------------------------------------------------------


def test_arguments_flags_and_repeated_options_are_kept(tmp_path: Path) -> None:
    found = words(["checkpoint", "show", "run", "--no-verify"], cwd=tmp_path)
    assert found == ["checkpoint", "show", "--no-verify", "--", str(tmp_path / "run")]
    found = words(["plan", "--config=/c.yaml", "--topology", "1x1xCPU-8GB", "--rows", "a=1", "--rows", "b=2"])
    assert [found[i + 1] for i, word in enumerate(found) if word == "--rows"] == ["a=1", "b=2"]


def test_json_is_asked_of_the_job_once() -> None:
    assert words(["doctor"], as_json=True) == ["doctor", "--json"]
    assert words(["doctor", "--json"], as_json=True) == ["doctor", "--json"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["tun"], "No such command 'tun'"),
        (["data"], "needs a subcommand"),
        (["tune", "--checkpoint", "a", "--data", "b"], "Missing option '--out'"),
        (["tune", "--chekpoint", "a"], "No such option '--chekpoint'"),
        (["demo"], "cannot be submitted"),
        (["submit", "--", "doctor"], "cannot be submitted"),
    ],
)
def test_submit_refuses_what_is_no_job_before_it_connects(given: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["submit", "--address", "http://127.0.0.1:9", "--", *given])
    assert result.exit_code == 2
    assert said in result.stderr


def test_submit_refuses_an_address_that_is_no_url() -> None:
    result = CliRunner().invoke(main, ["submit", "--address", "10.0.0.1:8265", "--", "doctor"])
    assert result.exit_code == 2
    assert "give the cluster's dashboard, such as http://10.0.0.1:8265" in result.stderr


def test_environment_and_names_are_checked() -> None:
    assert parse_env(("A=1", "B_2=x=y", "C=")) == {"A": "1", "B_2": "x=y", "C": ""}
    for pair in ("A", "=1", "2A=1", "A B=1"):
        with pytest.raises(ConfigError, match="KEY=VALUE"):
            parse_env((pair,))
    assert job_id(None, "tune") != job_id(None, "tune")
    assert job_id("nightly.2", "tune").startswith("nightly.2-")
    for name in ("", "a/b", "-a", "a b", "a\n"):
        with pytest.raises(ConfigError, match="--name"):
            job_id(name, "tune")


def test_the_upload_is_the_code_and_little_else(tmp_path: Path) -> None:
    root = source_tree()
    assert root == ROOT
    create_package(str(root), tmp_path / "upload.zip", include_gitignore=True, excludes=[".git", ".venv"])
    names = set(zipfile.ZipFile(tmp_path / "upload.zip").namelist())
    assert {"cluster/__main__.py", "trainer/data/schema.py", "configs/movielens.yaml", "pyproject.toml"} <= names
    kept_here = ("tests/", "benchmarks/", "docs/", "runs/", "data/", ".git", ".ruff_cache", ".mypy_cache")
    assert [n for n in names if n.startswith(kept_here) and n != ".gitignore" or "__pycache__" in n] == []
    assert (tmp_path / "upload.zip").stat().st_size < 3_000_000


# -- the log and the end ---------------------------------------------------------------------------------------------

LOG = '{"step": 1}\nwarm\n{"artifact": "a", "front": [1, 2]}\nlate note\n'


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_json_alone_goes_to_stdout_however_the_log_is_cut(size: int, capsys: pytest.CaptureFixture) -> None:
    log = LogLines(as_json=True)
    for start in range(0, len(LOG), size):
        log.show(LOG[start : start + size], start)
    log.close()
    out, err = capsys.readouterr()
    assert json.loads(out) == {"artifact": "a", "front": [1, 2]}
    assert err.splitlines() == ["warm", '{"step": 1}', "late note"]


def test_log_that_is_sent_again_is_shown_once(capsys: pytest.CaptureFixture) -> None:
    log = LogLines(as_json=False)
    for text in (LOG[:20], LOG[:35], LOG):
        log.show(text[:10], 0)
        log.show(text[10:], 10)
    log.close()
    assert capsys.readouterr().out == LOG


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_exit_code_is_the_jobs_own(status: str, driver: int | None, code: int, capsys: Any) -> None:
    details = JobDetails(
        type=JobType.SUBMISSION,
        status=JobStatus(status),
        entrypoint="x",
        driver_exit_code=driver,
        message="no such node",
    )
    assert exit_code("nightly", details) == code
    assert ("no such node" in capsys.readouterr().err) == (status == "FAILED" and driver is None)
