"""Statistics of the training rows -> a fitted Transform.

`FitStats` is what one fragment says; it merges with others in any order. `fit_transform` turns the sum into
vocabularies, quantile buckets and means; `extend_transform` adds the ids of new rows to an older transform. Pure: no
files, no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from trainer.data.schema import DataConfig, MultiFeature, NumericFeature, SequenceFeature, TableOptions, encodings
from trainer.data.transform import (
    RESERVED_ROWS,
    IdMap,
    NumericStats,
    TableInfo,
    Transform,
    as_numbers,
    flat,
    hash_ids,
    split_bags,
    warp,
)
from trainer.errors import DataError

QUANTILE_SAMPLE = 1_000_000  # values that quantiles are taken from at most; exact below that
HELD_PARTS = 16  # id counts of a table that are held before they are summed, at most


@dataclass
class NumberStats:
    """Sums of one number over training rows.

    `sample` holds parts (n, 2): values, and the random priorities by which the lowest stay in a sample of all.
    """

    count: int = 0
    missing: int = 0
    mean: float = 0.0
    spread: float = 0.0  # sum of squared distances from the mean
    low: float = np.inf
    high: float = -np.inf
    sample: list[np.ndarray] = field(default_factory=list)

    def merge(self, other: NumberStats) -> None:
        """Add another fragment's sums."""
        self.missing += other.missing
        both = self.count + other.count
        if both:  # Chan's update: sums of squares would cancel for large, close numbers such as times
            apart = other.mean - self.mean
            self.mean += apart * other.count / both
            self.spread += other.spread + apart * apart * self.count * other.count / both
        self.count = both
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.sample = self.sample + other.sample
        if sum(len(s) for s in self.sample) > 2 * QUANTILE_SAMPLE:
            self.sample = [thinned(self.sample)]


def thinned(parts: list[np.ndarray]) -> np.ndarray:
    """The QUANTILE_SAMPLE rows of lowest priority of parts (n, 2): a uniform sample, whatever the parts were."""
    rows = np.concatenate(parts)
    if len(rows) <= QUANTILE_SAMPLE:
        return rows
    return rows[np.argpartition(rows[:, 1], QUANTILE_SAMPLE - 1)[:QUANTILE_SAMPLE]]


@dataclass
class FitStats:
    """What one fragment's training rows say: id counts by table, sums by number."""

    rows: int = 0
    ids: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    numbers: dict[str, NumberStats] = field(default_factory=dict)

    def merge(self, other: FitStats) -> None:
        """Add another fragment. Id counts are summed once several have gathered."""
        self.rows += other.rows
        for name, parts in other.ids.items():
            held = self.ids.setdefault(name, [])
            held += parts
            # the sum comes first: parts are added to it before they outgrow it
            if len(held) > HELD_PARTS or sum(len(k) for k, _ in held[1:]) > len(held[0][0]):
                self.ids[name] = [sum_counts(held)]
        for name, stats in other.numbers.items():
            self.numbers.setdefault(name, NumberStats()).merge(stats)


