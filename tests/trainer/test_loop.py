"""trainer/loop.py: what it decides from values, how tables start, and runs on one process, killed and resumed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_builders import CPU, local_tensors, make_dataset, make_run

from trainer import worker
from trainer.checkpoint import Checkpoint, Position, open_checkpoint
from trainer.config import RunConfig
from trainer.data.dataset import Dataset
from trainer.data.digest import epoch_digest
from trainer.data.reader import Reader
from trainer.errors import DataError
from trainer.loop import (
    after_evaluation,
    check_seen,
    epoch_order,
    keep_score,
    planned,
    seed_step,
    train_stages,
    until_evaluation,
)
from trainer.metrics import mean_ne
from trainer.models import build_ranker
from trainer.worker import GROWN_INIT, Place, Worker, build_worker, fill, start_at_base_rate

pytestmark = pytest.mark.filterwarnings(  # TorchRec 1.8 wraps the head in torch 2.13's DDP with its former argument
    "ignore:`broadcast_buffers` is deprecated:FutureWarning", "ignore:Please use DTensor instead:FutureWarning"
)

ALONE = Place(0, 1, 1, CPU)
STAGES = [
    {"epochs": 2, "embedding_dim": 4, "data_fraction": 0.5},
    {"epochs": 1, "batch_size": 20},
]


# -- decisions -------------------------------------------------------------------------------------------------------


def after(run: RunConfig, position: Position, *nes: float, epoch_done: bool = False) -> list[Position]:
    found = []
    for ne in nes:
        position = after_evaluation(run, position, ne, epoch_done)
        found.append(position)
    return found


def test_evaluation_remembers_the_best_and_counts_the_stale():
    run = make_run(train={"patience": 9})
    found = after(run, Position(batch=2), 0.9, 0.8, 0.85, 0.8, 0.7)
    assert [(p.best_ne, p.stale_evals) for p in found] == [(0.9, 0), (0.8, 0), (0.8, 1), (0.8, 2), (0.7, 0)]
    assert {(p.epoch, p.batch) for p in found} == {(0, 2)}


def test_ne_that_is_no_number_is_no_better():
    (found,) = after(make_run(), Position(best_ne=0.9), math.nan)
    assert (found.best_ne, found.stale_evals) == (0.9, 1)


def test_ne_that_is_no_number_at_first_does_not_hide_a_later_one():
    found = after(make_run(), Position(), math.nan, 0.9)
    assert (found[-1].best_ne, found[-1].stale_evals) == (0.9, 0)


def test_epochs_end_starts_the_next_one_and_its_account_of_rows():
    before = Position(epoch=1, batch=10, step=30, samples=99, seen=12345)
    (found,) = after(make_run(), before, 0.9, epoch_done=True)
    assert found == Position(epoch=2, batch=0, step=30, samples=99, best_ne=0.9, seen=0)
    (within,) = after(make_run(), before, 0.9)
    assert (within.epoch, within.batch, within.seen) == (1, 10, 12345)


def test_plateau_drops_the_rates_and_waits_again():
    run = make_run(train={"patience": 9, "plateau": {"factor": 0.5, "patience": 2}})
    found = after(run, Position(), 0.9, 0.9, 0.91, 0.92, 0.95, 0.8, 0.81, 0.82)
    assert [p.lr_scale for p in found] == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert [p.stale_lr for p in found] == [0, 1, 0, 1, 0, 0, 1, 0]
    assert {p.lr_scale for p in after(make_run(), Position(), 0.9, 0.9, 0.9)} == {1.0}


def test_stage_ends_with_its_epochs_and_forgets_its_best():
    run = make_run(train={"stages": STAGES})
    (within,) = after(run, Position(epoch=0, batch=5, step=5, samples=50), 0.9, epoch_done=True)
    assert (within.stage, within.epoch) == (0, 1)
    (found,) = after(run, Position(epoch=1, batch=5, step=9, samples=90, best_ne=0.8), 0.9, epoch_done=True)
    assert found == Position(stage=1, step=9, samples=90)


def test_early_stopping_ends_a_stage_and_not_the_run():
    run = make_run(train={"stages": STAGES, "patience": 2, "plateau": {"factor": 0.5, "patience": 1}})
    found = after(run, Position(best_ne=0.5, batch=3, step=3, samples=30), 0.6, 0.7)
    assert (found[0].stage, found[0].stale_evals) == (0, 1)
    assert found[1] == Position(stage=1, step=3, samples=30, lr_scale=0.25)


def test_last_stage_stays_the_last():
    run = make_run(train={"stages": STAGES, "patience": 1})
    (found,) = after(run, Position(stage=1, best_ne=0.5), 0.6, epoch_done=True)
    assert (found.stage, found.epoch, found.stale_evals) == (1, 1, 1)


def test_checkpoints_of_earlier_stages_are_kept_behind_all_of_the_last():
    ne = {"ne": 0.5}
    assert keep_score({"ne": 0.4}, 1, 2) < keep_score(ne, 1, 2)
    assert keep_score({"ne": 9.9}, 1, 2) < keep_score({"ne": 0.1}, 0, 2)
    assert keep_score(ne, 0, 1) == mean_ne(ne)


def test_checkpoint_whose_ne_is_no_number_is_the_first_to_go():
    assert keep_score({"ne": math.nan}, 1, 2) > keep_score({"ne": 9.9}, 0, 2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data"), 120)


def test_planned_counts_what_the_reader_gives(dataset):
    for train in ({"epochs": 3, "batch_size": 25}, {"stages": STAGES, "batch_size": 16}):
        run = make_run(train=train)
        steps = samples = 0
        for index, stage in enumerate(run.train.all_stages):
            size = run.train.batch_rows(120, index)
            reader = Reader(dataset, "train", size, shuffle=True, fraction=stage.data_fraction)
            steps += stage.epochs * reader.num_batches()
            samples += stage.epochs * reader.epoch_rows()
        found = planned(run, dataset)
        assert abs(found[0] - steps) <= len(run.train.all_stages) * 3, "batches are rounded, an epoch at most by one"
        assert found[1] == pytest.approx(samples, rel=0.05)


def test_evaluations_divide_an_epoch(dataset):
    reader = Reader(dataset, "train", 12)
    assert reader.num_batches() == 10
    for evals, expected in ((1, [10]), (3, [4, 4, 2]), (4, [3, 3, 3, 1]), (99, [1] * 10)):
        found, batch = [], 0
        while batch < 10:
            found.append(until_evaluation(reader, evals, batch))
            batch += found[-1]
        assert found == expected
    assert until_evaluation(reader, 4, 4) == 2, "a run resumed within a segment evaluates where it would have"


def test_epochs_are_numbered_over_all_stages():
    run = make_run(train={"stages": STAGES})
    orders = [epoch_order(run, Position(stage=s, epoch=e)) for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert orders == [0, 1, 2, 3]


def test_dropout_depends_on_the_step_and_the_rank_alone():
    def draws(position: Position, rank: int = 0, seed: int = 1) -> list[float]:
        seed_step(seed, position, rank)
        return torch.rand(4).tolist()

    first = draws(Position(epoch=1, batch=2))
    torch.rand(100)
    assert draws(Position(epoch=1, batch=2, samples=7, best_ne=0.1)) == first
    others = [
        draws(Position(epoch=1, batch=3)),
        draws(Position(epoch=2, batch=2)),
        draws(Position(stage=1, epoch=1, batch=2)),
        draws(Position(epoch=1, batch=2), rank=1),
        draws(Position(epoch=1, batch=2), seed=2),
    ]
    assert all(o != first for o in others)


def test_epoch_that_missed_or_repeated_a_row_is_found(dataset):
    reader = Reader(dataset, "train", 16, shuffle=True)
    seen = [batch.digest for batch, _ in reader.batches(3)]
    check_seen(reader, sum(seen) % 2**64, 3)
    assert sum(seen) % 2**64 == epoch_digest(120, 3)
    for wrong in (sum(seen[1:]), sum(seen) + seen[0], 0):
        with pytest.raises(DataError, match="epoch 4: the rows trained on are not each row of the split once"):
            check_seen(reader, wrong % 2**64, 3)
    with pytest.raises(DataError, match="epoch 3"):
        check_seen(reader, sum(seen) % 2**64, 2)
    check_seen(Reader(dataset, "train", 16, shuffle=True, fraction=0.5), 0, 3)


# -- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_head_starts_at_the_base_rate_of_the_log(dataset, rate):
    sampled = replace(dataset, manifest=dataset.manifest | {"negative_rate": rate})
    model = build_ranker(make_run().model, dataset.transform)
    start_at_base_rate(model, sampled)
    positives = dataset.positives["train"][0]
    assert 0 < positives < 120
    expected = positives / (positives + (120 - positives) / rate)
    assert float(torch.sigmoid(model.head.out.bias.detach())) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arch", ["dcn", "deepfm", "dlrm", "mmoe"])
def test_every_architecture_starts_at_the_base_rate(dataset, arch):
    model = build_ranker(make_run(model={"arch": arch}).model, dataset.transform)
    start_at_base_rate(model, dataset)
    assert torch.allclose(torch.sigmoid(model.head.out.bias), torch.tensor(dataset.positives["train"][0] / 120))


@pytest.mark.parametrize("block", [3, 7, 64])
def test_fill_gives_one_table_for_any_offsets(monkeypatch, block):
    monkeypatch.setattr(worker, "INIT_ROWS", block)
    whole = torch.arange(20 * 6, dtype=torch.float32).view(20, 6)

    def rows_of(number: int) -> torch.Tensor:
        return whole[number * block : (number + 1) * block]

    for first in range(20):
        for last in range(first + 1, 21):
            for left, right in ((0, 6), (0, 2), (2, 6), (4, 6)):
                part = torch.full((last - first, right - left), -1.0)
                fill(part, first, left, rows_of)
                assert torch.equal(part, whole[first:last, left:right]), (first, last, left, right)


def tables_of(worker: Worker) -> dict[str, torch.Tensor]:
    keys = [f"tables/{t}/weight" for t in worker.dataset.transform.tables]
    return {k: torch.cat(local_tensors(worker.state()[k])).detach().clone() for k in keys}


@pytest.mark.usefixtures("group")
def test_tables_start_from_the_runs_seed_alone(dataset, monkeypatch):
    starts = []
    for seed, noise, placing in [(1, 0, "table_wise"), (1, 5, "data_parallel"), (2, 0, "table_wise")]:
        torch.manual_seed(noise)
        run = make_run(train={"seed": seed, "sharding": {"default": placing}}, model={"table_init": 0.03})
        starts.append(tables_of(build_worker(run, dataset, ALONE, 0)))
    for key, table in starts[0].items():
        assert torch.equal(table, starts[1][key])
        assert not torch.equal(table, starts[2][key])
        assert 0.02 < table.abs().max() <= 0.03
    user, hashed = starts[0]["tables/user/weight"], starts[0]["tables/hashed/weight"]
    assert not torch.equal(user[:5], hashed[:5]), "each table its own numbers"


@pytest.mark.usefixtures("group")
def test_columns_that_a_stage_adds_start_small_and_the_others_as_in_one_stage(dataset):
    staged, plain = make_run(train={"stages": STAGES}), make_run()
    sized = dataset.sized(staged.data, staged.model.embedding_dim)
    narrow, whole = (tables_of(build_worker(staged, sized, ALONE, stage)) for stage in (0, 1))
    alone = tables_of(build_worker(plain, sized, ALONE, 0))["tables/user/weight"]
    key = "tables/user/weight"
    assert (narrow[key].shape[1], whole[key].shape[1]) == (4, 8)
    assert torch.equal(narrow[key], alone[:, :4])
    assert torch.equal(whole[key][:, :4], alone[:, :4])
    torch.testing.assert_close(whole[key][:, 4:], alone[:, 4:] * GROWN_INIT)
    assert torch.equal(whole["tables/item/weight"], narrow["tables/item/weight"]), "of dim 4 in every stage"


# -- a run -----------------------------------------------------------------------------------------------------------


class Recorder:
    """A Reporter that keeps what it is told; `stop_after` checkpoints it stands for a kill."""

    def __init__(self, folder: Path, stop_after: int = 10**9) -> None:
        self.folder = folder
        self.stop_after = stop_after
        self.commits: list[tuple[Path, Position, float, int]] = []
        self.events: list[dict[str, Any]] = []

    def path(self, position: Position) -> Path:
        return self.folder / f"step-{position.samples:06d}"

    def commit(self, path: Path, position: Position, metrics: dict[str, Any], stage: int) -> None:
        self.commits.append((path, position, mean_ne(metrics), stage))
        if len(self.commits) == self.stop_after:
            raise KeyboardInterrupt

    def progress(self, position: Position, latest: dict[str, Any]) -> None:
        pass

    def evaluation(self, event: dict[str, Any]) -> None:
        self.events.append(event)


def go(run: RunConfig, dataset: Dataset, reporter: Recorder, found: Checkpoint | None = None):
    sized = dataset.sized(run.data, run.model.embedding_dim)

    def build(stage: int, precision, lanes) -> Worker:
        return build_worker(run, sized, ALONE, stage, precision=precision, lanes=lanes)

    return train_stages(build, run, reporter, found, None)


RUNS = {
    "plain": {"epochs": 2, "batch_size": 20, "evals_per_epoch": 2},
    "stages": {"stages": STAGES, "batch_size": 15, "evals_per_epoch": 2},
    "schedule": {
        "epochs": 2,
        "batch_size": 20,
        "evals_per_epoch": 2,
        "schedule": {"warmup_steps": 3, "decay": "cosine"},
        "plateau": {"factor": 0.5, "patience": 1},
        "dense_optimizer": "adam",
        "table_optimizer": "adagrad",
        "clip_norm": 0.1,
    },
}


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    return tmp_path / "whole", tmp_path / "cut"


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_run_that_was_killed_ends_as_the_whole_one(dataset, folders, name, stop_after):
    """To the last bit: weights, optimizer state, position, metrics; dropout and masked ids included."""
    run = make_run(train=RUNS[name] | {"patience": 99}, model={"dropout": 0.3})
    whole = Recorder(folders[0])
    worker, position, _ = go(run, dataset, whole)
    cut = Recorder(folders[1], stop_after)
    with pytest.raises(KeyboardInterrupt):
        go(run, dataset, cut)
    again = Recorder(folders[1])
    resumed, end, _ = go(run, dataset, again, open_checkpoint(cut.commits[-1][0]))
    assert end == position
    assert [c[1:] for c in cut.commits + again.commits] == [c[1:] for c in whole.commits]
    for key, value in worker.state().items():
        for got, want in zip(local_tensors(resumed.state()[key]), local_tensors(value), strict=True):
            assert torch.equal(got, want), key


@pytest.mark.usefixtures("group")
def test_run_of_stages_trains_narrow_tables_then_whole_ones(dataset, folders):
    run = make_run(train=RUNS["stages"] | {"patience": 99})
    recorder = Recorder(folders[0])
    worker, position, _ = go(run, dataset, recorder)
    assert [c[3] for c in recorder.commits] == [0] * 4 + [1] * 2
    dims = [open_checkpoint(c[0]).manifest["table_dims"]["user"] for c in recorder.commits]
    assert dims == [4] * 4 + [8] * 2
    assert (position.stage, position.epoch) == (1, 1)
    assert position.samples == pytest.approx(planned(run, dataset)[1], abs=10)
    assert tables_of(worker)["tables/user/weight"].shape[1] == 8


@pytest.mark.usefixtures("group")
def test_run_stops_once_patience_is_spent(dataset, folders, monkeypatch):
    scores = iter([0.9, 0.8, 0.85, 0.81, 0.5])
    monkeypatch.setattr(Worker, "evaluate", lambda self, split: {"ne": next(scores)})
    recorder = Recorder(folders[0])
    run = make_run(train={"epochs": 50, "batch_size": 20, "evals_per_epoch": 2, "patience": 2})
    _, position, _ = go(run, dataset, recorder)
    assert [c[2] for c in recorder.commits] == [0.9, 0.8, 0.85, 0.81]
    assert [e["best"] for e in recorder.events] == [True, True, False, False]
    assert (position.best_ne, position.stale_evals) == (0.8, 2)


@pytest.mark.usefixtures("group")
def test_evaluations_tell_epochs_and_the_rate_in_force(dataset, folders):
    recorder = Recorder(folders[0])
    schedule = {"warmup_steps": 0, "decay": "linear", "end": 0.5}
    run = make_run(train={"epochs": 2, "batch_size": 20, "evals_per_epoch": 2, "patience": 99, "schedule": schedule})
    go(run, dataset, recorder)
    assert [e["epoch"] for e in recorder.events] == [0.5, 1.0, 1.5, 2.0]
    assert [e["samples"] for e in recorder.events] == [60, 120, 180, 240]
    rates = np.array([e["lr"] for e in recorder.events]) / run.train.dense_lr
    assert rates.tolist() == pytest.approx([0.875, 0.75, 0.625, 0.5])


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", RUNS)
def test_pipelined_run_is_the_plain_one(dataset, folders, name):
    """TorchRec's pipeline reads a batch or two ahead; steps, masks and dropout fall on the same rows."""
    found = []
    for folder, pipeline in zip(folders, (False, True), strict=True):
        run = make_run(train=RUNS[name] | {"patience": 99, "pipeline": pipeline}, model={"dropout": 0.3})
        recorder = Recorder(folder)
        worker, position, _ = go(run, dataset, recorder)
        found.append((worker.state(), position, [c[1:] for c in recorder.commits]))
    assert found[0][1].seen == found[1][1].seen
    assert [(p.samples, p.step, stage) for p, _, stage in found[0][2]] == [
        (p.samples, p.step, stage) for p, _, stage in found[1][2]
    ]
    for key, value in found[0][0].items():
        for got, want in zip(local_tensors(found[1][0][key]), local_tensors(value), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
