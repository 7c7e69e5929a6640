"""What benchmarks/serve.py serves: an MLPerf-size DLRM on a synthetic log with a catalogue of items, compressed.

The truth and the size are those of benchmarks/dense.py (26 tables of D=64, 13 numbers, bottom MLP 512-256-64, over-arch
1024-1024-512-256-1), but that the ten item features are functions of the item, whose id is t16. Every row of the tables
is set to what its id really does; the head is trained above them. Two artifacts are made, so that one can replace the
other. Everything lies in one folder, and what is there already is used again.

Legend: B rows, F features, N ids of a feature, M items.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from benchmarks.dense import BOTTOM, DIM, FEATURES, ITEM_FEATURES, NUM_DENSE, OVER, Log, make_log
from benchmarks.planted import train_head_above
from benchmarks.recipes import prepared
from compress.artifact import load_artifact
from compress.compressor import compress, data_of
from compress.config import CalibrationPlan, CompressionPlan
from compress.pipeline import compress_checkpoint, profiles_for
from trainer.checkpoint import Checkpoint, open_checkpoint
from trainer.config import RunConfig, parse_run
from trainer.data.dataset import Dataset, open_dataset

NUMBERS = [f"I{i + 1}" for i in range(NUM_DENSE)]
USER_FEATURES = [name for name in FEATURES if name not in ITEM_FEATURES]
ITEM = FEATURES[16]
ITEM_AT = 16
CHUNK_ROWS = 100_000
MAX_DELTA_NE = 1e-3


@dataclass(frozen=True)
class Size:
    """How large a world is: ids of each feature, rows of the log, steps that train the head, and teach a small one.

    keep: shares of the head's neurons to try, in turn, until delta NE is within a tenth of a percent.
    """

    ids: int
    rows: int
    head_steps: int
    distill_steps: int
    keep: tuple[float, ...]


FULL = Size(50_000, 1_500_000, 3000, 3000, (0.25, 0.5, 1.0))  # a step of distillation is of 4,096 rows
QUICK = Size(2_000, 20_000, 20, 5, (0.25,))


@dataclass(frozen=True)
class World:
    """Folders of a made world, and what compressing came to."""

    folder: Path
    quality: dict[str, Any]

    @property
    def artifact(self) -> Path:
        """The compressed model."""
        return self.folder / "artifact"

    @property
    def following(self) -> Path:
        """The same model with coarser tables: the version that replaces the other."""
        return self.folder / "artifact-next"

    def open(self) -> tuple[Checkpoint, Dataset]:
        """The fp32 model and its data."""
        checkpoint = open_checkpoint(self.folder / "checkpoint", verify=False)
        return checkpoint, data_of(checkpoint, open_dataset(self.folder / "prepared"))

    def requests(self, count: int, candidates: int) -> list[dict[str, Any]]:
        """Bodies of requests, users and candidates drawn as the log draws them."""
        log = pq.read_table(next(iter(sorted((self.folder / "raw").glob("*.parquet")))))
        items = self.open()[1].items()
        assert items is not None
        ids = items[ITEM].to_numpy()
        rng = np.random.default_rng(5)
        users = log.select([*NUMBERS, *USER_FEATURES]).take(rng.integers(0, len(log), count)).to_pylist()
        return [{"user": user, "candidates": rng.permutation(ids)[:candidates].tolist(), "k": 10} for user in users]


def make_world(folder: Path, size: Size) -> World:
    """Make what is not there yet."""
    told = folder / "quality.json"
    if not told.exists():
        folder.mkdir(parents=True, exist_ok=True)
        log = make_log(size.ids)
        run = parse_run(_content(folder), "dlrm")
        if not (folder / "prepared" / "dataset.json").exists():
            tell("writing the log")
            _write_raw(folder / "raw", log, size)
            tell("preparing it")
            prepared(_content(folder), folder / "prepared")
        if not (folder / "checkpoint").exists():
            tell("training the head")
            _train(folder, run, log, size)
        tell("compressing")
        told.write_text(json.dumps(_compress(folder, size)), encoding="utf-8")
    return World(folder, json.loads(told.read_text(encoding="utf-8")))


def tell(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def _content(folder: Path) -> dict[str, Any]:
    numbers = [{"name": name, "kind": "numeric", "transform": "none", "side": "user"} for name in NUMBERS]
    sides = {name: "item" if name in ITEM_FEATURES else "user" for name in FEATURES}
    tables = [{"name": name, "kind": "categorical", "side": side, "min_count": 1} for name, side in sides.items()]
    return {
        "name": "dlrm",
        "data": {
            "input": str(folder / "raw" / "*.parquet"),
            "split": {"by": "row", "fractions": [0.8, 0.1, 0.1]},
            "ids": {"item": ITEM},
            "tasks": [{"name": "click", "column": "click"}],
            "features": numbers + tables,
        },
        "model": {
            "arch": "dlrm",
            "embedding_dim": DIM,
            "bottom_mlp": BOTTOM[:-1],
            "top_mlp": OVER[:-1],
            "dropout": 0.0,
        },
    }


def _write_raw(folder: Path, log: Log, size: Size) -> None:
    """The log. Its first N rows hold every id of every feature once, so that all have a row and all items are known."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(11)
    _, attributes_MF, _ = log.draw(size.ids, generator)
    attributes_MF[:, ITEM_AT] = torch.arange(size.ids)
    for index, first in enumerate(range(0, size.rows, CHUNK_ROWS)):
        rows = min(CHUNK_ROWS, size.rows - first)
        dense_BI, ids_BF, _ = log.draw(rows, generator)
        if first == 0:
            for at in range(ITEM_AT + 1):
                ids_BF[: size.ids, at] = torch.randperm(size.ids, generator=generator)
        ids_BF[:, ITEM_AT:] = attributes_MF[ids_BF[:, ITEM_AT], ITEM_AT:]
        clicks = log.clicks(dense_BI, ids_BF, generator)[:, 0]
        columns = {name: dense_BI[:, i].numpy() for i, name in enumerate(NUMBERS)}
        columns |= {name: ids_BF[:, f].numpy() for f, name in enumerate(FEATURES)}
        table = pa.table({**columns, "click": clicks.numpy().astype(np.int8)})
        pq.write_table(table, folder / f"part-{index:03d}.parquet")


