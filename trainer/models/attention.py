"""Attention pooling of sequences: what a user did, weighed by what it says of the candidate.

Source: Zhou et al., Deep Interest Network, 2018: a small network scores each (event, candidate) pair and the scores,
not normalised, weigh the sum. An absent position is a zero vector, so it adds nothing whatever its score.

Legend: B batch, S positions, W embedding dim, L sum of the lookups' widths, D sum of the features' embedding dims.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.models.ranker import Head, HeadShape, mlp

HIDDEN = (32, 16)


class AttentionPooling(nn.Module):
    """Pools one sequence against its target."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Sequential(mlp([4 * dim, *HIDDEN]), nn.Linear(HIDDEN[-1], 1))

    def forward(self, sequence_BSW: Tensor, target_BW: Tensor) -> Tensor:
        """(B, S, W), (B, W) -> (B, W)."""
        target = target_BW.unsqueeze(1).expand_as(sequence_BSW)
        pairs = torch.cat([sequence_BSW, target, sequence_BSW - target, sequence_BSW * target], dim=2)
        return (self.score(pairs) * sequence_BSW).sum(1)


class SequenceHead(Head):
    """Pools sequences, then hands one embedding a feature to the head of the architecture."""

    def __init__(self, inner: Head, shape: HeadShape) -> None:
        super().__init__()
        self.inner = inner
        self.dims = list(shape.dims)
        self.counts = list(shape.positions)
        self.targets = list(shape.targets)
        self.widths = [dim * (count or 1) for dim, count in zip(shape.dims, shape.positions, strict=True)]
        self.pools = nn.ModuleDict(
            {str(i): AttentionPooling(shape.dims[i]) for i, count in enumerate(shape.positions) if count is not None}
        )

    @property
    def out(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.inner.out

    def linear_readers(self, feature: int) -> list[tuple[str, int]]:
        """Those of the architecture; sequences and what they attend to are multiplied with each other first."""
        if self.counts[feature] is not None or feature in self.targets:
            return []
        return [(f"inner.{name}", start) for name, start in self.inner.linear_readers(feature)]

    def logits(self, dense_BI: Tensor, looked_up_BL: Tensor) -> Tensor:
        """Logits (B, T)."""
        parts = list(looked_up_BL.split(self.widths, dim=1))
        for key, pool in self.pools.items():
            index = int(key)
            target = self.targets[index]
            assert target is not None
            parts[index] = pool(parts[index].unflatten(1, (-1, self.dims[index])), parts[target])
        return self.inner(dense_BI, torch.cat(parts, dim=1))
