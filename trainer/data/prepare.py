"""Raw log -> prepared Parquet, with Ray Data.

Passes, each a map over the log's fragments: row keys (only where rows are cleaned), time cuts (only for a split by
time), statistics of the training rows, encoded rows. A worker holds one fragment; the driver adds up what fragments say
as it arrives, and holds what grows with the vocabularies and the item catalogue, never with the rows (but for eight
bytes a row while duplicates are sought). What is written lands in a staging folder that becomes the output by one
rename.
"""

from __future__ import annotations

import logging
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from trainer.config import RunConfig
from trainer.data.clean import (
    Dropped,
    Part,
    counts_of,
    find_duplicates,
    kept_negatives,
    read_labels,
    read_part,
    row_keys,
    write_duplicates,
)
from trainer.data.cuts import Bracket, values_at
from trainer.data.dataset import DENSE, FORMAT_VERSION, GROUP, LABELS, SPLITS
from trainer.data.encoded import Encoded, to_columns
from trainer.data.fit import FitStats, check_extends, extend_transform, fit_transform, observe, sum_counts
from trainer.data.latest import last_seen, timestamps
from trainer.data.log import Fragment, csv_to_parquet, find_files, fragments_of
from trainer.data.schema import DataConfig, columns_of
from trainer.data.transform import OOV_ROW, Transform, as_text, flat, hash_ids, load_transform, write_arrow
from trainer.errors import DataError, SlimrankError
from trainer.files import new_directory, write_json
from trainer.progress import ReportProgress
from trainer.storage import Location, location

ROW_GROUP_ROWS = 16_384  # a training rank holds some row groups of each of its lanes at once
SAMPLE_ROWS = 256
MERGE_ITEMS = 8  # parts of the item catalogue that are held before they are merged


@dataclass(frozen=True)
class Splitter:
    """Which split each row of a fragment falls into.

    Where rows were cleaned, `starts` counts the rows left before each fragment and `duplicates` is the folder that says
    which are repeated.
    """

    data: DataConfig
    cuts: tuple[float, float] = (0.0, 0.0)
    starts: tuple[int, ...] | None = None
    duplicates: Path | None = None

    def read(self, fragment: Fragment) -> Part:
        """The fragment's rows that break no rule."""
        return read_part(fragment, self.data, self.duplicates)

    def assign(self, raw: pa.Table, fragment: Fragment) -> np.ndarray:
        """Split index (N,) int8: 0 train, 1 val, 2 test. Raises: DataError for a word that names no split."""
        if fragment.split is not None:
            return np.full(len(raw), SPLITS.index(fragment.split), dtype=np.int8)
        if self.data.split.column is not None:
            name = self.data.split.column
            words = as_text(flat(raw[name]), name)
            index = pc.index_in(words, pa.array(list(SPLITS)))
            if index.null_count:
                seen = pc.unique(words.filter(index.is_null())).to_pylist()[:3]
                raise DataError(f"column {name!r}: {seen} name no split: its values must be train, val or test")
            return index.to_numpy().astype(np.int8)
        if self.data.split.by == "timestamp":
            position = timestamps(raw, self.data)
        else:
            start = fragment.start if self.starts is None else self.starts[fragment.index]
            position = np.arange(start, start + len(raw), dtype=np.float64)
        return np.searchsorted(np.asarray(self.cuts), position, side="right").astype(np.int8)


# -- the passes: functions of one fragment ---------------------------------------------------------------------------


def _observe_times(fragment: Fragment, splitter: Splitter, brackets: Sequence[Bracket]) -> list[Bracket]:
    data = splitter.data
    raw = splitter.read(fragment).raw if data.clean.columns else fragment.read([str(data.timestamp)])
    times = timestamps(raw, data)
    return [replace(bracket).observe(times) for bracket in brackets]


def _observe_rows(fragment: Fragment, splitter: Splitter) -> FitStats:
    data, part = splitter.data, splitter.read(fragment)
    labels = read_labels(part.raw, data)
    training = (splitter.assign(part.raw, fragment) == 0) & ~np.isnan(labels).any(axis=1)
    if data.sample_negatives is not None:
        training &= kept_negatives(labels, part.numbers, data.sample_negatives)
    return observe(part.raw.filter(pa.array(training)), data, seed=fragment.index)


@dataclass
class Written:
    """What encoding one fragment gave back."""

    files: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    positives: dict[str, np.ndarray] = field(default_factory=dict)
    lookups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    unknown: dict[str, dict[str, int]] = field(default_factory=lambda: {s: {} for s in SPLITS})
    dropped: int = 0
    cleaned: Dropped = field(default_factory=Dropped)
    before_sampling: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=np.int64))  # rows, positives
    items: pa.Table | None = None
    sample: pa.Table | None = None


