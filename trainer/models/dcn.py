"""DCN v2: explicit low-rank feature crosses beside an MLP.

Source: Wang et al., DCN V2, 2021 (parallel structure, low-rank cross).
Legend: B batch, I dense inputs, D sum of embedding dims, X = I + D, R cross rank, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.models.ranker import Head, HeadShape, mlp


class LowRankCross(nn.Module):
    """One cross layer: x0 * (U V x + b) + x."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width)

    def forward(self, x0_BX: Tensor, x_BX: Tensor) -> Tensor:
        """(B, X) -> (B, X)."""
        crossed = self.up(self.down(x_BX)).to(x0_BX.dtype)
        return (x0_BX * crossed).add_(x_BX)  # the gradient of addcmul would take two more products


class DCNHead(Head):
    """Cross network and MLP side by side, joined by a linear layer."""

    def __init__(self, config: ModelConfig, shape: HeadShape) -> None:
        super().__init__()
        width = shape.num_dense + shape.total_dim
        self.starts = [shape.num_dense + start for start in shape.starts]
        rank = min(config.cross_rank, width)
        self.crosses = nn.ModuleList(LowRankCross(width, rank) for _ in range(config.cross_layers))
        self.deep = mlp([width, *config.top_mlp], config.dropout, config.batch_norm)
        self.out = nn.Linear(width + (config.top_mlp[-1] if config.top_mlp else width), shape.num_tasks)

    def linear_readers(self, feature: int) -> list[tuple[str, int]]:
        """The MLP and the last layer where there are no crosses, which multiply each column by others."""
        if len(self.crosses) or not len(self.deep):
            return []
        return [(name, self.starts[feature]) for name in ("deep.0", "out")]

    def logits(self, dense_BI: Tensor, pooled_BD: Tensor) -> Tensor:
        """Logits (B, T)."""
        x0_BX = self.cast(torch.cat([dense_BI, pooled_BD], dim=1))
        x_BX = x0_BX
        for cross in self.crosses:
            x_BX = cross(x0_BX, x_BX)
        return self.out(torch.cat([x_BX, self.deep(x0_BX)], dim=1))
