"""A larger teacher's log-odds, computed once by a batch job and stored beside the prepared data.

    DATA/teacher/VERSION/train/part-00000.parquet     logits: a row for each training row, in the same row groups

In: a teacher's checkpoint and the prepared data it was trained on. Out: the folder that the reader takes them from.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from trainer.checkpoint import Checkpoint, open_checkpoint, training_state_of
from trainer.config import Distill, RunConfig
from trainer.data.batch import to_batch
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.reader import Chunk, read_chunk
from trainer.errors import DataError
from trainer.models import Ranker, build_ranker

SCORE_ROWS = 8192


def score_with_teacher(
    distill: Distill, run: RunConfig, dataset: Dataset, show: Callable[[dict[str, Any], list[Any]], None]
) -> Path:
    """The folder with a teacher's log-odds of the training rows; scored by Ray tasks where it is not there yet.

    Raises: DataError when the teacher was trained on other prepared rows or tasks.
    """
    checkpoint = open_checkpoint(Path(distill.teacher))
    check_teacher(checkpoint, run, dataset)
    folder = dataset.folder / "teacher" / checkpoint.version
    if (folder / "teacher.json").exists():
        return folder
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    (staging / "train").mkdir(parents=True)
    try:
        remote = ray.remote(num_cpus=1, max_retries=3)(score_file)
        files = range(len(dataset.files["train"]))
        waiting = [remote.remote(str(checkpoint.folder), str(dataset.folder), i, str(staging)) for i in files]
        done = 0
        while waiting:
            ready, waiting = ray.wait(waiting)
            ray.get(ready)
            done += len(ready)
            show({}, [{"kind": "note", "text": f"teacher: scored {done} of {len(files)} files"}])
        record = {"teacher": str(checkpoint.folder), "version": checkpoint.version, "metrics": checkpoint.metrics}
        (staging / "teacher.json").write_text(json.dumps(record), encoding="utf-8")
        if not folder.exists():
            os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def check_teacher(checkpoint: Checkpoint, run: RunConfig, dataset: Dataset) -> None:
    """Raises: DataError unless a teacher scores these very rows."""
    if checkpoint.fingerprint != dataset.transform.fingerprint():
        raise DataError(
            f"train.distill.teacher: {checkpoint.folder} was not trained on {dataset.folder}: train the teacher there"
        )
    theirs, ours = [t.name for t in checkpoint.run.data.tasks], [t.name for t in run.data.tasks]
    if theirs != ours:
        raise DataError(f"train.distill.teacher: {checkpoint.folder} predicts {theirs}, this run {ours}")


def load_ranker(checkpoint: Checkpoint, dataset: Dataset) -> Ranker:
    """A checkpoint's whole model on this process, for scoring: fp32, not sharded."""
    run = checkpoint.run
    sized = dataset.sized(run.data, run.model.embedding_dim)
    model = build_ranker(run.model, sized.transform, device="cpu")
    with torch.no_grad():
        for key, value in training_state_of(model).items():
            value.copy_(checkpoint.read(key))
    return model.eval()


@torch.inference_mode()
def score_file(checkpoint: str, data: str, index: int, staging: str) -> None:
    """Score one training file into its twin below `staging`, row group by row group."""
    torch.set_num_threads(1)
    dataset = open_dataset(Path(data))
    model = load_ranker(open_checkpoint(Path(checkpoint), verify=False), dataset)
    file = dataset.files["train"][index]
    target = Path(staging) / "train" / Path(file.path).name
    tasks = len(dataset.transform.schema.tasks)
    schema = pa.schema({"logits": pa.list_(pa.float32(), tasks)})
    with pq.ParquetWriter(target, schema) as writer:
        for group, rows in enumerate(file.row_groups):
            chunk = read_chunk(dataset, Chunk(file.path, group, rows))
            parts = []
            for at in range(0, rows, SCORE_ROWS):
                part = chunk.encoded.take(np.arange(at, min(at + SCORE_ROWS, rows)))
                parts.append(model(to_batch(part))[0].numpy())
            flat = pa.array(np.concatenate(parts).astype(np.float32).ravel())
            column = pa.FixedSizeListArray.from_arrays(flat, tasks)
            writer.write_table(pa.table([column], schema=schema), row_group_size=rows)
