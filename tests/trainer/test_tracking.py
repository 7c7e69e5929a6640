"""trainer/tracking.py: what is recorded is read back, once, also after a resume."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from trainer.config import RunConfig
from trainer.errors import ConfigError, DataError
from trainer.tracking import Tracker, check_tracking, read_metrics

NE = {"ne": 0.9, "ndcg@10": 0.5, "auc": None}


def some_run(**train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "small",
            "data": {
                "input": "log.parquet",
                "tasks": [{"name": "click", "column": "label"}],
                "features": [{"name": "user", "kind": "categorical"}],
            },
            "train": train,
        }
    )


def events_in(folder: Path) -> list[Event]:
    """Every event of a folder, oldest file first: records of length, its CRC, data, their CRC."""
    events = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            events.append(Event.FromString(raw[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def scalars_in(folder: Path) -> list[tuple[int, str, float]]:
    return [(e.step, v.tag, v.simple_value) for e in events_in(folder) for v in e.summary.value]


# -- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_evaluations_are_read_back_as_they_were_told(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", some_run())
    tracker.evaluation(100, 0.5, {"click": NE}, {"lr": np.float32(0.5), "samples_per_s": float("nan"), "best": True})
    tracker.evaluation(200, 1.0, {"click": NE}, {})
    assert len(read_metrics(tmp_path / "run")) == 2  # before it is closed
    tracker.close()
    first, second = read_metrics(tmp_path / "run")
    assert first == {
        "samples": 100,
        "epoch": 0.5,
        "metrics": {"click": NE},
        "lr": 0.5,
        "samples_per_s": None,
        "best": True,
    }
    assert (second["samples"], second["epoch"]) == (200, 1.0)


def test_a_resumed_run_keeps_one_lineage(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, some_run())
    for samples in (100, 200, 300):
        tracker.evaluation(samples, samples / 100, {"ne": 1.0}, {})
    tracker.close()
    tracker = Tracker(tmp_path, some_run(), samples=200)
    tracker.evaluation(300, 3.0, {"ne": 0.5}, {})
    tracker.close()
    assert [(r["samples"], r["metrics"]["ne"]) for r in read_metrics(tmp_path)] == [(100, 1.0), (200, 1.0), (300, 0.5)]


def test_a_run_that_starts_again_drops_what_was_there(tmp_path: Path) -> None:
    Tracker(tmp_path, some_run()).evaluation(100, 1.0, NE, {})
    Tracker(tmp_path, some_run()).close()
    assert read_metrics(tmp_path) == []


def test_a_torn_last_line_is_left_out_and_never_glued_to_the_next(tmp_path: Path) -> None:
    Tracker(tmp_path, some_run()).evaluation(100, 1.0, NE, {})
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + whole[: len(whole) // 2])
    assert len(read_metrics(tmp_path)) == 1
    Tracker(tmp_path, some_run(), samples=100).evaluation(200, 2.0, NE, {})
    assert [r["samples"] for r in read_metrics(tmp_path)] == [100, 200]


@pytest.mark.parametrize("line", ["half {", "[]", "{}", "3"])
def test_a_broken_line_within_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"samples": 1, "metrics": {{}}}}\n{line}\n{{"samples": 2}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 is not an evaluation"):
        read_metrics(tmp_path)


# -- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_evaluations_and_scalars(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, some_run())
    tracker.evaluation(100, 0.5, {"click": NE}, {"lr": 0.25, "best": True})
    tracker.scalars(120, {"train/loss": 0.75, "train/gone": float("inf"), "train/none": None})
    tracker.close()
    assert scalars_in(tmp_path) == [
        (100, "val/click/ne", pytest.approx(0.9)),
        (100, "val/click/ndcg_at_10", 0.5),
        (100, "train/epoch", 0.5),
        (100, "train/lr", 0.25),
        (120, "train/loss", 0.75),
    ]


def test_a_resumed_run_purges_later_events(tmp_path: Path) -> None:
    first = Tracker(tmp_path, some_run())
    first.evaluation(300, 3.0, {"ne": 1.0}, {})
    first.close()
    assert not [e for e in events_in(tmp_path) if e.HasField("session_log")]
    Tracker(tmp_path, some_run(), samples=200).close()
    starts = [e for e in events_in(tmp_path) if e.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in starts] == [(201, SessionLog.START)]


# -- MLflow ----------------------------------------------------------------------------------------------------------


class Failure(Exception):
    """Stands in for mlflow.exceptions.MlflowException."""


class Store:
    """Stands in for MlflowClient and its server: the documented calls, no others."""

    def __init__(self) -> None:
        self.uri = ""
        self.experiments: dict[str, str] = {}
        self.status: dict[str, str] = {}
        self.params: list[tuple[str, str]] = []
        self.metrics: list[tuple[str, str, float, int]] = []
        self.down = False

    def __call__(self, tracking_uri: str | None = None) -> Store:
        self.uri = tracking_uri or ""
        return self

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        self._up()
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = str(len(self.experiments) + 1)
        return self.experiments[name]

    def create_run(self, experiment_id: str, run_name: str | None = None) -> SimpleNamespace:
        run_id = f"{experiment_id}-{run_name}-{len(self.status)}"
        self.status[run_id] = "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str | None = None) -> None:
        if run_id not in self.status:
            raise Failure("no such run")
        self.status[run_id] = str(status)

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self._up()
        assert len(params) <= 100
        self.params += params
        self.metrics += [(run_id, key, value, step) for key, value, _, step in metrics]

    def set_terminated(self, run_id: str, status: str = "FINISHED") -> None:
        self._up()
        self.status[run_id] = status

    def _up(self) -> None:
        if self.down:
            raise Failure("connection refused\nlong story")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """An mlflow package that keeps what it is told in memory."""
    store = Store()
    names = {
        "mlflow": {"MlflowClient": store},
        "mlflow.entities": {"Metric": lambda *fields: fields, "Param": lambda *fields: fields},
        "mlflow.exceptions": {"MlflowException": Failure},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return store


def test_mlflow_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    check_tracking(some_run())
    for act in (check_tracking, lambda run: Tracker(tmp_path, run)):
        with pytest.raises(ConfigError, match=r"train\.mlflow: .*pip install mlflow"):
            act(some_run(mlflow={"experiment": "rankers"}))


def test_mlflow_is_told_settings_metrics_and_the_end(tmp_path: Path, store: Store) -> None:
    tracker = Tracker(tmp_path, some_run(mlflow={"experiment": "rankers", "tracking_uri": "http://tracking:5000"}))
    tracker.evaluation(100, 0.5, NE, {})
    run_id = "1-small-0"
    assert store.uri == "http://tracking:5000"
    assert ("train.table_lr", "0.02") in store.params
    assert store.metrics == [
        (run_id, "val/ne", 0.9, 100),
        (run_id, "val/ndcg_at_10", 0.5, 100),
        (run_id, "train/epoch", 0.5, 100),
    ]
    assert store.status == {run_id: "RUNNING"}
    tracker.close()
    assert store.status == {run_id: "FINISHED"}


def test_mlflow_without_an_address_is_a_file_beside_the_run(tmp_path: Path, store: Store) -> None:
    Tracker(tmp_path, some_run(mlflow={"experiment": "rankers"})).close()
    assert store.uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_resumed_run_goes_on_in_its_mlflow_run(tmp_path: Path, store: Store) -> None:
    run = some_run(mlflow={"experiment": "rankers"})
    Tracker(tmp_path, run).close("KILLED")
    params = list(store.params)
    Tracker(tmp_path, run, samples=100)
    assert store.status == {"1-small-0": "RUNNING"}
    assert store.params == params  # MLflow refuses to change them
    store.status.clear()  # deleted on the server
    Tracker(tmp_path, run, samples=100)
    assert json.loads((tmp_path / "mlflow.json").read_text())["run_id"] in store.status
    Tracker(tmp_path, some_run(mlflow={"experiment": "other"}), samples=100)
    assert list(store.experiments) == ["rankers", "other"]


def test_a_server_that_is_lost_does_not_end_the_training(tmp_path: Path, store: Store) -> None:
    notes: list[str] = []
    config = {"experiment": "rankers", "tracking_uri": "http://me:secret@tracking:5000"}
    tracker = Tracker(tmp_path, some_run(mlflow=config), note=notes.append)
    store.down = True
    tracker.evaluation(100, 0.5, NE, {})
    tracker.evaluation(200, 1.0, NE, {})
    tracker.close()
    assert notes == ["MLflow at http://tracking:5000 failed (connection refused): going on without it"]
    assert len(read_metrics(tmp_path)) == 2


def test_a_server_that_is_not_there_is_refused_at_the_start(tmp_path: Path, store: Store) -> None:
    store.down = True
    with pytest.raises(ConfigError, match=r"http://tracking:5000: connection refused: check tracking_uri"):
        Tracker(tmp_path, some_run(mlflow={"experiment": "r", "tracking_uri": "http://me:secret@tracking:5000"}))
