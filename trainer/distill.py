"""A larger teacher's log-odds of the training rows, stored beside them: what one task of the batch job does.

    DATA/teacher/VERSION/train/part-00000.parquet     logits: a row for each training row, in the same row groups

The job that runs one task a file is in trainer/ray_distill.py; the reader takes the rows from there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from trainer.checkpoint import Checkpoint, open_checkpoint, training_state_of
from trainer.config import RunConfig
from trainer.data.batch import to_batch
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.reader import Chunk, read_chunk
from trainer.errors import DataError
from trainer.models import Ranker, build_ranker

SCORE_ROWS = 8192


def check_teacher(checkpoint: Checkpoint, run: RunConfig, dataset: Dataset) -> None:
    """Raises: DataError unless a teacher scores these very rows; CheckpointError for one of an earlier stage."""
    checkpoint.check_whole()
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
    dataset = open_dataset(data)
    model = load_ranker(open_checkpoint(checkpoint, verify=False), dataset)
    file = dataset.files["train"][index]
    target = Path(staging) / "train" / file.path.name
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
