"""A cluster written as "2x8xH100-80GB" -> TorchRec's Topology -> a dry-run plan of a run's tables, and what it costs.

In: a RunConfig, the sizes of its tables, a word for the machines. Out: placements, bytes a device, milliseconds a step,
as the planner counts them. Nothing of that cluster is needed: tables are meta tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig

from cluster.tables import render
from trainer.config import RunConfig
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.schema import NumericFeature
from trainer.data.transform import RESERVED_ROWS, NumericStats, TableInfo, Transform
from trainer.errors import ConfigError
from trainer.memory import plan_memory
from trainer.models import build_ranker, module_name
from trainer.optimizer import fuse_table_optimizer
from trainer.progress import size
from trainer.sharding import GLOO_BYTES_PER_MS, Planned, describe_plan, plan_tables
from trainer.storage import Location

GB = 1000**3
UNITS = {"MB": 1000**2, "GB": GB, "TB": 1000**4, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
LEFT_OUT = (
    "left out: the dense layers and their communication, reading batches, kernel launches, overlap of communication "
    "with computation, and skew of ids (each row of a table counts as equally hot)"
)
DEFAULT_BATCH = 4096  # the largest that a run without batch_size takes


@dataclass(frozen=True)
class Device:
    """Bandwidths of one kind of device in GB/s, and its share of a usual host's memory in GB.

    `intra` is between devices of a host (both directions together, as vendors and TorchRec's own defaults count it),
    `inter` a device's share of its host's network.
    """

    memory: float
    intra: float
    inter: float
    host_memory: float
    source: str


# memory and intra: the vendor's data sheet of the SXM (else PCIe) part; inter and host_memory: the server named
DEVICES = {
    "B200": Device(
        8000, 1800, 50, 250, "NVIDIA DGX B200 datasheet: HBM3e 64 TB/s of 8, NVLink 1.8 TB/s, 8x400 Gb/s, 2 TB"
    ),
    "H200": Device(
        4800, 900, 50, 250, "NVIDIA H200 datasheet: HBM3e 4.8 TB/s, NVLink 900 GB/s; DGX H200 8x400 Gb/s, 2 TB"
    ),
    "H100": Device(
        3350, 900, 50, 250, "NVIDIA H100 SXM datasheet: HBM3 3.35 TB/s, NVLink 900 GB/s; DGX H100 8x400 Gb/s, 2 TB"
    ),
    "A100": Device(
        1555, 600, 25, 125, "NVIDIA A100-40GB datasheet: 1,555 GB/s, NVLink 600 GB/s; DGX A100 8x200 Gb/s, 1 TB"
    ),
    "A10G": Device(
        600, 64, 1.6, 96, "NVIDIA A10 datasheet: 600 GB/s, PCIe 4 64 GB/s; AWS g5.48xlarge 100 Gb/s, 768 GiB of 8"
    ),
    "L40S": Device(
        864, 64, 25, 125, "NVIDIA L40S datasheet: 864 GB/s, PCIe 4 64 GB/s; OVX server 8 GPUs, 8x200 Gb/s, 1 TB"
    ),
    "L4": Device(
        300, 64, 1.6, 96, "NVIDIA L4 datasheet: 300 GB/s, PCIe 4 64 GB/s; AWS g6.48xlarge 100 Gb/s, 768 GiB of 8"
    ),
    "T4": Device(
        300, 32, 1.6, 48, "NVIDIA T4 datasheet: 300 GB/s, PCIe 3 32 GB/s; AWS g4dn.metal 100 Gb/s, 384 GiB of 8"
    ),
    "V100": Device(
        900, 300, 6.25, 64, "NVIDIA V100 SXM2 datasheet: 900 GB/s, NVLink 300 GB/s; DGX-1 4x100 Gb/s, 512 GB of 8"
    ),
    "CPU": Device(
        54.8, 0.67, 0.67, 0, "TorchRec's DDR_MEM_BW (51 GiB/s); gloo between processes measured (trainer/sharding.py)"
    ),
}
A100_80GB_MEMORY = 2039  # NVIDIA A100-80GB SXM datasheet


@dataclass(frozen=True)
class Cluster:
    """Hosts, devices a host, their kind, and a device's memory (for CPU: the host's, which its workers share)."""

    hosts: int
    devices: int
    name: str
    memory_bytes: int

    @property
    def world_size(self) -> int:
        """Workers: one a device."""
        return self.hosts * self.devices

    @property
    def compute_device(self) -> str:
        """As TorchRec names it."""
        return "cpu" if self.name == "CPU" else "cuda"

    @property
    def device(self) -> Device:
        """Its bandwidths."""
        found = DEVICES[self.name]
        large_a100 = self.name == "A100" and self.memory_bytes > 60 * GB
        return replace(found, memory=A100_80GB_MEMORY, host_memory=250) if large_a100 else found

    @property
    def worker_bytes(self) -> int:
        """Memory of one worker's device."""
        return self.memory_bytes // self.devices if self.name == "CPU" else self.memory_bytes


