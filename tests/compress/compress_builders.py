"""Real things in small: a raw log, its prepared data set, a checkpoint of it, and artifacts. No Ray is started.

`World` is what most tests start from; its tables have rows of very different scales, so that quantization matters.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from compress.artifact import Artifact, load_artifact
from compress.compressor import compress
from compress.config import CompressionPlan, TablePlan
from compress.lookup import StoredTable, Tier, pieces_of, tier_views
from compress.methods.codec import quantize_rows
from compress.model import CompressedModel, model_of_checkpoint
from compress.search.profile import TableProfile, profile_tables
from compress.search.space import packable
from trainer.checkpoint import Checkpoint, Position, open_checkpoint, save_checkpoint
from trainer.config import RunConfig
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.fit import FitStats, extend_transform, fit_transform
from trainer.data.log import find_files, fragments_of
from trainer.data.prepare import Splitter, _finish, _observe_rows, _write_rows
from trainer.data.transform import Transform
from trainer.files import write_json
from trainer.models import build_head

GENRES = ("Drama", "Comedy", "Action", "Horror", "War", "Noir", "Animation", "Western")


def quiet(_what: str, _step: int, _total: int) -> None:
    """Progress that nobody watches."""


# -- a raw log -------------------------------------------------------------------------------------------------------


def zipf(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Indices below `size`, the first ones far more often than the last."""
    weights = 1.0 / np.arange(1, size + 1) ** 1.1
    return rng.choice(size, rows, p=weights / weights.sum())


def raw_log(rows: int, seed: int) -> pa.Table:
    """A log in time order. Item-side columns are functions of the item, but for a few items without genres or price."""
    rng = np.random.default_rng(seed)
    users, items = zipf(rng, rows, 500), zipf(rng, rows, 160)
    genres = [
        None if i % 23 == 0 else "|".join(GENRES[(i * 7 + j) % len(GENRES)] for j in range(1 + i % 3))
        for i in range(160)
    ]
    price = [None if i % 11 == 0 else float(np.round(np.exp(i % 13 / 3.0), 3)) for i in range(160)]
    recent = [[f"i{x}" for x in zipf(rng, int(n), 160)] if n < 6 else None for n in rng.integers(0, 7, rows)]
    age = rng.normal(40, 12, rows)
    odds = 0.8 * np.sin(users) + 0.8 * np.cos(items) + 0.02 * (age - 40) - 0.3
    return pa.table(
        {
            "user_id": pa.array(users.astype(np.int64) + 1000),
            "item_id": pa.array([f"i{i}" for i in items]),
            "item_title": pa.array([f"Title {i}" if i % 9 else None for i in items]),
            "genres": pa.array([genres[i] for i in items]),
            "price": pa.array([price[i] for i in items], pa.float64()),
            "recent": pa.array(recent, pa.list_(pa.string())),
            "town": pa.array([f"town-{t}" for t in zipf(rng, rows, 300)], mask=rng.random(rows) < 0.05),
            "age": pa.array(np.round(age, 1), mask=rng.random(rows) < 0.1),
            "income": pa.array(np.exp(rng.normal(8, 1, rows)), mask=rng.random(rows) < 0.05),
            "when": pa.array(1_000_000 + np.arange(rows) * 60 + rng.integers(0, 60, rows)),
            "click": pa.array((rng.random(rows) < 1 / (1 + np.exp(-odds))).astype(np.int8)),
            "buy": pa.array((rng.random(rows) < 0.3).astype(np.int8)),
        }
    )


FEATURES: tuple[dict[str, Any], ...] = (
    {"name": "user_id", "kind": "categorical", "side": "user", "dim": 16},
    {"name": "item_id", "kind": "categorical", "side": "item", "dim": 8},
    {"name": "recent", "kind": "multi", "side": "user", "table": "item_id", "pooling": "sum", "max_length": 4},
    {"name": "genres", "kind": "multi", "side": "item", "separator": "|", "pooling": "mean", "dim": 8},
    {"name": "city", "column": "town", "kind": "categorical", "side": "user", "hash_size": 200, "dim": 12},
    {"name": "age", "kind": "numeric", "side": "user"},
    {"name": "price", "kind": "numeric", "side": "item", "transform": "log1p"},
    {"name": "income", "kind": "numeric", "transform": "bucketize", "buckets": 12, "dim": 4},
)


