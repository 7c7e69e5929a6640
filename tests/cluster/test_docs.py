"""The list of keys in docs/config.md is whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from compress.config import CompressionPlan, SearchConfig, TablePlan
from serve.config import ServeConfig
from trainer.config import (
    Distill,
    MetricsConfig,
    MlflowConfig,
    ModelConfig,
    Plateau,
    RunConfig,
    Schedule,
    ShardingConfig,
    Stage,
    TableSharding,
    TrainConfig,
    Workers,
)
from trainer.data.schema import CategoricalFeature, Clean, DataConfig, Ids, MultiFeature, NumericFeature, Split, Task

SECTIONS = [RunConfig, DataConfig, Split, Clean, Ids, Task, CategoricalFeature, MultiFeature, NumericFeature]
SECTIONS += [
    ModelConfig,
    TrainConfig,
    ShardingConfig,
    TableSharding,
    MetricsConfig,
    MlflowConfig,
    Distill,
    Plateau,
    Schedule,
    Stage,
    Workers,
    CompressionPlan,
    TablePlan,
    SearchConfig,
    ServeConfig,
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_config_docs_name_every_key(section: type[BaseModel]) -> None:
    words = set(re.findall(r"\w+", (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")))
    assert set(section.model_fields) <= words


def test_readme_is_short_and_names_the_docs() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    for name in ("docs/limits.md", "docs/glossary.md", "docs/config.md", "make demo", "make test"):
        assert name in text
