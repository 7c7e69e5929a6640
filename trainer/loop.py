"""The training loop on one rank: step, evaluate, decide how to go on, save; stage after stage. Imports no Ray.

What it tells and where checkpoints go is a Reporter's business: Ray Train's is in trainer/ray_train.py.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from trainer.checkpoint import (
    Checkpoint,
    Position,
    open_checkpoint,
)
from trainer.config import RunConfig
from trainer.data.batch import Batch
from trainer.data.dataset import Dataset
from trainer.data.digest import epoch_digest
from trainer.data.reader import Reader
from trainer.errors import DataError
from trainer.machine import keep_freed_memory
from trainer.metrics import mean_ne
from trainer.optimizer import lr_factor, set_lr
from trainer.precision import Precision
from trainer.ranks import from_all
from trainer.step import Loss, Stepper
from trainer.worker import Place, Worker

WARMUP_STEPS = 10  # left out of samples_per_s


class Reporter(Protocol):
    """What a run tells the world. All but `path` and `commit` are called on rank 0 alone."""

    def path(self, position: Position) -> Path:
        """Where a checkpoint is to be written."""

    def commit(self, path: Path, position: Position, metrics: dict[str, Any], stage: int) -> None:
        """A checkpoint is whole; every rank calls this. `stage` is the one that was trained."""

    def progress(self, position: Position, latest: dict[str, Any]) -> None:
        """A step is done."""

    def evaluation(self, event: dict[str, Any]) -> None:
        """The validation split was scored."""


@dataclass
class Speed:
    """Samples and seconds of the steps after the first few; evaluations and checkpoints are left out."""

    samples: int = 0
    seconds: float = 0.0

    @property
    def per_s(self) -> float | None:
        """Steady-state samples a second."""
        return round(self.samples / self.seconds, 1) if self.seconds else None


def train_stages(
    build: Callable[[int, Precision | None, int | None], Worker],
    run: RunConfig,
    reporter: Reporter,
    found: Checkpoint | None,
    start: Checkpoint | None,
) -> tuple[Worker, Position, Speed]:
    """Train from a checkpoint of this run (`found`), from another run's weights (`start`), or from nothing."""
    keep_freed_memory()
    position = Position() if found is None else found.position
    stages = run.train.all_stages
    stage = min(position.stage, len(stages) - 1)
    kept = {} if found is None else found.manifest
    worker = build(stage, kept.get("precision"), kept.get("lanes"))
    if found is not None or start is not None:
        worker.load(found or start)  # type: ignore[arg-type]
    speed = Speed()
    while True:
        position, saved = train_stage(worker, position, reporter, speed)
        if position.stage == stage or saved is None or position.stage >= len(stages):
            return worker, position, speed
        stage = position.stage
        worker = build(stage, worker.precision, worker.lanes)
        worker.load(open_checkpoint(saved, verify=False))


