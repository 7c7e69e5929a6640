"""DeepFM: a factorization machine beside an MLP, on the same embeddings.

Source: Guo et al., DeepFM, 2017. The first-order term is linear in the embeddings and the numbers; features of other
dims than the widest are projected to it for the pairwise term.
Legend: B batch, I dense inputs, F sparse features, D sum of their dims, W common width, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from trainer.config import ModelConfig
from trainer.models.ranker import Head, HeadShape, mlp


class DeepFMHead(Head):
    """logits = linear(x) + pairwise products of feature vectors + MLP(x), mixed to T tasks by the last layer."""

    def __init__(self, config: ModelConfig, shape: HeadShape) -> None:
        super().__init__()
        self.dims = list(shape.dims)
        self.starts = [shape.num_dense + start for start in shape.starts]
        width = max(shape.dims)
        inputs = shape.num_dense + shape.total_dim
        self.project = nn.ModuleList(
            nn.Identity() if dim == width else nn.Linear(dim, width, bias=False) for dim in self.dims
        )
        self.dense_vector = nn.Linear(shape.num_dense, width, bias=False) if shape.num_dense else None
        self.deep = mlp([inputs, *config.top_mlp], config.dropout, config.batch_norm)
        last = config.top_mlp[-1] if config.top_mlp else inputs
        self.first_order = nn.Linear(inputs, shape.num_tasks, bias=False)
        self.out = nn.Linear(width + last, shape.num_tasks)

    def linear_readers(self, feature: int) -> list[tuple[str, int]]:
        """The projection of a feature that is not as wide as the widest, the first order, and the MLP."""
        if isinstance(self.project[feature], nn.Identity):
            return []
        start = self.starts[feature]
        deep = ("deep.0", start) if len(self.deep) else ("out", max(self.dims) + start)
        return [(f"project.{feature}", 0), ("first_order", start), deep]

    def logits(self, dense_BI: Tensor, pooled_BD: Tensor) -> Tensor:
        """Logits (B, T)."""
        parts = pooled_BD.split(self.dims, dim=1)
        vectors = [project(part) for project, part in zip(self.project, parts, strict=True)]
        if self.dense_vector is not None:
            vectors.append(self.dense_vector(dense_BI))
        pairs_BW = pair_products(vectors)
        x = self.cast(torch.cat([dense_BI, pooled_BD], dim=1))
        return self.first_order(x) + self.out(torch.cat([pairs_BW, self.deep(x)], dim=1))


def pair_products(vectors: Sequence[Tensor]) -> Tensor:
    """The sum over all pairs of F vectors, each (B, W), of their elementwise products -> (B, W)."""
    if has_torch_function(vectors):  # one request's vectors are summed once, not once a candidate
        return handle_torch_function(pair_products, vectors, vectors)
    stacked_BFW = torch.stack(list(vectors), dim=1)
    return 0.5 * (stacked_BFW.sum(1).square() - stacked_BFW.square().sum(1))
