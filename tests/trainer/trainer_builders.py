"""Small real things for the trainer's tests: runs, logs, fitted transforms, prepared data sets, sharded models."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from trainer.checkpoint import init_optimizer_state, training_state
from trainer.config import RunConfig, parse_run
from trainer.data import prepare
from trainer.data.dataset import SPLITS, Dataset, open_dataset
from trainer.data.fit import FitStats, fit_transform, observe
from trainer.data.log import Fragment, find_files, fragments_of
from trainer.data.schema import DataConfig
from trainer.data.transform import Transform
from trainer.files import write_json
from trainer.models import build_ranker
from trainer.optimizer import build_optimizer, fuse_table_optimizer
from trainer.sharders import sharders
from trainer.sharding import make_plan

CPU = torch.device("cpu")

FEATURES: list[dict[str, Any]] = [
    {"name": "user", "kind": "categorical", "side": "user"},
    {"name": "item", "kind": "categorical", "side": "item", "dim": 4},
    {"name": "history", "kind": "multi", "table": "item"},
    {"name": "hashed", "kind": "categorical", "hash_size": 11},
    {"name": "tags", "kind": "multi", "separator": "|", "max_length": 3},
    {"name": "price", "kind": "numeric", "transform": "log1p"},
    {"name": "age", "kind": "numeric", "transform": "bucketize", "buckets": 4},
    {"name": "row", "kind": "numeric", "transform": "none"},
]


def run_content(**data: Any) -> dict[str, Any]:
    """A run's mapping as YAML would hold it; `data` replaces keys of its data section."""
    section = {
        "input": "log/*.parquet",
        "split": {"by": "row"},
        "tasks": [{"name": "click", "column": "label"}],
        "features": copy.deepcopy(FEATURES),
        **data,
    }
    model = {"arch": "dcn", "embedding_dim": 8, "bottom_mlp": [8], "top_mlp": [8], "dropout": 0.0}
    return {"name": "tiny", "data": section, "model": model}


