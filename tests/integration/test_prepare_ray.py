"""Preparing on Ray: what is decided across fragments comes out the same every time, and as a single process has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.config import RunConfig, parse_run
from trainer.data import prepare as prepare_module
from trainer.data.dataset import SPLITS, open_dataset
from trainer.data.prepare import prepare

ROWS, FILES = 6000, 5


def quietly(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A log in several files, each a fragment, with something for every rule."""
    folder = tmp_path_factory.mktemp("log")
    rng = np.random.default_rng(0)
    for part in range(FILES):
        rows = ROWS // FILES
        price = rng.lognormal(2, 1, rows)
        log = {
            "user": rng.integers(0, 400, rows),
            "item": rng.integers(0, 150, rows),
            "price": pa.array(price, mask=rng.random(rows) < 0.05),
            "age": rng.normal(40, 10, rows),
            "click": rng.random(rows) < 0.3,
            "time": pa.array(rng.integers(0, 10**15, rows), mask=rng.random(rows) < 0.01),
        }
        pq.write_table(pa.table(log), folder / f"{part}.parquet")
    features = [
        {"name": "user", "kind": "categorical", "side": "user"},
        {"name": "item", "kind": "categorical", "side": "item"},
        {"name": "price", "kind": "numeric", "transform": "log1p"},
        {"name": "age", "kind": "numeric", "transform": "bucketize", "buckets": 8},
    ]
    content = {
        "name": "ray",
        "data": {
            "input": str(folder / "*.parquet"),
            "split": {"by": "timestamp"},
            "timestamp": "time",
            "ids": {"user": "user", "item": "item"},
            "clean": {"duplicates": ["user", "item"], "ranges": {"price": [None, 40]}, "required": ["time"]},
            "sample_negatives": 0.6,
            "tasks": [{"name": "click", "column": "click"}],
            "features": features,
        },
    }
    return parse_run(content, "run")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_prepare_on_ray_writes_what_one_process_writes(
    ray_local: None, run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(run, tmp_path / "first", quietly)
    prepare(run, tmp_path / "second", quietly)
    monkeypatch.setattr(prepare_module, "_map", lambda function, items, what, progress: map(function, items))
    prepare(run, tmp_path / "alone", quietly)
    written = files_of(tmp_path / "first")
    assert files_of(tmp_path / "second") == written
    assert files_of(tmp_path / "alone") == written
    cleaned = first["cleaned"]
    assert min(cleaned["duplicates"], cleaned["ranges"]["price"], cleaned["required"]["time"]) > 10
    manifest = json.loads((tmp_path / "first" / "dataset.json").read_text())
    before = manifest["train_before_sampling"]["rows"]
    assert before + sum(first["rows"][s] for s in ("val", "test")) == ROWS - (
        cleaned["duplicates"] + cleaned["ranges"]["price"] + cleaned["required"]["time"]
    )
    assert abs(before / (before + first["rows"]["val"] + first["rows"]["test"]) - 0.8) < 0.001


def test_prepare_on_ray_continues_from_data_prepared_before(ray_local: None, run: RunConfig, tmp_path: Path) -> None:
    prepare(run, tmp_path / "old", quietly)
    rare = run.model_copy(update={"data": run.data.model_copy(update={"min_count": 1})})
    prepare(rare, tmp_path / "new", quietly, tmp_path / "old")
    old, new = open_dataset(tmp_path / "old"), open_dataset(tmp_path / "new")
    assert new.transform.lineage == (old.transform.fingerprint(),)
    sample = old.sample()
    before, after = old.transform.encode(sample), new.transform.encode(sample)
    for name, ragged in before.sparse.items():
        known = ragged.values >= 2
        np.testing.assert_array_equal(after.sparse[name].values[known], ragged.values[known])
    np.testing.assert_array_equal(before.dense, after.dense)
    assert [new.rows(s) for s in SPLITS] == [old.rows(s) for s in SPLITS]
