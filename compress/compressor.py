"""Checkpoint + plan -> artifact. Reads like the recipe: profile, resolve, pack, write, seal.

Legend: N training rows, K kept rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from compress.artifact import GOLDEN_ROWS, golden_table, seal
from compress.catalogue import write_catalogue
from compress.config import CompressionPlan
from compress.errors import PlanError
from compress.ids import artifact_rows, read_ids, write_ids
from compress.lookup import PackedTable, map_block, table_offsets, table_view
from compress.methods.codec import quantize_rows, row_bytes
from compress.model import build_model
from compress.search.profile import TableProfile
from trainer.checkpoint import Checkpoint
from trainer.data.dataset import Dataset
from trainer.data.transform import IdMap, write_arrow
from trainer.errors import DataError
from trainer.files import new_directory, write_json
from trainer.progress import ReportProgress


@dataclass(frozen=True)
class ResolvedTable:
    """What a plan means for one table: `cut` rows stay (N when none is pruned) at `bits` a value."""

    table: PackedTable
    cut: int
    id_map_bytes: int

    @property
    def pruned(self) -> bool:
        """Whether there is a centroid, behind the kept rows."""
        return self.table.rows > self.cut


def resolve(plan: CompressionPlan, profiles: Mapping[str, TableProfile]) -> dict[str, ResolvedTable]:
    """Turn shares of rows or lookups into cuts, and check that every table can do what it is asked.

    Raises: PlanError naming the table, the dim and what to use in its place.
    """
    for name in plan.tables:
        if name not in profiles:
            raise PlanError(f"plan names table {name!r}, the model has: {', '.join(profiles)}")
    resolved = {}
    for name, profile in profiles.items():
        asked = plan.of(name)
        info = profile.info
        try:
            row_bytes(info.embedding_dim, asked.bits)
        except PlanError as error:
            raise PlanError(f"table {name}: {error}") from None
        cut = profile.cut(asked)
        pruned = cut < info.num_embeddings
        packed = PackedTable(name, cut + pruned, info.embedding_dim, asked.bits, info.features)
        resolved[name] = ResolvedTable(packed, cut, profile.id_bytes[pruned])
    return resolved


def table_bytes(resolved: Mapping[str, ResolvedTable]) -> int:
    """Bytes of packed tables as stored (rows, scale, bias, centroids, alignment) and of their id maps."""
    return table_offsets([r.table for r in resolved.values()])[1] + sum(r.id_map_bytes for r in resolved.values())


def pack_tables(
    path: Path,
    checkpoint: Checkpoint,
    id_maps: Mapping[str, IdMap],
    profiles: Mapping[str, TableProfile],
    resolved: Mapping[str, ResolvedTable],
    progress: ReportProgress,
) -> None:
    """Write tables.bin a chunk of rows at a time; memory is one chunk and one rank array."""
    tables = [r.table for r in resolved.values()]
    size = table_offsets(tables)[1]
    with path.open("wb") as file:
        file.truncate(size)
    block = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    for index, (name, part) in enumerate(resolved.items()):
        view = table_view(block, tables, index)
        target = artifact_rows(id_maps[name], profiles[name].order, part.cut)
        for first, rows in checkpoint.table_chunks(name):
            where = torch.from_numpy(target[first : first + len(rows)].astype(np.int64))
            kept = where < part.cut
            view[where[kept]] = quantize_rows(rows[kept], part.table.bits)
        if part.pruned:
            centroid = torch.from_numpy(profiles[name].centroid(part.cut))
            view[part.cut] = quantize_rows(centroid[None], part.table.bits)[0]
        progress("pack", index + 1, len(tables))


def data_of(checkpoint: Checkpoint, dataset: Dataset) -> Dataset:
    """The prepared data a checkpoint was trained on, its tables as wide as the checkpoint's.

    Raises: DataError unless the checkpoint was trained on this prepared data; CheckpointError for one of an earlier
    training stage.
    """
    checkpoint.check_whole()
    if checkpoint.fingerprint != dataset.transform.fingerprint():
        raise DataError(
            f"{dataset.folder}: not the prepared data that {checkpoint.folder} was trained on: give that one to --data"
        )
    return dataset.sized(checkpoint.run.data, checkpoint.run.model.embedding_dim)


def compress(
    checkpoint: Checkpoint,
    dataset: Dataset,
    plan: CompressionPlan,
    out: Path,
    profiles: Mapping[str, TableProfile],
    progress: ReportProgress,
    metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the artifact of a plan into the folder `out`, and return its manifest.

    Raises: PlanError when a table cannot do what the plan asks; DataError when data and checkpoint do not belong
    together; SlimrankError when `out` holds something already.
    """
    dataset = data_of(checkpoint, dataset)
    transform = dataset.transform
    resolved = resolve(plan, profiles)
    orders = {name: p.order for name, p in profiles.items()}
    cuts = {name: r.cut for name, r in resolved.items()}
    tables = [r.table for r in resolved.values()]
    with new_directory(out) as staging:
        pack_tables(staging / "tables.bin", checkpoint, transform.id_maps, profiles, resolved, progress)
        dense = checkpoint.dense_state()
        save_file(dense, staging / "dense.safetensors")
        write_json(staging / "transform.json", transform.describe())
        write_ids(staging / "ids.arrow", transform.id_maps, orders, cuts)
        own = transform.with_id_maps(read_ids(staging / "ids.arrow", transform.tables, cuts))
        block = map_block(staging / "tables.bin", table_offsets(tables)[1])
        model = build_model(checkpoint.run, own, tables, block, dense, "unsealed")
        items = dataset.items()
        if items is not None:
            write_catalogue(staging / "items.arrow", items, own)
        write_arrow(golden_table(dataset.sample().slice(0, GOLDEN_ROWS), model), staging / "golden.arrow")
        manifest = {
            "name": checkpoint.run.name,
            "run": checkpoint.run.model_dump(mode="json"),
            "plan": plan.model_dump(mode="json"),
            "tables": [asdict(t) for t in tables],
            "cuts": cuts,
            "sizes": {
                "table_bytes": table_bytes(resolved),
                "table_bytes_fp32": sum(t.fp32_bytes for t in transform.tables.values()),
            },
            "lineage": {
                "checkpoint": checkpoint.version,
                "fingerprint": checkpoint.fingerprint,
                "samples": checkpoint.position.samples,
            },
            "metrics": dict(metrics or {}),
        }
        return seal(staging, manifest)
