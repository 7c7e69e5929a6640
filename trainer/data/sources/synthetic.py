"""A synthetic click log in the shape of Criteo's: planted signal, known attainable AUC, any number of rows.

13 counts (some null) and 26 Zipf-distributed ids. The log-odds of a click are a sum over ids, a sum over pairs of
fields of dot products between id vectors, and a bend of the counts; all id effects are hashes of the id, so nothing is
stored and tables may have any size. What no ranker can beat is the AUC of the true probabilities: it is written beside
the log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trainer.data.digest import splitmix64 as mix
from trainer.files import new_directory, write_json
from trainer.metrics import auc, row_losses
from trainer.progress import ReportProgress

NUMBERS = 13
FIELDS = 26
CHUNK_ROWS = 500_000
ZIPF = 1.05
PAIR_DIM = 4
BASE_LOG_ODDS = -1.9
TEST_SHARE = 0.1
# distinct values of the fields, as in the public Criteo Kaggle log
CRITEO_SIZES = (
    *(1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5683, 8_351_593, 3194),
    *(27, 14_992, 5_461_306, 10, 5652, 2173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)


def gaussian(values: np.ndarray, salt: int) -> np.ndarray:
    """A standard normal number for each value, always the same one (Box-Muller of two hashes)."""
    u = (mix(values, 2 * salt) >> np.uint64(11)).astype(np.float64) / 2**53
    v = (mix(values, 2 * salt + 1) >> np.uint64(11)).astype(np.float64) / 2**53
    return np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)


def zipf_ranks(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Ranks 0..size-1 with probability close to (rank + 1) ** -ZIPF (inverse of the continuous law)."""
    power = 1.0 - ZIPF
    u = rng.random(rows)
    return np.minimum(((((size + 1) ** power - 1) * u + 1) ** (1 / power)).astype(np.int64) - 1, size - 1)


def make_chunk(rng: np.random.Generator, rows: int, sizes: tuple[int, ...]) -> tuple[pa.Table, np.ndarray]:
    """One chunk of the log, and the true log-odds of its rows (N,)."""
    log_odds = np.full(rows, BASE_LOG_ODDS)
    columns: dict[str, pa.Array] = {}
    for i in range(NUMBERS):
        heat = rng.normal(size=rows)
        counts = np.floor(np.exp(1.0 + heat * (0.8 + 0.05 * i)))
        missing = rng.random(rows) < 0.04 * (i % 4)
        log_odds += np.where(missing, 0.1, 0.12 * np.sin(heat * (1 + i % 3)))
        columns[f"I{i + 1}"] = pa.array(counts.astype(np.int64), mask=missing)
    vectors = []
    for f, size in enumerate(sizes):
        ids = mix(zipf_ranks(rng, rows, size), 7_000 + f) >> np.uint64(32)
        log_odds += 0.22 * gaussian(ids, 100 + f)
        if f % 3 == 0:
            vectors.append(np.stack([gaussian(ids, 1_000 + 10 * f + k) for k in range(PAIR_DIM)]))
        columns[f"C{f + 1}"] = pa.array(ids.astype(np.int64))
    for left, right in zip(vectors[:-1], vectors[1:], strict=True):
        log_odds += 0.14 * (left * right).sum(axis=0)
    clicks = rng.random(rows) < 1 / (1 + np.exp(-log_odds))
    return pa.table({"label": pa.array(clicks.astype(np.int8)), **columns}), log_odds


def write_synthetic(
    out: Path, rows: int, seed: int = 0, max_ids: int | None = None, progress: ReportProgress = print
) -> dict[str, Any]:
    """Write raw/part-*.parquet, run.yaml and synthetic.json (attainable AUC and log loss of the last tenth) into `out`.

    Raises: SlimrankError when `out` holds something already.
    """
    sizes = tuple(min(s, max_ids) if max_ids else s for s in CRITEO_SIZES)
    labels, odds = [], []
    test_from = rows - int(rows * TEST_SHARE)
    with new_directory(out) as staging:
        (staging / "raw").mkdir()
        for index, first in enumerate(range(0, rows, CHUNK_ROWS)):
            size = min(CHUNK_ROWS, rows - first)
            table, log_odds = make_chunk(np.random.default_rng((seed, index)), size, sizes)
            pq.write_table(table, staging / "raw" / f"part-{index:05d}.parquet", row_group_size=CHUNK_ROWS // 4)
            tail = slice(max(test_from - first, 0), size)
            labels.append(table["label"].to_numpy()[tail].astype(np.float64))
            odds.append(log_odds[tail])
            progress("synth", first + size, rows)
        truth, scores = np.concatenate(labels), np.concatenate(odds)
        known: dict[str, Any] = {
            "rows": rows,
            "seed": seed,
            "ids": dict(zip([f"C{f + 1}" for f in range(FIELDS)], sizes, strict=True)),
            "test_rows": len(truth),
            "attainable_auc": auc(truth, scores),
            "attainable_log_loss": float(row_losses(truth, scores).mean()),
        }
        write_json(staging / "synthetic.json", known)
        (staging / "run.yaml").write_text(yaml.safe_dump(run_yaml(), sort_keys=False), encoding="utf-8")
    return {"path": str(Path(out).absolute()), **known}


def run_yaml() -> dict[str, Any]:
    """A run that fits the log."""
    numbers = [{"name": f"I{i + 1}", "kind": "numeric", "transform": "log1p"} for i in range(NUMBERS)]
    fields = [{"name": f"C{f + 1}", "kind": "categorical"} for f in range(FIELDS)]
    return {
        "name": "synthetic",
        "data": {
            "input": "raw/*.parquet",
            "split": {"by": "row", "fractions": [0.8, 0.1, 0.1]},
            "tasks": [{"name": "click", "column": "label"}],
            "features": numbers + fields,
        },
        "model": {"arch": "dcn", "embedding_dim": 16},
    }
