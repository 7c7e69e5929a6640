"""Model + topology -> sharding plan, by TorchRec's planner; what it asks for, estimates and refuses.

In: the tables, the run's `train.sharding`, a Topology. Out: a ShardingPlan with the planner's own figures. The default
places tables whole (table-wise): under it row-wise Adagrad is one optimizer on any number of workers and any device.
Memory caps are read from the machine, since the planner assumes 128 GiB a rank. Bytes held are in trainer/memory.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    ShardingOption,
    Stats,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import (
    CacheParams,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from trainer.config import ShardingConfig, TableSharding
from trainer.data.transform import TableInfo, Transform
from trainer.errors import ConfigError
from trainer.machine import machine_memory_bytes
from trainer.memory import HELD_PARTS, plan_memory
from trainer.models import module_name
from trainer.progress import size
from trainer.ranks import from_first
from trainer.sharders import sharders

ELEMENTWISE_OPTIMIZERS = ("sgd", "adagrad")  # no state is shared by a row's columns: columns may part
SHOWN_TABLES = 5
# gloo's all-to-all of 16 MiB between two processes of one machine, one thread each: .67 GB/s on the two-core machine
# that the README's figures are from; the planner would assume 600 GB/s
GLOO_BYTES_PER_MS = 0.67e9 / 1000


# -- what the config asks of each table ------------------------------------------------------------------------------


def check_sharding(
    tables: Mapping[str, TableInfo], sharding: ShardingConfig, device: str, world_size: int, table_optimizer: str
) -> dict[str, TableSharding]:
    """What is asked of each table, types and column widths filled in.

    A table that `default` cannot cut (row_wise with too few rows for all workers, column_wise with a dim that has no
    fitting divisor) is placed whole: the result is the same.
    Raises: ConfigError naming the table, the value, the rule and what to use instead.
    """
    unknown = sorted(set(sharding.tables) - set(tables))
    if unknown:
        raise ConfigError(
            f"train.sharding.tables.{unknown[0]}: no such table: the tables are {', '.join(sorted(tables)[:30])}"
        )
    return {
        name: _checked(table, sharding.of(name), device, world_size, table_optimizer, name in sharding.tables)
        for name, table in tables.items()
    }


def _checked(
    table: TableInfo, asked: TableSharding, device: str, world_size: int, table_optimizer: str, named: bool
) -> TableSharding:
    where = f"train.sharding: table {table.name}"
    if asked.kernel in ("fused_uvm", "fused_uvm_caching") and device != "cuda":
        raise ConfigError(f"{where}: kernel {asked.kernel} needs a GPU, these workers have none: use kernel fused")
    if asked.kernel == "dense" and asked.type != "data_parallel":
        raise ConfigError(f"{where}: kernel dense is that of data_parallel tables, its type is {asked.type}: leave it")
    if asked.type == "table_row_wise" and device != "cuda":
        raise ConfigError(f"{where}: table_row_wise is for GPU hosts: use row_wise or table_wise on CPU")
    if asked.type == "row_wise" and leaves_empty_shards(table.num_embeddings, world_size):
        if named:
            raise ConfigError(
                f"{where}: row_wise leaves some of {world_size} workers none of its {table.num_embeddings} rows, which "
                f"FBGEMM cannot train: use type table_wise"
            )
        return asked.model_copy(update={"type": "table_wise"})
    if asked.type != "column_wise":
        return asked
    if table_optimizer not in ELEMENTWISE_OPTIMIZERS:
        raise ConfigError(
            f"{where}: column_wise with table_optimizer {table_optimizer}, which keeps one state a row, trains "
            f"another model on each number of workers: use table_optimizer adagrad, or type table_wise or row_wise"
        )
    width = column_width(table.embedding_dim, asked.min_partition, world_size)
    if width is None and not named:
        return asked.model_copy(update={"type": "table_wise"})
    if width is None:
        least = f", {asked.min_partition} (min_partition) at least" if asked.min_partition else ""
        raise ConfigError(
            f"{where}: column_wise cannot cut embedding_dim {table.embedding_dim}: a shard's width must be a smaller "
            f"divisor of it and a multiple of 4{least}: use another dim or type"
        )
    return asked.model_copy(update={"min_partition": width})


def column_width(dim: int, min_partition: int | None, world_size: int) -> int | None:
    """Width of a column shard: the least allowed one, else the least that gives each worker one shard at most.

    None when `dim` has no proper divisor of that kind. One worker without a `min_partition` takes the whole width.
    """
    widths = [w for w in range(4, dim, 4) if dim % w == 0]
    if min_partition is not None:
        return next((w for w in widths if w >= min_partition), None)
    if world_size == 1:
        return dim
    few = [w for w in widths if dim // w <= world_size]
    return few[0] if few else (widths[-1] if widths else None)


def leaves_empty_shards(rows: int, world_size: int) -> bool:
    """Whether row-wise sharding, in blocks of ceil(rows / world_size), leaves the last worker nothing."""
    return -(-rows // world_size) * (world_size - 1) >= rows


def allowed_types(asked: TableSharding, table_optimizer: str, device: str, rows: int, world_size: int) -> list[str]:
    """Sharding types the planner may choose from; `auto` stands for those whose result does not depend on the plan.

    data_parallel is not among those: it would cost each worker a gradient of the whole table a step.
    """
    if asked.type != "auto":
        return [str(asked.type)]
    types = [ShardingType.TABLE_WISE.value]
    if not leaves_empty_shards(rows, world_size):
        types.append(ShardingType.ROW_WISE.value)
        if device == "cuda":
            types.append(ShardingType.TABLE_ROW_WISE.value)
    if table_optimizer in ELEMENTWISE_OPTIMIZERS:
        types.append(ShardingType.COLUMN_WISE.value)
    return types


def constraints_of(
    tables: Mapping[str, TableInfo],
    asked: Mapping[str, TableSharding],
    table_optimizer: str,
    device: str,
    world_size: int,
    lookups: Mapping[str, list[float]],
) -> dict[str, ParameterConstraints]:
    """The planner's constraints. `lookups`: mean lookups by a row of the log, of each way that a table is read."""
    constraints = {}
    for name, table in tables.items():
        want = asked[name]
        kernel = want.kernel or ("dense" if want.type == "data_parallel" else "fused")
        constraints[module_name(name)] = ParameterConstraints(
            sharding_types=allowed_types(want, table_optimizer, device, table.num_embeddings, world_size),
            compute_kernels=[EmbeddingComputeKernel(kernel).value],
            min_partition=want.min_partition,
            pooling_factors=lookups[name],
            cache_params=CacheParams(load_factor=want.cache_load_factor) if want.cache_load_factor else None,
        )
    return constraints


