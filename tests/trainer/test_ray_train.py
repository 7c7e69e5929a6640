"""trainer/ray_train.py without Ray: what it decides from values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_builders import make_dataset, make_run

from trainer import ray_train
from trainer.checkpoint import Checkpoint, Position, open_checkpoint, save_checkpoint
from trainer.config import RunConfig
from trainer.data.dataset import Dataset
from trainer.data.schema import Split
from trainer.errors import CheckpointError, ConfigError, DataError, SlimrankError
from trainer.ray_train import (
    RayReporter,
    check_continues,
    check_fits,
    check_resumes,
    check_room,
    raise_user_error,
    read_recoveries,
)
from trainer.worker import Place


def saved(folder: Path, run: RunConfig, dataset: Dataset, **header: Any) -> Checkpoint:
    """A checkpoint of a run with one tensor in it: what its header says is all that counts here."""
    told = {
        "run": run.model_dump(mode="json"),
        "fingerprint": dataset.transform.fingerprint(),
        "table_dims": run.table_dims(),
        "position": asdict(Position()),
        "metrics": {"ne": 0.9},
    }
    folder.parent.mkdir(exist_ok=True)
    save_checkpoint(folder, {"dense/head.out.bias": torch.zeros(1)}, told | header, 0, 1)
    return open_checkpoint(folder)


def test_run_fits_the_data_it_was_prepared_with(tmp_path):
    dataset = make_dataset(tmp_path, 20)
    check_fits(make_run(), dataset)
    check_fits(make_run(model={"arch": "dlrm"}, split=Split(by="row").model_dump()), dataset)
    with pytest.raises(DataError, match="prepared with other features or tasks than the config's"):
        check_fits(make_run(features=[{"name": "user", "kind": "categorical"}]), dataset)
    with pytest.raises(DataError, match="prepared with other features or tasks"):
        check_fits(make_run(tasks=[{"name": "other", "column": "label"}]), dataset)
    with pytest.raises(DataError, match="a split has 12 rows, fewer than 13 workers"):
        check_fits(make_run(train={"workers": 13}), dataset)


def test_more_workers_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(ray_train.ray, "cluster_resources", lambda: {"CPU": 2.0})
    check_room(2)
    with pytest.raises(ConfigError, match=r"train\.workers 3: the cluster has 2 cores: pass --workers 2"):
        check_room(3)


def test_user_error_of_a_worker_is_raised_as_it_was():
    cause = DataError("log.parquet: broken")
    wrapped = RuntimeError("worker died")
    wrapped.__cause__ = cause
    with pytest.raises(DataError, match=r"^log\.parquet: broken$"):
        raise_user_error(SimpleNamespace(worker_failures={0: wrapped}))
    task_error = RuntimeError("remote")
    task_error.cause = cause
    with pytest.raises(DataError, match=r"^log\.parquet: broken$"):
        raise_user_error(SimpleNamespace(worker_failures={0: ValueError("other"), 1: task_error}))


def test_error_that_is_no_users_is_left_alone():
    assert raise_user_error(SimpleNamespace(worker_failures={0: RuntimeError("died")})) is None
    assert raise_user_error(RuntimeError("no failures told")) is None


def test_errors_survive_the_way_between_processes():
    import pickle

    for kind in (SlimrankError, ConfigError, DataError):
        again = pickle.loads(pickle.dumps(kind("x: y")))
        assert type(again) is kind
        assert str(again) == "x: y"


def quietly(*_):
    """What is told of progress, unheard."""


def test_resuming_needs_no_folder_yet_and_says_so(tmp_path):
    dataset = make_dataset(tmp_path / "data", 20)
    told = []
    check_resumes(make_run(), dataset, tmp_path / "none", lambda latest, events: told.extend(events))
    assert [event["text"] for event in told] == [
        f"nothing to resume in {tmp_path / 'none'}: starting from the beginning"
    ]


@pytest.mark.parametrize(
    ("model", "train", "says"),
    [
        ({"arch": "dlrm"}, {}, r"trained with model\.arch dcn, the config says dlrm"),
        ({}, {"table_optimizer": "adagrad"}, r"train\.table_optimizer rowwise_adagrad, the config says adagrad"),
        ({}, {"dense_optimizer": "sgd"}, r"train\.dense_optimizer adamw, the config says sgd"),
        ({}, {"stages": [{"epochs": 1}]}, r"train\.stages \(\), the config says"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, model, train, says):
    dataset = make_dataset(tmp_path / "data", 20)
    saved(tmp_path / "run" / "step-000000000010", make_run(), dataset)
    check_resumes(make_run(train={"epochs": 7}), dataset, tmp_path / "run", quietly)
    with pytest.raises(ConfigError, match=says):
        check_resumes(make_run(model=model, train=train), dataset, tmp_path / "run", quietly)


def test_resuming_on_other_data_is_refused(tmp_path):
    dataset = make_dataset(tmp_path / "data", 20)
    other = make_dataset(tmp_path / "other", 30)
    saved(tmp_path / "run" / "step-000000000010", make_run(), other)
    with pytest.raises(DataError, match="not the prepared data that"):
        check_resumes(make_run(), dataset, tmp_path / "run", quietly)


def test_continuing_needs_the_same_model_and_known_data(tmp_path):
    dataset = make_dataset(tmp_path / "data", 20)
    checkpoint = saved(tmp_path / "one", make_run(), dataset)
    check_continues(make_run(train={"epochs": 2}), dataset, checkpoint)
    with pytest.raises(ConfigError, match="of another model than the config's"):
        check_continues(make_run(model={"embedding_dim": 16}), dataset, checkpoint)
    with pytest.raises(ConfigError, match=r"holds the state of train\.table_optimizer rowwise_adagrad"):
        check_continues(make_run(train={"table_optimizer": "sgd"}), dataset, checkpoint)
    early = saved(tmp_path / "early", make_run(), dataset, table_dims={"user": 4})
    with pytest.raises(CheckpointError, match="of an earlier training stage"):
        check_continues(make_run(), dataset, early)
    with pytest.raises(DataError, match=r"prepare the new data with --continue-from"):
        check_continues(make_run(), make_dataset(tmp_path / "other", 30), checkpoint)


class Heard:
    """Keeps what a run tells, in place of the board that Ray would hold."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def tell(self, latest: dict[str, Any], event: dict[str, Any] | None = None) -> None:  # noqa: ARG002
        """Progress or a note."""
        if event is not None:
            self.notes.append(event["text"])