def _write_rows(fragment: Fragment, splitter: Splitter, transform: Transform, folder: Path) -> Written:
    data, part = splitter.data, splitter.read(fragment)
    raw = part.raw
    labels = read_labels(raw, data)
    labelled = ~np.isnan(labels).any(axis=1)
    split_of = splitter.assign(raw, fragment)
    written = Written(dropped=int((~labelled).sum()), cleaned=part.dropped, items=_seen_items(raw, data, fragment))
    for index, split in enumerate(SPLITS):
        wanted = (split_of == index) & labelled
        if split == "train" and data.sample_negatives is not None:
            written.before_sampling = np.array([wanted.sum(), (labels[wanted, 0] != 0).sum()])
            wanted &= kept_negatives(labels, part.numbers, data.sample_negatives)
        chosen = np.flatnonzero(wanted)
        if not len(chosen):
            continue
        rows = raw.take(pa.array(chosen))
        encoded = transform.encode(rows)
        path = f"{split}/part-{fragment.index:05d}.parquet"
        table = _prepared_table(encoded, labels[chosen], _groups(rows, data))
        pq.write_table(table, folder / path, row_group_size=ROW_GROUP_ROWS)
        sizes = [min(ROW_GROUP_ROWS, len(chosen) - at) for at in range(0, len(chosen), ROW_GROUP_ROWS)]
        written.files[split].append({"path": path, "row_groups": sizes})
        written.positives[split] = labels[chosen].sum(axis=0, dtype=np.float64)
        for name, ragged in encoded.sparse.items():
            written.unknown[split][name] = int((ragged.values == OOV_ROW).sum())
            if split == "train":
                table_name = transform.sparse[name].table_name
                written.lookups.setdefault(table_name, []).append(np.unique(ragged.values, return_counts=True))
        if split == "val":
            # taken, not sliced: a slice would travel with all the rows that it was cut from
            written.sample = rows.take(pa.array(np.arange(min(SAMPLE_ROWS, len(rows)))))
    written.lookups = {k: [sum_counts(v)] for k, v in written.lookups.items()}
    return written


def _prepared_table(encoded: Encoded, labels: np.ndarray, groups: np.ndarray | None) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for name, ragged in encoded.sparse.items():
        columns |= to_columns(name, ragged)
    if encoded.dense.shape[1]:
        columns[DENSE] = pa.FixedSizeListArray.from_arrays(pa.array(encoded.dense.ravel()), encoded.dense.shape[1])
    columns[LABELS] = pa.FixedSizeListArray.from_arrays(pa.array(labels.ravel()), labels.shape[1])
    if groups is not None:
        columns[GROUP] = pa.array(groups)
    return pa.table(columns)


def _groups(raw: pa.Table, data: DataConfig) -> np.ndarray | None:
    column = data.ids.group or data.ids.user
    if column is None:
        return None
    keys, missing = hash_ids(flat(raw[column]), column)
    return np.where(missing, np.uint64(0), keys)


def _seen_items(raw: pa.Table, data: DataConfig, fragment: Fragment) -> pa.Table | None:
    """Each item once: its raw item-side columns as the fragment last saw them, and when."""
    if data.ids.item is None:
        return None
    wanted = [data.ids.item, *([data.title] if data.title else [])]
    wanted += [c for f in data.features if f.side == "item" for c in columns_of(f)]
    table = raw.select(list(dict.fromkeys(wanted)))
    if data.timestamp is not None:
        when = timestamps(raw, data)
    else:
        when = np.arange(fragment.start, fragment.start + len(raw), dtype=np.float64)
    keys, missing = hash_ids(flat(raw[data.ids.item]), data.ids.item)
    return last_seen(
        table.append_column("_key", pa.array(keys)).append_column("_when", pa.array(when)).filter(pa.array(~missing))
    )


# -- the shell -------------------------------------------------------------------------------------------------------