def lookups_of(model: nn.Module, ids_per_row: Mapping[str, float]) -> dict[str, list[float]]:
    """By table, the mean lookups of each feature that the model reads it with (a sequence reads at each position).

    A table's `ids_per_row` are spread evenly over them; 1 each where it has none.
    """
    bags = [module for module in model.modules() if isinstance(module, EmbeddingBagCollection)]
    readers = {
        table.name.removeprefix(module_name("")): len(table.feature_names)
        for module in bags
        for table in module.embedding_bag_configs()
    }
    return {name: [ids_per_row.get(name, float(count)) / count] * count for name, count in readers.items()}


# -- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A plan, and the planner's figures for each shard of it (`options`: storage in bytes, perf in ms)."""

    plan: ShardingPlan
    options: list[ShardingOption]


class _Kept(Stats):
    """Keeps the options that the planner chose, in place of the report it would log."""

    def __init__(self) -> None:
        self.options: list[ShardingOption] = []

    def log(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.options = list(kwargs["best_plan"])


def topology(device: torch.device, world_size: int, local_world_size: int, memory_share: float = 0.7) -> Topology:
    """The planner's view of the workers: `memory_share` of the memory that this machine really has."""
    ddr = int(machine_memory_bytes() * memory_share / local_world_size)
    hbm = torch.cuda.get_device_properties(device).total_memory * memory_share if device.type == "cuda" else None
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=world_size,
            local_world_size=local_world_size,
            ddr_cap_bytes=ddr,
            hbm_cap_bytes=None if hbm is None else int(hbm),
        ),
        hardware_config=HardwareConfig(intra_host_bw=GLOO_BYTES_PER_MS, inter_host_bw=GLOO_BYTES_PER_MS),
        kernel_config=KernelConfig(compute_device=device.type, use_hardware_based_bandwidth=device.type == "cpu"),
    )


