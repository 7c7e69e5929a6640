"""One training step, and evaluation. No Ray.

Legend: B local batch, T tasks, D sum of embedding dims.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchrec.optim.keyed import CombinedOptimizer

from trainer.data.batch import Batch


def loss_of(logits_BT: Tensor, pooled_BD: Tensor, labels_BT: Tensor, features: int, table_l2: float) -> Tensor:  # noqa: N803
    """Sum over the local rows of the mean log loss over tasks, plus `table_l2` times the mean squared norm of features.

    The L2 term regularises just the rows a batch touches (FBGEMM's CPU kernels ignore weight decay). Taken as a mean
    over the features, one value serves logs with few fields and with many.
    """
    loss = F.binary_cross_entropy_with_logits(logits_BT, labels_BT, reduction="sum") / labels_BT.shape[1]
    if table_l2:
        loss = loss + table_l2 / features * pooled_BD.square().sum()
    return loss


def train_step(
    model: nn.Module, optimizer: CombinedOptimizer, batch: Batch, global_rows: int, world_size: int, table_l2: float
) -> Tensor:
    """Forward, backward, update. Gradients are of the mean over the global batch, also where ranks hold unequal slices.

    Returns the local share of the global mean loss, detached.
    """
    assert batch.labels is not None, "training needs labels"
    optimizer.zero_grad()
    logits, pooled = model(batch.dense, batch.sparse)
    loss = loss_of(logits, pooled, batch.labels, len(batch.sparse.keys()), table_l2) / global_rows
    (loss * world_size).backward()  # data-parallel averaging divides by the world size
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[tuple[Batch, int]], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits (rows of this rank, T) over some batches, in evaluation mode."""
    model.eval()
    labels, logits = [], []
    for batch, _ in batches:
        on_device = batch.to(device)
        out, _ = model(on_device.dense, on_device.sparse)
        labels.append(np.asarray(batch.labels))
        logits.append(out.float().cpu().numpy())
    model.train()
    return np.concatenate(labels), np.concatenate(logits)


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of all ranks, on every rank (in rank order)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    parts: list[np.ndarray | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return np.concatenate([p for p in parts if p is not None])
