"""Raw columns -> table row ids and floats. Fitted once; the same object runs in prepare and in serve.

An id is read as text (7, 7.0 and "7" are one id), hashed to 64 bits, and found in its table's vocabulary. Row 0 of
every table is the out-of-vocabulary row, row 1 stands for a missing value; ids follow in the order of their hashes, so
rows say nothing of frequency and a row-wise shard gets its share of hot ones. A vocabulary that was extended keeps its
rows and appends those of new ids. Fitting and extending are in trainer/data/fit.py.

Legend: N rows, I dense inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from trainer.data.encoded import Encoded, Ragged
from trainer.data.schema import (
    DataConfig,
    MultiFeature,
    NumericFeature,
    SequenceFeature,
    SparseFeature,
    is_attention,
)
from trainer.errors import DataError
from trainer.files import write_json
from trainer.storage import Location, read_ipc

OOV_ROW = 0
MISSING_ROW = 1
RESERVED_ROWS = 2
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TableInfo:
    """An embedding table. `kind` says how an id becomes a row: by vocabulary, by hash, or by bucket of a number."""

    name: str
    kind: Literal["vocabulary", "hash", "buckets"]
    num_embeddings: int
    embedding_dim: int
    features: tuple[str, ...]

    @property
    def fp32_bytes(self) -> int:
        """Bytes of the rows in fp32."""
        return self.num_embeddings * self.embedding_dim * 4


@dataclass(frozen=True)
class NumericStats:
    """What was fitted of one number, after its log where the transform takes one."""

    mean: float
    std: float
    low: float
    high: float
    has_missing: bool
    boundaries: tuple[float, ...] = ()


@dataclass(frozen=True)
class IdMap:
    """How one table turns keys into rows.

    A vocabulary holds `keys`: the sorted leading bits (64 - `shift` of them) of its ids' hashes; position p is row
    p + 2. A hash or bucket table has none: the row is 2 + key % `size`. `remap` (num_embeddings,) int32, where there is
    one, takes these rows to the real ones: those of an artifact, or of a vocabulary that was extended.
    """

    size: int
    keys: np.ndarray | None = None
    shift: int = 0
    remap: np.ndarray | None = None

    @classmethod
    def of_rows(cls, keys: np.ndarray) -> IdMap:
        """The map of a vocabulary's distinct keys (N,) uint64, given in the order of their rows."""
        if (keys[1:] > keys[:-1]).all():
            return cls(len(keys), keys)
        sort = np.argsort(keys, kind="stable")
        remap = np.concatenate([np.arange(RESERVED_ROWS), sort + RESERVED_ROWS]).astype(np.int32)
        return cls(len(keys), keys[sort], remap=remap)

    def keys_by_row(self) -> np.ndarray:
        """The keys (N,) uint64 of a trained vocabulary in the order of their rows, from row 2 on."""
        assert self.keys is not None, "a hash or bucket table has no keys"
        if self.remap is None:
            return np.asarray(self.keys)
        ordered = np.empty_like(self.keys)
        ordered[self.remap[RESERVED_ROWS:] - RESERVED_ROWS] = self.keys
        return ordered

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Table rows (N,) int64 of 64-bit keys (N,) uint64; unknown ids give the out-of-vocabulary row."""
        if self.keys is None:
            rows = (keys % np.uint64(self.size)).astype(np.int64) + RESERVED_ROWS
        elif len(self.keys) == 0:
            rows = np.zeros(len(keys), dtype=np.int64)
        else:
            wanted = keys >> np.uint64(self.shift)
            found = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
            rows = np.where(self.keys[found] == wanted, found + RESERVED_ROWS, OOV_ROW)
        return rows if self.remap is None else self.remap[rows].astype(np.int64)

    def row(self, reserved: int) -> int:
        """Where a reserved row (OOV_ROW or MISSING_ROW) lies."""
        return reserved if self.remap is None else int(self.remap[reserved])


class Transform:
    """The fitted transform of a schema.

    `tables` and `id_maps` by table name, `numerics` by feature name. `lineage` holds the fingerprints of the transforms
    that this one extends, oldest first: rows of any of them are rows of this one. Immutable by convention:
    `with_id_maps` makes the artifact's version of it.
    """

    def __init__(
        self,
        schema: DataConfig,
        tables: dict[str, TableInfo],
        id_maps: dict[str, IdMap],
        numerics: dict[str, NumericStats],
        lineage: tuple[str, ...] = (),
        weighted: bool | None = None,
    ) -> None:
        self.lineage = lineage
        self.schema = schema
        self.weighted = schema.weighted if weighted is None else weighted
        self.tables = tables
        self.id_maps = id_maps
        self.numerics = numerics
        self.sparse = {f.name: f for f in schema.sparse_features}
        self.dense_names = [
            name
            for f in schema.dense_features
            for name in ([f.name, f"{f.name}.missing"] if numerics[f.name].has_missing else [f.name])
        ]

    def with_id_maps(self, id_maps: dict[str, IdMap]) -> Transform:
        """The same transform, reading other rows."""
        return Transform(self.schema, self.tables, id_maps, self.numerics, self.lineage, self.weighted)

    def with_dims(self, features: Sequence[SparseFeature | NumericFeature], default_dim: int) -> Transform:
        """The same transform, its tables as wide as a model's features ask for."""
        asked = {f.name: getattr(f, "dim", None) or default_dim for f in features}
        tables = {name: replace(t, embedding_dim=asked[name]) for name, t in self.tables.items()}
        schema = self.schema.model_copy(update={"features": list(features)})
        return Transform(schema, tables, self.id_maps, self.numerics, self.lineage, self.weighted)

    def with_widths(self, widths: Mapping[str, int]) -> Transform:
        """The same transform, some of its tables, by name, with fewer columns than its features ask for."""
        tables = {name: replace(t, embedding_dim=widths.get(name, t.embedding_dim)) for name, t in self.tables.items()}
        return Transform(self.schema, tables, self.id_maps, self.numerics, self.lineage, self.weighted)

    def table_of(self, feature: str) -> TableInfo:
        """The table that a sparse feature reads."""
        return self.tables[self.sparse[feature].table_name]

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(self, raw: pa.Table) -> Encoded:
        """Encode raw rows. A column that `raw` lacks counts as missing in every row.

        Raises: DataError naming the column when its values cannot be read as its feature's kind.
        """
        sparse = {name: self.encode_sparse(name, raw) for name in self.sparse}
        return Encoded(sparse, self.encode_dense(raw))

    def positions(self, name: str) -> int | None:
        """The most ids a row of a feature holds, where they are looked up one by one; else None."""
        feature = self.sparse[name]
        return feature.max_length if isinstance(feature, SequenceFeature) and is_attention(feature) else None

    def encode_sparse(self, name: str, raw: pa.Table) -> Ragged:
        """Rows of one sparse feature's table for N raw rows."""
        feature = self.sparse[name]
        column = _column(raw, feature.source)
        if isinstance(feature, MultiFeature | SequenceFeature):
            return self._encode_bags(feature, column, raw)
        id_map = self.id_maps[feature.table_name]
        if isinstance(feature, NumericFeature):
            numbers = as_numbers(column, feature.source)
            missing = np.isnan(numbers)
            boundaries = np.asarray(self.numerics[name].boundaries)
            keys = np.searchsorted(boundaries, numbers, side="right").astype(np.uint64)
        else:
            keys, missing = hash_ids(column, feature.source)
        rows = id_map.rows(keys)
        rows[missing] = id_map.row(MISSING_ROW)
        return Ragged(rows)

    def encode_dense(self, raw: pa.Table) -> np.ndarray:
        """Dense inputs (N, I) float32: standardized where fitted so, missing as 0 beside an indicator."""
        columns = []
        for feature in self.schema.dense_features:
            stats = self.numerics[feature.name]
            numbers = as_numbers(_column(raw, feature.source), feature.source)
            missing = np.isnan(numbers)
            scaled = np.clip(warp(numbers, feature), stats.low, stats.high)
            if feature.transform != "none":
                scaled = (scaled - stats.mean) / stats.std
            scaled[missing] = 0.0
            columns.append(scaled)
            if stats.has_missing:
                columns.append(missing)
        if not columns:
            return np.zeros((len(raw), 0), dtype=np.float32)
        return np.stack(columns, axis=1).astype(np.float32)

    def _encode_bags(self, feature: MultiFeature | SequenceFeature, column: pa.Array, raw: pa.Table) -> Ragged:
        values, lengths = split_bags(column, feature)
        weights = bag_weights(raw, feature, lengths) if self.weighted else None
        keys, missing = hash_ids(values, feature.source)
        id_map = self.id_maps[feature.table_name]
        rows = id_map.rows(keys)
        rows[missing] = id_map.row(MISSING_ROW)
        empty = lengths == 0
        if empty.any():  # an empty bag reads the missing row, as in training
            at = np.cumsum(lengths)[empty] - lengths[empty]
            rows = np.insert(rows, at, id_map.row(MISSING_ROW))
            weights = None if weights is None else np.insert(weights, at, np.float32(1.0))
            lengths = np.where(empty, 1, lengths)
        return Ragged(rows, lengths.astype(np.int32), weights, self.positions(feature.name))

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write transform.json and, for each vocabulary, vocabulary/TABLE.arrow (hash uint64, in row order)."""
        (folder / "vocabulary").mkdir(parents=True, exist_ok=True)
        for name, id_map in self.id_maps.items():
            if id_map.keys is not None:
                write_arrow(pa.table({"hash": id_map.keys_by_row()}), folder / "vocabulary" / f"{name}.arrow")
        write_json(folder / "transform.json", self.describe())

    def describe(self) -> dict[str, Any]:
        """Everything but the vocabularies, as JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint(),
            "extends": self.lineage[-1] if self.lineage else None,
            "lineage": list(self.lineage),
            "schema": self.schema.model_dump(mode="json"),
            "tables": [asdict(t) for t in self.tables.values()],
            "numerics": {k: asdict(v) for k, v in self.numerics.items()},
        }

    def fingerprint(self) -> str:
        """Changes whenever encoded rows could: a model only fits data that was encoded alike."""
        digest = hashlib.sha256()
        features = [f.model_dump(mode="json") for f in self.schema.features]
        numerics = {k: asdict(v) for k, v in self.numerics.items()}
        # a dim decides no encoded row: one prepared data set serves models of any width
        tables = [{k: v for k, v in asdict(t).items() if k != "embedding_dim"} for t in self.tables.values()]
        features = [{k: v for k, v in f.items() if k != "dim"} for f in features]
        digest.update(json.dumps([features, tables, numerics], sort_keys=True).encode())
        for name in sorted(self.id_maps):
            if self.id_maps[name].keys is not None:
                digest.update(np.ascontiguousarray(self.id_maps[name].keys_by_row()).data)
        return digest.hexdigest()[:16]


