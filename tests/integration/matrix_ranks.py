"""What each rank of test_checkpoint_matrix.py's process groups does: train and save under every plan, load all of them.

Imports neither pytest nor Ray, which would be half of a new process's start.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from trainer.checkpoint import Checkpoint, Position, open_checkpoint
from trainer.config import RunConfig, ShardingConfig
from trainer.data.dataset import open_dataset
from trainer.errors import ConfigError
from trainer.loop import train_reader
from trainer.step import Loss, train_step
from trainer.worker import Place, Worker, build_worker

TYPES = ("table_wise", "column_wise", "row_wise", "data_parallel")
OPTIMIZERS = ("rowwise_adagrad", "adagrad")
WORLDS = (1, 2, 3)
STEPS = 3


def cases() -> Iterator[tuple[str, str]]:
    """Every (sharding type, table optimizer) that a run may have."""
    for optimizer in OPTIMIZERS:
        for kind in TYPES:
            if (kind, optimizer) != ("column_wise", "rowwise_adagrad"):
                yield kind, optimizer


def build(run: RunConfig, data: str, kind: str, optimizer: str, place: Place) -> Worker:
    """The worker of one case."""
    changes = {"sharding": ShardingConfig(default=kind), "table_optimizer": optimizer, "precision": "highest"}
    run = run.model_copy(update={"train": run.train.model_copy(update=changes)})
    dataset = open_dataset(Path(data)).sized(run.data, run.model.embedding_dim)
    return build_worker(run, dataset, place, 0)


def train(worker: Worker, first: int, steps: int) -> None:
    """Some steps on the global batches from `first` on."""
    loss = Loss(worker.run)
    reader = train_reader(worker)
    batches = reader.batches(0, first)
    for _ in range(steps):
        batch, _ = next(batches)
        train_step(worker.model, worker.optimizer, loss, batch, worker.place.world_size)
    batches.close()


def differing(worker: Worker, checkpoint: Checkpoint, tolerance: float = 0.0) -> list[str]:
    """Names of this rank's tensors that are not what the checkpoint holds."""
    wrong = []
    state = worker.state()
    tables = {key.split("/")[1] for key in state if key.startswith("tables/")}
    everything = {f"tables/{t}/{what}" for t in tables for what in ("weight", "momentum1")}  # a rank sees its own state
    if not set(state) | everything <= set(checkpoint.keys()):
        return sorted((set(state) | everything) - set(checkpoint.keys()))
    for key, value in state.items():
        whole = checkpoint.read(key)
        parts = [(value, None)]
        if isinstance(value, ShardedTensor):
            parts = [(s.tensor, s.metadata) for s in value.local_shards()]
        for tensor, where in parts:
            expected = whole
            if where is not None:
                for axis, (at, size) in enumerate(zip(where.shard_offsets, where.shard_sizes, strict=True)):
                    expected = expected.narrow(axis, at, size)
            if tensor.shape != expected.shape or not torch.allclose(tensor.detach(), expected, rtol=0, atol=tolerance):
                wrong.append(key)
    return wrong


def on_rank(rank: int, world_size: int, folder: str, run: RunConfig, data: str) -> None:
    """Save every case of this world size; once all worlds have, load every checkpoint there is into every case."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world_size}", rank=rank, world_size=world_size)
    place = Place(rank, world_size, world_size, torch.device("cpu"))
    root, found = Path(folder), {}
    workers = {}
    for kind, optimizer in cases():
        worker = workers[kind, optimizer] = build(run, data, kind, optimizer, place)
        train(worker, 0, STEPS)
        path = root / f"{optimizer}-{kind}-{world_size}"
        worker.save(path, Position(batch=STEPS), {})
        found[f"saved {path.name}"] = differing(worker, open_checkpoint(path))
    try:
        build(run, data, "column_wise", "rowwise_adagrad", place)
        found["refused"] = ["column-wise row-wise Adagrad was not refused"]
    except ConfigError as error:
        found["refused"] = [] if "column_wise" in str(error) else [str(error)]
    dist.barrier()
    (root / f"done-{world_size}-{rank}").touch()
    while len(list(root.glob("done-*"))) < sum(WORLDS):
        time.sleep(0.05)
    for (kind, optimizer), worker in workers.items():
        for source in sorted(root.glob(f"{optimizer}-*")):
            checkpoint = open_checkpoint(source, verify=False)
            worker.load(checkpoint)
            found[f"{source.name} -> {kind} x{world_size}"] = differing(worker, checkpoint)
        # the last one loaded was trained on the same data: one more step gives what it gives everywhere
        worker.load(open_checkpoint(root / f"{optimizer}-table_wise-1", verify=False))
        train(worker, STEPS, 1)
        worker.save(root / f"next-{optimizer}-{kind}-{world_size}", Position(), {})
    torch.save(found, root / f"found-{world_size}-{rank}.pt")
    dist.destroy_process_group()
