"""One training step and its loss: no Ray, no files.

Legend: B batch, L sum of the lookups' widths, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from trainer.config import RunConfig
from trainer.data.batch import Batch


class Loss:
    """What a run minimises: log loss of its tasks, a teacher's log-odds where it distils, L2 of the rows it touches.

    negative_rate: the share of negatives that prepare kept; the labels' odds are that much too high, so they are
    compared with log-odds shifted by its logarithm, and the model itself stays calibrated.
    """

    def __init__(self, run: RunConfig, negative_rate: float = 1.0) -> None:
        self.table_l2 = run.train.table_l2
        self.distill = run.train.distill
        weights = torch.tensor([t.weight for t in run.data.tasks])
        self.task_weights = weights / weights.sum()
        self.shift = -torch.log(torch.tensor(negative_rate)).item()

    def __call__(self, logits_BT: Tensor, looked_up_BL: Tensor, batch: Batch, l2_scale_L: Tensor) -> Tensor:
        """The batch's share of the mean loss over the global batch.

        The L2 term regularises just the rows a batch touches (FBGEMM's CPU kernels ignore weight decay). Taken as a
        mean over the features, one value serves logs with few fields and with many.
        """
        assert batch.labels is not None, "training needs labels"
        weights_T = self.task_weights.to(logits_BT.device)
        sampled = logits_BT + self.shift
        loss = (F.binary_cross_entropy_with_logits(sampled, batch.labels, reduction="none") * weights_T).sum()
        if self.distill is not None:
            assert batch.teacher is not None, "distillation needs the teacher's log-odds"
            temperature, alpha = self.distill.temperature, self.distill.alpha
            soft = F.binary_cross_entropy_with_logits(
                sampled / temperature, torch.sigmoid((batch.teacher + self.shift) / temperature), reduction="none"
            )
            loss = (1 - alpha) * loss + alpha * temperature**2 * (soft * weights_T).sum()
        if self.table_l2:
            loss = loss + self.table_l2 * (looked_up_BL.square() @ l2_scale_L).sum()
        return loss / batch.rows


def train_step(model: nn.Module, optimizer: CombinedOptimizer, loss_of: Loss, batch: Batch, world_size: int) -> Tensor:
    """Forward, backward, update. Gradients are of the mean over the global batch, also where ranks hold unequal slices.

    Returns the local share of the global mean loss, detached.
    """
    optimizer.zero_grad()
    logits, looked_up = model(batch)
    loss = loss_of(logits, looked_up, batch, l2_scale(model))
    (loss * world_size).backward()  # data-parallel averaging divides by the world size
    optimizer.step()
    return loss.detach()


def l2_scale(model: nn.Module) -> Tensor:
    """The ranker's own weights of the L2 term, whatever it is wrapped in."""
    inner = model.module if isinstance(model, DistributedModelParallel) else model
    return inner.l2_scale


class Stepper:
    """Takes training steps: one after another, or with TorchRec's pipeline, which overlaps the copy to the device and
    the exchange of ids with the step before. Both do the same arithmetic in the same order."""

    def __init__(
        self, model: DistributedModelParallel, optimizer: CombinedOptimizer, loss_of: Loss, device: torch.device,
        world_size: int, pipeline: bool,
    ) -> None:  # fmt: skip
        self.model = model
        self.optimizer = optimizer
        self.loss_of = loss_of
        self.device = device
        self.world_size = world_size
        self.pipeline = pipeline

    def steps(self, batches: Iterable[Batch], before: Any) -> Iterator[None]:
        """Train on each batch; `before` is called ahead of each step, with the model about to run."""
        if not self.pipeline:
            for batch in batches:
                before()
                train_step(self.model, self.optimizer, self.loss_of, batch.to(self.device), self.world_size)
                yield
            return
        pipeline: Any = TrainPipelineSparseDist(
            self.model,
            self.optimizer,
            self.device,
            custom_model_fwd=self._pipelined,
        )
        waiting = iter(batches)
        while True:
            before()
            try:
                pipeline.progress(waiting)
            except StopIteration:
                pipeline.detach()  # evaluation runs the model as it was
                return
            yield

    def _pipelined(self, batch: Batch | None) -> tuple[Tensor, Tensor]:
        assert batch is not None
        logits, looked_up = self.model(batch)
        loss = self.loss_of(logits, looked_up, batch, l2_scale(self.model))
        return loss * self.world_size, loss.detach()
