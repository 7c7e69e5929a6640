"""Rankers, built by name from ModelConfig. A new architecture is one file with a head and one line in HEADS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from trainer.config import ModelConfig
from trainer.data.schema import MultiFeature
from trainer.data.transform import Transform
from trainer.models.dcn import DCNHead
from trainer.models.dlrm import DLRMHead
from trainer.models.ranker import Head, HeadShape, Ranker

HEADS: dict[str, Callable[[ModelConfig, HeadShape], Head]] = {
    "dcn": DCNHead,
    "dlrm": DLRMHead,
}


def head_shape(transform: Transform) -> HeadShape:
    """What a head of this data takes and gives."""
    dims = tuple(transform.table_of(name).embedding_dim for name in transform.sparse)
    return HeadShape(len(transform.dense_names), dims, len(transform.schema.tasks))


def build_head(model: ModelConfig, transform: Transform) -> Head:
    """The dense part of a ranker, by name."""
    return HEADS[model.arch](model, head_shape(transform))


def pooling_of(transform: Transform, feature: str) -> str:
    """How a feature's bag is pooled: "mean" or "sum" (one id a row counts as sum)."""
    spec = transform.sparse[feature]
    return spec.pooling if isinstance(spec, MultiFeature) else "sum"


def build_ranker(model: ModelConfig, transform: Transform, device: torch.device | str = "meta") -> Ranker:
    """The whole trainable model; tables live on `device` ("meta" when they will be sharded)."""
    configs = []
    for table in transform.tables.values():
        pooling = _one_pooling(transform, table.features)
        configs.append(
            EmbeddingBagConfig(
                name=module_name(table.name),
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=list(table.features),
                pooling=PoolingType.MEAN if pooling == "mean" else PoolingType.SUM,
                weight_init_min=-model.table_init,
                weight_init_max=model.table_init,
            )
        )
    embeddings = EmbeddingBagCollection(tables=configs, device=torch.device(device))
    return Ranker(embeddings, build_head(model, transform), list(transform.sparse))


def module_name(table: str) -> str:
    """A table's name inside the model: prefixed, since torch refuses modules called `type`, `forward` or the like."""
    return f"t_{table}"


def _one_pooling(transform: Transform, features: Sequence[str]) -> str:
    # a single id pools alike by mean and by sum, so it goes with whatever the table's bags want
    bags = {pooling_of(transform, f) for f in features if isinstance(transform.sparse[f], MultiFeature)}
    assert len(bags) < 2, "the schema refuses a table that is pooled in two ways"
    return bags.pop() if bags else "sum"
