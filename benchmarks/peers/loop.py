"""The trainer's own loop on one rank, under whatever started the process: a spawn, torchrun, or Ray Train.

As a script it is what torchrun runs: torchrun ... benchmarks/peers/loop.py JOB.json; rank 0 writes JOB.json.out.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.checkpoint import Position
from trainer.config import RunConfig, parse_run
from trainer.data.dataset import Dataset, open_dataset
from trainer.loop import train_stages
from trainer.worker import Place, Worker, build_worker

CPU = torch.device("cpu")


class PlainReporter:
    """A Reporter that tells nobody: checkpoints go to a folder, of which the last and the best are kept."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self.best: tuple[float, Path | None] = (float("inf"), None)
        self.last: Path | None = None
        self.evaluations = 0

    def path(self, position: Position) -> Path:
        """Where a checkpoint is to be written."""
        return self.folder / f"step-{position.samples:012d}"

    def commit(self, path: Path, position: Position, metrics: dict[str, Any], stage: int) -> None:  # noqa: ARG002
        """Keep the checkpoint, drop what is no longer wanted."""
        self.evaluations += 1
        old = {self.last, self.best[1]}
        if metrics["ne"] < self.best[0]:
            self.best = metrics["ne"], path
        self.last = path
        for gone in old - {self.last, self.best[1], None}:
            if self.rank == 0:
                shutil.rmtree(gone)  # type: ignore[arg-type]

    def progress(self, position: Position, latest: dict[str, Any]) -> None:
        """A step is done."""

    def evaluation(self, event: dict[str, Any]) -> None:
        """The validation split was scored."""


@dataclass(frozen=True)
class Job:
    """What every rank needs to know. `data` and `out` are folders."""

    run: dict[str, Any]
    data: str
    out: str

    def open(self) -> tuple[RunConfig, Dataset]:
        """The run, and its data with tables as wide as the model asks for."""
        run = parse_run(self.run, "bench")
        return run, open_dataset(Path(self.data)).sized(run.data, run.model.embedding_dim)


def job_of(run: RunConfig, data: Path, out: Path) -> Job:
    """A job of a run."""
    return Job(run.model_dump(mode="json"), str(data), str(out))


def run_loop(job: Job, place: Place, ready: Callable[[], None] | None = None) -> dict[str, Any]:
    """Train the whole job; the process group is there. `ready` is called before the first step."""
    quiet()
    run, dataset = job.open()

    def build(stage: int, precision: Any, lanes: int | None) -> Worker:
        worker = build_worker(run, dataset, place, stage, precision=precision, lanes=lanes)
        if ready is not None:
            ready()
        return worker

    folder = Path(job.out)
    worker, position, speed = train_stages(build, run, PlainReporter(folder, place.rank), None, None)
    return {
        "samples_per_s": speed.samples / speed.seconds,
        "samples": position.samples,
        "precision": worker.precision,
        "ne": position.best_ne,
    }


def quiet() -> None:
    """One thread, and no notes of the libraries."""
    warnings.filterwarnings("ignore")
    for name in (None, "torchrec", "fbgemm_gpu", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def start_group(rank: int, world_size: int, store: Path) -> Place:
    """A gloo process group of processes that meet in a file."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    return Place(rank, world_size, world_size, CPU)


def alone(job: Job) -> Place:
    """A process group of this process."""
    Path(job.out).mkdir(parents=True, exist_ok=True)
    return start_group(0, 1, Path(tempfile.mkdtemp(dir=job.out)) / "store")


def main() -> None:
    """What torchrun runs on each rank."""
    path = Path(sys.argv[1])
    job = Job(**json.loads(path.read_text(encoding="utf-8")))
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    result = run_loop(job, Place(rank, world_size, int(os.environ["LOCAL_WORLD_SIZE"]), CPU))
    if rank == 0:
        path.with_suffix(".out").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's and Arrow's threads now and then abort a process that ends while they wind down


if __name__ == "__main__":
    main()