def parse_topology(text: str) -> Cluster:
    """Read "HOSTSxDEVICESxNAME-MEMORY", such as 2x8xH100-80GB or 1x2xCPU-24GB.

    Raises: ConfigError naming what is wrong, with the known names.
    """
    form = "HOSTSxDEVICESxNAME-MEMORY, such as 2x8xH100-80GB or 1x2xCPU-24GB"
    found = re.fullmatch(r"(\d+)x(\d+)x([A-Za-z][A-Za-z0-9]*)(?:-(\d+(?:\.\d+)?)([A-Za-z]+))?", text.strip())
    if found is None:
        raise ConfigError(f"--topology {text!r}: not of the form {form}")
    hosts, devices, name, number, unit = found.groups()
    known = {key.upper(): key for key in DEVICES}
    if name.upper() not in known:
        raise ConfigError(f"--topology {text!r}: device {name} is unknown: use one of {', '.join(DEVICES)}")
    if number is None:
        raise ConfigError(f"--topology {text!r}: the memory of a device is missing: write {form}")
    units = {key.upper(): value for key, value in UNITS.items()}
    if unit.upper() not in units:
        raise ConfigError(f"--topology {text!r}: unit {unit} is unknown: use one of {', '.join(UNITS)}")
    if int(hosts) < 1 or int(devices) < 1 or float(number) <= 0:
        raise ConfigError(f"--topology {text!r}: hosts, devices and memory must be positive: write {form}")
    return Cluster(int(hosts), int(devices), known[name.upper()], round(float(number) * units[unit.upper()]))


def planner_topology(cluster: Cluster, memory_share: float) -> Topology:
    """The cluster as TorchRec's planner sees it, with `memory_share` of its memory to fill."""
    device = cluster.device
    on_cpu = cluster.compute_device == "cpu"
    host_bytes = cluster.worker_bytes if on_cpu else device.host_memory * GB
    per_ms = GB / 1000  # GB/s in bytes/ms
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=cluster.world_size,
            local_world_size=cluster.devices,
            hbm_cap_bytes=None if on_cpu else round(cluster.memory_bytes * memory_share),
            ddr_cap_bytes=round(host_bytes * memory_share),
        ),
        hardware_config=HardwareConfig(
            hbm_mem_bw=device.memory * per_ms,
            ddr_mem_bw=device.memory * per_ms if on_cpu else None,
            intra_host_bw=GLOO_BYTES_PER_MS if on_cpu else device.intra * per_ms,
            inter_host_bw=GLOO_BYTES_PER_MS if on_cpu else device.inter * per_ms,
        ),
        kernel_config=KernelConfig(compute_device=cluster.compute_device, use_hardware_based_bandwidth=True),
    )


# -- the tables ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """A run's tables by name, the training rows and each table's lookups a row where they are known."""

    tables: dict[str, TableInfo]
    train_rows: int | None = None
    ids_per_row: Mapping[str, float] | None = None


