"""Optimizers: one for all tables, one for the dense part, behind one `step`; and their learning-rate schedule.

A table's optimizer does not depend on how it is sharded. Sharded tables are updated by FBGEMM inside the backward pass;
a data-parallel table has dense gradients, which TorchRec would hand to the dense optimizer, so here it gets the same
table optimizer in plain torch. A table that would train with anything else is found before the first step.

Legend: N rows, D embedding dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import SGD, Adagrad, in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from trainer.config import TrainConfig
from trainer.errors import ConfigError

TABLE_EPS = 1e-8
TABLE_MARK = "embedding_bags."

# name -> what FBGEMM fuses, and what it calls it
FUSED: dict[str, tuple[type[torch.optim.Optimizer], EmbOptimType]] = {
    "rowwise_adagrad": (RowWiseAdagrad, EmbOptimType.EXACT_ROWWISE_ADAGRAD),
    "adagrad": (Adagrad, EmbOptimType.EXACT_ADAGRAD),
    "sgd": (SGD, EmbOptimType.EXACT_SGD),
}


class TableOptimizer(torch.optim.Optimizer):
    """The fused table optimizers for tables with dense gradients (data-parallel ones), with the same state.

    State momentum1: (N,) for row-wise Adagrad, (N, D) for Adagrad, none for SGD. The twin of FBGEMM's kernels: rows
    whose gradient is zero keep weight and state.
    """

    def __init__(self, params: Iterable[Any], kind: str, lr: float, eps: float = TABLE_EPS) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})
        self.kind = kind
        for group in self.param_groups:
            for table in group["params"]:
                if kind != "sgd":
                    shape = table.shape[:1] if kind == "rowwise_adagrad" else table.shape
                    self.state[table]["momentum1"] = torch.zeros(shape, dtype=torch.float32, device=table.device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        """One update from the gradients."""
        for group in self.param_groups:
            for table in group["params"]:
                grad = table.grad
                if grad is None:
                    continue
                if self.kind == "sgd":
                    table.sub_(grad, alpha=group["lr"])
                    continue
                state = self.state[table]["momentum1"]
                if self.kind == "adagrad":
                    state.addcmul_(grad, grad)
                    table.addcdiv_(grad, state.sqrt().add_(group["eps"]), value=-group["lr"])
                else:
                    state.add_(grad.square().mean(dim=1))
                    table.sub_(grad * (group["lr"] / (state.sqrt() + group["eps"])).unsqueeze(1))


def fuse_table_optimizer(tables: nn.Module, train: TrainConfig) -> None:
    """Have every table updated inside its backward pass; call before sharding."""
    optimizer = FUSED[train.table_optimizer][0]
    arguments = {"lr": train.table_lr} | ({} if train.table_optimizer == "sgd" else {"eps": TABLE_EPS})
    _apply_optimizer_in_backward(optimizer, tables.parameters(), arguments)


def build_optimizer(model: DistributedModelParallel, train: TrainConfig) -> CombinedOptimizer:
    """Fused tables, data-parallel tables and dense part together; each schedules by its own base learning rate.

    The fused learning rate reaches the kernels through `step`.
    Raises: ConfigError when a table would train with an optimizer that nobody chose.
    """
    left = dict(in_backward_optimizer_filter(model.named_parameters()))
    replicated = {name: p for name, p in left.items() if TABLE_MARK in name and p.numel()}
    dense = {name: p for name, p in left.items() if TABLE_MARK not in name}
    parts: list[tuple[str, Any]] = [("tables", model.fused_optimizer)]
    if replicated:
        twin = KeyedOptimizerWrapper(
            replicated, lambda params: TableOptimizer(params, train.table_optimizer, train.table_lr)
        )
        parts.append(("replicated_tables", twin))
    own: Any = KeyedOptimizerWrapper(dense, lambda params: dense_optimizer(params, train))
    if train.clip_norm is not None:  # of the dense part alone: fused gradients never exist, whatever the plan
        own = GradientClippingOptimizer(own, clipping=GradientClipping.NORM, max_gradient=train.clip_norm)
    parts.append(("dense", own))
    combined = CombinedOptimizer(parts)
    check_table_optimizers(model, set(replicated), train)
    for group in combined.param_groups:
        group["base_lr"] = group["lr"]
    return combined


def dense_optimizer(params: Any, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the dense part, by name."""
    lr, decay = train.dense_lr, train.weight_decay
    if train.dense_optimizer == "sgd":
        return torch.optim.SGD(params, lr=lr, weight_decay=decay)
    if train.dense_optimizer == "adagrad":
        return torch.optim.Adagrad(params, lr=lr, weight_decay=decay, eps=1e-8)
    kind = torch.optim.AdamW if train.dense_optimizer == "adamw" else torch.optim.Adam
    return kind(params, lr=lr, weight_decay=decay, fused=True)


def check_table_optimizers(model: DistributedModelParallel, replicated: set[str], train: TrainConfig) -> None:
    """Every table of this rank must train with the chosen optimizer and learning rate.

    TorchRec silently fuses a default at lr .01 where none was applied.
    Raises: ConfigError naming the tables, what they would train with, and what was chosen.
    """
    wanted = FUSED[train.table_optimizer][1]
    covered = {_table_name(name) for name in replicated}
    for kernel in fused_kernels(model):
        names = [n.removeprefix("t_") for n in kernel.table_names or []]
        lr = float(kernel.learning_rate_tensor.item())
        if kernel.optimizer != wanted or not math.isclose(lr, train.table_lr, rel_tol=1e-5):
            raise ConfigError(
                f"tables {', '.join(names)}: would train with {kernel.optimizer.value} at lr {lr:g}, which nobody "
                f"chose: train.table_optimizer is {train.table_optimizer} at {train.table_lr:g}: apply it before "
                f"sharding (fuse_table_optimizer)"
            )
        covered.update(names)
    here = {_table_name(name) for name, p in model.named_parameters() if TABLE_MARK in name and p.numel()}
    if here - covered:
        raise ConfigError(f"tables {', '.join(sorted(here - covered))}: no table optimizer trains them")


def fused_kernels(model: DistributedModelParallel) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """This rank's training kernels that hold an optimizer of their own."""

    def leaves(optimizer: Any) -> Iterable[Any]:
        for _, part in optimizer.optimizers:
            if isinstance(part, CombinedOptimizer):
                yield from leaves(part)
            else:
                yield part._emb_module

    return list(leaves(model.fused_optimizer))


def _table_name(parameter: str) -> str:
    return parameter.partition(f"{TABLE_MARK}t_")[2].removesuffix(".weight")


def lr_factor(train: TrainConfig, step: int, total_steps: int) -> float:
    """What both learning rates are multiplied by at a step: linear warm-up, then the chosen decay to `schedule.end`."""
    schedule = train.schedule
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay == "none":
        return 1.0
    span = max(total_steps - schedule.warmup_steps, 1)
    done = min(max(step - schedule.warmup_steps, 0) / span, 1.0)
    shape = 1.0 - done if schedule.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.end + (1.0 - schedule.end) * shape


def set_lr(optimizer: CombinedOptimizer, factor: float) -> None:
    """Scale every group's base learning rate; fused kernels take it at their next step."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
