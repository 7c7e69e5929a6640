"""`slimrank tune` on a real Ray: what it writes, what it survives, what it is limited by."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from click.testing import CliRunner
from process_tree import descendants

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "compress"))

from compress_builders import World, clicked_world, quiet, save_random_checkpoint  # noqa: E402

from cluster.cli import main  # noqa: E402
from compress.artifact import load_artifact  # noqa: E402
from compress.config import Choice, SearchConfig, Space  # noqa: E402
from compress.lookup import TABLE_ALIGNMENT  # noqa: E402
from compress.model import model_of_checkpoint, translate_rows  # noqa: E402
from compress.search.decide import front_of, split_rows  # noqa: E402
from compress.search.objective import compare  # noqa: E402
from compress.search.preparation import prepare  # noqa: E402
from compress.search.ray_tune import in_parallel, read_trials, run_trials  # noqa: E402
from compress.search.sampler import Limits  # noqa: E402
from compress.search.space import grid  # noqa: E402
from trainer.data.reader import Rows, spread_rows  # noqa: E402

PATIENCE_S = 200
BUDGET = 0.02
SEARCH = SearchConfig.model_validate(
    {
        "trials": 6,
        "max_delta_ne": BUDGET,
        "sample_rows": 6_000,
        "selection_rows": 2_500,
        "gate_rows": 3_500,
        "rungs": [0.7, 1.0],
        "start": 3,
        "finalists": 2,
        "calibrate": {"steps": 3, "evaluations": 1, "held_rows": 500},
    }
)
QUALITY = {"delta_ne", "delta_ne_upper", "delta_auc", "delta_auc_lower", "overlap"}


@pytest.fixture(scope="module")
def world(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Prepared data with 12,000 validation rows, and a checkpoint whose run asks for SEARCH."""
    asked = SEARCH.model_dump(mode="json", exclude_defaults=True)
    return clicked_world(tmp_path_factory.mktemp("tuned"), rows=60_000, tune=asked)


def words(world: World, out: Path, *options: object) -> list[str]:
    """`tune` of the world's checkpoint into `out`."""
    command = ["tune", "--checkpoint", world.checkpoint.folder, "--data", world.dataset.folder, "--out", out, *options]
    return list(map(str, command))


def told(*arguments: object) -> dict[str, Any]:
    """What a command prints under --json."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout.strip().splitlines()[-1])


def refused(*arguments: object) -> str:
    """The one line that a command ends in."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 2, result.output + repr(result.exception)
    (line,) = result.stderr.strip().splitlines()
    return line


def written(out: Path, name: str = "tune.json") -> dict[str, Any]:
    """One of a search's JSON files."""
    return json.loads((out / name).read_text(encoding="utf-8"))


def searched_trials(out: Path) -> list[dict[str, Any]]:
    """The finished trials of a search that are no calibrated ones."""
    return [t for t in read_trials(out / "trials.jsonl") if t.get("origin") != "calibrated"]


@pytest.fixture(scope="module")
def found(world: World) -> Path:
    """The folder of a whole search, whose --json line is beside it."""
    out = world.folder / "found"
    result = told(*words(world, out))
    (world.folder / "found.json").write_text(json.dumps(result), encoding="utf-8")
    return out


# -- what it writes ----------------------------------------------------------------------------------------------------


def test_search_json_says_what_was_asked_of_what(world: World, found: Path) -> None:
    said = written(found, "search.json")
    assert SearchConfig.model_validate(said["config"]) == SEARCH
    assert said["checkpoint"]["version"] == world.checkpoint.version
    assert said["data"]["fingerprint"] == world.dataset.transform.fingerprint()
    assert said["samples"] | {"working_set_bytes": 0} == {
        "search": 6_000,
        "selection": 2_500,
        "gate": 3_500,
        "rungs": [4_200, 6_000],
        "working_set_bytes": 0,
    }
    assert said["knobs"] == list(Space.model_fields)
    assert said["fp32"]["table_bytes"] == sum(t.fp32_bytes for t in world.dataset.transform.tables.values())
    assert 0.5 < said["fp32"]["auc"] < 1
    assert 0.5 < said["fp32"]["ne"] < 1