def parse_rows(words: Sequence[str]) -> dict[str, int]:
    """`--rows TABLE=N` options. Raises: ConfigError when one is not of that form."""
    rows = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if not name or not number.replace("_", "").isdigit() or int(number) < 1:
            raise ConfigError(f"--rows {word!r}: not of the form TABLE=N, such as item_id=200000000")
        rows[name] = int(number)
    return rows


def with_rows(known: Tables, rows: Mapping[str, int]) -> Tables:
    """The same tables, some with other row counts. Raises: ConfigError for a table that is none."""
    for name in rows:
        if name not in known.tables:
            raise ConfigError(f"--rows {name}: no such table: the tables are {', '.join(sorted(known.tables)[:30])}")
    tables = {
        name: replace(table, num_embeddings=rows.get(name, table.num_embeddings))
        for name, table in known.tables.items()
    }
    return replace(known, tables=tables)


def tables_of_config(run: RunConfig, rows: Mapping[str, int]) -> Tables | None:
    """The tables, where the config (hash_size, buckets) or `rows` tells all their sizes; None where a log must."""
    tables: dict[str, TableInfo] = {}
    for owner in run.data.sparse_features:
        if owner.table_name != owner.name:
            continue
        told = owner.buckets if isinstance(owner, NumericFeature) else owner.hash_size
        if told is None and owner.name not in rows:
            return None
        kind = "buckets" if isinstance(owner, NumericFeature) else "hash" if told else "vocabulary"
        readers = tuple(f.name for f in run.data.sparse_features if f.table_name == owner.name)
        count = (told or 0) + RESERVED_ROWS
        tables[owner.name] = TableInfo(owner.name, kind, count, owner.dim or run.model.embedding_dim, readers)  # type: ignore[arg-type]
    return with_rows(Tables(tables), rows)


def tables_of_dataset(dataset: Dataset) -> Tables:
    """The tables of a prepared folder, and how often a training row looks each one up."""
    rows = dataset.rows("train")
    tables = dataset.transform.tables
    return Tables(tables, rows, {name: float(dataset.counts(name).sum()) / max(rows, 1) for name in tables})


def find_tables(run: RunConfig, data: Location | None, rows: Mapping[str, int]) -> Tables | None:
    """Tables from prepared data, or from the config; None where the log's ids must be counted."""
    if data is not None:
        return with_rows(tables_of_dataset(open_dataset(data)), rows)
    return tables_of_config(run, rows)


# -- the plan --------------------------------------------------------------------------------------------------------


def table_optimizer(run: RunConfig) -> str:
    """The run's table optimizer, by name."""
    return run.train.table_optimizer


