"""The list of keys in docs/config.md is whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from compress.config import CalibrationPlan, CompressionPlan, SearchConfig, TablePlan, TierPlan
from compress.methods.dense import DensePlan
from serve.config import ServeConfig, SwapConfig
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
from trainer.data.schema import (
    CategoricalFeature,
    Clean,
    DataConfig,
    Ids,
    MultiFeature,
    NumericFeature,
    SequenceFeature,
    Split,
    Task,
)

SECTIONS = [RunConfig, DataConfig, Split, Clean, Ids, Task, CategoricalFeature, MultiFeature, SequenceFeature]
SECTIONS += [NumericFeature]
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
    CalibrationPlan,
    DensePlan,
    TablePlan,
    TierPlan,
    SearchConfig,
    ServeConfig,
    SwapConfig,
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_config_docs_name_every_key(section: type[BaseModel]) -> None:
    words = set(re.findall(r"\w+", (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")))
    assert set(section.model_fields) <= words


@pytest.mark.parametrize(
    "section",
    [Task, MultiFeature, SequenceFeature, ModelConfig, TrainConfig, Schedule, Distill, Stage]
    + [CompressionPlan, TablePlan, TierPlan],
    ids=lambda s: s.__name__,
)
def test_config_docs_have_a_row_for_every_key(section: type[BaseModel]) -> None:
    """A row of a table names the key in its first column; tasks have theirs within the row of `tasks`."""
    text = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
    keys = {k.strip() for line in text.splitlines() if line.startswith("|") for k in line.split("|")[1].split(",")}
    if section is Task:
        row = next(line for line in text.splitlines() if line.startswith("| tasks |"))
        keys = set(re.findall(r"`(\w+)`", row))
    assert set(section.model_fields) <= keys


@pytest.mark.parametrize(
    "field",
    ["arch", "kind", "pooling", "decay", "table_optimizer", "dense_optimizer", "precision", "order", "clip", "unknown"],
)
def test_config_docs_name_every_choice(field: str) -> None:
    """Each word that a key takes is in its row."""
    rows = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in rows if line.startswith(f"| {field} |")]
    kinds = [MultiFeature, SequenceFeature, CategoricalFeature, NumericFeature, ModelConfig, TrainConfig, Schedule]
    kinds += [CompressionPlan, TablePlan]
    words = [a for k in kinds if field in k.model_fields for a in get_args(k.model_fields[field].annotation)]
    assert words
    assert {w for w in words if not re.search(rf"\b{w}\b", row)} == set()


def test_readme_is_short_and_names_the_docs() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    for name in ("docs/limits.md", "docs/glossary.md", "docs/config.md", "make demo", "make test"):
        assert name in text