def attempt(out: Path, samples: int) -> tuple[RayReporter, Heard]:
    """A worker of rank 0 that begins at a position."""
    heard, position = Heard(), Position(samples=samples)
    reporter = RayReporter(make_run(), out, heard, Place(0, 2, 2, torch.device("cpu")), position)  # type: ignore[arg-type]
    reporter.recovered(position, 2)
    return reporter, heard


def test_every_interruption_is_recorded_with_what_it_cost(tmp_path):
    first, heard = attempt(tmp_path, 0)
    assert heard.notes == [], "a run that only begins recovers from nothing"
    first.heartbeat(Position(samples=1000), committed=True)
    first.close("FAILED")
    _, heard = attempt(tmp_path, 1000)  # killed right after a checkpoint, before the next heartbeat
    assert len(heard.notes) == 1
    second, _ = attempt(tmp_path, 1000)
    second.heartbeat(Position(samples=1600))
    attempt(tmp_path, 1000)
    found = read_recoveries(tmp_path)
    assert [r["samples_redone"] for r in found] == [0, 0, 600]
    assert {r["from_samples"] for r in found} == {1000}


def test_a_run_that_was_done_recovers_from_nothing(tmp_path):
    first, _ = attempt(tmp_path, 0)
    first.heartbeat(Position(samples=2000), committed=True, done=True)
    _, heard = attempt(tmp_path, 2000)
    assert heard.notes == []
    assert read_recoveries(tmp_path) == []