def dry_run(run: RunConfig, known: Tables, cluster: Cluster) -> dict[str, Any]:
    """Plan a run's tables on a cluster that need not exist; what `slimrank plan --json` prints.

    Raises: ConfigError when the config asks what cannot be there, or the tables do not fit.
    """
    numerics = {f.name: NumericStats(0.0, 1.0, 0.0, 1.0, False) for f in run.data.features if f.kind == "numeric"}
    model = build_ranker(run.model, Transform(run.data, known.tables, {}, numerics))
    fuse_table_optimizer(model.embeddings, run.train)
    told = run.train.all_stages[-1].batch_size or run.train.batch_size or DEFAULT_BATCH
    batch = run.train.batch_rows(known.train_rows) if known.train_rows else told
    where = planner_topology(cluster, run.train.sharding.memory_share)
    planned = plan_tables(
        model,
        known.tables,
        where,
        local_batch_size=max(batch // cluster.world_size, 1),
        sharding=run.train.sharding,
        table_optimizer=table_optimizer(run),
        ids_per_row=known.ids_per_row,
    )
    described = describe_plan(planned.plan)
    for name, table in known.tables.items():
        described[name] |= {"num_embeddings": table.num_embeddings, "embedding_dim": table.embedding_dim}
    devices = device_costs(planned, described, known.tables, table_optimizer(run), cluster, where)
    return {
        "topology": f"{cluster.hosts}x{cluster.devices}x{cluster.name}",
        "device_bytes": cluster.worker_bytes,
        "cap_bytes": where.devices[0].storage.hbm or where.devices[0].storage.ddr,
        "bandwidths": f"{cluster.name}: {cluster.device.source}",
        "batch_size": batch,
        "table_optimizer": table_optimizer(run),
        "lookups": "counted" if known.ids_per_row else "assumed: one id a feature and row",
        "tables": {name: described[name] for name in known.tables},
        "devices": devices,
        "step_ms": max(d["step_ms"] for d in devices),
        "left_out": LEFT_OUT,
    }


def device_costs(
    planned: Planned,
    described: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, TableInfo],
    optimizer: str,
    cluster: Cluster,
    where: Topology,
) -> list[dict[str, Any]]:
    """Bytes and milliseconds of each device. activation_bytes: what the planner counts beside tables on the device
    itself (inputs, outputs, and the caches of UVM kernels); host_bytes: what UVM kernels keep in host memory.
    """
    held = plan_memory(described, tables, optimizer, cluster.world_size)
    found: list[dict[str, Any]] = [
        {"activation_bytes": 0, "host_bytes": 0, "step_ms": 0.0, "host": rank // cluster.devices, **held[rank]}
        for rank in range(cluster.world_size)
    ]
    on_cpu = where.compute_device == "cpu"
    for option in planned.options:
        name = option.name.removeprefix(module_name(""))
        alone = {name: {**described[name], "shards": []}}
        for index, shard in enumerate(option.shards):
            rank, storage, perf = shard.rank, shard.storage, shard.perf
            assert rank is not None
            assert storage is not None
            assert perf is not None
            if described[name]["shards"]:
                alone[name]["shards"] = [described[name]["shards"][index]]
            own = plan_memory(alone, tables, optimizer, cluster.world_size)[rank]
            tables_bytes = own["weight_bytes"] + own["optimizer_bytes"]
            in_host = option.compute_kernel.startswith("fused_uvm")
            counted = storage.ddr if on_cpu else storage.hbm
            found[rank]["activation_bytes"] += max(counted - (0 if in_host else tables_bytes), 0)
            found[rank]["host_bytes"] += tables_bytes if in_host else 0
            found[rank]["step_ms"] += perf.total
    for device in found:
        device["optimizer_bytes"] += device.pop("gradient_bytes")
        on_device = device["weight_bytes"] + device["optimizer_bytes"] + device["activation_bytes"]
        device["total_bytes"] = on_device - device["host_bytes"]
    return found


def plan_lines(result: Mapping[str, Any]) -> list[str]:
    """The plan for people."""
    rows = [
        [
            name,
            f"{how['num_embeddings']:,} x {how['embedding_dim']}",
            how["sharding_type"]
            + ("" if how["compute_kernel"] in ("fused", "dense") else f", {how['compute_kernel']}"),
            ranges(how["ranks"]),
        ]
        for name, how in sorted(
            result["tables"].items(), key=lambda item: -item[1]["num_embeddings"] * item[1]["embedding_dim"]
        )
    ]
    lines = render(f"tables on {result['topology']}", ["table", "rows x dim", "placement", "devices"], rows)
    devices = [
        [
            str(d["rank"]),
            size(d["weight_bytes"]),
            size(d["optimizer_bytes"]),
            size(d["activation_bytes"]),
            f"{d['total_bytes'] / result['cap_bytes']:.1%}",
            f"{d['step_ms']:.3f}",
        ]
        for d in result["devices"]
    ]
    title = f"devices, of {size(result['cap_bytes'])} each (train.sharding.memory_share)"
    lines += ["", *render(title, ["device", "weights", "state", "activations", "full", "ms"], devices), ""]
    in_host = sum(d["host_bytes"] for d in result["devices"])
    if in_host:
        lines.append(f"{size(in_host)} of the weights and state lie in the hosts' memory (UVM kernels)")
    lines.append(f"embedding part of a step: {result['step_ms']:.3f} ms at a global batch of {result['batch_size']:,}")
    return [*lines, result["left_out"], f"lookups {result['lookups']}", result["bandwidths"]]


def ranges(ranks: Sequence[int]) -> str:
    """Ranks as people read them: 0-3, 6."""
    parts: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
