"""Checkpoints against plain files: the same bytes, written and fsynced, then read, in one folder, in turns."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.data import make_run
from benchmarks.peers.loop import Job, job_of

CHUNK_BYTES = 16 << 20  # as trainer/checkpoint.py writes


def measure(bench: Any, table_rows: int, data: Path, world_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of plain files and of the checkpoint: {"save" | "load cold" | "load warm": (plain, checkpoint)}."""
    run = make_run(table_rows, None, {"batch_size": 4096, "workers": world_size})
    job = job_of(run, data, bench.fresh())
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    processes = [
        context.Process(target=on_rank, args=(job, rank, world_size, rounds, answers)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found = answers.get(timeout=1200)
    for process in processes:
        process.join()
    return found


def on_rank(job: Job, rank: int, world_size: int, rounds: int, answers: Any) -> None:
    """A rank's process; rank 0 answers."""
    import torch.distributed as dist

    from benchmarks.peers.loop import quiet, start_group
    from trainer.checkpoint import load_into, open_checkpoint, save_checkpoint
    from trainer.worker import build_worker

    quiet()
    out = Path(job.out)
    run, dataset = job.open()
    place = start_group(rank, world_size, out / "store")
    worker = build_worker(run, dataset, place, 0, precision="highest")
    state = worker.state()
    header = {
        "run": run.model_dump(mode="json"),
        "fingerprint": dataset.transform.fingerprint(),
        "metrics": {},
        "position": {},
    }
    found: dict[str, Any] = {name: ([], []) for name in ("save", "load cold", "load warm")}

    def timed(name: str, side: int, work: Any) -> None:
        dist.barrier()
        begun = time.perf_counter()
        work()
        dist.barrier()
        found[name][side].append(time.perf_counter() - begun)

    folder, plain = out / "checkpoint", out / f"plain-{rank}"
    save = partial(save_checkpoint, folder, state, header, rank, world_size)
    buffer = bytearray(CHUNK_BYTES)
    for turn in range(rounds):
        if turn == 0:  # what this rank writes is known once it has written it
            save()
        own = [folder / f"rank-{rank:05d}.safetensors", *([folder / "dense.safetensors"] if rank == 0 else [])]
        content = [p.read_bytes() for p in own]
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            timed("save", side, partial(write_plain, plain, content) if side == 0 else save)
        size = sum(len(part) for part in content)
        for heat in ("cold", "warm"):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                if heat == "cold":
                    drop_pages([plain, *own])
                load = partial(load_into, state, open_checkpoint(folder, verify=False))
                timed(f"load {heat}", side, partial(read_plain, plain, buffer) if side == 0 else load)
                del load  # its mapped pages could not be dropped
        plain.unlink()
    total = torch.tensor([size])
    dist.all_reduce(total)
    if rank == 0:
        answers.put({**found, "bytes": int(total)})
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        shutil.rmtree(folder)


def write_plain(path: Path, content: list[bytes]) -> None:
    """Write one file from memory; it is on disk on return."""
    with path.open("wb", buffering=0) as file:
        for part in content:
            view = memoryview(part)
            for first in range(0, len(view), CHUNK_BYTES):
                file.write(view[first : first + CHUNK_BYTES])
        os.fsync(file.fileno())


def read_plain(path: Path, buffer: bytearray) -> None:
    """Read one file from start to end into the same piece of memory."""
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop_pages(paths: list[Path]) -> None:
    """Have the kernel forget what it holds of files (which are on disk already)."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
