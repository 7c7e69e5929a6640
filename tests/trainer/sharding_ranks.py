"""What each rank of test_sharding.py's process groups does: shard, train three steps, tell what it holds.

Imports neither pytest nor Ray, which would be half of a new process's start.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from trainer.checkpoint import training_state
from trainer.config import RunConfig, ShardingConfig
from trainer.data.batch import to_batch
from trainer.data.transform import Transform
from trainer.errors import ConfigError
from trainer.memory import measured_memory, plan_memory
from trainer.models import build_ranker
from trainer.optimizer import build_optimizer, fuse_table_optimizer
from trainer.sharders import sharders
from trainer.sharding import describe_plan, make_plan
from trainer.step import Loss, Stepper

CPU = torch.device("cpu")
GLOBAL_ROWS = 16  # three ranks hold 5, 5 and 6


@dataclass(frozen=True)
class World:
    """What is trained on what: each global step's rows."""

    run: RunConfig
    transform: Transform
    steps: list[pa.Table]


def initial(table: str, rows: int, dim: int) -> torch.Tensor:
    """A table's start, whole: the same under every plan."""
    return torch.empty(rows, dim).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(len(table) * 7 + rows))


def train_under(
    world: World, sharding: ShardingConfig, optimizer_name: str, rank: int, world_size: int, pipeline: bool = False
) -> dict:
    """All global steps. Returns plan, estimate, measure and this rank's shards."""
    chosen = world.run.train.model_copy(update={"table_optimizer": optimizer_name, "table_lr": 0.05})
    run, transform = world.run.model_copy(update={"train": chosen}), world.transform
    torch.manual_seed(0)
    model = build_ranker(run.model, transform)
    fuse_table_optimizer(model.embeddings, run.train)
    plan = make_plan(
        model,
        transform,
        CPU,
        world_size=world_size,
        local_world_size=world_size,
        batch_size=GLOBAL_ROWS,
        sharding=sharding,
        table_optimizer=optimizer_name,
    )
    described = describe_plan(plan)
    sharded = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders(sharding.comms, CPU))
    optimizer = build_optimizer(sharded, run.train)
    state = training_state(sharded, optimizer)
    for name, table in transform.tables.items():
        whole = initial(name, table.num_embeddings, table.embedding_dim)
        value = state[f"tables/{name}/weight"]
        if isinstance(value, ShardedTensor):
            for part in value.local_shards():
                (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
                part.tensor.copy_(whole[row : row + rows, column : column + columns])
        else:
            with torch.no_grad():
                value.copy_(whole)

    def slice_of(rows: pa.Table):
        first, last = GLOBAL_ROWS * rank // world_size, GLOBAL_ROWS * (rank + 1) // world_size
        labels = (np.arange(GLOBAL_ROWS) % 3 == 0).astype(np.float32)[first:last, None]
        return to_batch(transform.encode(rows.slice(first, last - first)), labels, rows=GLOBAL_ROWS)

    stepper = Stepper(sharded, optimizer, Loss(run), CPU, world_size, pipeline)
    for _ in stepper.steps(map(slice_of, world.steps), before=lambda: None):
        pass
    shards = []
    state = training_state(sharded, optimizer)
    for name in transform.tables:
        value = state[f"tables/{name}/weight"]
        if isinstance(value, ShardedTensor):
            for part in value.local_shards():
                shards.append((name, list(part.metadata.shard_offsets), part.tensor.detach().clone()))
        else:
            shards.append((name, [0, 0], value.detach().clone()))
    return {
        "plan": described,
        "estimate": plan_memory(described, transform.tables, optimizer_name, world_size)[rank],
        "measured": measured_memory(state),
        "shards": shards,
    }


def on_rank(rank: int, folder: str, world: World, cases: dict) -> None:
    """All cases among three ranks, then among the first two; what was found goes to FOLDER/WORLD_SIZE-RANK.pt."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for world_size in (3, 2):
        if rank >= world_size:
            return
        store = f"file://{folder}/store-{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        found = {}
        for name, (sharding, optimizer_name) in cases.items():
            try:
                asked, pipeline = ShardingConfig(**sharding), name.startswith("pipelined")
                found[name] = train_under(world, asked, optimizer_name, rank, world_size, pipeline)
            except ConfigError as error:
                found[name] = {"error": str(error)}
        torch.save(found, Path(folder) / f"{world_size}-{rank}.pt")
        dist.destroy_process_group()
