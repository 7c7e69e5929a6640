"""trainer/evaluation.py: the metrics of several ranks are those of one process, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from trainer.config import MetricsConfig
from trainer.errors import DataError
from trainer.evaluation import ScoreBuffer, gather_to_rank0, metrics_over_ranks, score_rows
from trainer.metrics import task_metrics

if TYPE_CHECKING:
    from trainer.data.batch import Batch

TASKS = ["click", "buy"]
CONFIG = MetricsConfig(k=(1, 5))


def some_scores(rows: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N, 2), logits (N, 2) with ties, groups (N,) that need all 64 bits."""
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=(rows, 2)), 3).astype(np.float32)
    labels = (rng.random((rows, 2)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return labels, logits, np.uint64(2**64 - 400) + rng.integers(0, 400, rows, dtype=np.uint64)


def filled(part: slice, batch: int, grouped: bool = True, capacity: int = 7) -> ScoreBuffer:
    """A buffer of some of the rows, added batch by batch."""
    labels, logits, groups = (a[part] for a in some_scores())
    buffer = ScoreBuffer(2, grouped=grouped, rows=capacity)
    for at in range(0, len(labels), batch):
        rows = slice(at, at + batch)
        buffer.add(labels[rows], logits[rows], groups[rows] if grouped else None)
    return buffer


def shares(world_size: int) -> list[slice]:
    """Uneven shares of 4000 rows: the last of three ranks has none."""
    cuts = {2: [0, 1234, 4000], 3: [0, 2999, 4000, 4000]}[world_size]
    return [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def work(rank: int, world_size: int, folder: str) -> None:
    """One rank: write the metrics it was told, with and without groups, and how many rows it holds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    part = shares(world_size)[rank]
    buffer = filled(part, batch=97)
    gathered = gather_to_rank0(buffer)
    told = {
        "rows": None if gathered is None else len(gathered),
        "grouped": metrics_over_ranks(buffer, TASKS, CONFIG),
        "alone": metrics_over_ranks(filled(part, batch=500, grouped=False), TASKS, CONFIG),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_metrics_of_several_ranks_are_those_of_one_process(world_size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(world_size, str(tmp_path)), nprocs=world_size)
    labels, logits, groups = some_scores()
    for rank in range(world_size):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["rows"] == (4000 if rank == 0 else None)
        assert told["grouped"] == task_metrics(labels, logits, TASKS, groups, CONFIG)
        assert told["alone"] == task_metrics(labels, logits, TASKS, None, CONFIG)


def test_buffer_grows_and_keeps_every_row() -> None:
    scores = filled(slice(None), batch=33).scores()
    labels, logits, groups = some_scores()
    assert (scores.labels.dtype, scores.logits.dtype) == (np.uint8, np.float32)
    np.testing.assert_array_equal(scores.labels, labels)
    np.testing.assert_array_equal(scores.logits, logits)
    np.testing.assert_array_equal(scores.groups, groups)


def test_buffer_of_the_right_size_does_not_grow() -> None:
    buffer = ScoreBuffer(2, grouped=False, rows=4000)
    before = buffer.scores().logits.base
    labels, logits, _ = some_scores()
    buffer.add(labels, logits)
    assert buffer.scores().logits.base is before


def test_one_process_needs_no_process_group() -> None:
    labels, logits, groups = some_scores()
    assert metrics_over_ranks(filled(slice(None), 100), TASKS) == task_metrics(labels, logits, TASKS, groups)


def test_labels_other_than_0_and_1_are_refused() -> None:
    with pytest.raises(DataError, match=r"label 0\.5.*positive"):
        ScoreBuffer(1, grouped=False).add(np.array([[1.0], [0.5]]), np.zeros((2, 1)))


class Sum(nn.Module):
    """Scores a row by the sum of its numbers, and doubles that in training."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, None]:
        return batch.dense.sum(dim=1, keepdim=True) * (2 if self.training else 1), None


def test_score_rows_scores_in_evaluation_mode_and_keeps_groups() -> None:
    from trainer.data.encoded import Encoded, Ragged  # not above: the ranks of the other test need no TorchRec
    from trainer.data.reader import Rows

    rng = np.random.default_rng(0)
    dense = rng.normal(size=(10, 3)).astype(np.float32)
    labels, groups = rng.integers(0, 2, (10, 1)).astype(np.float32), np.arange(10, dtype=np.uint64)
    rows = Rows(Encoded({"item": Ragged(np.arange(10), None)}, dense), labels, groups, np.arange(10))
    slices = [(rows.take(np.arange(a, b)), 10) for a, b in ((0, 4), (4, 10))]
    model = Sum().train()
    scores = score_rows(model, slices, torch.device("cpu"), ScoreBuffer(1, grouped=True)).scores()
    np.testing.assert_allclose(scores.logits[:, 0], dense.sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(scores.labels, labels)
    np.testing.assert_array_equal(scores.groups, groups)
    assert model.training
