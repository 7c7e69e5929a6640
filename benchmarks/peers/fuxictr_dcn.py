"""The same DCNv2 in FuxiCTR's own classes: its BaseModel and train_step, its FeatureEmbedding, its Adam.

FuxiCTR's DCNv2 has a full-rank cross and embeds numbers; for the same arithmetic on both sides the head here is the
trainer's (low-rank cross, numbers as they are) with torch's dropout. Its loader is left out: batches lie in memory.
Needs `fuxictr` on the path (pip install --no-deps --target DIR fuxictr polars polars-runtime-32 h5py; PYTHONPATH=DIR).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FeatureEmbedding
from fuxictr.pytorch.models import BaseModel
from torch import Tensor

from benchmarks.peers.dense_adam import CLIP_NORM, Sample, with_torch_dropout
from trainer.config import ModelConfig
from trainer.data.transform import Transform
from trainer.models import build_head

LABEL = "label"
NUMBERS = "numbers"


class FuxiDCN(BaseModel):
    """BaseModel with the trainer's DCN head over its FeatureEmbedding."""

    def __init__(self, model: ModelConfig, transform: Transform, feature_map: FeatureMap, folder: Path) -> None:
        super().__init__(feature_map, verbose=0, model_root=str(folder), metrics=["AUC"])
        self.embedding_layer = FeatureEmbedding(feature_map, model.embedding_dim)
        self.head = with_torch_dropout(build_head(model, transform))
        self.compile("adam", "binary_crossentropy", 1e-3)
        self._max_gradient_norm = CLIP_NORM

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Probabilities (B, 1)."""
        ids = {name: inputs[name] for name in self.feature_map.features}
        looked_up = self.embedding_layer(ids, flatten_emb=True)
        return {"y_pred": torch.sigmoid(self.head(inputs[NUMBERS], looked_up))}

    def steps(self, samples: Iterable[Sample]) -> Iterator[None]:
        """A step of `train_step` a sample, as train_epoch takes it."""
        self.train()
        names = list(self.feature_map.features)
        for sample in samples:
            batch: dict[str, Any] = dict(zip(names, sample.ids, strict=True))
            self.train_step(batch | {NUMBERS: sample.dense, LABEL: sample.labels}).item()
            yield


def build(model: ModelConfig, transform: Transform, folder: Path) -> FuxiDCN:
    """The model over a transform's features."""
    feature_map = FeatureMap("bench", str(folder))
    feature_map.labels = [LABEL]
    feature_map.features = OrderedDict(
        (name, {"source": "", "type": "categorical", "vocab_size": transform.table_of(name).num_embeddings})
        for name in transform.sparse
    )
    feature_map.num_fields = len(feature_map.features)
    return FuxiDCN(model, transform, feature_map, folder)