def train_stage(worker: Worker, position: Position, reporter: Reporter, speed: Speed) -> tuple[Position, Path | None]:
    """Train until the stage's epochs are done or the validation NE stops improving.

    Returns where training stands (in the next stage, where there is one) and the last checkpoint written.
    """
    train, place = worker.run.train, worker.place
    reader = train_reader(worker)
    total_steps, total_samples = planned(worker.run, worker.dataset)
    pace = Pace(reporter, position, total_samples) if place.rank == 0 else None
    stepper = Stepper(
        worker.model,
        worker.optimizer,
        Loss(worker.run, worker.dataset.negative_rate),
        place.device,
        place.world_size,
        train.pipeline,
    )
    saved: Path | None = None
    warm = WARMUP_STEPS

    def before() -> None:
        seed_step(train.seed, position, place.rank)
        set_lr(worker.optimizer, lr_factor(train, position.step, total_steps) * position.lr_scale)

    while goes_on(worker, position):
        epoch = position.epoch
        order = epoch_order(worker.run, position)
        source = reader.batches(order, position.batch)
        while goes_on(worker, position) and position.epoch == epoch:
            seen = 0
            waiting: deque[Batch] = deque()
            segment = until_evaluation(reader, train.evals_per_epoch, position.batch)
            mark = time.perf_counter()
            for _ in stepper.steps(remembered(itertools.islice(source, segment), waiting), before):
                batch = waiting.popleft()
                now = time.perf_counter()
                if warm > 0:
                    warm -= 1
                else:
                    speed.samples, speed.seconds = speed.samples + batch.rows, speed.seconds + now - mark
                mark = now
                seen = (seen + batch.digest) % 2**64
                position = replace(
                    position,
                    batch=position.batch + 1,
                    step=position.step + 1,
                    samples=position.samples + batch.rows,
                )
                if pace is not None:
                    pace.tell(position)
            position = replace(position, seen=(position.seen + sum_over_ranks(seen, place)) % 2**64)
            if position.batch == reader.num_batches():
                check_seen(reader, position.seen, order)
            position, saved = evaluate_and_save(worker, position, reader, reporter, speed)
        source.close()
    return position, saved


def goes_on(worker: Worker, position: Position) -> bool:
    """Whether a stage has more to train."""
    train = worker.run.train
    stage = train.all_stages[worker.stage]
    return position.stage == worker.stage and position.epoch < stage.epochs and position.stale_evals < train.patience


def train_reader(worker: Worker) -> Reader:
    """The training split, as the worker's stage takes it."""
    train, place = worker.run.train, worker.place
    return Reader(
        worker.dataset,
        "train",
        worker.run.train.batch_rows(worker.dataset.rows("train"), worker.stage),
        rank=place.rank,
        world_size=place.world_size,
        seed=train.seed,
        shuffle=train.shuffle,
        oov_rate=train.oov_rate,
        lanes=worker.lanes,
        fraction=train.all_stages[worker.stage].data_fraction,
        teacher=worker.teacher,
    )


def epoch_order(run: RunConfig, position: Position) -> int:
    """The number of an epoch over all stages: what the order of its rows depends on, beside the seed."""
    return sum(stage.epochs for stage in run.train.all_stages[: position.stage]) + position.epoch