def sum_counts(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct keys uint64 and their summed counts int64."""
    if not parts:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    keys, inverse = np.unique(np.concatenate([k for k, _ in parts]), return_inverse=True)
    counts = np.zeros(len(keys), dtype=np.int64)
    np.add.at(counts, inverse, np.concatenate([c for _, c in parts]))
    return keys, counts


def observe(raw: pa.Table, data: DataConfig, seed: int) -> FitStats:
    """The statistics of one fragment's training rows.

    Raises: DataError naming a column whose values are not of its feature's kind.
    """
    stats = FitStats(rows=len(raw))
    rng = np.random.default_rng(seed)
    for feature in data.features:
        column = flat(raw[feature.source])
        if isinstance(feature, NumericFeature):
            stats.numbers[feature.name] = _observe_number(as_numbers(column, feature.source), feature, rng)
            continue
        if isinstance(feature, MultiFeature | SequenceFeature):
            column = split_bags(column, feature)[0]
        if _hash_size(feature, data) is None:
            keys, missing = hash_ids(column, feature.source)
            unique, counts = np.unique(keys[~missing], return_counts=True)
            stats.ids.setdefault(feature.table_name, []).append((unique, counts))
    return stats


def _observe_number(numbers: np.ndarray, feature: NumericFeature, rng: np.random.Generator) -> NumberStats:
    known = warp(numbers[~np.isnan(numbers)], feature)
    stats = NumberStats(count=len(known), missing=len(numbers) - len(known))
    if len(known):
        stats.mean = float(known.mean())
        stats.spread = float(np.square(known - stats.mean).sum())
        stats.low, stats.high = float(known.min()), float(known.max())
        if feature.transform == "bucketize":
            stats.sample = [thinned([np.stack([known, rng.random(len(known))], axis=1)])]
    return stats


def _hash_size(feature: TableOptions, data: DataConfig) -> int | None:
    owner = next(f for f in data.features if f.name == feature.table_name)
    return owner.hash_size if isinstance(owner, TableOptions) else None


def fit_transform(stats: FitStats, data: DataConfig, default_dim: int) -> Transform:
    """Vocabularies, buckets and means of the training rows.

    Raises: DataError when a number has no value at all in the training rows.
    """
    numerics = {f.name: _fit_number(stats.numbers[f.name], f) for f in data.features if isinstance(f, NumericFeature)}
    tables: dict[str, TableInfo] = {}
    id_maps: dict[str, IdMap] = {}
    for owner in data.sparse_features:
        if owner.table_name != owner.name:
            continue
        name = owner.name
        readers = tuple(f.name for f in data.sparse_features if f.table_name == name)
        if isinstance(owner, NumericFeature):
            id_map = IdMap(len(numerics[name].boundaries) + 1)
            kind = "buckets"
        elif owner.hash_size is not None:
            id_map = IdMap(owner.hash_size)
            kind = "hash"
        else:
            keys, counts = sum_counts(stats.ids.get(name, []))
            kept = keys[counts >= (owner.min_count or data.min_count)]
            id_map = IdMap(len(kept), kept)
            kind = "vocabulary"
        id_maps[name] = id_map
        rows = id_map.size + RESERVED_ROWS
        tables[name] = TableInfo(name, kind, rows, owner.dim or default_dim, readers)  # type: ignore[arg-type]
    return Transform(data, tables, id_maps, numerics)


def extend_transform(old: Transform, stats: FitStats, data: DataConfig, default_dim: int) -> Transform:
    """An older transform that knows the ids of new training rows too.

    Numbers, buckets, hash sizes and the rows of known ids stay as they are. Ids that are new, and seen `min_count`
    times in the new rows, are appended to their vocabularies in the order of their hashes. Dims may be others.
    Raises: DataError naming the first feature that differs from the older transform's.
    """
    check_extends(old, data)
    tables, id_maps = dict(old.tables), dict(old.id_maps)
    for name, table in old.tables.items():
        if table.kind != "vocabulary":
            continue
        owner = next(f for f in data.sparse_features if f.name == name)
        assert isinstance(owner, TableOptions), "a vocabulary belongs to ids"
        keys, counts = sum_counts(stats.ids.get(name, []))
        frequent = keys[counts >= (owner.min_count or data.min_count)]
        known = old.id_maps[name].keys_by_row()
        new = np.setdiff1d(frequent, known, assume_unique=True)
        id_maps[name] = IdMap.of_rows(np.concatenate([known, np.sort(new)]))
        tables[name] = replace(table, num_embeddings=id_maps[name].size + RESERVED_ROWS)
    lineage = (*old.lineage, old.fingerprint())
    return Transform(data, tables, id_maps, old.numerics, lineage).with_dims(data.features, default_dim)


def check_extends(old: Transform, data: DataConfig) -> None:
    """Raises: DataError naming the first feature that is encoded otherwise than in an older transform."""
    before = {f["name"]: f for f in encodings(old.schema.features)}
    now = {f["name"]: f for f in encodings(data.features)}
    start = "leave out --continue-from, or restore the config"
    for name in [*before, *now]:
        if name not in now or name not in before:
            where = "not in the config" if name in before else "not in the data to continue from"
            raise DataError(f"feature {name!r}: {where}: features must stay the same: {start}")
        was, wanted = before[name], now[name]
        changed = next((k for k in {**was, **wanted} if was.get(k) != wanted.get(k)), None)
        if changed is not None:
            raise DataError(
                f"feature {name!r}: {changed} is {wanted.get(changed)!r}, the data to continue from has "
                f"{was.get(changed)!r}: features must stay the same: {start}"
            )
    if list(before) != list(now):
        raise DataError(f"features: their order differs from that of the data to continue from: {start}")


def _fit_number(stats: NumberStats, feature: NumericFeature) -> NumericStats:
    if stats.count == 0:
        raise DataError(f"feature {feature.name!r}: column {feature.source!r} has no number in the training rows")
    std = float(np.sqrt(stats.spread / stats.count))
    boundaries: tuple[float, ...] = ()
    if feature.transform == "bucketize":
        quantiles = np.quantile(thinned(stats.sample)[:, 0], np.arange(1, feature.buckets) / feature.buckets)
        boundaries = tuple(float(q) for q in np.unique(quantiles))
    return NumericStats(stats.mean, std if std > 1e-12 else 1.0, stats.low, stats.high, stats.missing > 0, boundaries)
