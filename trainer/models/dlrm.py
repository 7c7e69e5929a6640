"""DLRM: dot products between all pairs of embeddings and the bottom MLP's output.

Source: Naumov et al., Deep Learning Recommendation Model, 2019.
Legend: B batch, I dense inputs, F sparse features, D sum of their dims, W common width, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from trainer.config import ModelConfig
from trainer.models.ranker import Head, HeadShape, mlp


class DLRMHead(Head):
    """Features of other dims than the widest are projected to it first."""

    def __init__(self, config: ModelConfig, shape: HeadShape) -> None:
        super().__init__()
        self.dims = list(shape.dims)
        self.starts = shape.starts
        self.width = max(shape.dims)
        self.bottom = mlp([shape.num_dense, *config.bottom_mlp, self.width]) if shape.num_dense else None
        self.project = nn.ModuleList(
            nn.Identity() if dim == self.width else nn.Linear(dim, self.width, bias=False) for dim in self.dims
        )
        vectors = len(self.dims) + (shape.num_dense > 0)
        rows, columns = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("pairs", rows * vectors + columns, persistent=False)
        first = len(rows) + (self.width if shape.num_dense else 0) + shape.total_dim
        self.top = mlp([first, *config.top_mlp], config.dropout, config.batch_norm)
        self.out = nn.Linear(config.top_mlp[-1] if config.top_mlp else first, shape.num_tasks)

    def linear_readers(self, feature: int) -> list[tuple[str, int]]:
        """The projection of a feature that is not as wide as the widest, and the top."""
        if isinstance(self.project[feature], nn.Identity):
            return []
        return [(f"project.{feature}", 0), ("top.0" if len(self.top) else "out", self.starts[feature])]

    def logits(self, dense_BI: Tensor, pooled_BD: Tensor) -> Tensor:
        """Logits (B, T)."""
        parts = pooled_BD.split(self.dims, dim=1)
        vectors = [project(part) for project, part in zip(self.project, parts, strict=True)]
        inputs = [pooled_BD]
        if self.bottom is not None:
            bottom_BW = self.bottom(dense_BI)
            vectors.append(bottom_BW)
            inputs.append(bottom_BW)
        inputs.append(pair_dots(vectors, self.pairs))
        return self.out(self.top(torch.cat(inputs, dim=1)))


def pair_dots(vectors: Sequence[Tensor], pairs_P: Tensor) -> Tensor:
    """Dot products of pairs of V vectors, each (B, W) -> (B, P). A pair is coded as first * V + second."""
    if has_torch_function(vectors):  # one request's vectors need one product, not one a candidate
        return handle_torch_function(pair_dots, vectors, vectors, pairs_P)
    stacked_BVW = torch.stack(list(vectors), dim=1)
    dots = torch.bmm(stacked_BVW, stacked_BVW.transpose(1, 2)).flatten(1)
    return dots.index_select(1, pairs_P)
