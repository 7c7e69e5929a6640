"""The data section of a run: which columns of a log are features, labels and ids, and how the log is split.

In: the `data` mapping of the YAML. Out: a frozen, validated DataConfig. Reads no file.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Side = Literal["user", "item", "context"]

_COMPARISONS: dict[str, Callable[[Any, float], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


class Config(BaseModel):
    """Base of every section of a run: a value, frozen, that rejects keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Task(Config):
    """One thing to predict: the label is 1 where `column` satisfies `positive`.

    Without `positive` the column must hold 0 and 1 (or booleans). Rows whose label is null are refused in prepare.
    `weight` is what the task's loss counts for beside those of the others.
    """

    name: str = "label"
    column: str
    positive: str | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @field_validator("positive")
    @classmethod
    def _parses(cls, value: str | None) -> str | None:
        if value is not None:
            parse_comparison(value)
        return value


def parse_comparison(text: str) -> tuple[str, float]:
    """Split a rule such as ">= 4" into its operator and number.

    Raises: ValueError when the text is not `OPERATOR NUMBER`.
    """
    match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a comparison: write an operator and a number, such as '>= 4' or '== 1'")
    return match.group(1), float(match.group(2))


def comparison(text: str) -> Callable[[Any, float], Any]:
    """The elementwise operator of a rule such as ">= 4"; works on floats and on arrays alike."""
    return _COMPARISONS[parse_comparison(text)[0]]


