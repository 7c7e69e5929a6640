"""Model + topology -> sharding plan, by TorchRec's planner.

Tables are placed whole (table-wise): the one placement under which row-wise Adagrad is the same optimizer on any number
of workers and on CPU and GPU alike. Memory caps are read from the machine, since the planner assumes 128 GiB a rank.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan, ShardingType

from trainer.data.transform import Transform
from trainer.errors import ConfigError
from trainer.models import module_name

MEMORY_SHARE = 0.7  # of the machine's memory, for tables with their optimizer state and activations


def sharders() -> list[EmbeddingBagCollectionSharder]:
    """What knows how to shard a ranker's tables."""
    return [EmbeddingBagCollectionSharder()]


def machine_memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def topology(device: torch.device, world_size: int, local_world_size: int) -> Topology:
    """The planner's view of the workers, with memory as it is."""
    ddr = int(machine_memory_bytes() * MEMORY_SHARE / local_world_size)
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=world_size, local_world_size=local_world_size, ddr_cap_bytes=ddr, hbm_cap_bytes=hbm
        ),
        kernel_config=KernelConfig(compute_device=device.type),
    )


def make_plan(
    model: nn.Module,
    transform: Transform,
    device: torch.device,
    *,
    world_size: int,
    local_world_size: int,
    batch_size: int,
) -> ShardingPlan:
    """Place every table on a rank; called by all ranks together, they agree on rank 0's plan.

    Raises: ConfigError when the tables do not fit the machines.
    """
    constraints = {
        module_name(table.name): ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value])
        for table in transform.tables.values()
    }
    planner = EmbeddingShardingPlanner(
        topology=topology(device, world_size, local_world_size),
        batch_size=max(batch_size // world_size, 1),
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.05),
        debug=False,
    )
    group = dist.group.WORLD
    assert group is not None, "make_plan needs a process group"
    try:
        return planner.collective_plan(model, sharders(), group)
    except PlannerError as error:
        largest = max(transform.tables.values(), key=lambda t: t.fp32_bytes)
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"tables do not fit {world_size} worker(s): the largest, {largest.name}, takes "
            f"{largest.fp32_bytes / 1e9:.2f} GB beside its optimizer state: add workers, or lower its dim or hash_size "
            f"({reason})"
        ) from None


def describe_plan(plan: ShardingPlan) -> dict[str, dict[str, object]]:
    """Each table's sharding type and ranks, as JSON values."""
    return {
        name.removeprefix(module_name("")): {"sharding_type": p.sharding_type, "ranks": p.ranks}
        for module in plan.plan.values()
        for name, p in module.items()
    }