def make_run(model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    """`run_content`, validated."""
    content = run_content(**data)
    return parse_run({**content, "model": content["model"] | (model or {}), "train": train or {}}, "tiny.yaml")


def data_of(*features: dict[str, Any], **data: Any) -> DataConfig:
    """A data section of some features; a categorical one is added where none reads a table."""
    listed = list(features)
    if all(f["kind"] == "numeric" and f.get("transform") != "bucketize" for f in listed):
        listed.append({"name": "any", "kind": "categorical"})
    return make_run(features=listed, **data).data


def write_run(folder: Path, content: Any) -> Path:
    """Write a run's YAML."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def random_log(rows: int, seed: int = 0, split: Sequence[str] | None = None) -> pa.Table:
    """A log for FEATURES with missing values in every column but `row`, `label` and `time`."""
    rng = np.random.default_rng(seed)

    def some(values: list[Any], share: float = 0.1) -> list[Any]:
        return [None if rng.random() < share else v for v in values]

    table = pa.table(
        {
            "user": pa.array(some(rng.integers(0, 9, rows).tolist()), pa.int64()),
            "item": some([f"i{n}" for n in rng.integers(0, 12, rows)]),
            "history": pa.array(
                some([[f"i{n}" for n in rng.integers(0, 14, rng.integers(0, 5))] for _ in range(rows)]),
                pa.list_(pa.string()),
            ),
            "hashed": pa.array(some(rng.integers(0, 40, rows).astype(float).tolist()), pa.float64()),
            "tags": some(["|".join(rng.choice(["x", "y", "z", "w"], rng.integers(0, 6))) for _ in range(rows)]),
            "price": pa.array(some(rng.lognormal(2, 1, rows).tolist()), pa.float64()),
            "age": pa.array(some(rng.integers(10, 80, rows).tolist()), pa.int64()),
            "row": pa.array(np.arange(rows)),
            "label": pa.array((np.arange(rows) * 7 % 3 == 0).astype(np.int8)),
            "time": pa.array(np.sort(rng.integers(0, rows // 3 + 1, rows))),
        }
    )
    return table if split is None else table.append_column("split", pa.array(list(split)))


def fitted(raw: pa.Table, data: DataConfig, dim: int = 8) -> Transform:
    """A transform fitted on all rows of a table."""
    return fit_transform(observe(raw, data, 0), data, dim)


def whole(raw: pa.Table, split: str | None = None, start: int = 0) -> Fragment:
    """The fragment that would stand for a table, for functions that take both."""
    return Fragment(0, "nowhere.parquet", (0,), start, len(raw), split)


def prepare_here(
    folder: Path, run: RunConfig, cuts: tuple[float, float] = (0.0, 0.0), row_group_rows: int = 1 << 16
) -> Dataset:
    """All that `prepare` does to Parquet logs, in this process: the same functions mapped by a plain loop."""
    splitter = prepare.Splitter(run.data, cuts)
    fragments = fragments_of(find_files(run.data), run.data)
    stats = FitStats()
    for fragment in fragments:
        stats.merge(prepare._observe_rows(fragment, splitter))
    transform = fit_transform(stats, run.data, run.model.embedding_dim)
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "ROW_GROUP_ROWS", row_group_rows)
        parts = [prepare._write_rows(fragment, splitter, transform, folder) for fragment in fragments]
    manifest = prepare._finish(parts, transform, run.data, folder)
    transform.save(folder)
    write_json(folder / "dataset.json", {**manifest, "name": run.name})
    return open_dataset(folder)


def prepare_locally(run: RunConfig, out: Path, continue_from: Path | None = None) -> dict[str, Any]:
    """`prepare` itself, each pass a plain loop in place of Ray Data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_map", lambda function, items, what, progress: map(function, items))
        return prepare.prepare(run, out, lambda *_: None, continue_from)


def make_dataset(folder: Path, train_rows: int, files: int = 2, row_group_rows: int = 7, **data: Any) -> Dataset:
    """A prepared data set of `train_rows` training rows and 12 each of val and test; dense `row` numbers the rows."""
    split = ["train"] * train_rows + ["val"] * 12 + ["test"] * 12
    log = random_log(len(split), split=split)
    (folder / "log").mkdir(parents=True)
    for part, rows in enumerate(np.array_split(np.arange(len(log)), files)):
        pq.write_table(log.take(pa.array(rows)), folder / "log" / f"{part}.parquet")
    run = make_run(input=str(folder / "log" / "*.parquet"), split={"column": "split"}, **data)
    return prepare_here(folder / "prepared", run, row_group_rows=row_group_rows)


def shard(
    run: RunConfig, transform: Transform, seed: int, *, fuse: bool = True
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The sharded model and its optimizer on this process, as a training worker builds them; needs a process group.

    Without `fuse`, no table optimizer is applied, as where a caller forgot to.
    """
    torch.manual_seed(seed)
    model = build_ranker(run.model, transform)
    if fuse:
        fuse_table_optimizer(model.embeddings, run.train)
    plan = make_plan(
        model,
        transform,
        CPU,
        world_size=1,
        local_world_size=1,
        batch_size=16,
        sharding=run.train.sharding,
        table_optimizer=run.train.table_optimizer,
    )
    sharded = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders())
    optimizer = build_optimizer(sharded, run.train)
    init_optimizer_state(optimizer)
    generator = torch.Generator().manual_seed(seed)
    for key, value in training_state(sharded, optimizer).items():
        if key.endswith("/weight") and key.startswith("tables/"):
            with torch.no_grad():
                for tensor in local_tensors(value):
                    tensor.uniform_(-0.5, 0.5, generator=generator)
    return sharded, optimizer


def local_tensors(value: torch.Tensor | ShardedTensor) -> list[torch.Tensor]:
    """Live storage of what this rank holds of a tensor of the training state."""
    return [s.tensor for s in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
