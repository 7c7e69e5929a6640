"""A run's configuration: frozen values, validated where they are made, saved beside what they produced.

One YAML file describes a run. This file owns the sections `data`, `model` and `train`; `compress`, `tune` and `serve`
stay plain mappings here and are validated by the packages that own them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, PositiveInt, ValidationError, model_validator

from trainer.data.schema import Config, DataConfig
from trainer.errors import ConfigError


class ModelConfig(Config):
    """The ranker: an embedding table per sparse feature, and a dense head over the pooled embeddings."""

    arch: Literal["dlrm", "dcn"] = "dcn"
    embedding_dim: int = Field(default=16, gt=0, multiple_of=4)
    bottom_mlp: tuple[PositiveInt, ...] = (64,)
    top_mlp: tuple[PositiveInt, ...] = (256, 128)
    cross_layers: int = Field(default=2, ge=0, le=8)
    cross_rank: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    table_init: float = Field(default=0.02, gt=0)


class MetricsConfig(Config):
    """What evaluations count. Within groups: at each `k`; per row: yes where the probability is `threshold` or more."""

    k: tuple[PositiveInt, ...] = Field(default=(10,), max_length=8)
    threshold: float = Field(default=0.5, gt=0, lt=1)


class MlflowConfig(Config):
    """Where a run's metrics go in MLflow; without `tracking_uri`, MLFLOW_TRACKING_URI or a file beside the run."""

    experiment: str = Field(min_length=1)
    tracking_uri: str | None = Field(default=None, min_length=1)


class TrainConfig(Config):
    """How the ranker is trained. `batch_size` is global (the sum over workers), chosen from the row count if absent.

    The defaults were chosen over several seeds on two small real logs for flat optima, not for the best of either.
    """

    epochs: int = Field(default=10, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    workers: int = Field(default=2, ge=1)
    seed: int = 0
    shuffle: bool = True
    table_lr: float = Field(default=0.02, gt=0)
    dense_lr: float = Field(default=0.001, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    table_l2: float = Field(default=0.3, ge=0)
    oov_rate: float = Field(default=0.01, ge=0, lt=0.5)
    evals_per_epoch: int = Field(default=4, ge=1)
    patience: int = Field(default=4, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    metrics: MetricsConfig = MetricsConfig()
    mlflow: MlflowConfig | None = None

    @model_validator(mode="after")
    def _rows_for_every_worker(self) -> TrainConfig:
        if self.batch_size is not None and self.batch_size < self.workers:
            raise ValueError(f"batch_size {self.batch_size} is global: it must be {self.workers} (workers) at least")
        return self

    def batch_rows(self, train_rows: int) -> int:
        """The global batch: as configured, else the power of two nearest to rows / 256, from 256 to 4096."""
        if self.batch_size is not None:
            return self.batch_size
        return min(max(2 ** round(math.log2(max(train_rows, 256) / 256)), 256), 4096)


class RunConfig(Config):
    """One YAML file: everything from the raw log to the served ranker."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: DataConfig
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    compress: dict[str, Any] = Field(default_factory=dict)
    tune: dict[str, Any] = Field(default_factory=dict)
    serve: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known_dims(self) -> RunConfig:
        if self.model.arch == "dlrm" and not self.model.bottom_mlp and self.data.dense_features:
            raise ValueError("model.bottom_mlp: dlrm needs a bottom MLP when the log has numeric features")
        return self


def describe(error: ValidationError, where: str) -> str:
    """Turn pydantic's report into one line a problem: where, what was seen, what the rule is."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(p) for p in problem["loc"]) or "top level"
        rule = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            rule = "unknown key: remove it, or correct its spelling (docs/config.md lists all)"
        elif problem["type"] == "union_tag_invalid":
            rule = f"kind {problem['ctx']['tag']!r} is unknown: use one of {problem['ctx']['expected_tags']}"
        elif problem["type"] == "union_tag_not_found":
            rule = "kind is missing: use categorical, multi or numeric"
        elif problem["type"] == "missing":
            rule = "missing: add it"
        elif not isinstance(problem.get("input"), dict | list | BaseModel):
            rule += f" (got {problem.get('input')!r})"
        lines.append(f"{where}: {path}: {rule}")
    return "; ".join(lines)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises: ConfigError when there is no such file, it is not YAML, or it holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping with name, data, model, train; got {type(content).__name__}")
    return content


def load_run(path: Path, input_override: str | None = None) -> RunConfig:
    """Read and validate a run's YAML; paths in it are taken relative to its own folder and come out absolute.

    Raises: ConfigError with every broken rule in one line.
    """
    path = Path(path)
    content = load_yaml(path)
    data = content.get("data")
    if isinstance(data, dict):
        if input_override is not None:
            data["input"] = str(Path(input_override).absolute()) if "://" not in input_override else input_override
            if isinstance(data.get("split"), dict) and data["split"].get("files") is not None:
                raise ConfigError(f"{path}: data.split.files names the files of each split: leave out --input")
        base = path.absolute().parent
        if isinstance(data.get("input"), str):
            data["input"] = _absolute(data["input"], base)
        files = data["split"].get("files") if isinstance(data.get("split"), dict) else None
        if isinstance(files, dict):
            data["split"]["files"] = {k: _absolute(v, base) for k, v in files.items() if isinstance(v, str)}
    return parse_run(content, str(path))


def parse_run(content: dict[str, Any], where: str) -> RunConfig:
    """Validate a run's mapping. Raises: ConfigError naming `where` it came from."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(describe(error, where)) from None


def dump_run(run: RunConfig) -> str:
    """The run as JSON text, as saved beside what it produced."""
    return json.dumps(run.model_dump(mode="json"), indent=2) + "\n"


def _absolute(path: str, base: Path) -> str:
    return path if "://" in path or Path(path).is_absolute() else str(base / path)
