"""MMoE: experts shared by the tasks, a gate and a tower for each of them.

Source: Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, 2018.
Legend: B batch, I dense inputs, D sum of embedding dims, E experts, H an expert's width, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.ranker import Head, HeadShape, mlp


class TowerLogits(nn.Module):
    """One logit a task, each from its own tower's output. `bias` is where training starts at the tasks' base rates."""

    def __init__(self, width: int, tasks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tasks, width))
        self.bias = nn.Parameter(torch.zeros(tasks))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, towers_BTH: Tensor) -> Tensor:
        """(B, T, H) -> (B, T)."""
        return (towers_BTH * self.weight).sum(2) + self.bias


class MMoEHead(Head):
    """`experts` MLPs of `top_mlp`; each task mixes them by its own gate and reads the mix through its own tower."""

    def __init__(self, config: ModelConfig, shape: HeadShape) -> None:
        super().__init__()
        inputs = shape.num_dense + shape.total_dim
        self.starts = [shape.num_dense + start for start in shape.starts]
        width = config.top_mlp[-1] if config.top_mlp else inputs
        self.experts = nn.ModuleList(
            mlp([inputs, *config.top_mlp], config.dropout, config.batch_norm) for _ in range(config.experts)
        )
        self.gates = nn.ModuleList(nn.Linear(inputs, config.experts) for _ in range(shape.num_tasks))
        self.towers = nn.ModuleList(
            mlp([width, *config.tower_mlp], config.dropout, config.batch_norm) for _ in range(shape.num_tasks)
        )
        self.out = TowerLogits(config.tower_mlp[-1] if config.tower_mlp else width, shape.num_tasks)

    def linear_readers(self, feature: int) -> list[tuple[str, int]]:
        """Each expert's first layer and each gate; experts without layers mix the inputs themselves."""
        if not all(len(expert) for expert in self.experts):
            return []
        names = [f"experts.{i}.0" for i in range(len(self.experts))] + [f"gates.{i}" for i in range(len(self.gates))]
        return [(name, self.starts[feature]) for name in names]

    def logits(self, dense_BI: Tensor, pooled_BD: Tensor) -> Tensor:
        """Logits (B, T)."""
        x = self.cast(torch.cat([dense_BI, pooled_BD], dim=1))
        experts_BEH = torch.stack([expert(x) for expert in self.experts], dim=1)
        towers = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            share_B1E = torch.softmax(gate(x), dim=1).unsqueeze(1)
            towers.append(tower(torch.bmm(share_B1E, experts_BEH).squeeze(1)))
        return self.out(torch.stack(towers, dim=1))