def _train(folder: Path, run: RunConfig, log: Log, size: Size) -> None:
    dataset = open_dataset(folder / "prepared").sized(run.data, run.model.embedding_dim)
    tables = dict(_rows_of(dataset, log))
    plan = CalibrationPlan(steps=size.head_steps, batch_size=1024, lr=1e-3, target="labels", evaluations=10)
    train_head_above(run, dataset, tables, folder / "checkpoint", 0, plan, size.rows)


def _rows_of(dataset: Dataset, log: Log) -> Iterator[tuple[str, torch.Tensor]]:
    """Each table (rows, D): the log's own weights at the rows that its ids have, zeros where there is no id."""
    ids = np.arange(log.weights_FND.shape[1])
    for f, name in enumerate(FEATURES):
        rows = torch.from_numpy(dataset.transform.encode_sparse(name, pa.table({name: ids})).values)
        table = torch.zeros(dataset.transform.tables[name].num_embeddings, DIM)
        table[rows] = log.weights_FND[f]
        yield name, table


def _compress(folder: Path, size: Size) -> dict[str, Any]:
    """Both artifacts; of the served one the keep, delta NE and its bound."""
    found: dict[str, Any] = {}
    for keep in size.keep:
        dense = {"dtype": "int8", "keep_neurons": keep, "distill_steps": size.distill_steps if keep < 1 else 0}
        out = folder / f"artifact-{keep:g}"
        found = {"keep_neurons": keep, **_artifact(folder, out, {"default": {"bits": 8}, "dense": dense})}
        tell(f"  {keep:g} of the neurons: delta NE {found['delta_ne']:+.2e}, at most {found['delta_ne_upper']:+.2e}")
        if found["delta_ne"] <= MAX_DELTA_NE or keep == size.keep[-1]:
            out.rename(folder / "artifact")
            break
    found["next"] = _following(folder, dense)
    return found


def _following(folder: Path, dense: dict[str, Any]) -> dict[str, Any]:
    """The version that comes next: the lower half of each table at four bits, under the same head."""
    tables = {"tiers": [{"keep": 0.5, "bits": 8}, {"bits": 4}]}
    plan = CompressionPlan.model_validate({"default": tables, "dense": dense})
    checkpoint = open_checkpoint(folder / "checkpoint", verify=False)
    dataset = data_of(checkpoint, open_dataset(folder / "prepared"))
    head = load_artifact(folder / "artifact").model.head.head
    profiles = profiles_for(plan, checkpoint, dataset, lambda *_: None)
    out = folder / "artifact-next"
    manifest = compress(checkpoint, dataset, plan, out, profiles, lambda *_: None, head=head)
    return {"version": manifest["version"], "table_bytes": manifest["sizes"]["table_bytes"]}


def _artifact(folder: Path, out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    path = folder / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    kept = ("version", "table_bytes", "table_bytes_fp32", "delta_ne", "delta_ne_upper")
    result = compress_checkpoint(folder / "checkpoint", folder / "prepared", path, out, "test", lambda *_: None)
    return {name: result[name] for name in kept}
