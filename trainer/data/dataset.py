"""A prepared data set on disk: what prepare writes and training, tuning and evaluation read.

DIR/dataset.json            format version, rows and files of each split, positives, out-of-vocabulary shares, what
                            cleaning dropped, the rate at which negatives were kept, the data sets it continues
DIR/transform.json          the fitted transform (trainer/data/transform.py), with vocabulary/TABLE.arrow
DIR/counts/TABLE.arrow      lookups of each row in the training split
DIR/{train,val,test}/*.parquet
DIR/items.parquet           the item catalogue: item id, title, raw item-side columns, as last seen
DIR/sample.parquet          raw validation rows, for golden requests and parity tests
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from trainer.data.schema import DataConfig
from trainer.data.transform import Transform, load_transform, read_arrow
from trainer.errors import DataError
from trainer.storage import Location, first_missing, location, open_parquet, reading, why_absent

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
FORMAT_VERSION = 1
MANIFEST = "dataset.json"
LABELS = "labels"
DENSE = "dense"
GROUP = "group"


@dataclass(frozen=True)
class PartFile:
    """One prepared Parquet file and the rows of each of its row groups."""

    path: Location
    row_groups: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """An opened prepared data set."""

    folder: Location
    transform: Transform
    files: dict[str, list[PartFile]]
    positives: dict[str, list[int]]
    manifest: dict[str, Any]

    def sized(self, data: DataConfig, embedding_dim: int) -> Dataset:
        """The same data, its tables as wide as a run's model asks for (prepared rows do not depend on it)."""
        return replace(self, transform=self.transform.with_dims(data.features, embedding_dim))

    @property
    def negative_rate(self) -> float:
        """The share of the training split's negatives that prepare kept."""
        return float(self.manifest.get("negative_rate", 1.0))

    def rows(self, split: SplitName) -> int:
        """Rows of a split."""
        return sum(sum(f.row_groups) for f in self.files[split])

    def groups(self, split: SplitName) -> np.ndarray | None:
        """The group of each row (N,) uint64, where the schema names a group or a user."""
        tables = [_read(f.path, [GROUP]) for f in self.files[split] if self._has_groups]
        return pa.concat_tables(tables)[GROUP].to_numpy() if tables else None

    @property
    def _has_groups(self) -> bool:
        ids = self.transform.schema.ids
        return (ids.group or ids.user) is not None

    def counts(self, table: str) -> np.ndarray:
        """Lookups of each row (num_embeddings,) int64 in the training split."""
        return read_arrow(self.folder / "counts" / f"{table}.arrow")["count"].to_numpy()

    def items(self) -> pa.Table | None:
        """The raw item catalogue, where the schema names an item id."""
        path = self.folder / "items.parquet"
        return _read(path) if path.exists() else None

    def sample(self) -> pa.Table:
        """Raw validation rows."""
        return _read(self.folder / "sample.parquet")


def _read(path: Location, columns: list[str] | None = None) -> pa.Table:
    with reading(path), open_parquet(path) as file:
        return file.read(columns)


def open_dataset(folder: str | Location) -> Dataset:
    """Open what prepare wrote, which is read where it lies.

    Raises: DataError when the folder is no prepared data set, or a file of it is missing.
    """
    folder = location(folder)
    try:
        if not (folder / MANIFEST).exists():
            raise FileNotFoundError
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
        files: dict[str, list[PartFile]] = {
            split: [PartFile(folder / f["path"], tuple(f["row_groups"])) for f in manifest["files"][split]]
            for split in SPLITS
        }
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        raise DataError(
            f"{folder}: not a prepared data set{why_absent(folder, MANIFEST)}: give --data the folder that "
            f"'data prepare' wrote"
        ) from None
    if version != FORMAT_VERSION:
        raise DataError(f"{folder}: format {version}, this version reads {FORMAT_VERSION}: prepare it again")
    missing = first_missing([p.path for parts in files.values() for p in parts])
    if missing is not None:
        raise DataError(f"{missing}: missing from the prepared data set: prepare it again")
    return Dataset(folder, load_transform(folder), files, manifest["positives"], manifest)
