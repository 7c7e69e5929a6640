"""The trainer's recipes end to end: a teacher, stages, a new day, rich features.

Runs are few and full, on small synthetic logs with two workers; what is compared is their checkpoints.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))

import pyarrow as pa  # noqa: E402
from rich_builders import rich_log, rich_run, write_log  # noqa: E402

from cluster.cli import main  # noqa: E402
from compress.artifact import load_artifact  # noqa: E402
from trainer.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from trainer.config import Distill, RunConfig, Stage, load_run  # noqa: E402
from trainer.data.batch import Batch  # noqa: E402
from trainer.data.dataset import Dataset, open_dataset  # noqa: E402
from trainer.data.prepare import prepare  # noqa: E402
from trainer.data.reader import Reader  # noqa: E402
from trainer.data.sources.synthetic import write_synthetic  # noqa: E402
from trainer.data.transform import OOV_ROW  # noqa: E402
from trainer.distill import check_teacher, load_ranker  # noqa: E402
from trainer.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from trainer.ray_train import train  # noqa: E402
from trainer.worker import Place, Worker, build_worker  # noqa: E402

ROWS, TRAIN_ROWS = 12_000, 9_600
SETTINGS: dict[str, Any] = {"patience": 100, "evals_per_epoch": 1, "epochs": 1, "precision": "highest"}
ALONE = Place(0, 1, 1, torch.device("cpu"))
JUMP = 0.01  # of the spread of the log-odds (root mean square), when tables grow; measured: .0002


def quietly(*_: Any) -> None:
    """Progress that nobody watches."""


def command(*arguments: object, fails: bool = False) -> Any:
    """What the command prints with --json, or the line with which it fails."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == (2 if fails else 0), result.output + str(result.exception)
    return result.stderr.strip().splitlines()[-1] if fails else json.loads(result.stdout.strip().splitlines()[-1])


def with_train(run: RunConfig, **changes: Any) -> RunConfig:
    return run.model_copy(update={"train": run.train.model_copy(update=SETTINGS | changes)})


def with_model(run: RunConfig, **changes: Any) -> RunConfig:
    return run.model_copy(update={"model": run.model.model_copy(update=changes)})


def write_yaml(path: Path, content: dict[str, Any], train: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({**content, "train": SETTINGS | train}, sort_keys=False), encoding="utf-8")
    return path


def worker_here(run: RunConfig, data: Dataset, stage: int = -1) -> Worker:
    """A run's worker in this process."""
    stage = stage % len(run.train.all_stages)
    return build_worker(run, data.sized(run.data, run.model.embedding_dim), ALONE, stage, precision="highest")


