"""Trainers in processes of their own that take turns on one core: what disturbs the machine meets all of them.

A side builds its trainer once, warms up, and then trains for some seconds whenever it is told to. The figure of a side
is the median over its turns.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.loop import Job

WARMUP_STEPS = 6
PEER_BATCHES = 24  # held ready in memory for a peer, which goes through them in a circle
MIN_STEPS = 3

Trainer = Callable[[Job, str], Iterator[int]]  # yields the rows of each step


def ours(job: Job, option: str) -> Iterator[int]:
    """The trainer's Ranker, Stepper and Reader as train_stage puts them together, at a precision."""
    from benchmarks.peers.loop import alone
    from trainer.checkpoint import Position
    from trainer.loop import seed_step, train_reader
    from trainer.machine import keep_freed_memory
    from trainer.optimizer import set_lr
    from trainer.step import Loss, Stepper
    from trainer.worker import build_worker

    keep_freed_memory()
    run, dataset = job.open()
    run = run.model_copy(update={"train": run.train.model_copy(update={"precision": option})})
    place = alone(job)
    worker = build_worker(run, dataset, place, 0)
    stepper = Stepper(worker.model, worker.optimizer, Loss(run, 1.0), place.device, 1, False)
    reader = train_reader(worker)
    position = Position()
    rows = []

    def source() -> Iterator[Any]:
        for epoch in itertools.count():
            for batch, _ in reader.batches(epoch):
                rows.append(batch.rows)
                yield batch

    def before() -> None:
        seed_step(run.train.seed, position, 0)
        set_lr(worker.optimizer, 1.0)

    for _ in stepper.steps(source(), before):
        yield rows[-1]


def peer(job: Job, option: str) -> Iterator[int]:
    """nn.Embedding and dense Adam: plain, or in FuxiCTR's own classes."""
    from benchmarks.peers.dense_adam import DenseAdamDCN, Peer, Recipe, sample_of
    from trainer.data.reader import LANES, Reader

    run, dataset = job.open()
    size = run.train.batch_rows(dataset.rows("train"))
    reader = Reader(dataset, "train", size, shuffle=True, lanes=LANES, oov_rate=run.train.oov_rate)
    samples = [sample_of(batch) for batch, _ in itertools.islice(reader.batches(), PEER_BATCHES)]
    circle = itertools.cycle(samples)
    if option == "fuxictr":
        from benchmarks.peers.fuxictr_dcn import build

        trainer: Any = build(run.model, dataset.transform, Path(job.out))
    else:
        trainer = Peer(DenseAdamDCN(run.model, dataset.transform), Recipe())
    for sample, _ in zip(circle, trainer.steps(itertools.cycle(samples)), strict=False):
        yield len(sample.labels)


SIDES: dict[str, tuple[Trainer, str]] = {
    "ours": (ours, "auto"),
    "ours, fp32": (ours, "highest"),
    "nn.Embedding + Adam": (peer, "plain"),
    "FuxiCTR": (peer, "fuxictr"),
}


def serve_turns(name: str, job: Job, core: int, pipe: Any) -> None:
    """What a side's process runs: a turn for each number of seconds it is sent, until it is sent None."""
    from benchmarks.peers.loop import quiet

    os.sched_setaffinity(0, {core})
    quiet()
    trainer, option = SIDES[name]
    steps = trainer(job, option)
    try:
        for _ in range(WARMUP_STEPS):
            next(steps)
    except ImportError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while (seconds := pipe.recv()) is not None:
        rows, count, begun = 0, 0, time.perf_counter()
        while count < MIN_STEPS or time.perf_counter() - begun < seconds:
            rows += next(steps)
            count += 1
        pipe.send(rows / (time.perf_counter() - begun))


def take_turns(jobs: dict[str, Job], turns: int, seconds: float, tell: Callable[[str], None]) -> dict[str, list[float]]:
    """Samples a second of each side in each of its turns; sides that cannot run here are told of and left out."""
    context = multiprocessing.get_context("spawn")
    core = max(os.sched_getaffinity(0))
    sides = {}
    for name, job in jobs.items():
        here, there = context.Pipe()
        process = context.Process(target=serve_turns, args=(name, job, core, there), daemon=True)
        process.start()
        there.close()
        try:
            problem = here.recv()
        except EOFError:
            problem = "its process ended"
        if problem is None:
            sides[name] = here, process
        else:
            tell(f"{name}: left out: {problem}")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            sides[name][0].send(seconds)
            rates[name].append(sides[name][0].recv())
        tell("  ".join(f"{name} {rates[name][-1]:,.0f}/s" for name in sides))
    for pipe, process in sides.values():
        pipe.send(None)
        process.join()
    return rates


def median(rates: list[float]) -> float:
    """The middle one."""
    return statistics.median(rates)
