"""Bytes: what a plan's tables will take, and what a rank really holds.

The estimate counts a table's weights and its optimizer's state, shard by shard; activations, the dense part, caches and
the runtime are left out, and `measured_memory` shows them in the peaks it stands beside.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from trainer.data.transform import TableInfo
from trainer.errors import ConfigError

WEIGHT_BYTES = 4  # fp32
# state bytes of a shard of (rows, dim) under each table optimizer; FBGEMM keeps states in fp32
STATE_BYTES = {
    "sgd": lambda rows, dim: 0,  # noqa: ARG005
    "rowwise_adagrad": lambda rows, dim: 4 * rows,  # noqa: ARG005
    "adagrad": lambda rows, dim: 4 * rows * dim,
}

HELD_PARTS = ("weight_bytes", "optimizer_bytes", "gradient_bytes")


def state_bytes(optimizer: str, rows: int, dim: int) -> int:
    """Optimizer state of a shard of (rows, dim). Raises: ConfigError for an optimizer it does not know."""
    if optimizer not in STATE_BYTES:
        raise ConfigError(
            f"table_optimizer {optimizer}: its state's size is unknown: use one of {', '.join(STATE_BYTES)}"
        )
    return STATE_BYTES[optimizer](rows, dim)


def plan_memory(
    described: Mapping[str, Mapping[str, Any]], tables: Mapping[str, TableInfo], optimizer: str, world_size: int
) -> list[dict[str, int]]:
    """Bytes of each rank's tables under a plan, as `describe_plan` gives it.

    Each rank has weight_bytes (fp32), optimizer_bytes (the table optimizer's state) and gradient_bytes (data_parallel
    tables only, which are on every rank: a fused table's gradient never exists whole).
    Not counted: activations, UVM caches, the dense part.
    """
    ranks = [{"rank": r, **dict.fromkeys(HELD_PARTS, 0)} for r in range(world_size)]
    for name, how in described.items():
        for shard in how["shards"]:
            rows, dim = shard["sizes"]
            held = ranks[shard["rank"]]
            held["weight_bytes"] += rows * dim * WEIGHT_BYTES
            held["optimizer_bytes"] += state_bytes(optimizer, rows, dim)
        if how["sharding_type"] == "data_parallel":
            table = tables[name]
            for held in ranks:
                held["weight_bytes"] += table.fp32_bytes
                held["optimizer_bytes"] += state_bytes(optimizer, table.num_embeddings, table.embedding_dim)
                held["gradient_bytes"] += table.fp32_bytes
    return ranks


def measured_memory(state: Mapping[str, Tensor | ShardedTensor]) -> dict[str, int | None]:
    """What this rank really holds, to stand beside the estimate after a run.

    `state`: of the run, under canonical names (trainer/checkpoint.py, training_state). table_bytes: weights and
    optimizer state of the tables. peak_rss_bytes: of the process so far. cuda_peak_bytes: None without CUDA.
    """
    local = [part for key, value in state.items() if key.startswith("tables/") for part in _local(value)]
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "table_bytes": sum(part.numel() * part.element_size() for part in local),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts kilobytes
        "cuda_peak_bytes": cuda,
    }


def _local(value: Tensor | ShardedTensor) -> list[Tensor]:
    return [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