def plan_tables(
    model: nn.Module,
    tables: Mapping[str, TableInfo],
    where: Topology,
    *,
    local_batch_size: int,
    sharding: ShardingConfig,
    table_optimizer: str,
    ids_per_row: Mapping[str, float] | None = None,
) -> Planned:
    """Have TorchRec's planner place every table; no process group, and no device of that kind, is needed.

    `ids_per_row`: mean lookups of a table by one row of the log, all its features together (1 a feature by default).
    Raises: ConfigError when the config asks what cannot be, or the tables do not fit.
    """
    device = where.compute_device
    asked = check_sharding(tables, sharding, device, where.world_size, table_optimizer)
    constraints = constraints_of(
        tables, asked, table_optimizer, device, where.world_size, lookups_of(model, ids_per_row or {})
    )
    kept = _Kept()
    offered = sharders(sharding.comms, device)
    enumerator = EmbeddingEnumerator(topology=where, batch_size=local_batch_size, constraints=constraints)
    planner = EmbeddingShardingPlanner(
        topology=where,
        batch_size=local_batch_size,
        enumerator=enumerator,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
        stats=kept,
        debug=False,
    )
    try:
        plan = planner.plan(model, offered)
    except PlannerError:
        raise ConfigError(refusal(enumerator.enumerate(model, offered), where)) from None
    check_copies(describe_plan(plan), tables, table_optimizer, where)
    return Planned(plan, kept.options)


def check_copies(
    described: Mapping[str, Mapping[str, Any]], tables: Mapping[str, TableInfo], table_optimizer: str, where: Topology
) -> None:
    """Raises: ConfigError when data_parallel tables do not fit with the gradient that the planner does not count."""
    copies = [name for name, how in described.items() if how["sharding_type"] == "data_parallel"]
    on_device = {n: how for n, how in described.items() if not how["compute_kernel"].startswith("fused_uvm")}
    storage = where.devices[0].storage
    cap = storage.ddr if where.compute_device == "cpu" else storage.hbm
    held = plan_memory(on_device, tables, table_optimizer, where.world_size) if copies else []
    most = max((sum(rank[part] for part in HELD_PARTS) for rank in held), default=0)
    if most > cap:
        needs = [Need(name, 2 * tables[name].fp32_bytes, 2 * tables[name].fp32_bytes) for name in copies]
        raise ConfigError(
            f"tables do not fit {where.world_size} worker(s) with {size(cap)} each, {size(most - cap)} lacks: "
            f"data_parallel tables take their weights twice on each worker (they have a whole gradient): "
            f"{misfit_list(needs)}: use type row_wise or table_wise"
        )