def run_config(
    log: Path, *, tasks: Sequence[str], arch: str, catalogue: bool, tune: dict[str, Any] | None = None
) -> RunConfig:
    """The run of `raw_log`: tables of every kind, one shared by two features, dims 4 to 16."""
    return RunConfig.model_validate(
        {
            "name": "small",
            "data": {
                "input": str(log / "*.parquet"),
                "split": {"by": "timestamp", "fractions": [0.7, 0.2, 0.1]},
                "timestamp": "when",
                "ids": {"user": "user_id", "item": "item_id"} if catalogue else {"user": "user_id"},
                "title": "item_title" if catalogue else None,
                "tasks": [{"name": t, "column": t} for t in tasks],
                "features": list(FEATURES),
            },
            "model": {"arch": arch, "embedding_dim": 8, "top_mlp": [16, 8], "bottom_mlp": [8], "cross_rank": 4},
            "tune": tune or {},
        }
    )


def write_log(raw: pa.Table, folder: Path) -> None:
    """The log as two Parquet files, which make two fragments."""
    folder.mkdir(parents=True)
    half = len(raw) // 2
    pq.write_table(raw.slice(0, half), folder / "part-0.parquet")
    pq.write_table(raw.slice(half), folder / "part-1.parquet")


# -- prepared data and a checkpoint ----------------------------------------------------------------------------------


def prepare_here(run: RunConfig, raw: pa.Table, folder: Path, continue_from: Transform | None = None) -> Dataset:
    """What trainer.data.prepare does on Ray, by the same functions of a fragment, in this process."""
    fragments = fragments_of(find_files(run.data), run.data)
    times = np.sort(raw["when"].to_numpy().astype(np.float64))
    first, second = (times[round(len(times) * share)] for share in (0.7, 0.9))
    splitter = Splitter(run.data, (float(first), float(second)))
    stats = FitStats()
    for fragment in fragments:
        stats.merge(_observe_rows(fragment, splitter))
    if continue_from is None:
        transform = fit_transform(stats, run.data, run.model.embedding_dim)
    else:
        transform = extend_transform(continue_from, stats, run.data, run.model.embedding_dim)
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
    written = [_write_rows(fragment, splitter, transform, folder) for fragment in fragments]
    manifest = _finish(written, transform, run.data, folder)
    transform.save(folder)
    write_json(folder / "dataset.json", {**manifest, "name": run.name})
    return open_dataset(folder)


