"""`slimrank compress`: open, profile, compress, compare. The command's work without its printing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.artifact import load_artifact
from compress.compressor import data_of, resolve
from compress.compressor import compress as write_artifact
from compress.config import CompressionPlan, load_plan
from compress.model import model_of_checkpoint, score_split
from compress.search.objective import compare
from compress.search.profile import profile_tables
from trainer.checkpoint import open_checkpoint
from trainer.data.dataset import SplitName, open_dataset
from trainer.files import check_new
from trainer.progress import ReportProgress


def compress_checkpoint(
    checkpoint_path: Path,
    data: Path,
    plan_file: Path | None,
    out: Path,
    split: SplitName,
    progress: ReportProgress,
) -> dict[str, Any]:
    """Write an artifact and compare it with its checkpoint on a split; returns what `compress --json` prints.

    The plan is the file's, else the `compress` section of the checkpoint's run.

    Raises: SlimrankError for a bad plan, checkpoint, data folder or output folder, before anything is written.
    """
    check_new(out)
    asked = None if plan_file is None else load_plan(plan_file)
    checkpoint = open_checkpoint(checkpoint_path)
    dataset = data_of(checkpoint, open_dataset(data))
    plan = asked or CompressionPlan.model_validate(checkpoint.run.compress)
    profiles = profile_tables(checkpoint, dataset, progress)
    resolve(plan, profiles)
    manifest = write_artifact(checkpoint, dataset, plan, out, profiles, progress)
    labels, logits = score_split(load_artifact(out).model, dataset, split)
    _, reference = score_split(model_of_checkpoint(checkpoint, dataset.transform), dataset, split)
    return {
        "artifact": str(Path(out).absolute()),
        "version": manifest["version"],
        **manifest["sizes"],
        "split": split,
        **asdict(compare(labels, logits, reference)),
    }
