"""The batch job that has a teacher score the training rows, once for all runs that distil from it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from trainer.checkpoint import open_checkpoint
from trainer.config import Distill, RunConfig
from trainer.data.dataset import Dataset
from trainer.distill import check_teacher, score_file
from trainer.errors import DataError


def score_with_teacher(
    distill: Distill, run: RunConfig, dataset: Dataset, show: Callable[[dict[str, Any], list[Any]], None]
) -> Path:
    """The folder with a teacher's log-odds of the training rows; scored by Ray tasks where it is not there yet.

    Raises: DataError when the teacher was trained on other prepared rows or tasks, or there is no writing beside them.
    """
    checkpoint = open_checkpoint(Path(distill.teacher))
    check_teacher(checkpoint, run, dataset)
    if not isinstance(dataset.folder, Path):
        raise DataError(
            f"{dataset.folder}: train.distill writes the teacher's log-odds beside the rows: copy the prepared data "
            f"to a folder that the workers share, and give that to --data"
        )
    folder = dataset.folder / "teacher" / checkpoint.version
    if (folder / "teacher.json").exists():
        return folder
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        (staging / "train").mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: cannot be written ({error.strerror}), and the teacher's log-odds go there, beside the "
            f"rows: let this user write to it, or copy the prepared data to where they may"
        ) from None
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
