"""The shape all rankers share: embedding tables -> pooled embeddings -> a dense head -> one logit a task.

Legend: B batch, I dense inputs, D sum of the features' embedding dims, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class HeadShape:
    """What a head takes and gives: I dense inputs, the embedding dim of each sparse feature in order, T tasks."""

    num_dense: int
    dims: tuple[int, ...]
    num_tasks: int

    @property
    def total_dim(self) -> int:
        """D: width of the concatenated pooled embeddings."""
        return sum(self.dims)


class Head(nn.Module):
    """The dense part of a ranker: (dense (B, I), pooled (B, D)) -> logits (B, T). No tables in it."""


class Ranker(nn.Module):
    """Tables and head. Training shards `embeddings`; compression replaces them by a quantized lookup."""

    def __init__(self, embeddings: EmbeddingBagCollection, head: Head, features: Sequence[str]) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.head = head
        self.features = list(features)

    def forward(self, dense_BI: Tensor, sparse: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:  # noqa: N803
        """Logits (B, T), and the pooled embeddings (B, D) that regularisation looks at."""
        pooled = self.embeddings(sparse)
        # a sharded collection may order features by table group: take them by name
        pooled_BD = torch.cat([pooled[name] for name in self.features], dim=1)
        return self.head(dense_BI, pooled_BD), pooled_BD


def mlp(sizes: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU and dropout after each."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.Linear(n_in, n_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)
