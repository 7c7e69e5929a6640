"""A checkpoint of a synthetic log whose rows are known: each id's own effects, turned, those of the rarest ids, too.

A ranker trained on a log of a few million rows learns little of ids that it saw twice, and cutting them may even help.
Here every row of every table holds what the log's labels were drawn with (trainer/data/sources/synthetic.py), as a
ranker trained without end would; only the head is trained. So whatever is cut costs what it costs.

Legend: N rows of a table, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from compress.config import CalibrationPlan
from compress.methods.calibrate import reading, tune_head
from compress.search.working_set import extract
from trainer.checkpoint import Checkpoint, Position, open_checkpoint, save_checkpoint
from trainer.config import RunConfig
from trainer.data.dataset import Dataset
from trainer.data.reader import spread_rows
from trainer.data.sources.synthetic import FIELDS, PAIR_DIM, gaussian
from trainer.data.transform import RESERVED_ROWS
from trainer.models import build_head

SCALE = 0.3  # of a row's values: about that of trained rows
TRAIN_ROWS = 400_000
EVAL_ROWS = 50_000
HEAD = CalibrationPlan(steps=1500, batch_size=2048, lr=2e-3, target="labels", evaluations=10)


def planted_rows(
    dataset: Dataset, raw: Path, seed: int, into: Mapping[str, np.ndarray] | None = None
) -> Mapping[str, np.ndarray]:
    """Rows (N, D) float32 of each table: effect and pair vector of each id, turned by a rotation of the table's own.

    `into`: arrays to write them into, whose other rows stay as they are; zeros by default. Where ids of a hash table
    share a row, it is that of one of them.
    """
    rng = np.random.default_rng(seed)
    found = into or {
        name: np.zeros((table.num_embeddings, table.embedding_dim), dtype=np.float32)
        for name, table in dataset.transform.tables.items()
    }
    turns = {n: np.linalg.qr(rng.normal(size=(w.shape[1], w.shape[1])))[0] for n, w in found.items()}
    for path in sorted(raw.glob("*.parquet")):
        log = pq.read_table(path)
        encoded = dataset.transform.encode(log)
        for field in range(FIELDS):
            name = f"C{field + 1}"
            if name not in found:
                continue
            rows, first = np.unique(encoded.sparse[name].values, return_index=True)
            known = rows >= RESERVED_ROWS
            ids = log[name].to_numpy()[first[known]].astype(np.uint64)
            parts = np.zeros((len(ids), found[name].shape[1]))
            parts[:, 0] = gaussian(ids, 100 + field)
            for k in range(PAIR_DIM if field % 3 == 0 else 0):
                parts[:, 1 + k] = gaussian(ids, 1_000 + 10 * field + k)
            found[name][rows[known]] = SCALE * (parts @ turns[name])
    return found


def planted_checkpoint(
    run: RunConfig,
    dataset: Dataset,
    raw: Path,
    folder: Path,
    seed: int = 0,
    into: Mapping[str, np.ndarray] | None = None,
    dense: dict[str, torch.Tensor] | None = None,
    lessons: CalibrationPlan = HEAD,
) -> Checkpoint:
    """Write a checkpoint of planted rows with an untrained head, train the head, and write it again; opened.

    `dataset` as wide as the run's model; `raw` is the folder of the log's Parquet files; `into` as in planted_rows.
    `dense`: a head that was trained on the same log before; else `lessons` is how it is trained.
    """
    tables = {n: torch.from_numpy(w) for n, w in planted_rows(dataset, raw, seed, into).items()}
    if dense is not None:
        return _write(run, dataset, tables, dense, folder)
    return train_head_above(run, dataset, tables, folder, seed, lessons)


def train_head_above(
    run: RunConfig,
    dataset: Dataset,
    tables: dict[str, torch.Tensor],
    folder: Path,
    seed: int = 0,
    lessons: CalibrationPlan = HEAD,
    train_rows: int = TRAIN_ROWS,
) -> Checkpoint:
    """A checkpoint of these tables (N, D) with a head trained above them on `train_rows` rows of the log; opened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_head(run.model, dataset.transform).state_dict()
    first = _write(run, dataset, tables, head, folder.with_name(folder.name + "-untrained"))
    train, held = (
        extract(first, dataset.transform, None, spread_rows(dataset, split, limit))
        for split, limit in (("train", train_rows), ("val", EVAL_ROWS))
    )
    plan = lessons.model_copy(update={"seed": seed})
    tuned = tune_head(
        reading(train, None), reading(held, None), run, plan, dataset.negative_rate, None, lambda *_: None
    )
    return _write(run, dataset, tables, tuned.dense, folder)


def _write(
    run: RunConfig, dataset: Dataset, tables: dict[str, torch.Tensor], head: dict[str, torch.Tensor], folder: Path
) -> Checkpoint:
    state = {f"tables/{name}/weight": weight for name, weight in tables.items()}
    state |= {f"tables/{name}/momentum1": torch.zeros(len(weight)) for name, weight in tables.items()}
    state |= {f"dense/head.{key}": value for key, value in head.items()}
    header = {
        "run": run.model_dump(mode="json"),
        "fingerprint": dataset.transform.fingerprint(),
        "table_dims": run.table_dims(),
        "position": asdict(Position(samples=dataset.rows("train"))),
        "metrics": {"ne": 1.0},
        "plan": {},
        "world_size": 1,
    }
    save_checkpoint(folder, state, header, rank=0, world_size=1)
    return open_checkpoint(folder)
