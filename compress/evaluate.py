"""Quality of a checkpoint or an artifact on a prepared split, both through the same lookup and head.

Legend: N rows, T tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from compress.artifact import is_artifact, load_artifact
from compress.compressor import data_of
from compress.model import SCORE_ROWS, CompressedModel, score_split
from compress.search.working_set import extract, trial_model
from trainer.checkpoint import MANIFEST, Checkpoint, open_checkpoint
from trainer.data.batch import to_batch
from trainer.data.dataset import Dataset, SplitName
from trainer.data.reader import Reader, concatenate
from trainer.errors import SlimrankError
from trainer.metrics import task_metrics
from trainer.storage import Location, location, why_absent

CHUNK_BATCHES = 64  # of SCORE_ROWS: their rows of the tables are read together


def open_model(path: str | Location, dataset: Dataset) -> CompressedModel | Checkpoint:
    """What scores: the model of an artifact, or a checkpoint that was trained on this data.

    Raises: SlimrankError when the path is neither, or was not made from this data.
    """
    path = location(path)
    if is_artifact(path):
        return load_artifact(path).model
    if not (path / MANIFEST).exists() and not (path / "train.json").exists():
        why = why_absent(path, MANIFEST)
        raise SlimrankError(
            f"{path}: neither a checkpoint nor an artifact{why}: give the folder that 'train' or 'tune' wrote"
        )
    checkpoint = open_checkpoint(path)
    data_of(checkpoint, dataset)
    return checkpoint


def evaluate(model: CompressedModel | Checkpoint, dataset: Dataset, split: SplitName) -> dict[str, Any]:
    """Rows and metrics of a split, as `slimrank evaluate --json` prints them; k and threshold are those of its run."""
    if isinstance(model, Checkpoint):
        metrics = model.run.train.metrics
        labels, logits = score_checkpoint(model, data_of(model, dataset), split)
    else:
        metrics = model.metrics
        labels, logits = score_split(model, dataset, split)
    tasks = [t.name for t in dataset.transform.schema.tasks]
    return {"rows": len(labels), **task_metrics(labels, logits, tasks, dataset.groups(split), metrics)}


def score_checkpoint(
    checkpoint: Checkpoint, dataset: Dataset, split: SplitName, dense: Mapping[str, Tensor] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and log-odds (N, T) of a prepared split by an uncompressed model whose tables need not fit in memory.

    `dataset` is the checkpoint's own (see `data_of`). About 250,000 rows of the split, and the table rows that these
    touch, are in memory at a time. `dense`: weights of another head for the same tables. Scores are those of
    `model_of_checkpoint`, to the bit: same lookup, same head, same batches.
    """
    slices = (rows for rows, _ in Reader(dataset, split, SCORE_ROWS).slices())
    labels, logits = [], []
    while batches := list(itertools.islice(slices, CHUNK_BATCHES)):
        working = extract(checkpoint, dataset.transform, None, concatenate(batches))
        model, _ = trial_model(working, None)
        if dense is not None:
            model.head.load_state_dict(dict(dense))
        for begin, end in itertools.pairwise(itertools.accumulate(map(len, batches), initial=0)):
            logits.append(model.logits(to_batch(working.sample.take(np.arange(begin, end)))))
        labels.append(working.labels)
    return np.concatenate(labels), np.concatenate(logits)
