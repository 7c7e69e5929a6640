"""Quality of a checkpoint or an artifact on a prepared split, both through the same lookup and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.artifact import is_artifact, load_artifact
from compress.compressor import data_of
from compress.model import CompressedModel, model_of_checkpoint, score_split
from trainer.checkpoint import MANIFEST, open_checkpoint
from trainer.data.dataset import Dataset, SplitName
from trainer.errors import SlimrankError
from trainer.metrics import task_metrics


def open_model(path: Path, dataset: Dataset) -> CompressedModel:
    """The model of a checkpoint (fp32) or of an artifact.

    Raises: SlimrankError when the path is neither, or was not made from this data.
    """
    path = Path(path).absolute()
    if is_artifact(path):
        return load_artifact(path).model
    if not (path / MANIFEST).exists() and not (path / "train.json").exists():
        raise SlimrankError(
            f"{path}: neither a checkpoint nor an artifact: give the folder that 'train' or 'tune' wrote"
        )
    checkpoint = open_checkpoint(path)
    return model_of_checkpoint(checkpoint, data_of(checkpoint, dataset).transform)


def evaluate(model: CompressedModel, dataset: Dataset, split: SplitName) -> dict[str, Any]:
    """Rows and metrics of a split, as `slimrank evaluate --json` prints them; k and threshold are those of its run."""
    labels, logits = score_split(model, dataset, split)
    return {"rows": len(labels), **task_metrics(labels, logits, model.tasks, dataset.groups(split), model.metrics)}
