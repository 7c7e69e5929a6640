"""Tables of any size that one log reads the same rows of: the worlds of benchmarks/tune.py.

A synthetic log whose largest fields are hashed into as many rows as asked; every other field has a vocabulary. Rows of
ids in the log hold what the ids do (benchmarks/planted.py), the others are drawn at random: rows that this log does not
read, as those of a larger log would be. The head is trained once, on the smallest tables, and put above the others.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.planted import HEAD, SCALE, planted_checkpoint
from benchmarks.recipes import prepared
from trainer.checkpoint import Checkpoint, open_checkpoint
from trainer.config import parse_run
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.sources.synthetic import write_synthetic
from trainer.data.transform import RESERVED_ROWS, TableInfo

HASHED = ("C3", "C4", "C12", "C16", "C21")  # the fields of millions of ids
LEFT_OUT = ("C10", "C24", "C26")  # of 90,000 to 290,000 ids: their tables would not be small beside the smallest
SPLIT = [0.6, 0.3, 0.1]
CHUNK_ROWS = 1 << 20


@dataclass(frozen=True)
class World:
    """The folder of a checkpoint and its data, and the rows of its tables together."""

    rows: int
    folder: Path

    def open(self) -> tuple[Checkpoint, Dataset]:
        """The checkpoint, and the data as wide as its tables; verified when they were written."""
        checkpoint = open_checkpoint(self.folder / "checkpoint", verify=False)
        return checkpoint, open_dataset(self.folder / "prepared").sized(
            checkpoint.run.data, checkpoint.run.model.embedding_dim
        )

    def remove(self) -> None:
        """Remove its files."""
        shutil.rmtree(self.folder)


def write_grown_log(folder: Path, rows: int) -> dict[str, Any]:
    """Write a log into `folder`, and return its run's mapping without sizes of hash tables."""
    write_synthetic(folder, rows, progress=lambda *_: None)
    content = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    data = content["data"]
    data["input"] = str(folder / "raw" / "*.parquet")
    data["split"]["fractions"] = SPLIT
    data["features"] = [f for f in data["features"] if f["name"] not in LEFT_OUT]
    return content


def grown(
    content: Mapping[str, Any], rows: int, folder: Path, dense: dict[str, torch.Tensor] | None, head_steps: int
) -> World:
    """Write a world whose hash tables have about `rows` rows together.

    `dense`: the head of another world of this log; without it one is trained, in so many steps.
    """
    content = copy.deepcopy(dict(content))
    for feature in content["data"]["features"]:
        if feature["name"] in HASHED:
            feature["hash_size"] = rows // len(HASHED) - RESERVED_ROWS
    folder.mkdir()
    run = parse_run(content, "grown")
    dataset = prepared(content, folder / "prepared").sized(run.data, run.model.embedding_dim)
    tables = dataset.transform.tables
    scratch = folder / "rows"
    scratch.mkdir()
    drawn = {name: random_rows(scratch / name, table) for name, table in tables.items()}
    raw = Path(content["data"]["input"]).parent
    planted_checkpoint(
        run, dataset, raw, folder / "checkpoint", 0, drawn, dense, HEAD.model_copy(update={"steps": head_steps})
    )
    shutil.rmtree(scratch)
    shutil.rmtree(folder / "checkpoint-untrained", ignore_errors=True)
    total = sum(table.num_embeddings for table in tables.values())
    return World(total, folder)


def random_rows(path: Path, table: TableInfo) -> np.ndarray:
    """Rows (N, D) float32 of a table in a mapped file, as large as planted ones: the file may exceed the memory."""
    rng = np.random.default_rng(0)
    rows = np.memmap(path, np.float32, "w+", shape=(table.num_embeddings, table.embedding_dim))
    for first in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[first : first + CHUNK_ROWS]
        chunk[:] = SCALE * rng.standard_normal(chunk.shape, np.float32) / np.sqrt(table.embedding_dim)
    return rows
