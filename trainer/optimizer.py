"""Optimizers: fused row-wise Adagrad for tables, AdamW for the dense part, behind one `step`.

The table optimizer is named here explicitly: a table for which none is chosen would silently train with a default.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from trainer.config import TrainConfig

TABLE_EPS = 1e-8


def fuse_table_optimizer(tables: nn.Module, train: TrainConfig) -> None:
    """Have every table updated by row-wise Adagrad inside its backward pass; call before sharding."""
    _apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": train.table_lr, "eps": TABLE_EPS})


def build_optimizer(model: DistributedModelParallel, train: TrainConfig) -> CombinedOptimizer:
    """Tables (fused) and dense part together. The fused learning rate reaches the kernels through its `step`."""
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    wrapped = KeyedOptimizerWrapper(
        dense, lambda params: torch.optim.AdamW(params, lr=train.dense_lr, weight_decay=train.weight_decay)
    )
    return CombinedOptimizer([("tables", model.fused_optimizer), ("dense", wrapped)])