def prepare(
    run: RunConfig, out: Path, progress: ReportProgress, continue_from: str | Location | None = None
) -> dict[str, Any]:
    """Prepare a run's log into the folder `out`; Ray must be connected.

    With `continue_from`, a folder that was prepared before, its transform is kept and new ids are appended to it.
    Returns the rows of each split and the tables, as `slimrank data prepare --json` prints them.
    Raises: DataError when the log does not fit the schema, a split is empty, or a label has one class, or when the
    features are not those of `continue_from`.
    """
    data, dim = run.data, run.model.embedding_dim
    old = None if continue_from is None else load_transform(location(continue_from))
    if old is not None:
        check_extends(old, data)
    started = time.monotonic()
    with new_directory(Path(out)) as staging:
        fragments, splitter, stats = _observe(data, staging, progress)
        transform = fit_transform(stats, data, dim) if old is None else extend_transform(old, stats, data, dim)
        for split in SPLITS:
            (staging / split).mkdir()
        write = partial(_write_rows, splitter=splitter, transform=transform, folder=staging)
        manifest = _finish(_map(write, fragments, "encode", progress), transform, data, staging)
        manifest["name"] = run.name
        for path in [*staging.glob(".csv-*"), *staging.glob(".duplicates-*")]:
            path.unlink()
        transform.save(staging)
        write_json(staging / "dataset.json", manifest)
    return {
        "data": str(Path(out).absolute()),
        "rows": manifest["rows"],
        "dropped_without_label": manifest["dropped_without_label"],
        "cleaned": manifest["cleaned"],
        "negative_rate": manifest["negative_rate"],
        "positives": manifest["positives"],
        "tables": {
            t.name: {"num_embeddings": t.num_embeddings, "embedding_dim": t.embedding_dim}
            for t in transform.tables.values()
        },
        "seconds": round(time.monotonic() - started, 1),
    }


def fit_tables(run: RunConfig, progress: ReportProgress) -> Transform:
    """The transform that `prepare` would fit, and nothing written; Ray must be connected.

    Raises: DataError as `prepare` does.
    """
    with tempfile.TemporaryDirectory(prefix="slimrank-fit-") as staging:
        _, _, stats = _observe(run.data, Path(staging), progress)
    return fit_transform(stats, run.data, run.model.embedding_dim)


def _observe(data: DataConfig, staging: Path, progress: ReportProgress) -> tuple[list[Fragment], Splitter, FitStats]:
    """The log's fragments, which split each row falls into, and statistics of the training rows."""
    fragments = fragments_of(_as_parquet(find_files(data), data, staging, progress), data)
    splitter = _fit_splitter(fragments, data, progress, staging)
    stats = FitStats()
    for fitted in _map(partial(_observe_rows, splitter=splitter), fragments, "fit", progress):
        stats.merge(fitted)
    if stats.rows == 0:
        raise DataError("split train: no rows: check data.split and data.clean against the log")
    return fragments, splitter, stats


def _as_parquet(files: list, data: DataConfig, staging: Path, progress: ReportProgress) -> list:
    csv = [(i, f) for i, f in enumerate(files) if f.is_csv]
    if not csv:
        return files
    targets = {i: str(staging / f".csv-{i:05d}.parquet") for i, _ in csv}
    jobs = [(f.path, targets[i]) for i, f in csv]
    for _ in _map(lambda job: csv_to_parquet(job[0], job[1], data), jobs, "read csv", progress):
        pass
    return [replace(f, path=targets[i], is_csv=False) if f.is_csv else f for i, f in enumerate(files)]


def _fit_splitter(fragments: Sequence[Fragment], data: DataConfig, progress: ReportProgress, folder: Path) -> Splitter:
    """The cuts between the splits; duplicates are left in `folder`."""
    splitter = Splitter(data)
    rows = sum(f.rows for f in fragments)
    if data.clean.columns:
        left = _clean(fragments, data, progress, folder)
        rows = sum(left)
        starts = tuple(int(n) for n in np.cumsum([0, *left[:-1]]))
        splitter = replace(splitter, starts=starts, duplicates=folder)
        if rows == 0:
            raise DataError(f"data.clean: no row of the log passes {data.clean.model_dump()}: check the rules")
    shares = data.split.fractions[0], data.split.fractions[0] + data.split.fractions[1]
    if data.split.by != "timestamp":
        return replace(splitter, cuts=(float(round(rows * shares[0])), float(round(rows * shares[1]))))

    def summarize(brackets: list[Bracket]) -> Iterator[list[Bracket]]:
        return _map(partial(_observe_times, splitter=splitter, brackets=brackets), fragments, "times", progress)

    first, second = values_at(shares, summarize)
    return replace(splitter, cuts=(first, second))


def _clean(fragments: Sequence[Fragment], data: DataConfig, progress: ReportProgress, folder: Path) -> list[int]:
    """Rows of each fragment that break no rule; leaves in `folder` which are duplicates."""
    keyed, left = [0], []
    duplicates = data.clean.duplicates is not None
    keys = np.empty(sum(f.rows for f in fragments) if duplicates else 0, dtype=np.uint64)
    for found, rows in _map(partial(row_keys, data=data), fragments, "clean", progress):
        left.append(rows)
        if duplicates:
            keys[keyed[-1] : keyed[-1] + len(found)] = found
            keyed.append(keyed[-1] + len(found))
    if duplicates:
        repeated = find_duplicates(keys[: keyed[-1]])
        for index, fragment in enumerate(fragments):
            own = repeated[keyed[index] : keyed[index + 1]]
            write_duplicates(folder, fragment, own)
            left[index] -= int(own.sum())
    return left