def planned(run: RunConfig, dataset: Dataset) -> tuple[int, int]:
    """Steps and samples of the whole run, if nothing stops it early."""
    steps, samples = 0, 0.0
    rows = dataset.rows("train")
    for index, stage in enumerate(run.train.all_stages):
        batches = -(-rows // run.train.batch_rows(rows, index))
        steps += stage.epochs * max(round(batches * stage.data_fraction), 1)
        samples += stage.epochs * rows * stage.data_fraction
    return steps, round(samples)


def until_evaluation(reader: Reader, evals_per_epoch: int, batch: int) -> int:
    """Batches from here to the next evaluation."""
    batches = reader.num_batches()
    every = -(-batches // evals_per_epoch)
    return min((batch // every + 1) * every, batches) - batch


def remembered(source: Iterator[tuple[Batch, int]], waiting: deque[Batch]) -> Iterator[Batch]:
    """Batches on their way to the step: the pipeline reads ahead, so what was consumed is counted from this queue."""
    for batch, _ in source:
        waiting.append(batch)
        yield batch


def sum_over_ranks(value: int, place: Place) -> int:
    """Sum of 64-bit numbers over the ranks, modulo 2**64."""
    return sum(from_all(value, place.world_size)) % 2**64


def check_seen(reader: Reader, seen: int, order: int) -> None:
    """Account for a whole epoch: raises DataError unless each row reached the weights exactly once."""
    if reader.epoch_rows() == reader.rows and seen != epoch_digest(reader.rows, order):
        raise DataError(
            f"{reader.dataset.folder}: epoch {order + 1}: the rows trained on are not each row of the split once: "
            f"the data changed under the run, or this is a defect: please report it"
        )


def seed_step(seed: int, position: Position, rank: int) -> None:
    """Dropout depends on the step and the rank alone, so a resumed run drops what the whole run would have."""
    words = np.random.SeedSequence([seed % 2**63, position.stage, position.epoch, position.batch, rank])
    torch.manual_seed(int(words.generate_state(1, np.uint64)[0] >> np.uint64(1)))


def evaluate_and_save(
    worker: Worker, position: Position, reader: Reader, reporter: Reporter, speed: Speed
) -> tuple[Position, Path]:
    """Validate, decide how training goes on, and write a checkpoint that goes on so."""
    train = worker.run.train
    metrics = worker.evaluate("val")
    ne = mean_ne(metrics)
    better = ne < position.best_ne
    shown = position.epoch + position.batch / reader.num_batches()
    position = after_evaluation(worker.run, position, ne, position.batch == reader.num_batches())
    path = reporter.path(position)
    if worker.place.rank == 0:  # told before it is saved: what a kill in between leaves is dropped on resume
        factor = lr_factor(train, position.step, planned(worker.run, worker.dataset)[0]) * position.lr_scale
        reporter.evaluation(
            {
                "kind": "evaluation",
                "epoch": shown,
                "stage": worker.stage,
                "samples": position.samples,
                "metrics": metrics,
                "samples_per_s": speed.per_s,
                "lr": train.dense_lr * factor,
                "best": better,
            }
        )
    worker.save(path, position, metrics)
    reporter.commit(path, position, metrics, worker.stage)
    return position, path


def after_evaluation(run: RunConfig, position: Position, ne: float, epoch_done: bool) -> Position:
    """Where training stands once the validation NE is known: early stopping, lr drops, the next epoch or stage."""
    train = run.train
    better = ne < position.best_ne
    scale, stale_lr = position.lr_scale, 0 if better else position.stale_lr + 1
    if train.plateau is not None and stale_lr >= train.plateau.patience:
        scale, stale_lr = scale * train.plateau.factor, 0
    position = replace(
        position,
        best_ne=ne if better else position.best_ne,  # min() would keep a NaN
        stale_evals=0 if better else position.stale_evals + 1,
        lr_scale=scale,
        stale_lr=stale_lr,
    )
    if epoch_done:
        position = replace(position, epoch=position.epoch + 1, batch=0, seen=0)
    stages = train.all_stages
    ends = position.epoch >= stages[position.stage].epochs or position.stale_evals >= train.patience
    if ends and position.stage < len(stages) - 1:
        return Position(stage=position.stage + 1, step=position.step, samples=position.samples, lr_scale=scale)
    return position


def keep_score(metrics: dict[str, Any], stage: int, stages: int) -> float:
    """What checkpoints are kept by, lower first: the validation NE, those of earlier stages behind all of the last.

    One that diverged (NE is no number) is the first to go.
    """
    ne = mean_ne(metrics)
    return math.inf if math.isnan(ne) else ne + 1000.0 * (stages - 1 - stage)


class Pace:
    """Tells how fast a run goes and how much is left."""

    def __init__(self, reporter: Reporter, position: Position, total: int) -> None:
        self.reporter = reporter
        self.total = total
        self.steps = 0
        self.first = position
        self.started = time.monotonic()

    def tell(self, position: Position) -> None:
        """A step is done: rates leave out the first few."""
        self.steps += 1
        if self.steps == WARMUP_STEPS:
            self.first, self.started = position, time.monotonic()
        if self.steps <= WARMUP_STEPS:
            return
        elapsed = max(time.monotonic() - self.started, 1e-9)
        done = position.samples - self.first.samples
        rate = done / elapsed
        left = max(self.total - position.samples, 0) / rate if rate else 0.0
        self.reporter.progress(
            position,
            {"samples": position.samples, "total": self.total, "left_s": left, "samples_per_s": rate},
        )