def load_transform(folder: Location) -> Transform:
    """Read what `Transform.save` wrote; vocabularies stay on disk, mapped (of a storage they are read).

    Raises: DataError when the folder holds no transform of this version.
    """
    described = read_description(folder / "transform.json")
    tables, numerics, schema = described
    id_maps = {}
    for table in tables.values():
        if table.kind == "vocabulary":
            keys = read_arrow(folder / "vocabulary" / f"{table.name}.arrow")["hash"].combine_chunks().to_numpy()
            id_maps[table.name] = IdMap.of_rows(keys)
        else:
            id_maps[table.name] = IdMap(table.num_embeddings - RESERVED_ROWS)
    lineage = json.loads((folder / "transform.json").read_text(encoding="utf-8")).get("lineage", [])
    return Transform(schema, tables, id_maps, numerics, tuple(lineage))


def read_description(path: Location) -> tuple[dict[str, TableInfo], dict[str, NumericStats], DataConfig]:
    """Tables, numeric statistics and schema of a transform.json. Raises: DataError when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise DataError(f"{path}: format {content['format_version']}, this version reads {FORMAT_VERSION}")
        tables = {t["name"]: TableInfo(**{**t, "features": tuple(t["features"])}) for t in content["tables"]}
        numerics = {
            k: NumericStats(**{**v, "boundaries": tuple(v["boundaries"])}) for k, v in content["numerics"].items()
        }
        return tables, numerics, DataConfig.model_validate(content["schema"])
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        raise DataError(f"{path}: not a transform ({type(error).__name__}): give a folder that prepare wrote") from None


# -- raw values ------------------------------------------------------------------------------------------------------


def _column(raw: pa.Table, name: str) -> pa.Array:
    if name not in raw.column_names:
        return pa.nulls(len(raw))
    return flat(raw[name])


def flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array of a column's chunks, dictionaries decoded."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # no chunks at all
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=column.type)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def as_text(column: pa.Array, name: str) -> pa.Array:
    """Ids as text: 7, 7.0 and "7" are one id; null, NaN and "" are missing.

    Raises: DataError when the column holds lists or other nested values.
    """
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        text = column
    elif pa.types.is_null(kind):
        return pa.nulls(len(column), pa.string())
    elif pa.types.is_floating(kind):
        numbers = pc.if_else(pc.is_nan(column), None, column).cast(pa.float64())
        whole = pc.and_(pc.equal(numbers, pc.round(numbers)), pc.less(pc.abs(numbers), 2.0**53))
        integers = pc.if_else(whole, numbers, None).cast(pa.int64()).cast(pa.string())
        text = pc.if_else(whole, integers, numbers.cast(pa.string()))
    elif pa.types.is_nested(kind):
        raise DataError(f"column {name!r}: holds {kind}, a categorical feature takes one value a row: use kind: multi")
    else:
        try:
            text = column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"column {name!r}: {kind} cannot be read as ids: {error}") from None
    return pc.if_else(pc.equal(text, ""), None, text)


def hash_ids(column: pa.Array, name: str) -> tuple[np.ndarray, np.ndarray]:
    """64-bit keys (N,) uint64 of an id column, and which of its values are missing (N,) bool.

    The hash is pandas' (SipHash of the UTF-8 text with a fixed key): the same in every process and release.
    """
    if len(column) < 64 and pa.types.is_string(column.type):  # a request's user: Arrow's calls would be the most of it
        words = [word or "" for word in column.to_pylist()]
        return hash_words(words), np.array([not word for word in words], dtype=bool)
    text = as_text(column, name)
    missing = text.is_null().to_numpy(zero_copy_only=False)
    if len(text) < 64:
        return _hash_text(text), missing
    encoded = text.dictionary_encode()
    keys = _hash_text(encoded.dictionary)
    codes = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
    return (keys[codes] if len(keys) else np.zeros(len(text), dtype=np.uint64)), missing


def hash_words(words: Sequence[str]) -> np.ndarray:
    """The keys (N,) uint64 that `hash_ids` gives ids that are text already, without Arrow in between."""
    return np.asarray(pd.util.hash_array(np.array(words, dtype=object), categorize=False), dtype=np.uint64)


def _hash_text(text: pa.Array) -> np.ndarray:
    words = text.fill_null("").to_numpy(zero_copy_only=False).astype(object)
    return np.asarray(pd.util.hash_array(words, categorize=False), dtype=np.uint64)


def as_numbers(column: pa.Array, name: str) -> np.ndarray:
    """A numeric column as float64 (N,), NaN where missing or infinite.

    Raises: DataError naming the column and the first value that is no number.
    """
    kind = column.type
    try:
        if pa.types.is_date(kind):
            column = column.cast(pa.timestamp("us"))
        if pa.types.is_temporal(kind):
            column = column.cast(pa.int32() if kind.bit_width == 32 and not pa.types.is_date(kind) else pa.int64())
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            column = pc.utf8_trim_whitespace(column)
            column = pc.if_else(pc.equal(column, ""), None, column)
        # integers beyond 2**53 lose their last digits, which no ranker can tell
        numbers = column.cast(pa.float64(), safe=not pa.types.is_integer(column.type))
        numbers = numbers.to_numpy(zero_copy_only=False).astype(np.float64, copy=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"column {name!r}: {kind} cannot be read as numbers: {str(error).splitlines()[0]}") from None
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def split_bags(column: pa.Array, feature: MultiFeature | SequenceFeature) -> tuple[pa.Array, np.ndarray]:
    """Values of all bags in a row, and the length of each bag (N,) int64; a null bag is empty.

    A bag keeps its first `max_length` ids, a sequence its last.
    Raises: DataError when the column is neither lists nor, with `separator`, text.
    """
    return cut_bags(as_lists(column, feature.source, feature.separator), feature)


def as_lists(column: pa.Array, name: str, separator: str | None) -> pa.Array:
    """A column of lists: as it is, text cut at `separator`, or single values as lists of one."""
    kind = column.type
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.list_(pa.string()))
    if pa.types.is_fixed_size_list(kind):
        return column.cast(pa.list_(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return column
    text = as_text(column, name)
    if separator is not None:
        return pc.split_pattern(text, separator)
    single = pa.ListArray.from_arrays(np.arange(len(text) + 1, dtype=np.int32), text)
    return pc.if_else(text.is_null(), None, single)


def cut_bags(lists: pa.Array, feature: MultiFeature | SequenceFeature) -> tuple[pa.Array, np.ndarray]:
    """Values and lengths of lists after the cut at `max_length`."""
    whole = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = np.minimum(whole, feature.max_length)
    values = flat(pc.list_flatten(lists))
    if (lengths == whole).all():
        return values, lengths
    first = np.cumsum(whole) - whole
    if isinstance(feature, SequenceFeature):
        first += whole - lengths
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return values.take(pa.array(np.repeat(first, lengths) + within)), lengths


def bag_weights(raw: pa.Table, feature: MultiFeature | SequenceFeature, lengths: np.ndarray) -> np.ndarray:
    """What each id of the bags counts for (total,) float32: its own weight (1 where there is none), over the bag's sum
    of weights where the bag is pooled by mean.

    Raises: DataError when there are not as many weights as ids, or one is negative.
    """
    column = feature.weights if isinstance(feature, MultiFeature) else None
    weights = np.ones(int(lengths.sum()))
    if column is not None and column in raw.column_names:
        values, own = cut_bags(as_lists(_column(raw, column), column, feature.separator), feature)
        wrong = (own != lengths) & (own > 0)
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(
                f"feature {feature.name!r}: row {row} has {lengths[row]} ids in {feature.source!r} and {own[row]} "
                f"weights in {column!r}: give each id one weight"
            )
        if own.any():  # a row without weights counts each id once
            weights[np.repeat(own > 0, lengths)] = np.nan_to_num(as_numbers(values, column), nan=1.0)
            if (weights < 0).any():
                raise DataError(f"column {column!r}: holds weight {weights.min():g}: weights are 0 or more")
    if feature.pooling == "mean":
        bag = np.repeat(np.arange(len(lengths)), lengths)
        sums = np.bincount(bag, weights, minlength=len(lengths))
        weights = weights / np.maximum(sums, 1e-12)[bag]
    return weights.astype(np.float32)


def warp(numbers: np.ndarray, feature: NumericFeature) -> np.ndarray:
    """The part of a numeric transform that comes before fitting: sign(x) log(1 + |x|) for log1p, else x."""
    return np.sign(numbers) * np.log1p(np.abs(numbers)) if feature.transform == "log1p" else numbers


def write_arrow(table: pa.Table, path: Path) -> None:
    """Write one Arrow IPC file, uncompressed so that it can be mapped."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_arrow(path: Location) -> pa.Table:
    """Map an Arrow IPC file (of a storage: read it). Raises: DataError when it is absent or damaged."""
    try:
        return read_ipc(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}") from None


def pick(transform: Transform, features: Sequence[SparseFeature | NumericFeature]) -> Transform:
    """A transform of some of the features only: what the item catalogue or a user's request needs."""
    schema = transform.schema.model_copy(update={"features": list(features)})
    return Transform(
        schema, transform.tables, transform.id_maps, transform.numerics, transform.lineage, transform.weighted
    )
