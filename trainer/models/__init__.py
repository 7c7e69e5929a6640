"""Rankers, built by name from ModelConfig. A new architecture is one file with a head and one line in HEADS.

A head whose first layers are linear says so in `linear_readers`, and low-rank tables cost it nothing after the lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from trainer.config import ModelConfig
from trainer.data.batch import lookup_names
from trainer.data.schema import MultiFeature, SequenceFeature
from trainer.data.transform import Transform
from trainer.models.attention import SequenceHead
from trainer.models.dcn import DCNHead
from trainer.models.deepfm import DeepFMHead
from trainer.models.dlrm import DLRMHead
from trainer.models.mmoe import MMoEHead
from trainer.models.ranker import Head, HeadShape, Ranker

HEADS: dict[str, Callable[[ModelConfig, HeadShape], Head]] = {
    "dcn": DCNHead,
    "deepfm": DeepFMHead,
    "dlrm": DLRMHead,
    "mmoe": MMoEHead,
}


def head_shape(transform: Transform) -> HeadShape:
    """What a head of this data takes and gives."""
    features = list(transform.sparse)
    positions = [transform.positions(name) for name in features]
    targets = [
        None if count is None else features.index(transform.sparse[name].table_name)
        for name, count in zip(features, positions, strict=True)
    ]
    return HeadShape(
        num_dense=len(transform.dense_names),
        dims=tuple(transform.table_of(name).embedding_dim for name in features),
        num_tasks=len(transform.schema.tasks),
        features=tuple(features),
        positions=tuple(positions),
        targets=tuple(targets),
    )


def build_head(model: ModelConfig, transform: Transform) -> Head:
    """The dense part of a ranker, by name."""
    shape = head_shape(transform)
    head = HEADS[model.arch](model, shape)
    return SequenceHead(head, shape) if any(count is not None for count in shape.positions) else head


def pooling_of(transform: Transform, feature: str) -> str:
    """How a feature's bag is pooled: "mean" or "sum" (one id a lookup counts as sum)."""
    spec = transform.sparse[feature]
    return spec.pooling if isinstance(spec, MultiFeature | SequenceFeature) and spec.pooling == "mean" else "sum"


def lookups_of(transform: Transform, features: Sequence[str]) -> list[str]:
    """The names under which features are looked up in their tables."""
    return [lookup for name in features for lookup in lookup_names(name, transform.positions(name))]


def build_ranker(
    model: ModelConfig,
    transform: Transform,
    device: torch.device | str = "meta",
    dims: Mapping[str, int] | None = None,
) -> Ranker:
    """The whole trainable model; tables live on `device` ("meta" when they will be sharded).

    `dims` gives narrower tables than the head expects, for an early stage of progressive training.
    """
    configs = []
    for table in transform.tables.values():
        mean = not transform.weighted and "mean" in {pooling_of(transform, f) for f in table.features}
        configs.append(
            EmbeddingBagConfig(
                name=module_name(table.name),
                num_embeddings=table.num_embeddings,
                embedding_dim=(dims or {}).get(table.name, table.embedding_dim),
                feature_names=lookups_of(transform, table.features),
                pooling=PoolingType.MEAN if mean else PoolingType.SUM,
                weight_init_min=-model.table_init,
                weight_init_max=model.table_init,
            )
        )
    embeddings = EmbeddingBagCollection(tables=configs, device=torch.device(device), is_weighted=transform.weighted)
    return Ranker(embeddings, build_head(model, transform), head_shape(transform))


def module_name(table: str) -> str:
    """A table's name inside the model: prefixed, since torch refuses modules called `type`, `forward` or the like."""
    return f"t_{table}"