class FeatureBase(Config):
    """What all kinds share. `column` is where the log holds it (the name itself by default)."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    column: str | None = None
    side: Side = "context"

    @property
    def source(self) -> str:
        """The raw column this feature is read from."""
        return self.column or self.name


class TableOptions(FeatureBase):
    """Options of features that read an embedding table."""

    dim: int | None = Field(default=None, gt=0, multiple_of=4)
    min_count: int | None = Field(default=None, ge=1)
    hash_size: int | None = Field(default=None, ge=2, le=2**31 - 3)
    table: str | None = None

    @property
    def table_name(self) -> str:
        """The table this feature reads: its own, or the one that `table` names."""
        return self.table or self.name


class CategoricalFeature(TableOptions):
    """One id a row."""

    kind: Literal["categorical"]


class BagFeature(TableOptions):
    """Several ids a row: a list column, or text cut at `separator`."""

    separator: str | None = None


class MultiFeature(BagFeature):
    """A bag of ids a row, pooled by mean or sum; `weights` names a column with a number for each id."""

    kind: Literal["multi"]
    pooling: Literal["mean", "sum"] = "mean"
    max_length: int = Field(default=100, ge=1)
    weights: str | None = None


class SequenceFeature(BagFeature):
    """Ids in the order of time, newest last; the last `max_length` of them are read.

    `attention` pools them by what each says of the candidate: the feature whose table the sequence shares.
    """

    kind: Literal["sequence"]
    pooling: Literal["mean", "sum", "attention"] = "mean"
    max_length: int = Field(default=50, ge=1, le=1000)

    @model_validator(mode="after")
    def _attends_to_a_feature(self) -> SequenceFeature:
        if self.pooling == "attention" and self.table in (None, self.name):
            raise ValueError("pooling: attention needs table: the feature it attends to, whose table it shares")
        return self


class NumericFeature(FeatureBase):
    """A number a row. `bucketize` cuts it at quantiles of the training split and gives each bucket an embedding."""

    kind: Literal["numeric"]
    transform: Literal["standardize", "log1p", "bucketize", "none"] = "standardize"
    buckets: int = Field(default=32, ge=2, le=4096)
    dim: int | None = Field(default=None, gt=0, multiple_of=4)

    @property
    def table_name(self) -> str:
        """The table that a bucketized number reads."""
        return self.name

    @model_validator(mode="after")
    def _dim_has_a_table(self) -> NumericFeature:
        if self.dim is not None and self.transform != "bucketize":
            raise ValueError("'dim' belongs to an embedding table: use it with transform: bucketize")
        return self


Feature = Annotated[CategoricalFeature | MultiFeature | SequenceFeature | NumericFeature, Field(discriminator="kind")]
SparseFeature = CategoricalFeature | MultiFeature | SequenceFeature | NumericFeature


def is_attention(feature: SparseFeature) -> bool:
    """Whether a feature is a sequence that is pooled by attention."""
    return isinstance(feature, SequenceFeature) and feature.pooling == "attention"


def columns_of(feature: SparseFeature | NumericFeature) -> list[str]:
    """The raw columns that a feature is read from: its ids or numbers, and the weights of its ids."""
    weights = feature.weights if isinstance(feature, MultiFeature) else None
    return [feature.source] if weights is None else [feature.source, weights]


def encodings(features: Sequence[SparseFeature | NumericFeature]) -> list[dict[str, Any]]:
    """What of some features decides how rows are encoded: all but the width of their tables."""
    return [{k: v for k, v in f.model_dump().items() if k != "dim"} for f in features]


class Split(Config):
    """How rows become train, val and test: by time, by row order, by a column, or by files.

    `by: timestamp` cuts the time range so that `fractions` of the rows fall before each cut; rows of one instant stay
    together. `by: row` takes the log's own order. `column` holds the words train, val and test. `files` gives globs.
    """

    by: Literal["timestamp", "row"] | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    column: str | None = None
    files: dict[Literal["train", "val", "test"], str] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        ways = [w for w in ("by", "column", "files") if getattr(self, w) is not None]
        if len(ways) != 1:
            raise ValueError(f"give exactly one of by, column, files (got {', '.join(ways) or 'none'})")
        if any(not f > 0 for f in self.fractions) or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions {list(self.fractions)} must be positive and sum to 1")
        if self.files is not None and set(self.files) != {"train", "val", "test"}:
            raise ValueError("files must name train, val and test")
        return self


class Ids(Config):
    """Columns that identify: whom we rank for, what is ranked, and the group that ranking metrics are taken within."""

    user: str | None = None
    item: str | None = None
    group: str | None = None


class Clean(Config):
    """Rows that do not belong: repeated, out of range, or without a value that they must have.

    `duplicates`: rows that agree in all of these columns; the first in log order stays. `ranges`: [low, high] of a
    number, either end null; a missing value passes. `required`: columns that must have a value.
    """

    duplicates: list[str] | None = Field(default=None, min_length=1)
    ranges: dict[str, tuple[float | None, float | None]] = Field(default_factory=dict)
    required: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _ranges_hold_something(self) -> Clean:
        for column, (low, high) in self.ranges.items():
            if low is None and high is None:
                raise ValueError(f"ranges: {column!r} has neither end: give [low, high], one of which may be null")
            if low is not None and high is not None and not low <= high:
                raise ValueError(f"ranges: {column!r} [{low:g}, {high:g}] holds no number: low must not exceed high")
        return self

    @property
    def columns(self) -> list[str]:
        """Every column that a rule looks at, in the order the rules are applied."""
        return list(dict.fromkeys([*self.required, *self.ranges, *(self.duplicates or [])]))


class DataConfig(Config):
    """The data section: a user brings a Parquet or CSV log and this schema, and no code."""

    input: str | None = None
    format: Literal["parquet", "csv"] | None = None
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    split: Split = Split(by="row")
    timestamp: str | None = None
    ids: Ids = Ids()
    title: str | None = None
    min_count: int = Field(default=2, ge=1)
    clean: Clean = Clean()
    sample_negatives: float | None = Field(default=None, gt=0, le=1)
    tasks: list[Task] = Field(min_length=1)
    features: list[Feature] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        names = [f.name for f in self.features]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"feature {name!r} is named twice: feature names are unique")
        tasks = [t.name for t in self.tasks]
        if len(set(tasks)) != len(tasks):
            raise ValueError(f"task names {tasks} must be unique")
        if self.sample_negatives is not None and len(tasks) > 1:
            raise ValueError(
                f"sample_negatives {self.sample_negatives:g}: a row has {len(tasks)} labels ({', '.join(tasks)}), so "
                f"none is a negative: use it with one task"
            )
        if self.split.by == "timestamp" and self.timestamp is None:
            raise ValueError("split by timestamp needs 'timestamp': the column that holds the time of each row")
        if (self.input is None) == (self.split.files is None):
            raise ValueError("give either 'input' or 'split.files'")
        if not self.sparse_features:
            raise ValueError("at least one categorical, multi or bucketized feature is needed: a ranker has tables")
        owners = {f.name: f for f in self.sparse_features}
        for feature in self.sparse_features:
            owner = owners.get(feature.table_name)
            if owner is None or owner.table_name != owner.name:
                raise ValueError(
                    f"feature {feature.name!r}: table {feature.table_name!r} must be a feature with its own table"
                )
            if owner is not feature and isinstance(owner, NumericFeature):
                raise ValueError(f"feature {feature.name!r}: table {owner.name!r} holds buckets of a number, not ids")
            if owner is not feature and isinstance(feature, TableOptions):
                own = [k for k in ("dim", "min_count", "hash_size") if getattr(feature, k) is not None]
                if own:
                    raise ValueError(f"feature {feature.name!r} shares table {owner.name!r}: set {own[0]} there")
            if is_attention(feature) and is_attention(owner):
                raise ValueError(f"feature {feature.name!r}: attends to {owner.name!r}, which is itself a sequence")
        return self

    @property
    def weighted(self) -> bool:
        """Whether ids carry weights into their pooled sum: where a feature names some, or where one table is pooled
        in two ways (a lookup has one pooling a table, so means become weighted sums)."""
        bags = [f for f in self.sparse_features if isinstance(f, MultiFeature | SequenceFeature)]
        if any(isinstance(f, MultiFeature) and f.weights is not None for f in bags):
            return True
        poolings: dict[str, set[str]] = {}
        for f in bags:
            if f.pooling != "attention":
                poolings.setdefault(f.table_name, set()).add(f.pooling)
        return any(len(p) > 1 for p in poolings.values())

    @property
    def sparse_features(self) -> list[SparseFeature]:
        """Features that read an embedding table, in the order the model concatenates them."""
        return [f for f in self.features if not isinstance(f, NumericFeature) or f.transform == "bucketize"]

    @property
    def dense_features(self) -> list[NumericFeature]:
        """Features that reach the model as numbers."""
        return [f for f in self.features if isinstance(f, NumericFeature) and f.transform != "bucketize"]

    @property
    def columns(self) -> list[str]:
        """Every raw column that preparing needs, each once."""
        extra = [self.timestamp, self.ids.user, self.ids.item, self.ids.group, self.title, self.split.column]
        wanted = [c for f in self.features for c in columns_of(f)] + [t.column for t in self.tasks]
        wanted += [c for c in extra if c]
        wanted += self.clean.columns
        return list(dict.fromkeys(wanted))
