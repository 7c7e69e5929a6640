"""Labels and scores of a split, collected over ranks, into metrics that do not depend on how many ranks there are.

Each rank fills a ScoreBuffer batch by batch; rank 0 receives all rows as tensors, computes, and tells every rank. All
metrics are free of row order (trainer/metrics.py), so equal scores give equal metrics to the last bit.

Memory: a row takes 5 T + 8 bytes in a buffer; rank 0 holds all rows besides its own, and about 70 bytes a row
more while it computes (tracemalloc, 1M rows in 100k groups).

Legend: N rows, B rows of a batch, T tasks. What is gathered lives in CPU memory: under NCCL, pass the group that
`cpu_group` makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from trainer.config import MetricsConfig
from trainer.errors import DataError
from trainer.metrics import DEFAULTS, task_metrics

if TYPE_CHECKING:
    from trainer.data.reader import Rows

FIRST_ROWS = 65_536  # room of a buffer that was told no size
GROWTH = 1.5


@dataclass(frozen=True)
class Scores:
    """labels (N, T) uint8, logits (N, T) float32, groups (N,) uint64 or None."""

    labels: np.ndarray
    logits: np.ndarray
    groups: np.ndarray | None

    def __len__(self) -> int:
        return len(self.labels)


class ScoreBuffer:
    """What one rank has scored so far, in arrays that grow in large steps; with `rows` they need not grow at all."""

    def __init__(self, tasks: int, *, grouped: bool, rows: int = FIRST_ROWS) -> None:
        self.rows = 0
        self._labels = np.empty((rows, tasks), dtype=np.uint8)
        self._logits = np.empty((rows, tasks), dtype=np.float32)
        self._groups = np.empty(rows, dtype=np.uint64) if grouped else None

    def add(self, labels: np.ndarray, logits: np.ndarray, groups: np.ndarray | None = None) -> None:
        """Append a batch: labels and logits (B, T), groups (B,) as the buffer was made for.

        Raises: DataError when a label is neither 0 nor 1.
        """
        assert (groups is None) == (self._groups is None), "a buffer holds groups for all rows or for none"
        end = self.rows + len(labels)
        if end > len(self._labels):
            self._grow(max(end, int(len(self._labels) * GROWTH)))
        place = slice(self.rows, end)
        self._labels[place] = labels > 0.5
        if not np.array_equal(self._labels[place], labels):
            wrong = labels[self._labels[place] != labels][0]
            raise DataError(f"label {wrong}: metrics need labels of 0 and 1: give the task a 'positive' rule")
        self._logits[place] = logits
        if self._groups is not None and groups is not None:
            self._groups[place] = groups
        self.rows = end

    def scores(self) -> Scores:
        """The rows so far, as views."""
        groups = None if self._groups is None else self._groups[: self.rows]
        return Scores(self._labels[: self.rows], self._logits[: self.rows], groups)

    def _grow(self, rows: int) -> None:
        self._labels, self._logits = _longer(self._labels, self.rows, rows), _longer(self._logits, self.rows, rows)
        if self._groups is not None:
            self._groups = _longer(self._groups, self.rows, rows)


def _longer(array: np.ndarray, used: int, rows: int) -> np.ndarray:
    out = np.empty((rows, *array.shape[1:]), dtype=array.dtype)
    out[:used] = array[:used]
    return out


@torch.no_grad()
def score_rows(
    model: nn.Module, slices: Iterable[tuple[Rows, int]], device: torch.device, buffer: ScoreBuffer
) -> ScoreBuffer:
    """Score this rank's rows (`Reader.slices`) in evaluation mode into `buffer`; ranks run as many batches as another.

    The model returns (logits (B, T), pooled); it goes back to the mode it was in.
    """
    from trainer.data.batch import to_batch

    was_training = model.training
    model.eval()
    try:
        for rows, _ in slices:
            batch = to_batch(rows.encoded).to(device)
            logits, _ = model(batch.dense, batch.sparse)
            buffer.add(rows.labels, logits.float().cpu().numpy(), rows.groups)
    finally:
        model.train(was_training)
    return buffer


# -- over ranks ------------------------------------------------------------------------------------------------------


def cpu_group() -> dist.ProcessGroup | None:
    """A group for tensors in CPU memory: the default one under gloo, else a new one. Call once, on all ranks."""
    if not dist.is_initialized() or "gloo" in dist.get_backend():
        return None
    return dist.new_group(backend="gloo")


def gather_to_rank0(buffer: ScoreBuffer, group: dist.ProcessGroup | None = None) -> Scores | None:
    """All ranks' rows on rank 0, in rank order; None on the others. Ranks may hold different numbers of rows.

    Rank 0 receives straight into the arrays it returns: no padding, no second copy, no pickling.
    """
    mine = buffer.scores()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = torch.zeros(world_size, dtype=torch.int64)
    sizes[rank] = len(mine)
    dist.all_reduce(sizes, group=group)
    counts = sizes.tolist()
    labels, logits = _gather(mine.labels, counts, group), _gather(mine.logits, counts, group)
    groups = None
    if mine.groups is not None:
        groups = _gather(mine.groups.view(np.int64), counts, group)  # gloo knows no uint64
    if labels is None or logits is None:
        return None
    return Scores(labels, logits, None if groups is None else groups.view(np.uint64))


def _gather(rows: np.ndarray, counts: list[int], group: dist.ProcessGroup | None) -> np.ndarray | None:
    if dist.get_rank() != 0:
        if len(rows):
            dist.send(torch.from_numpy(rows), dst=0, group=group)
        return None
    out = np.empty((sum(counts), *rows.shape[1:]), dtype=rows.dtype)
    out[: counts[0]] = rows
    for source in range(1, len(counts)):
        if counts[source]:
            start = sum(counts[:source])
            dist.recv(torch.from_numpy(out[start : start + counts[source]]), src=source, group=group)
    return out


def metrics_over_ranks(
    buffer: ScoreBuffer,
    tasks: Sequence[str],
    config: MetricsConfig = DEFAULTS,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Metrics (`task_metrics`) of the rows of all ranks, on every rank."""
    scores = gather_to_rank0(buffer, group)
    told: list[dict[str, Any] | None] = [None]
    if scores is not None:
        told = [task_metrics(scores.labels, scores.logits, tasks, scores.groups, config)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(told, src=0, group=group)
    assert told[0] is not None, "rank 0 tells the metrics"
    return told[0]