def save_random_checkpoint(run: RunConfig, dataset: Dataset, folder: Path, seed: int) -> Checkpoint:
    """A checkpoint as the trainer writes it, of random weights whose rows differ a hundredfold in scale."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for table in dataset.transform.tables.values():
        shape = (table.num_embeddings, table.embedding_dim)
        scale = 0.3 * torch.exp(torch.randn((shape[0], 1), generator=generator))
        state[f"tables/{table.name}/weight"] = torch.randn(shape, generator=generator) * scale + 0.1 * scale
        state[f"tables/{table.name}/momentum1"] = torch.rand(shape[0], generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = build_head(run.model, dataset.transform)
    state.update({f"dense/head.{key}": value for key, value in head.state_dict().items()})
    header = {
        "run": run.model_dump(mode="json"),
        "fingerprint": dataset.transform.fingerprint(),
        "table_dims": run.table_dims(),
        "position": asdict(Position(samples=dataset.rows("train"), best_ne=0.9)),
        "metrics": {"ne": 0.9},
        "plan": {},
        "world_size": 1,
    }
    save_checkpoint(folder, state, header, rank=0, world_size=1)
    return open_checkpoint(folder)


@dataclass(frozen=True, eq=False)
class World:
    """A raw log, its prepared data and a checkpoint of it."""

    folder: Path
    raw: pa.Table
    run: RunConfig
    dataset: Dataset
    checkpoint: Checkpoint

    @cached_property
    def profiles(self) -> dict[str, TableProfile]:
        """Profiles of all tables."""
        return profile_tables(self.checkpoint, self.dataset, quiet)

    @cached_property
    def fp32(self) -> CompressedModel:
        """The uncompressed model."""
        return model_of_checkpoint(self.checkpoint, self.dataset.transform)

    def compress(self, plan: CompressionPlan, out: Path) -> dict[str, Any]:
        """Write an artifact and return its manifest."""
        return compress(self.checkpoint, self.dataset, plan, out, self.profiles, quiet)

    def artifact(self, plan: CompressionPlan) -> Artifact:
        """The opened artifact of a plan, in a folder of its own inside the world's."""
        out = Path(tempfile.mkdtemp(prefix="artifact-", dir=self.folder))
        self.compress(plan, out)
        return load_artifact(out)

    def uniform(self, bits: int, coverage: float = 1.0) -> CompressionPlan:
        """One setting for all tables, with more bits where a dim needs them."""
        tables = self.dataset.transform.tables
        own = {n: packable(t.embedding_dim, bits) for n, t in tables.items()}  # type: ignore[arg-type]
        return CompressionPlan(tables={n: TablePlan(bits=b, coverage=coverage) for n, b in own.items()})


def build_world(
    folder: Path,
    *,
    rows: int = 3000,
    seed: int = 0,
    tasks: Sequence[str] = ("click",),
    arch: str = "dcn",
    catalogue: bool = True,
    tune: dict[str, Any] | None = None,
) -> World:
    """Write a log, its prepared data and a checkpoint under `folder`, and open them."""
    raw = raw_log(rows, seed)
    write_log(raw, folder / "log")
    run = run_config(folder / "log", tasks=tasks, arch=arch, catalogue=catalogue, tune=tune)
    dataset = prepare_here(run, raw, folder / "prepared")
    return World(folder, raw, run, dataset, save_random_checkpoint(run, dataset, folder / "checkpoint", seed + 1))


def clicked_world(folder: Path, *, rows: int, tune: dict[str, Any]) -> World:
    """A world whose clicks are drawn from its own model, so that whatever compression changes costs NE."""
    drawn = build_world(folder / "drawn", rows=rows)
    logits_N = drawn.fp32.score_encoded(drawn.dataset.transform.encode(drawn.raw))[:, 0]
    clicks_N = np.random.default_rng(8).random(rows) < 1 / (1 + np.exp(-logits_N))
    raw = drawn.raw.set_column(drawn.raw.column_names.index("click"), "click", pa.array(clicks_N.astype(np.int8)))
    write_log(raw, folder / "log")
    run = run_config(folder / "log", tasks=("click",), arch="dcn", catalogue=True, tune=tune)
    dataset = prepare_here(run, raw, folder / "prepared")
    return World(folder, raw, run, dataset, save_random_checkpoint(run, dataset, folder / "checkpoint", 1))


def extended_world(old: World, folder: Path, rows: int = 1500, seed: int = 11) -> World:
    """A later log of the same run, prepared with the older one's transform as its start, and a checkpoint of it."""
    raw = raw_log(rows, seed)
    raw = raw.set_column(0, "user_id", pc.add(raw["user_id"], 250))  # half of the users are new
    write_log(raw, folder / "log")
    run = run_config(folder / "log", tasks=("click",), arch="dcn", catalogue=True)
    dataset = prepare_here(run, raw, folder / "prepared", old.dataset.transform)
    return World(folder, raw, run, dataset, save_random_checkpoint(run, dataset, folder / "checkpoint", seed + 1))


