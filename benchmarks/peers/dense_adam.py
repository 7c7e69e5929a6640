"""The peer: the same DCNv2 with nn.Embedding tables and one dense Adam over everything, as FuxiCTR trains it.

The head is the trainer's own class with the same widths, dropout and initial spread, in fp32. Every step computes what
`fuxictr.pytorch.models.rank_model.BaseModel.train_step` does: forward, mean log loss, L2 of whole tables where
asked (lambda / 2 of the squared norm), backward, gradient norm clipped at 10, Adam. Differences in the peer's favour:
its batches lie ready in memory, and the L2 term costs nothing where its weight is 0.

Legend: B batch, F features, D sum of embedding dims.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.data.batch import Batch
from trainer.data.transform import Transform
from trainer.metrics import auc
from trainer.models import build_head

CLIP_NORM = 10.0  # BaseModel.fit's max_gradient_norm
MIN_LR = 1e-6  # BaseModel.lr_decay's


class DenseAdamDCN(nn.Module):
    """nn.Embedding for each feature, concatenated, under the trainer's DCN head."""

    def __init__(self, model: ModelConfig, transform: Transform) -> None:
        super().__init__()
        self.names = list(transform.sparse)
        self.tables = nn.ModuleList()
        for name in self.names:
            table = transform.table_of(name)
            embedding = nn.Embedding(table.num_embeddings, table.embedding_dim)
            nn.init.uniform_(embedding.weight, -model.table_init, model.table_init)
            self.tables.append(embedding)
        self.head = with_torch_dropout(build_head(model, transform))

    def forward(self, dense: Tensor, ids_FB: Tensor) -> Tensor:
        """Logits (B, 1)."""
        looked_up_BD = torch.cat([t(ids) for t, ids in zip(self.tables, ids_FB, strict=True)], dim=1)
        return self.head(dense, looked_up_BD)


def with_torch_dropout(module: nn.Module) -> nn.Module:
    """The module with torch's own dropout, which the peer pays for, in place of the trainer's cheaper one."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(parent, name, nn.Dropout(child.p))
    return module


@dataclass
class Sample:
    """One batch as the peer reads it: dense (B, I), ids (F, B), labels (B, 1)."""

    dense: Tensor
    ids: Tensor
    labels: Tensor


def sample_of(batch: Batch) -> Sample:
    """The same rows in the same order; every feature holds one id a row."""
    assert batch.labels is not None, "training needs labels"
    return Sample(batch.dense, batch.sparse.values().view(len(batch.sparse.keys()), -1), batch.labels)


@dataclass(frozen=True)
class Recipe:
    """How the peer is trained, in FuxiCTR's words."""

    lr: float = 1e-3
    embedding_regularizer: float = 0.0
    epochs: int = 10
    patience: int = 2
    reduce_lr_on_plateau: bool = True


@dataclass
class Peer:
    """A model under training."""

    model: nn.Module
    recipe: Recipe
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.recipe.lr)

    def step(self, sample: Sample) -> float:
        """One training step."""
        self.optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(self.model(sample.dense, sample.ids), sample.labels)
        if self.recipe.embedding_regularizer:
            for table in self.model.tables.parameters():  # type: ignore[union-attr]
                loss = loss + self.recipe.embedding_regularizer / 2 * table.square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        return loss.item()

    def steps(self, samples: Iterable[Sample]) -> Iterator[None]:
        """A step a sample."""
        self.model.train()
        for sample in samples:
            self.step(sample)
            yield

    @torch.no_grad()
    def auc(self, samples: Iterable[Sample]) -> float:
        """AUC of a split."""
        self.model.eval()
        scored = [(s.labels, self.model(s.dense, s.ids)) for s in samples]
        labels, scores = (torch.cat(parts).squeeze(1).double().numpy() for parts in zip(*scored, strict=True))
        return auc(labels, scores)