def make_plan(
    model: nn.Module,
    transform: Transform,
    device: torch.device,
    *,
    world_size: int,
    local_world_size: int,
    batch_size: int,
    sharding: ShardingConfig = ShardingConfig(),  # noqa: B008 - frozen
    table_optimizer: str = "rowwise_adagrad",
) -> ShardingPlan:
    """Place every table on the workers; called by all ranks together, they get rank 0's plan. `batch_size` is global.

    The tables' optimizer must be fused into `model` before (trainer/optimizer.py): the planner counts its state.
    Raises: ConfigError, on every rank, when the config asks what cannot be, or the tables do not fit the machines.
    """
    assert dist.is_initialized(), "make_plan needs a process group"
    found: Any = None
    if dist.get_rank() == 0:
        try:
            found = plan_tables(
                model,
                transform.tables,
                topology(device, world_size, local_world_size, sharding.memory_share),
                local_batch_size=max(batch_size // world_size, 1),
                sharding=sharding,
                table_optimizer=table_optimizer,
            ).plan
        except ConfigError as error:  # the planner's own collective_plan would leave the other ranks waiting
            found = error
        except Exception as error:
            found = RuntimeError(f"planning failed on rank 0: {type(error).__name__}: {error}")
    found = from_first(found, world_size, device=device if device.type == "cuda" else None)
    if isinstance(found, Exception):
        raise found
    return found


def describe_plan(plan: ShardingPlan) -> dict[str, dict[str, Any]]:
    """Each table's sharding type, compute kernel, ranks and shards (offsets, sizes: rows, columns), as JSON values.

    A data_parallel table has no shards: it is whole on all its ranks.
    """
    described = {}
    for module in plan.plan.values():
        for name, how in module.items():
            shards = [
                {
                    "rank": int(shard.placement.rank()),
                    "offsets": [int(o) for o in shard.shard_offsets],
                    "sizes": [int(s) for s in shard.shard_sizes],
                }
                for shard in (how.sharding_spec.shards if how.sharding_spec is not None else [])
            ]
            described[name.removeprefix(module_name(""))] = {
                "sharding_type": how.sharding_type,
                "compute_kernel": how.compute_kernel,
                "ranks": [int(r) for r in how.ranks or []],
                "shards": shards,
            }
    return described


# -- what does not fit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """What one table needs: `unit_bytes` is its largest shard, `total_bytes` all its shards, in one kind of memory."""

    table: str
    unit_bytes: int
    total_bytes: int


def refusal(options: Sequence[ShardingOption], where: Topology) -> str:
    """Why tables do not fit, in one line: which, how large (with optimizer state and activations), how much lacks."""
    gpu = where.compute_device != "cpu"
    for kind, cap in (("hbm", where.devices[0].storage.hbm), ("ddr", where.devices[0].storage.ddr)):
        if kind == "hbm" and not gpu:
            continue
        found = misfit(needs_of(options, kind), cap, where.world_size)
        if found is not None:
            memory = "GPU memory" if kind == "hbm" else "memory"
            return f"tables do not fit {where.world_size} worker(s) with {size(cap)} of {memory} each: {found}"
    largest = misfit_list(needs_of(options, "hbm" if gpu else "ddr"), "total_bytes")
    return (
        f"tables fit {where.world_size} worker(s) in sum but not as placed: {largest}: "
        f"use type row_wise for the largest, add workers, or raise train.sharding.memory_share"
    )


def needs_of(options: Sequence[ShardingOption], kind: str) -> list[Need]:
    """The least that each table needs of one kind of memory ("hbm" or "ddr"), over the options that it has."""
    by_table: dict[str, list[ShardingOption]] = {}
    for option in options:
        by_table.setdefault(option.name.removeprefix(module_name("")), []).append(option)
    return [
        Need(
            table,
            min(max(getattr(s.storage, kind) for s in option.shards) for option in choices),
            min(sum(getattr(s.storage, kind) for s in option.shards) for option in choices),
        )
        for table, choices in by_table.items()
    ]


def misfit(needs: Sequence[Need], cap: int, world_size: int) -> str | None:
    """Which tables are too large for a worker, or all together for the workers; None when neither is so."""
    single = [need for need in needs if need.unit_bytes > cap]
    if single:
        lacking = max(need.unit_bytes for need in single) - cap
        whole = any(need.unit_bytes == need.total_bytes for need in single) and world_size > 1
        step = "use type row_wise" if whole else "add workers"
        return (
            f"{misfit_list(single, 'unit_bytes')} on one worker, {size(lacking)} too much: {step}, "
            f"lower its dim or hash_size, or use workers with more memory"
        )
    total = sum(need.total_bytes for need in needs)
    if total > cap * world_size:
        return (
            f"{size(total - cap * world_size)} is missing in sum; the largest are {misfit_list(needs)}: "
            f"add workers, or lower their dim or hash_size"
        )
    return None


def misfit_list(needs: Sequence[Need], what: str = "total_bytes") -> str:
    """Tables with their bytes, largest first, up to five."""
    ordered = sorted(needs, key=lambda need: -getattr(need, what))
    shown = ", ".join(f"{need.table} {size(getattr(need, what))}" for need in ordered[:SHOWN_TABLES])
    return shown + (f" and {len(ordered) - SHOWN_TABLES} more" if len(ordered) > SHOWN_TABLES else "")