def large_world(folder: Path, users: int = 20_500, rows: int = 30_000) -> World:
    """So many users that some share their loose key; the training split has each of them."""
    rng = np.random.default_rng(6)
    raw = pa.concat_tables([raw_log(3000, 5)] * (rows // 3000))
    user = np.concatenate([rng.permutation(users), rng.integers(0, users, round(0.7 * rows) - users)])
    user = np.concatenate([user, rng.permutation(users)])[:rows]
    raw = raw.set_column(0, "user_id", pa.array(user.astype(np.int64)))
    raw = raw.set_column(raw.column_names.index("when"), "when", pa.array(np.arange(rows)))
    write_log(raw, folder / "log")
    run = run_config(folder / "log", tasks=("click",), arch="dcn", catalogue=False)
    run = run.model_copy(update={"data": run.data.model_copy(update={"min_count": 1})})
    dataset = prepare_here(run, raw, folder / "prepared")
    return World(folder, raw, run, dataset, save_random_checkpoint(run, dataset, folder / "checkpoint", 6))


@functools.cache
def large_world_in(base: Path) -> World:
    """The large world of a test session."""
    return large_world(base / "large")


def mixed_plan() -> CompressionPlan:
    """Bits and cuts of every kind: what most artifacts of these tests are made with."""
    return CompressionPlan(
        default=TablePlan(bits=8),
        tables={
            "user_id": TablePlan(bits=4, keep=0.3),
            "item_id": TablePlan(bits=2, coverage=0.9),
            "city": TablePlan(bits=4, coverage=0.8),
            "income": TablePlan(bits=16),
        },
    )


@functools.cache
def world_in(base: Path) -> World:
    """The world of a test session: both folders of tests share it."""
    return build_world(base / "world")


@functools.cache
def artifact_in(base: Path) -> Artifact:
    """The mixed plan's artifact of that world."""
    return world_in(base).artifact(mixed_plan())


@functools.cache
def two_tasks_in(base: Path) -> World:
    """Two tasks, a DLRM head, and no item id, so no catalogue."""
    return build_world(base / "two-tasks", rows=900, seed=7, tasks=("click", "buy"), arch="dlrm", catalogue=False)


# -- tables without a model ------------------------------------------------------------------------------------------


def random_rows(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Rows (N, D) of scales from a thousandth to ten."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (torch.rand((rows, 1), generator=generator) * 4 - 3)
    return torch.randn((rows, dim), generator=generator) * scale


def stored(
    name: str,
    rows: int | Sequence[int],
    dim: int,
    bits: int | Sequence[int],
    features: tuple[str, ...],
    width: int | None = None,
) -> StoredTable:
    """A table of one tier, or of several where rows and bits are sequences."""
    sizes, each = (rows, bits) if isinstance(rows, Sequence) else ((rows,), (bits,))
    tiers = tuple(Tier(n, b) for n, b in zip(sizes, each, strict=True))  # type: ignore[arg-type]
    return StoredTable(name, dim, width or dim, tiers, features)


def packed_block(tables: Sequence[StoredTable], seed: int = 0) -> torch.Tensor:
    """A block of bytes with random rows of these tables."""
    block = torch.zeros(pieces_of(tables)[1], dtype=torch.uint8)
    for index, (table, views) in enumerate(zip(tables, tier_views(block, tables), strict=True)):
        rows = random_rows(table.rows, table.width, seed + index)
        for first, tier, view in zip(table.firsts, table.tiers, views, strict=True):
            view[:] = quantize_rows(rows[first : first + tier.rows], tier.bits)
    return block


def random_bags(
    tables: Sequence[StoredTable], features: Sequence[str], batch: int, seed: int = 0, longest: int = 4
) -> KeyedJaggedTensor:
    """Bags of 0 to `longest` ids a feature and row."""
    rng = np.random.default_rng(seed)
    rows_of = {f: t.rows for t in tables for f in t.features}
    lengths = rng.integers(0, longest + 1, (len(features), batch))
    values = [rng.integers(0, rows_of[f], lengths[i].sum()) for i, f in enumerate(features)]
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(lengths.astype(np.int32).ravel()),
        stride=batch,
    )
