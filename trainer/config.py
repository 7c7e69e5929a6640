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
from pydantic import BaseModel, Field, PositiveInt, ValidationError, field_validator, model_validator

from trainer.data.schema import Config, DataConfig
from trainer.errors import ConfigError


class ModelConfig(Config):
    """The ranker: an embedding table per sparse feature, and a dense head over the pooled embeddings."""

    arch: Literal["dcn", "deepfm", "dlrm", "mmoe"] = "dcn"
    embedding_dim: int = Field(default=16, gt=0, multiple_of=4)
    bottom_mlp: tuple[PositiveInt, ...] = (64,)
    top_mlp: tuple[PositiveInt, ...] = (256, 128)
    cross_layers: int = Field(default=2, ge=0, le=8)
    cross_rank: int = Field(default=32, ge=1)
    experts: int = Field(default=4, ge=1, le=64)
    tower_mlp: tuple[PositiveInt, ...] = (64,)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    batch_norm: bool = False
    table_init: float = Field(default=0.02, gt=0)


class Workers(Config):
    """An elastic number of workers: Ray Train takes what the cluster has between the two, and resizes."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Schedule(Config):
    """What the learning rates are multiplied by: a linear warm-up, then a decay over all steps down to `end`."""

    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["none", "linear", "cosine"] = "none"
    end: float = Field(default=0.0, ge=0, le=1)


class Plateau(Config):
    """Multiply the learning rates by `factor` after `patience` evaluations without a better validation NE."""

    factor: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=2, ge=1)


class Distill(Config):
    """Train against a larger model's log-odds as well: (1 - alpha) hard loss + alpha soft loss at a temperature.

    `teacher` is a checkpoint or a training run's folder, trained on the same prepared rows.
    """

    teacher: str
    temperature: float = Field(default=1.0, gt=0)
    alpha: float = Field(default=0.5, gt=0, le=1)


class Stage(Config):
    """One stage of progressive training: what it takes less of than the run as a whole."""

    epochs: int = Field(default=1, ge=1)
    data_fraction: float = Field(default=1.0, gt=0, le=1)
    embedding_dim: int | None = Field(default=None, gt=0, multiple_of=4)
    batch_size: int | None = Field(default=None, ge=1)


ShardingType = Literal["auto", "table_wise", "column_wise", "row_wise", "table_row_wise", "data_parallel"]
Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"]


class TableSharding(Config):
    """How one table is placed. `type` is train.sharding.default where absent; `kernel` is TorchRec's compute kernel."""

    type: ShardingType | None = None
    kernel: Kernel | None = None
    min_partition: int | None = Field(default=None, gt=0, multiple_of=4)
    cache_load_factor: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _options_of_its_kind(self) -> TableSharding:
        if self.min_partition is not None and self.type != "column_wise":
            raise ValueError("min_partition is the least width of a column shard: use it with type: column_wise")
        if self.cache_load_factor is not None and self.kernel != "fused_uvm_caching":
            raise ValueError("cache_load_factor is of the cache of kernel: fused_uvm_caching: set that kernel too")
        if self.kernel == "dense" and self.type not in (None, "data_parallel"):
            raise ValueError("kernel dense is that of data_parallel tables: leave it out, or use type: data_parallel")
        if self.type == "data_parallel" and self.kernel not in (None, "dense"):
            raise ValueError(f"a data_parallel table has kernel dense: leave out kernel {self.kernel}")
        return self


class ShardingConfig(Config):
    """How tables are placed on workers. `tables` overrules `default` by table name; a bare word there is a type."""

    default: ShardingType = "table_wise"
    tables: dict[str, TableSharding] = Field(default_factory=dict)
    memory_share: float = Field(default=0.7, gt=0, le=1)
    comms: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"

    @field_validator("tables", mode="before")
    @classmethod
    def _words_are_types(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"type": table} if isinstance(table, str) else table for name, table in value.items()}

    def of(self, table: str) -> TableSharding:
        """What is asked of one table, its type filled in."""
        asked = self.tables.get(table, TableSharding())
        return asked if asked.type is not None else asked.model_copy(update={"type": self.default})


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
    workers: PositiveInt | Workers = 2
    max_failures: int = Field(default=3, ge=-1)
    seed: int = 0
    shuffle: bool = True
    table_optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    dense_optimizer: Literal["adamw", "adam", "adagrad", "sgd"] = "adamw"
    table_lr: float = Field(default=0.02, gt=0)
    dense_lr: float = Field(default=0.001, gt=0)
    schedule: Schedule = Schedule()
    plateau: Plateau | None = None
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["auto", "highest", "medium", "bf16"] = "auto"
    pipeline: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    table_l2: float = Field(default=0.3, ge=0)
    oov_rate: float = Field(default=0.01, ge=0, lt=0.5)
    evals_per_epoch: int = Field(default=4, ge=1)
    patience: int = Field(default=4, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    distill: Distill | None = None
    stages: tuple[Stage, ...] = ()
    sharding: ShardingConfig = ShardingConfig()
    metrics: MetricsConfig = MetricsConfig()
    mlflow: MlflowConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        for size in (self.batch_size, *(s.batch_size for s in self.stages)):
            if size is not None and size < self.max_workers:
                raise ValueError(f"batch_size {size} is global: it must be {self.max_workers} (workers) at least")
        dims = [s.embedding_dim for s in self.stages if s.embedding_dim is not None]
        if dims != sorted(dims):
            raise ValueError(f"stages: embedding_dim may only grow from stage to stage, not {dims}")
        if self.stages and self.stages[-1].embedding_dim is not None:
            raise ValueError("stages: the last stage trains the whole model: leave out its embedding_dim")
        return self

    @property
    def max_workers(self) -> int:
        """The most workers the run may have."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def min_workers(self) -> int:
        """The fewest workers the run goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def all_stages(self) -> tuple[Stage, ...]:
        """The stages as configured, or the run as one stage."""
        return self.stages or (Stage(epochs=self.epochs, batch_size=self.batch_size),)

    def batch_rows(self, train_rows: int, stage: int = -1) -> int:
        """The global batch of a stage: as configured, else the power of two nearest to rows / 256, from 256 to 4096."""
        size = self.all_stages[stage].batch_size or self.batch_size
        if size is not None:
            return size
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

    def table_dims(self, stage: int | None = None) -> dict[str, int]:
        """Each table's embedding dim: as the model has it, or in an earlier stage of training."""
        own = {f.name: f.dim or self.model.embedding_dim for f in self.data.sparse_features if f.table_name == f.name}
        cap = None if stage is None else self.train.all_stages[stage].embedding_dim
        return own if cap is None else {name: min(dim, cap) for name, dim in own.items()}


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
            rule = "kind is missing: use categorical, multi, sequence or numeric"
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
    distill = content["train"].get("distill") if isinstance(content.get("train"), dict) else None
    if isinstance(distill, dict) and isinstance(distill.get("teacher"), str):
        distill["teacher"] = _absolute(distill["teacher"], path.absolute().parent)
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
