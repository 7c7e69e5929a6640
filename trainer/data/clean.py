"""Rows of a log that training does not see: those that break a declared rule, duplicates, negatives sampled out.

Rules of one row (required, ranges) need nothing but the row. Duplicates need the whole log: each fragment gives a
64-bit key a row, `find_duplicates` decides, and the positions of the rows to drop lie in a file beside each other.

Legend: N rows of a fragment or of the log.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.digest import splitmix64
from trainer.data.log import Fragment
from trainer.data.schema import DataConfig, comparison, parse_comparison
from trainer.data.transform import as_numbers, flat, hash_ids
from trainer.errors import DataError

KEY_PARTS = 32  # duplicates are sought in one part of the keys at a time
MISSING_KEY = np.uint64(0x9AE16A3B2F90404F)
NEGATIVE_SALT = 0x5A


@dataclass
class Dropped:
    """How many rows broke each rule. A row counts once: under required, then ranges, then duplicates."""

    duplicates: int = 0
    ranges: dict[str, int] = field(default_factory=dict)
    required: dict[str, int] = field(default_factory=dict)

    def add(self, other: Dropped) -> None:
        """Add another fragment's counts."""
        self.duplicates += other.duplicates
        for mine, theirs in ((self.ranges, other.ranges), (self.required, other.required)):
            for column, count in theirs.items():
                mine[column] = mine.get(column, 0) + count


@dataclass(frozen=True)
class Part:
    """What is left of a fragment: its rows, their numbers (N,) int64 in the log, and what was dropped."""

    raw: pa.Table
    numbers: np.ndarray
    dropped: Dropped


def read_labels(raw: pa.Table, data: DataConfig) -> np.ndarray:
    """Labels (N, T) float32, NaN where the log has none. Raises: DataError for values that are neither 0 nor 1."""
    columns = []
    for task in data.tasks:
        values = as_numbers(flat(raw[task.column]), task.column)
        known = ~np.isnan(values)
        if task.positive is not None:
            bound = parse_comparison(task.positive)[1]
            values = np.where(known, comparison(task.positive)(values, bound), np.nan)
        elif not np.isin(values[known], (0.0, 1.0)).all():
            seen = values[known][~np.isin(values[known], (0.0, 1.0))][0]
            raise DataError(
                f"task {task.name!r}: column {task.column!r} holds {seen:g}, a label is 0 or 1: "
                f"say which values are positive, such as positive: '>= 4'"
            )
        columns.append(values.astype(np.float32))
    return np.stack(columns, axis=1)


def read_part(fragment: Fragment, data: DataConfig, folder: Path | None = None) -> Part:
    """A fragment's rows that break no rule; `folder` is where `write_duplicates` wrote, if there is that rule.

    Rows without a label are among them: they are left out later, and take no part in duplicates.
    """
    raw = fragment.read(data.columns)
    numbers = np.arange(fragment.start, fragment.start + len(raw), dtype=np.int64)
    keep, dropped = check_rows(raw, data)
    if not keep.all():
        raw, numbers = raw.filter(pa.array(keep)), numbers[keep]
    path = None if folder is None else _duplicates_path(folder, fragment)
    if path is not None and path.exists():
        repeated = np.load(path)
        dropped.duplicates = len(repeated)
        keep = np.ones(len(raw), dtype=bool)
        keep[np.flatnonzero(_labelled(raw, data))[repeated]] = False
        raw, numbers = raw.filter(pa.array(keep)), numbers[keep]
    return Part(raw, numbers, dropped)


def check_rows(raw: pa.Table, data: DataConfig) -> tuple[np.ndarray, Dropped]:
    """Which rows (N,) bool break no rule that a row can break by itself, and how many broke each."""
    keep = np.ones(len(raw), dtype=bool)
    dropped = Dropped()
    for column in data.clean.required:
        values = flat(raw[column])
        absent = values.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            absent |= pc.equal(values, "").fill_null(False).to_numpy(zero_copy_only=False)
        dropped.required[column] = int((keep & absent).sum())
        keep &= ~absent
    for column, (low, high) in data.clean.ranges.items():
        values = as_numbers(flat(raw[column]), column)
        outside = (values < (-np.inf if low is None else low)) | (values > (np.inf if high is None else high))
        dropped.ranges[column] = int((keep & outside).sum())
        keep &= ~outside
    return keep, dropped


def row_keys(fragment: Fragment, data: DataConfig) -> tuple[np.ndarray, int]:
    """Keys (N,) uint64 of a fragment's labelled rows that break no other rule, and all rows that break none."""
    part = read_part(fragment, data)
    raw = part.raw.filter(pa.array(_labelled(part.raw, data)))
    keys = np.zeros(len(raw), dtype=np.uint64)
    for salt, column in enumerate(data.clean.duplicates or ()):
        values = flat(raw[column])
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = pc.binary_join(values.cast(pa.list_(pa.string())), "\x1f")
        hashed, missing = hash_ids(values, column)
        keys = splitmix64(keys ^ np.where(missing, MISSING_KEY, hashed), salt)
    return keys, len(part.raw)


def find_duplicates(keys: np.ndarray) -> np.ndarray:
    """Which rows (N,) bool have the key of an earlier row. Holds about a thirtieth of the keys (N,) beside them."""
    repeated = np.zeros(len(keys), dtype=bool)
    part_of = keys.view(np.uint8)[7::8] // (256 // KEY_PARTS)  # the leading bits, on a little-endian machine
    for part in range(KEY_PARTS):
        rows = np.flatnonzero(part_of == part)
        order = np.argsort(keys[rows], kind="stable")
        found = keys[rows[order]]
        repeated[rows[order[1:][found[1:] == found[:-1]]]] = True
    return repeated


def write_duplicates(folder: Path, fragment: Fragment, repeated: np.ndarray) -> None:
    """Leave for `read_part` which of a fragment's keys (N,) bool are duplicates."""
    if repeated.any():
        np.save(_duplicates_path(folder, fragment), np.flatnonzero(repeated).astype(np.int32))


def kept_negatives(labels: np.ndarray, numbers: np.ndarray, rate: float) -> np.ndarray:
    """Which rows (N,) bool stay when a row of label 0 stays with probability `rate`: decided by its number in the log.

    Shapes: labels (N, 1) float32, numbers (N,) int64.
    """
    draw = (splitmix64(numbers, NEGATIVE_SALT) >> np.uint64(11)).astype(np.float64) / 2.0**53
    return (labels[:, 0] != 0) | (draw < rate)


def counts_of(dropped: Dropped) -> dict[str, Any]:
    """The counts as dataset.json holds them."""
    return {"duplicates": dropped.duplicates, "ranges": dropped.ranges, "required": dropped.required}


def _labelled(raw: pa.Table, data: DataConfig) -> np.ndarray:
    return ~np.isnan(read_labels(raw, data)).any(axis=1)


def _duplicates_path(folder: Path, fragment: Fragment) -> Path:
    return folder / f".duplicates-{fragment.index:05d}.npy"