def test_every_trial_is_written_down_with_its_figures_and_plan(found: Path) -> None:
    trials = searched_trials(found)
    assert [t["number"] for t in trials] == list(range(SEARCH.trials))
    assert [t["origin"] for t in trials] == ["start"] * 3 + ["sampler"] * 3
    for trial in trials:
        assert set(trial["params"]) == set(Space.model_fields)
        assert trial["stopped"] == (trial["rows"] == 4_200)
        assert [r["rows"] for r in trial["rungs"]] == ([4_200] if trial["stopped"] else [4_200, 6_000])
        assert trial["rungs"][-1]["delta_ne"] == trial["delta_ne"]
        assert trial["plan"]["tables"]
        assert trial["ms"] > 0
        assert trial["seconds"] > 0
        assert trial["stopped"] or trial["delta_ne"] < trial["delta_ne_upper"]
        assert trial["table_bytes"] < trial["artifact_bytes"]
    assert not any(t["stopped"] for t in trials[:3])  # the closed form is scored whole
    assert sorted(t["finished_s"] for t in trials) == [t["finished_s"] for t in trials]


def test_tune_json_has_front_choice_gate_tables_and_peers(world: World, found: Path) -> None:
    result = written(found)
    trials = searched_trials(found)
    assert (result["trials"], result["failed_trials"], result["interrupted"]) == (SEARCH.trials, 0, False)
    assert result["stopped_trials"] == sum(t["stopped"] for t in trials)
    sizes = [p["table_bytes"] for p in result["front"]]
    assert sizes == sorted(sizes)
    whole = {t["number"]: t for t in read_trials(found / "trials.jsonl") if not t["stopped"]}
    for point in result["front"]:
        assert point["delta_ne"] == whole[point["number"]]["delta_ne"]
        assert set(point["selection"]) == QUALITY
    chosen, gate = result["front"][result["chosen"]], result["gate"]
    assert chosen["measured_ms"] > 0
    assert gate["passed"]
    assert gate["delta_ne_upper"] <= gate["budget"] == BUDGET
    assert result["chosen"] in gate["tried"]
    assert str(chosen["number"]) in result["why"]
    assert set(result["tables"]) == set(world.dataset.transform.tables)
    for name, table in result["tables"].items():
        info = world.dataset.transform.tables[name]
        assert (table["rows"], table["dim"]) == (info.num_embeddings, info.embedding_dim)
        assert table["own_rows"] + table["centroid_rows"] + table["forgotten_rows"] == table["rows"]
    assert {p["name"].split()[0] for p in result["peers"]} == {"torchrec", "torch"}
    assert result["lineage"]["checkpoint"] == world.checkpoint.version