def log_odds(model: Any, data: Dataset, split: Any = "val") -> torch.Tensor:
    """The first task's log-odds of a split, by a worker's or a whole model."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch)[0] for batch, _ in Reader(data, split, 4096).batches()])


def assert_same(left: Checkpoint, right: Checkpoint, **tolerance: float) -> None:
    assert left.position.samples == right.position.samples
    for key in left.keys():  # noqa: SIM118
        torch.testing.assert_close(
            right.read(key),
            left.read(key),
            rtol=tolerance.get("rtol", 0),
            atol=tolerance.get("atol", 0),
            msg=lambda m, k=key: f"{k}: {m}",
        )


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def day(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    folder = tmp_path_factory.mktemp("day")
    write_synthetic(folder / "log", ROWS, max_ids=300, progress=quietly)
    run = load_run(folder / "log" / "run.yaml")
    prepare(run, folder / "prepared", quietly)
    return run, folder / "prepared"


@pytest.fixture(scope="module")
def next_day(day: tuple[RunConfig, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another log, with ids that the first one lacks: log/run.yaml, `prepared` as its continuation, `alone` without."""
    folder = tmp_path_factory.mktemp("next")
    write_synthetic(folder / "log", ROWS // 2, seed=1, max_ids=400, progress=quietly)
    config = folder / "log" / "run.yaml"
    command("data", "prepare", "--config", config, "--out", folder / "prepared", "--continue-from", day[1])
    command("data", "prepare", "--config", config, "--out", folder / "alone")
    return folder


@pytest.fixture(scope="module")
def teacher(day: tuple[RunConfig, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of dim 16, which teaches narrower ones and which the next day goes on from."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(with_train(day[0]), day[1], out, resume=False, show=quietly)
    return out


# -- distillation ----------------------------------------------------------------------------------------------------


def test_student_comes_closer_to_its_teacher(
    day: tuple[RunConfig, Path], teacher: Path, next_day: Path, tmp_path: Path
) -> None:
    run, data = day
    student = with_model(run, embedding_dim=4, top_mlp=(16,))
    dataset, checkpoint = open_dataset(data), open_checkpoint(teacher)
    whole = load_ranker(checkpoint, dataset)
    taught = log_odds(whole, dataset)
    folder = data / "teacher" / checkpoint.version
    gaps, written, told = [], [], []
    for alpha in (0.9, 0.1):
        notes: list[Any] = []
        pupil = with_train(student, distill=Distill(teacher=str(teacher), alpha=alpha))
        out = tmp_path / f"student-{alpha}"
        train(pupil, data, out, resume=False, show=lambda _, events, notes=notes: notes.extend(events))
        gaps.append(float((log_odds(load_ranker(open_checkpoint(out), dataset), dataset) - taught).square().mean()))
        written.append({p.name: p.stat().st_mtime_ns for p in sorted((folder / "train").iterdir())})
        told.append([e["text"] for e in notes if e["kind"] == "note" and "teacher" in e["text"]])
    assert gaps[0] < gaps[1], gaps
    assert written[0] == written[1]
    assert [len(t) for t in told] == [len(dataset.files["train"]), 0], "scored once, then reused"
    assert [p.name for p in (data / "teacher").iterdir()] == [checkpoint.version], "no staging folder is left"
    # whatever order the rows come in, each has its own teacher's log-odds beside it
    for batch, _ in Reader(dataset, "train", 512, seed=5, shuffle=True, teacher=folder).batches(epoch=2, start=3):
        with torch.no_grad():
            torch.testing.assert_close(batch.teacher, whole(batch)[0], rtol=1e-5, atol=1e-5)
    assert_refused(run, dataset, teacher, next_day, tmp_path)


def assert_refused(run: RunConfig, dataset: Dataset, teacher: Path, next_day: Path, tmp_path: Path) -> None:
    """A teacher of other data, of other tasks, and none at all."""
    pupil = with_train(load_run(next_day / "log" / "run.yaml"), distill=Distill(teacher=str(teacher)))
    with pytest.raises(DataError, match="was not trained on"):
        train(pupil, next_day / "prepared", tmp_path / "refused", resume=False, show=quietly)
    assert not (tmp_path / "refused").exists()
    other = run.model_copy(
        update={"data": run.data.model_copy(update={"tasks": [run.data.tasks[0].model_copy(update={"name": "buy"})]})}
    )
    with pytest.raises(DataError, match=r"predicts \['click'\], this run \['buy'\]"):
        check_teacher(open_checkpoint(teacher), other, dataset)


# -- stages ----------------------------------------------------------------------------------------------------------


STAGES = (
    Stage(data_fraction=0.25, embedding_dim=4, batch_size=64),
    Stage(data_fraction=0.5, embedding_dim=8, batch_size=128),
    Stage(epochs=2, batch_size=256),
)


def cut_after(whole: Path, out: Path, samples: int) -> None:
    """A run's folder as a kill leaves it right after the checkpoint at `samples` was committed."""
    shutil.copytree(whole, out)
    (out / "train.json").unlink()
    for path in out.glob("step-*"):
        if int(path.name.removeprefix("step-")) > samples:
            shutil.rmtree(path)
    path = out / "checkpoint_manager_snapshot.json"  # Ray Train's own account of what was committed
    snapshot = json.loads(path.read_text(encoding="utf-8"))
    pairs = zip(snapshot["checkpoint_results"], snapshot["checkpoint_report_indices"], strict=True)
    kept = [(result, index) for result, index in pairs if (out / result["checkpoint_dir_name"]).exists()]
    latest, reports = max(kept, key=lambda pair: pair[1])
    snapshot |= {
        "checkpoint_results": [result for result, _ in kept],
        "checkpoint_report_indices": [index for _, index in kept],
        "latest_checkpoint_result": latest,
        "current_report_index": reports + 1,
    }
    path.write_text(json.dumps(snapshot), encoding="utf-8")


@pytest.mark.usefixtures("group")
def test_stages_grow_without_a_jump_and_resume_to_the_bit(day: tuple[RunConfig, Path], tmp_path: Path) -> None:
    run, data = day
    run = with_train(run, stages=STAGES, evals_per_epoch=2, keep_checkpoints=20)
    dataset = open_dataset(data)
    result = train(run, data, tmp_path / "whole", resume=False, show=quietly)
    saved = [open_checkpoint(p, verify=False) for p in sorted((tmp_path / "whole").glob("step-*"))]
    assert [(c.manifest["stage"], c.manifest["table_dims"]["C3"]) for c in saved] == [
        *[(0, 4)] * 2,
        *[(1, 8)] * 2,
        *[(2, 16)] * 4,
    ]
    assert open_checkpoint(tmp_path / "whole").manifest["stage"] == 2, "the best is one of the whole model"
    assert result["samples"] == pytest.approx(TRAIN_ROWS * 2.75, abs=4 * 256)
    for before in (saved[1], saved[3]):
        narrow, grown = (worker_here(run, dataset, before.manifest["stage"] + more) for more in (0, 1))
        narrow.load(before)
        grown.load(before)
        old, new = log_odds(narrow.model, dataset), log_odds(grown.model, dataset)
        jump = float((new - old).square().mean().sqrt() / old.std())
        print(f"stage {before.manifest['stage']} -> next: jump {jump:.2g} of the spread {float(old.std()):.3f}")
        assert 0 < jump < JUMP
    for cut in (saved[2], saved[3]):  # in the middle of the second stage, and where the third begins
        out = tmp_path / f"from-{cut.position.samples}"
        cut_after(tmp_path / "whole", out, cut.position.samples)
        resumed = train(run, data, out, resume=True, show=quietly)
        assert resumed["test"] == result["test"]
        for other in saved:
            if other.position.samples > cut.position.samples:
                again = open_checkpoint(out / other.folder.name)
                assert again.position == other.position
                assert_same(other, again)
    # a run folder's earlier checkpoints are of narrower tables: what needs whole ones says so
    narrow_one = saved[1].folder
    for line in (
        command("evaluate", "--model", narrow_one, "--data", data, fails=True),
        command("compress", "--checkpoint", narrow_one, "--data", data, "--out", tmp_path / "no", fails=True),
    ):
        assert "earlier training stage" in line
    pupil = with_train(run, stages=(), distill=Distill(teacher=str(narrow_one)))
    with pytest.raises(CheckpointError, match="earlier training stage"):
        train(pupil, data, tmp_path / "no", resume=False, show=quietly)
    small = command("compress", "--checkpoint", tmp_path / "whole", "--data", data, "--out", tmp_path / "artifact")
    assert {t.embedding_dim for t in load_artifact(tmp_path / "artifact").model.transform.tables.values()} == {16}
    assert abs(small["delta_ne"]) < 0.01
    full = command("evaluate", "--model", tmp_path / "whole", "--data", data)
    assert full["auc"] == pytest.approx(result["test"]["auc"], abs=1e-6)


# -- a new day -------------------------------------------------------------------------------------------------------


def test_new_day_goes_on_from_the_old_checkpoint(
    day: tuple[RunConfig, Path], teacher: Path, next_day: Path, tmp_path: Path
) -> None:
    old, new = open_dataset(day[1]).transform, open_dataset(next_day / "prepared").transform
    content = yaml.safe_load((next_day / "log" / "run.yaml").read_text(encoding="utf-8"))
    config = write_yaml(next_day / "log" / "more.yaml", content, {})
    known = {t.name: t.num_embeddings for t in old.tables.values()}
    assert sum(t.num_embeddings - known[t.name] for t in new.tables.values()) > 500
    for name, ids in old.id_maps.items():
        np.testing.assert_array_equal(new.id_maps[name].keys_by_row()[: known[name] - 2], ids.keys_by_row())
    before = scores_as_unknown(load_run(config), next_day, teacher, known, tmp_path)
    refused = command(
        "train", "--config", config, "--data", next_day / "alone", "--out", tmp_path / "no", "--continue-from", teacher,
        fails=True,
    )  # fmt: skip
    assert "prepare the new data with --continue-from" in refused
    staged = with_train(load_run(config), stages=STAGES)
    with pytest.raises(ConfigError, match="stages"):
        train(staged, next_day / "prepared", tmp_path / "no", resume=False, show=quietly, continue_from=teacher)
    assert not (tmp_path / "no").exists()
    out = tmp_path / "run"
    result = command(
        "train", "--config", config, "--data", next_day / "prepared", "--out", out, "--continue-from", teacher
    )
    print(f"val NE of the new day: {before:.5f} before, {result['val']['ne']:.5f} after")
    assert result["val"]["ne"] < before
    assert open_checkpoint(out).manifest["continues"] == open_checkpoint(teacher).version
    assert result["samples"] == TRAIN_ROWS // 2


def scores_as_unknown(run: RunConfig, next_day: Path, teacher: Path, known: dict[str, int], tmp_path: Path) -> float:
    """Before training, ids that are new score as unknown ones do, bit for bit; the validation NE there."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        dataset = open_dataset(next_day / "prepared")
        worker = worker_here(run, dataset)
        worker.load(open_checkpoint(teacher))
        worker.model.eval()
        batch, _ = next(Reader(dataset, "train", 4096).batches())
        limits = torch.tensor([known[dataset.transform.sparse[k].table_name] for k in batch.sparse.keys()])  # noqa: SIM118
        values = batch.sparse.values()
        new = values >= torch.repeat_interleave(limits, len(batch))  # each feature has one id a row
        assert 0 < int(new.sum()) < len(values)
        unknown: Batch = replace(batch, sparse=batch.sparse.__class__(
            keys=batch.sparse.keys(), values=torch.where(new, OOV_ROW, values), lengths=batch.sparse.lengths()
        ))  # fmt: skip
        with torch.no_grad():
            assert torch.equal(worker.model(batch)[0], worker.model(unknown)[0])
        return float(worker.evaluate("val")["ne"])
    finally:
        dist.destroy_process_group()


# -- rich features ---------------------------------------------------------------------------------------------------


def test_tasks_sequences_attention_and_weights_from_log_to_answer(ray_local: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    log = rich_log(3_000, seed=5)
    ages = log["age"].to_numpy()
    likely = 1 / (1 + np.exp(-(ages - 40) / 6))
    log = log.drop_columns(["click"])
    log = log.append_column("click", pa.array((rng.random(len(log)) < likely).astype(np.int8)))
    log = log.append_column("stars", pa.array(np.where(rng.random(len(log)) < likely, 5, 2)))
    write_log(log, tmp_path / "log")
    content = yaml.safe_load(rich_run(tmp_path / "log", "mmoe").model_dump_json(exclude_none=True))
    content["data"]["tasks"] = [
        {"name": "click", "column": "click"},
        {"name": "buy", "column": "stars", "positive": ">= 4", "weight": 0.5},
    ]
    content["compress"] = {"version": 1, "default": {"bits": 8}, "tables": {"likes": {"bits": 4}}}
    config = write_yaml(tmp_path / "run.yaml", content, {"epochs": 4, "batch_size": 64})
    data, out, artifact = tmp_path / "prepared", tmp_path / "run", tmp_path / "artifact"
    command("data", "prepare", "--config", config, "--out", data)
    trained = command("train", "--config", config, "--data", data, "--out", out)
    assert {task: trained["test"][task]["auc"] > 0.7 for task in ("click", "buy")} == {"click": True, "buy": True}
    scored = command("evaluate", "--model", out, "--data", data)
    small = command("compress", "--checkpoint", out, "--data", data, "--out", artifact)
    assert abs(small["delta_ne"]) < 0.01
    rated = command("evaluate", "--model", artifact, "--data", data)
    for task in ("click", "buy"):
        assert scored[task]["auc"] == pytest.approx(trained["test"][task]["auc"], abs=1e-6)
        assert rated[task]["auc"] == pytest.approx(scored[task]["auc"], abs=0.005)
    check_answers(artifact, data, tmp_path)


def check_answers(artifact: Path, data: Path, tmp_path: Path) -> None:
    """Ranked offline, raw rows of the log score as their encoded rows do."""
    model, dataset = load_artifact(artifact).model, open_dataset(data)
    raw = dataset.sample().slice(0, 20)
    expected = 1 / (1 + np.exp(-model.score_encoded(model.transform.encode(raw))))
    sides = {c: f.side for f in model.transform.schema.features for c in (f.source, getattr(f, "weights", None)) if c}
    for row, scores in zip(raw.to_pylist(), expected, strict=True):
        user = {c: row[c] for c, side in sides.items() if side != "item" and row[c] is not None}
        request = tmp_path / "request.json"
        request.write_text(json.dumps({"user": user, "candidates": [row["item_id"]], "k": 1}), encoding="utf-8")
        (item,) = command("rank", "--artifact", artifact, "--request", request)["items"]
        assert item["id"] == row["item_id"]
        assert [item["scores"][t] for t in ("click", "buy")] == pytest.approx(scores.tolist(), abs=1e-6)
