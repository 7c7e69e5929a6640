"""trainer/ray_train.py without Ray: what it decides from values."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from trainer_builders import CPU, make_dataset, make_run, shard

from trainer import ray_train
from trainer.checkpoint import Position, training_state
from trainer.data.schema import Split
from trainer.errors import ConfigError, DataError, SlimrankError
from trainer.models import build_ranker
from trainer.ray_train import (
    check_fits,
    check_room,
    evaluate_and_save,
    init_tables,
    raise_user_error,
    start_at_base_rate,
)

shard_warnings = pytest.mark.filterwarnings(  # TorchRec 1.8 wraps the head in torch 2.13's DDP with its former argument
    "ignore:`broadcast_buffers` is deprecated:FutureWarning", "ignore:Please use DTensor instead:FutureWarning"
)


class StandInWorker:
    """A worker whose evaluations are given beforehand and whose reports are kept."""

    rank = 0

    def __init__(self, *nes: float) -> None:
        self.nes = list(nes)
        self.reported: list[Position] = []
        self.lines: list[str] = []
        self.teller = SimpleNamespace(tell=lambda state, line: self.lines.append(line))

    def evaluate(self, split: str) -> dict[str, float]:
        assert split == "val"
        return {"ne": self.nes.pop(0), "auc": 0.7, "log_loss": 0.5, "calibration": 1.0}

    def report(self, position: Position, metrics: dict[str, float]) -> None:
        self.reported.append(position)


def test_evaluation_remembers_the_best_and_counts_the_stale():
    worker = StandInWorker(0.9, 0.8, 0.85, 0.8, 0.7)
    position, seen = Position(batch=2), []
    for _ in range(5):
        position = evaluate_and_save(worker, position, batches=10)
        seen.append((position.best_ne, position.stale_evals))
    assert seen == [(0.9, 0), (0.8, 0), (0.8, 1), (0.8, 2), (0.7, 0)]
    assert worker.reported[-1] == position
    assert ["best" in line for line in worker.lines] == [True, True, False, False, True]


def test_evaluation_at_the_end_of_an_epoch_stores_the_next_ones_start():
    worker = StandInWorker(0.9)
    position = evaluate_and_save(worker, Position(epoch=1, batch=10, samples=99), batches=10)
    assert (position.epoch, position.batch) == (1, 10)
    assert worker.reported == [Position(epoch=2, batch=0, samples=99, best_ne=0.9)]


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


def test_head_starts_at_the_base_rate(tmp_path):
    dataset = make_dataset(tmp_path, 30)
    model = build_ranker(make_run().model, dataset.transform)
    start_at_base_rate(model, dataset)
    rate = dataset.positives["train"][0] / 30
    assert 0 < rate < 1
    torch.testing.assert_close(torch.sigmoid(model.head.out.bias.detach()), torch.tensor([rate]))


@shard_warnings
@pytest.mark.usefixtures("group")
def test_tables_start_from_the_runs_seed_alone(tmp_path):
    dataset = make_dataset(tmp_path / "data", 40)
    starts = []
    for run_seed, model_seed in [(1, 0), (1, 5), (2, 0)]:
        run = make_run(train={"seed": run_seed}, model={"table_init": 0.03})
        model, optimizer = shard(run, dataset.transform, seed=model_seed)
        init_tables(ray_train.Worker(run, dataset, model, optimizer, CPU, 0, 1, {}, None))
        state = training_state(model, optimizer)
        starts.append(
            {t: state[f"tables/{t}/weight"].local_shards()[0].tensor.clone() for t in dataset.transform.tables}
        )
    for table in dataset.transform.tables:
        assert torch.equal(starts[0][table], starts[1][table])
        assert not torch.equal(starts[0][table], starts[2][table])
        assert 0.02 < starts[0][table].abs().max() <= 0.03
    assert not torch.equal(starts[0]["user"][:5], starts[0]["hashed"][:5]), "each table its own numbers"


def test_position_is_a_plain_value():
    assert Position(**asdict(Position(1, 2, 3, 0.5, 4))) == Position(1, 2, 3, 0.5, 4)