def test_the_artifact_is_the_chosen_point(world: World, found: Path) -> None:
    result = written(found)
    chosen = result["front"][result["chosen"]]
    manifest = json.loads((found / "artifact" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["sizes"]["table_bytes"] == chosen["table_bytes"]
    stored = sum(t["bytes"] + t["id_map_bytes"] for t in result["tables"].values())
    tiers = sum(len(t["tiers"]) for t in result["tables"].values())
    assert 0 <= chosen["table_bytes"] - stored < TABLE_ALIGNMENT * tiers
    scored = told("evaluate", "--model", found / "artifact", "--data", world.dataset.folder, "--split", "val")
    fp32 = told("evaluate", "--model", world.checkpoint.folder, "--data", world.dataset.folder, "--split", "val")
    assert scored["ne"] / fp32["ne"] - 1 <= BUDGET
    files = sum(f.stat().st_size for f in (found / "artifact").rglob("*") if f.is_file())
    assert chosen["artifact_bytes"] == pytest.approx(files, rel=0.02)


def test_search_selection_and_gate_rows_are_disjoint_and_give_these_figures(world: World, found: Path) -> None:
    asked = (SEARCH.sample_rows, SEARCH.selection_rows, SEARCH.gate_rows)
    parts = split_rows(spread_rows(world.dataset, "val", sum(asked)), asked, SEARCH.seed)
    assert [len(p) for p in parts] == list(asked)
    assert len(np.unique(np.concatenate([p.index for p in parts]))) == sum(asked)
    slim = load_artifact(found / "artifact").model
    plain = model_of_checkpoint(world.checkpoint, world.dataset.transform)

    def change(rows: Rows) -> float:
        scores = slim.score_encoded(translate_rows(slim, world.dataset, rows.encoded))
        return compare(rows.labels, scores, plain.score_encoded(rows.encoded)).delta_ne

    result = written(found)
    chosen = result["front"][result["chosen"]]
    expected = (chosen["delta_ne"], chosen["selection"]["delta_ne"], result["gate"]["delta_ne"])
    assert [change(p) for p in parts] == pytest.approx(expected, abs=1e-6)


def test_json_line_is_tune_json_with_the_artifacts_path(world: World, found: Path) -> None:
    line = written(world.folder, "found.json")
    assert line == {**written(found), "artifact": str(found / "artifact")}


def test_report_reads_the_search(found: Path) -> None:
    summary = told("report", found)
    lines = len(read_trials(found / "trials.jsonl"))  # calibrated ones too
    assert (summary["trials"], summary["ended"], summary["gate_passed"]) == (lines, True, True)
    assert Path(summary["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")


# -- limits ------------------------------------------------------------------------------------------------------------


def test_earlier_front_comes_first_and_limits_hold(world: World, found: Path) -> None:
    out = world.folder / "limited"
    before = written(found)
    most = before["table_bytes_fp32"] // 5
    result = told(
        *words(world, out, "--earlier", found, "--max-bytes", most, "--max-ms", 500),
        *("--algorithm", "nsga2", "--trials", 8),
    )
    trials = searched_trials(out)
    settings = [t["params"] for t in front_of(searched_trials(found))]
    first = [t for t in trials if t["origin"] == "earlier"]
    assert first
    assert all(t["params"] in settings for t in first)
    assert all(t["table_bytes"] <= most for t in trials)
    chosen = result["front"][result["chosen"]]
    assert (chosen["measured_ms"] or chosen["ms"]) <= 500


def test_a_search_ends_when_its_minutes_are_over(world: World, found: Path) -> None:
    out = world.folder / "minutes"
    shutil.copytree(found, out)
    result = told(*words(world, out, "--resume", "--trials", 500, "--minutes", 0.15, "--algorithm", "random"))
    assert SEARCH.trials <= result["trials"] < 500
    assert not result["interrupted"]
    assert result["front"]


def test_resume_refuses_another_checkpoint_or_space(world: World, found: Path) -> None:
    other = save_random_checkpoint(world.run, world.dataset, world.folder / "other", 5).folder
    line = refused("tune", "--checkpoint", other, "--data", world.dataset.folder, "--out", found, "--resume")
    assert f"{found}: is a search of another checkpoint" in line
    tune = {**world.run.tune, "space": {"budget": {"low": 0.1, "high": 0.2}}}
    run = world.run.model_copy(update={"tune": tune})
    wider = save_random_checkpoint(run, world.dataset, world.folder / "wider", 1).folder
    line = refused("tune", "--checkpoint", wider, "--data", world.dataset.folder, "--out", found, "--resume")
    assert "another tune.space" in line
    assert str(found) in refused(*words(world, found))  # and without --resume, a folder that holds anything


def test_a_setting_that_cannot_be_planned_is_reported_and_stops_nothing(world: World, tmp_path: Path) -> None:
    search = SEARCH.model_copy(update={"algorithm": "grid", "calibrate": None})
    ready = prepare(world.checkpoint, world.dataset, search, in_parallel, quiet)
    beyond = Space(
        budget=Choice(choice=(0.001, 0.2)), centroids=Choice(choice=(1,)), bits=Choice(choice=((8,), (4, 8)))
    )
    beyond = beyond.model_copy(update={name: Choice(choice=(0.01,)) for name in ("trust", "tier_price")})
    shared = replace(ready.shared, space=beyond)  # not within the tables' reach, as `prepare` would have made it
    settings = grid(beyond, 8, 0)
    trials, interrupted = run_trials(
        shared,
        search.model_copy(update={"space": beyond, "trials": 8}),
        Limits(BUDGET, float("inf")),
        tmp_path,
        {"start": settings},
        quiet,
    )
    assert not interrupted
    assert sorted(json.dumps(t["params"], sort_keys=True) for t in trials) == sorted(
        json.dumps(s, sort_keys=True) for s in settings
    )
    failed = [t for t in trials if t["params"]["budget"] == "0.001"]
    assert len(failed) == 4
    assert all("error" in t and "budget" in t["error"] and "\n" not in t["error"] for t in failed)
    assert all("delta_ne_upper" in t for t in trials if t not in failed)


# -- what it survives --------------------------------------------------------------------------------------------------


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    """`slimrank ARGUMENTS` in a process group of its own."""
    inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "cluster", *arguments],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_trials(process: subprocess.Popen, out: Path, count: int) -> list[dict[str, Any]]:
    """The finished trials of a search under way, once there are so many."""
    deadline = time.monotonic() + PATIENCE_S
    while len(trials := read_trials(out / "trials.jsonl")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{len(trials)} of {count} trials after {PATIENCE_S} s"
        time.sleep(0.05)
    return trials


def test_nothing_finished_is_lost_with_a_trial_or_the_driver(world: World) -> None:
    out = world.folder / "killed"
    address = ray.get_runtime_context().gcs_address
    process = start([*words(world, out, "--trials", 200, "--algorithm", "grid"), "--address", address])
    try:
        wait_for_trials(process, out, 1)
        victims = descendants(os.getpid(), "ray::ResourceTrainable")  # what Tune calls one with resources
        assert victims
        os.kill(victims[0], signal.SIGKILL)
        wait_for_trials(process, out, 5)
    finally:
        process.kill()
        process.communicate()
    before = read_trials(out / "trials.jsonl")
    assert not (out / "tune.json").exists()
    with (out / "trials.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"number": 99, "par')  # a line that the crash cut short
    total = len(before) + 3
    result = told(*words(world, out, "--resume", "--trials", total, "--algorithm", "grid"))
    trials = searched_trials(out)
    assert trials[: len(before)] == before
    assert [t["number"] for t in trials] == list(range(total))
    assert result["trials"] == total
    assert not any("error" in t for t in trials)  # the killed one was done again
    settings = [json.dumps(t["params"], sort_keys=True) for t in trials]
    assert len(set(settings)) == total
    assert load_artifact(out / "artifact").version


def test_ctrl_c_leaves_a_result_that_can_be_used(world: World) -> None:
    out = world.folder / "interrupted"
    temp = Path(tempfile.mkdtemp(prefix="slimrank-", dir="/tmp"))  # socket paths have a limit: keep it short
    process = start(words(world, out, "--trials", 200, "--json"), RAY_TMPDIR=str(temp))
    try:
        wait_for_trials(process, out, 1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all in the foreground
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        shutil.rmtree(temp, ignore_errors=True)
    assert process.returncode == 0, stderr
    result = json.loads(stdout)
    assert result["interrupted"]
    assert written(out)["interrupted"]
    assert 1 <= result["trials"] == len(searched_trials(out)) < 200
    assert load_artifact(out / "artifact").version