def _finish(parts: Iterable[Written], transform: Transform, data: DataConfig, folder: Path) -> dict[str, Any]:
    """Sum what the fragments give back as it arrives, check it, and write counts, catalogue and sample."""
    files: dict[str, list] = {split: [] for split in SPLITS}
    positives = {split: np.zeros(len(data.tasks)) for split in SPLITS}
    unknown = {split: dict.fromkeys(transform.sparse, 0) for split in SPLITS}
    counts = {t.name: np.zeros(t.num_embeddings, dtype=np.int64) for t in transform.tables.values()}
    cleaned, unlabelled, before = Dropped(), 0, np.zeros(2, dtype=np.int64)
    items: list[pa.Table] = []
    samples: list[pa.Table] = []
    for part in parts:
        for split in SPLITS:
            files[split] += part.files[split]
            positives[split] = positives[split] + part.positives.get(split, 0)
            for name, number in part.unknown[split].items():
                unknown[split][name] += number
        for name, lookups in part.lookups.items():
            for seen, times in lookups:
                counts[name][seen] += times  # a part names each row once
        cleaned.add(part.cleaned)
        unlabelled += part.dropped
        before += part.before_sampling
        if part.items is not None:
            items.append(part.items)
        if len(items) > MERGE_ITEMS:
            items = [last_seen(pa.concat_tables(items, promote_options="permissive"))]
        if part.sample is not None and sum(len(s) for s in samples) < SAMPLE_ROWS:
            samples.append(part.sample)
    rows_of: dict[str, int] = {split: sum(sum(f["row_groups"]) for f in files[split]) for split in SPLITS}
    positives_of: dict[str, list[int]] = {split: [int(x) for x in positives[split]] for split in SPLITS}
    check_splits(rows_of, positives_of, data)
    (folder / "counts").mkdir()
    for name, full in counts.items():
        write_arrow(pa.table({"count": full}), folder / "counts" / f"{name}.arrow")
    if items:
        catalogue = last_seen(pa.concat_tables(items, promote_options="permissive"))
        pq.write_table(catalogue.drop_columns(["_key", "_when"]), folder / "items.parquet")
    pq.write_table(
        pa.concat_tables(samples, promote_options="permissive").slice(0, SAMPLE_ROWS), folder / "sample.parquet"
    )
    sampled = data.sample_negatives is not None
    return {
        "format_version": FORMAT_VERSION,
        "rows": rows_of,
        "positives": positives_of,
        "dropped_without_label": unlabelled,
        "cleaned": counts_of(cleaned),
        "negative_rate": data.sample_negatives if sampled else 1.0,
        "train_before_sampling": {
            "rows": int(before[0]) if sampled else rows_of["train"],
            "positives": [int(before[1])] if sampled else positives_of["train"],
        },
        "unknown_ids": unknown,
        "fingerprint": transform.fingerprint(),
        "extends": transform.lineage[-1] if transform.lineage else None,
        "lineage": list(transform.lineage),
        "files": files,
    }


def check_splits(rows: dict[str, int], positives: dict[str, list[int]], data: DataConfig) -> None:
    """Raises: DataError for an empty split or a label with one class, which no metric can be taken on."""
    for split in SPLITS:
        if rows[split] == 0:
            raise DataError(f"split {split}: no rows: check data.split ({data.split.model_dump(exclude_none=True)})")
        for task, count in zip(data.tasks, positives[split], strict=True):
            if count in (0, rows[split]):
                rule = "" if task.positive is None else f" and positive {task.positive!r}"
                raise DataError(
                    f"task {task.name!r}: all {rows[split]} labels of split {split} are {int(count > 0)}: a ranker "
                    f"needs both classes: check column {task.column!r}{rule}, or the split"
                )


def _map(function: Callable[[Any], Any], items: Sequence[Any], what: str, progress: ReportProgress) -> Iterator[Any]:
    """Run a function over items with Ray Data; results come in the items' order; the first user error ends it.

    Results travel pickled between this run's own workers; none of it is stored.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports every pass on stderr
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True

    def work(row: dict[str, Any]) -> dict[str, Any]:
        try:
            result: Any = function(items[row["index"]])
        except SlimrankError as error:
            result = error
        return {"index": row["index"], "result": pickle.dumps(result)}

    blocks = ray.data.from_items([{"index": i} for i in range(len(items))], override_num_blocks=len(items))
    progress(what, 0, len(items))
    early: dict[int, Any] = {}  # what came before its turn
    given = 0
    for done, row in enumerate(blocks.map(work).iter_rows(), start=1):
        early[row["index"]] = pickle.loads(row["result"])
        progress(what, done, len(items))
        while given in early:
            result = early.pop(given)
            given += 1
            if isinstance(result, SlimrankError):
                raise result
            yield result
