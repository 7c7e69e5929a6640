"""A raw log -> what it last says of each user, for requests that name a user and give no features.

    users.arrow   key uint64 (sorted hash of the id), id (text), value.COLUMN: float64, text, or lists of either

Values are raw, as a request would give them; the transform that reads them is the model's own. The log is read a
fragment at a time; what grows with the users is held. Legend: N rows of a fragment.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.clean import check_rows
from trainer.data.latest import last_seen, timestamps
from trainer.data.log import Fragment, LogFile, csv_to_parquet, find_files, fragments_of
from trainer.data.schema import (
    BagFeature,
    DataConfig,
    MultiFeature,
    NumericFeature,
    SparseFeature,
    columns_of,
)
from trainer.data.transform import as_lists, as_numbers, as_text, cut_bags, flat, hash_ids, write_arrow
from trainer.errors import DataError
from trainer.files import new_file
from trainer.progress import ReportProgress

VALUE = "value."
MERGE_PARTS = 8  # parts of what is known that are held before they are merged


def user_features(data: DataConfig) -> dict[str, list[SparseFeature | NumericFeature]]:
    """The features of the user's side by the column that each is read from, but for the user's id."""
    by_source: dict[str, list[SparseFeature | NumericFeature]] = {}
    for feature in data.features:
        if feature.side == "user" and feature.source != data.ids.user:
            by_source.setdefault(feature.source, []).append(feature)
    return by_source


def write_users(data: DataConfig, out: Path, progress: ReportProgress) -> dict[str, Any]:
    """Write the last known features of each user of a log to `out`; what `slimrank data users --json` prints.

    Of each feature the latest value that is not missing counts, by `data.timestamp`, or else in the log's order.
    Raises: DataError when the schema names no user, has no feature of theirs, or the log cannot be read.
    """
    features = user_features(data)
    if data.ids.user is None:
        raise DataError("the schema names no user: set data.ids.user to the column that holds the user's id")
    if not features:
        raise DataError("no feature but the id is of the user's side: set side: user on those that a user has")
    known: dict[str, list[pa.Table]] = {source: [] for source in ["", *features]}
    rows = 0
    with tempfile.TemporaryDirectory(prefix=".slimrank-users-", dir=_existing(Path(out).absolute())) as folder:
        fragments = fragments_of(_as_parquet(find_files(data), data, Path(folder)), data)
        for number, fragment in enumerate(fragments, 1):
            rows += fragment.rows
            for source, part in _observe(fragment, data, features):
                known[source] = _merge([*known[source], part])
            progress("users", number, len(fragments))
    latest = {source: _merge(parts, last=True)[0] for source, parts in known.items()}
    with new_file(out) as staging:
        write_arrow(_joined(latest), staging)
    return {
        "users": str(Path(out).absolute()),
        "rows": rows,
        "known": len(latest[""]),
        "columns": [
            c.removeprefix(VALUE) for part in latest.values() for c in part.column_names if c.startswith(VALUE)
        ],
        "bytes": Path(out).stat().st_size,
    }


def _existing(path: Path) -> Path:
    """The folder of a file that is to be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def _as_parquet(files: list[LogFile], data: DataConfig, folder: Path) -> list[LogFile]:
    parquet = []
    for number, file in enumerate(files):
        if file.is_csv:
            target = str(folder / f"{number:05d}.parquet")
            csv_to_parquet(file.path, target, data)
            parquet.append(replace(file, path=target, is_csv=False))
        else:
            parquet.append(file)
    return parquet


def _observe(
    fragment: Fragment, data: DataConfig, features: dict[str, list[SparseFeature | NumericFeature]]
) -> Iterator[tuple[str, pa.Table]]:
    """By source column the latest known values of the fragment's users; under "" their ids."""
    user = str(data.ids.user)
    wanted = [user, *([data.timestamp] if data.timestamp else []), *data.clean.columns]
    wanted += [c for members in features.values() for f in members for c in columns_of(f)]
    raw = fragment.read(list(dict.fromkeys(wanted)))
    raw = raw.filter(pa.array(check_rows(raw, data)[0]))
    when = timestamps(raw, data) if data.timestamp else np.arange(len(raw), dtype=np.float64) + fragment.start
    ids = as_text(flat(raw[user]), user).cast(pa.string())
    keys, missing = hash_ids(ids, user)
    frame = pa.table({"_key": keys, "_when": when})
    yield "", last_seen(frame.append_column("id", ids).filter(pa.array(~missing)))
    for source, members in features.items():
        values = {c: stored for f in members for c, stored in stored_columns(raw, f).items()}
        part = frame
        for column, stored in values.items():
            part = part.append_column(f"{VALUE}{column}", stored)
        there = pc.and_(values[source].is_valid(), pa.array(~missing))
        yield source, last_seen(part.filter(there))


def stored_columns(raw: pa.Table, feature: SparseFeature | NumericFeature) -> dict[str, pa.Array]:
    """A feature's raw columns in the types of the file: numbers, text, lists cut as the feature is.

    Raises: DataError naming the column when its values are not of the feature's kind.
    """
    column = flat(raw[feature.source])
    if isinstance(feature, NumericFeature):
        return {feature.source: pa.array(as_numbers(column, feature.source), from_pandas=True)}
    if not isinstance(feature, BagFeature):
        return {feature.source: as_text(column, feature.source).cast(pa.string())}
    ids, lists = _cut(raw, feature, feature.source)
    stored = {feature.source: _lists(as_text(ids, feature.source).cast(pa.string()), lists)}
    if isinstance(feature, MultiFeature) and feature.weights is not None:
        weights, lists = _cut(raw, feature, feature.weights)
        stored[feature.weights] = _lists(pa.array(as_numbers(weights, feature.weights), from_pandas=True), lists)
    return stored


def _cut(raw: pa.Table, feature: Any, name: str) -> tuple[pa.Array, tuple[np.ndarray, pa.Array]]:
    """The members of a column's lists after the cut at max_length; their lengths (N,), and which are null (N,)."""
    lists = as_lists(flat(raw[name]), name, feature.separator)
    values, lengths = cut_bags(lists, feature)
    return values, (lengths, lists.is_null())


def _lists(values: pa.Array, lists: tuple[np.ndarray, pa.Array]) -> pa.Array:
    lengths, null = lists
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=null)


def _merge(parts: list[pa.Table], *, last: bool = False) -> list[pa.Table]:
    return parts if len(parts) <= MERGE_PARTS and not last else [last_seen(pa.concat_tables(parts))]


def _joined(latest: dict[str, pa.Table]) -> pa.Table:
    """One row a user in the order of their keys; what nothing is known of is null."""
    keys = latest[""]["_key"].to_numpy()
    columns: dict[str, pa.Array] = {"key": pa.array(keys), "id": flat(latest[""]["id"])}
    for source, part in latest.items():
        if not source or not len(part):
            continue
        own = part["_key"].to_numpy()
        at = np.minimum(np.searchsorted(own, keys), len(own) - 1)
        index = pa.array(at, mask=own[at] != keys)
        for name in part.column_names:
            if name.startswith(VALUE):
                columns[name] = flat(part[name]).take(index)
    return pa.table(columns)
