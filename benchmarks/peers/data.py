"""A prepared data set made directly, for measures of speed: no raw log, no Ray; labels are coins.

13 numbers and 26 ids in the shape of Criteo's. Ids are Zipf-distributed over tables whose sizes are the log's own, cut
to a common cap so that together they have a wanted number of rows; hot rows lie anywhere, as they do after `prepare`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config import RunConfig, parse_run
from trainer.data.dataset import DENSE, FORMAT_VERSION, LABELS, SPLITS, Dataset, open_dataset
from trainer.data.encoded import Ragged, to_columns
from trainer.data.fit import fit_transform, observe
from trainer.data.sources.synthetic import CRITEO_SIZES, NUMBERS, zipf_ranks
from trainer.data.transform import RESERVED_ROWS, write_arrow
from trainer.files import write_json

ROW_GROUP_ROWS = 16_384  # as prepare writes them
EVAL_ROWS = 2_048
CLICK_RATE = 0.25


def sizes_of(table_rows: int) -> tuple[int, ...]:
    """Ids of each of the 26 fields, together close to `table_rows`: the log's own, under a cap."""
    low, high = 1, max(CRITEO_SIZES)
    while low < high:
        cap = (low + high) // 2
        if sum(min(size, cap) for size in CRITEO_SIZES) < table_rows:
            low = cap + 1
        else:
            high = cap
    return tuple(min(size, low) for size in CRITEO_SIZES)


def make_run(table_rows: int, model: dict | None = None, train: dict | None = None) -> RunConfig:
    """A run over tables of that many rows."""
    features = [{"name": f"I{i + 1}", "kind": "numeric", "transform": "none"} for i in range(NUMBERS)]
    features += [
        {"name": f"C{f + 1}", "kind": "categorical", "hash_size": size} for f, size in enumerate(sizes_of(table_rows))
    ]
    data = {"input": "none", "tasks": [{"name": "click", "column": "label"}], "features": features}
    content = {"name": "bench", "data": data, "model": {"arch": "dcn"} | (model or {}), "train": train or {}}
    return parse_run(content, "bench")


def write_prepared(folder: Path, rows: int, table_rows: int, seed: int = 0) -> Dataset:
    """Write `rows` training rows and a few of val and test; opened."""
    run = make_run(table_rows)
    rng = np.random.default_rng(seed)
    one = {f"I{i + 1}": pa.array(rng.normal(size=64)) for i in range(NUMBERS)}
    one |= {f"C{f + 1}": pa.array(np.arange(64)) for f in range(len(CRITEO_SIZES))}
    transform = fit_transform(observe(pa.table(one), run.data, seed), run.data, run.model.embedding_dim)
    sizes = sizes_of(table_rows)
    places = [rng.permutation(size) for size in sizes]
    (folder / "counts").mkdir(parents=True)
    files: dict[str, list] = {}
    positives: dict[str, list[int]] = {}
    counts = [np.zeros(size + RESERVED_ROWS, dtype=np.int64) for size in sizes]
    for split, size in zip(SPLITS, (rows, EVAL_ROWS, EVAL_ROWS), strict=True):
        (folder / split).mkdir()
        ids = [place[zipf_ranks(rng, size, n)] + RESERVED_ROWS for place, n in zip(places, sizes, strict=True)]
        labels = (rng.random((size, 1)) < CLICK_RATE).astype(np.float32)
        columns: dict[str, pa.Array] = {}
        for number, values in enumerate(ids):
            columns |= to_columns(f"C{number + 1}", Ragged(values))
            if split == "train":
                counts[number] += np.bincount(values, minlength=len(counts[number]))
        dense = rng.normal(size=(size, len(transform.dense_names))).astype(np.float32)
        columns[DENSE] = pa.FixedSizeListArray.from_arrays(pa.array(dense.reshape(-1)), dense.shape[1])
        columns[LABELS] = pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1)), 1)
        pq.write_table(pa.table(columns), folder / split / "part-00000.parquet", row_group_size=ROW_GROUP_ROWS)
        groups = [min(ROW_GROUP_ROWS, size - first) for first in range(0, size, ROW_GROUP_ROWS)]
        files[split] = [{"path": f"{split}/part-00000.parquet", "row_groups": groups}]
        positives[split] = [int(labels.sum())]
    for number, full in enumerate(counts):
        write_arrow(pa.table({"count": full}), folder / "counts" / f"C{number + 1}.arrow")
    transform.save(folder)
    write_json(folder / "dataset.json", {"format_version": FORMAT_VERSION, "files": files, "positives": positives})
    return open_dataset(folder)
