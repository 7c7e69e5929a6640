"""What to do to each table, and what to search: the `compress` and `tune` sections of a run."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from compress.errors import PlanError
from compress.methods.codebook import MAX_CENTROIDS
from compress.methods.codec import Clip
from compress.methods.dense import DensePlan
from compress.methods.prune import Score
from trainer.config import describe, load_yaml
from trainer.data.schema import Config

Bits = Literal[2, 4, 8, 16, 32]
TierBits = Literal[0, 2, 4, 8, 16, 32]
Unknown = Literal["own", "shared"]
T = TypeVar("T")


class Cut(Config):
    """How far down the ranks something reaches: a share of the rows, a share of the training lookups, or a number."""

    keep: float | None = Field(default=None, gt=0, le=1)
    coverage: float | None = Field(default=None, gt=0, le=1)
    rows: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_cut(self) -> Cut:
        if sum(x is not None for x in (self.keep, self.coverage, self.rows)) > 1:
            raise ValueError("give one of keep (share of rows), coverage (share of lookups) and rows")
        return self

    @property
    def whole(self) -> bool:
        """Whether it reaches all rows."""
        return self.rows is None and self.coverage is None and self.keep in (None, 1.0)


class TierPlan(Cut):
    """The rows up to a cut, behind those of the tier before, at `bits` a value.

    With bits 0, in the last tier only, each of them reads the nearest of the table's `centroids`. `clip`: the table's,
    where it is not given.
    """

    bits: TierBits
    clip: Clip | None = None


class TablePlan(Cut):
    """One table. The first rows by rank stay, up to the cut; the others read the nearest of some shared centroids.

    `bits` a value (16 and 32 are floats), or `tiers` of their own bits, of which the last one's cut is the table's.
    `clip`: how quantized rows are scaled, by their smallest and largest value or by a search for the least error.
    `centroids`: how many. `unknown`: with "shared" the ids beyond the last tier leave the id map and read one row
    together with the ids that training never saw; with "own" those read a row of theirs.
    `rank` stores rows as that many numbers beside a matrix that widens what was looked up; `energy` is the share of the
    rows' squared length that the rank must keep; `columns` stores that many of the columns as they are.
    """

    bits: Bits = 8
    tiers: tuple[TierPlan, ...] = ()
    clip: Clip = "search"
    centroids: int = Field(default=1, ge=1, le=MAX_CENTROIDS)
    unknown: Unknown = "own"
    rank: int | None = Field(default=None, ge=4)
    energy: float | None = Field(default=None, gt=0, lt=1)
    columns: int | None = Field(default=None, ge=4)

    @model_validator(mode="after")
    def _one_way(self) -> TablePlan:
        if self.tiers and ("bits" in self.model_fields_set or not self.whole):
            raise ValueError("give tiers, or bits and a cut for the whole table, not both")
        if any(later.bits > first.bits for first, later in itertools.pairwise(self.tiers)):
            raise ValueError(f"tiers {[t.bits for t in self.tiers]}: later ones have fewer bits, or as many")
        if sum(x is not None for x in (self.rank, self.energy, self.columns)) > 1:
            raise ValueError("give one of rank, energy and columns")
        if any(tier.bits == 0 for tier in self.tiers[:-1]):
            raise ValueError("bits 0 (rows that read a centroid) is for the last tier")
        if self.unknown == "shared" and self.centroids > 1 and not (self.tiers and self.tiers[-1].bits == 0):
            raise ValueError("unknown: shared with centroids needs a last tier of bits 0: the rows that read them")
        return self

    @model_serializer(mode="wrap")
    def _without_unused_bits(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `bits` out beside tiers, so that what is written can be read again."""
        return {key: value for key, value in plain(self).items() if key != "bits" or not self.tiers}

    @property
    def all_tiers(self) -> tuple[TierPlan, ...]:
        """The tiers; one where there is one setting for all rows."""
        if self.tiers:
            return self.tiers
        return (TierPlan(bits=self.bits, keep=self.keep, coverage=self.coverage, rows=self.rows),)


class CalibrationPlan(Config):
    """A short fine-tune of the dense part on training rows that are read through the compressed tables.

    `target`: the labels, the fp32 model's log-odds ("teacher"), or both, of which the teacher's has weight `alpha`;
    `temperature` softens the teacher. With `rounds` the plan's cuts are made little by little, the steps divided among
    the rounds. The step with the least loss on `held_rows` of the validation split is kept, the
    one before the first step included.
    """

    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=1024, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    target: Literal["labels", "teacher", "both"] = "teacher"
    alpha: float = Field(default=0.5, gt=0, lt=1)
    temperature: float = Field(default=1.0, gt=0)
    rounds: int = Field(default=1, ge=1, le=100)
    evaluations: int = Field(default=10, ge=1)
    held_rows: int = Field(default=50_000, ge=1)
    seed: int = 0


class CompressionPlan(Config):
    """What to do to every table: `default`, but for the tables named in `tables`.

    `order` is what ranks a table's rows: how often they are looked up, their length, the product, or what the loss
    would lose by cutting each ("fisher"). `dense` is what to do to the layers above the tables, `calibrate` fine-tunes
    them afterwards. `checkpoint` names the weights that the plan was made for, where it does.
    """

    version: Literal[1] = 1
    order: Score = "frequency"
    default: TablePlan = TablePlan()
    tables: dict[str, TablePlan] = Field(default_factory=dict)
    dense: DensePlan = DensePlan()
    checkpoint: str | None = None
    calibrate: CalibrationPlan | None = None

    def of(self, table: str) -> TablePlan:
        """The plan of one table."""
        return self.tables.get(table, self.default)


class Range(Config):
    """A knob that takes any number from `low` to `high`; with `log`, evenly by ratio. `points`: of them in a grid."""

    low: float
    high: float
    log: bool = False
    points: int = Field(default=8, ge=2, le=1000)

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low {self.low:g} is below high {self.high:g}, both finite: swap them, or give a choice")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, it is {self.low:g}")
        return self


class Choice(Config, Generic[T]):
    """A knob that takes one of some values; with a single one it is fixed."""

    choice: tuple[T, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Choice:
        if any(a == b for a, b in itertools.combinations(self.choice, 2)):
            raise ValueError("a value is there twice")
        return self


def _kind_of_knob(value: Any) -> str:
    return "choice" if isinstance(value, Choice) or (isinstance(value, dict) and "choice" in value) else "range"


Number = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choice[float], Tag("choice")], Discriminator(_kind_of_knob)
]


class Space(Config):
    """What a search varies; whatever else a plan says follows from these in closed form.

    `budget`: bytes of the tables, as a share of fp32. `bits`: what rows may be coded at. `centroids`: how many of them
    a table's tail may read, at most. `trust`: how far the tables' predicted losses are corrected by what compressing
    each was measured to cost (0: not at all). `tier_price`: relative loss of NE that a millisecond of looking up 500
    candidates is worth, by which tiers are merged. `dense`: what to do to the layers above the tables.
    """

    budget: Number = Range(low=0.003, high=0.6, log=True)
    bits: Choice[tuple[Literal[2, 4, 8, 16], ...]] = Choice(choice=((2, 4, 8, 16), (4, 8, 16), (8, 16)))
    centroids: Choice[int] = Choice(choice=(MAX_CENTROIDS, 1))
    trust: Number = Range(low=0.0, high=1.0)
    tier_price: Number = Range(low=1e-5, high=1e-2, log=True)
    dense: Choice[DensePlan] = Choice(choice=(DensePlan(), DensePlan(dtype="int8")))

    @model_validator(mode="after")
    def _in_bounds(self) -> Space:
        for name, low, high in (("budget", 0.0, 1.0), ("trust", 0.0, 1.0), ("tier_price", 0.0, math.inf)):
            knob = getattr(self, name)
            values = (knob.low, knob.high) if isinstance(knob, Range) else knob.choice
            if not all(low <= v <= high for v in values) or (name == "budget" and min(values) <= 0):
                raise ValueError(f"{name} {list(values)}: from {low:g} to {high:g}")
        if any(not bits for bits in self.bits.choice):
            raise ValueError("bits: each choice is a list with at least one of 2, 4, 8 and 16")
        if any(not 1 <= count <= MAX_CENTROIDS for count in self.centroids.choice):
            raise ValueError(f"centroids {list(self.centroids.choice)}: from 1 to {MAX_CENTROIDS}")
        return self


class SearchConfig(Config):
    """The `tune` section: how long to search and how, what must hold, and the samples.

    `trials` in all, within `minutes`. `algorithm` draws the settings. What must hold, by the one-sided 95% bound:
    `max_delta_ne`; and `max_table_bytes` ("2%", "300MB"), `max_ms` (500 candidates, one thread) where they are given.

    `sample_rows` of the validation split score the trials, at first `rungs` of them, and the best one in `eta` goes on
    at each; `selection_rows` others choose from the front, and `gate_rows`, which no one saw before, decide, for
    `gate_tries` plans at most. `start` plans from the closed form come first. `finalists` of the front are measured
    alone and, unless `calibrate` is null, tried with a fine-tuned head as well.
    """

    trials: int = Field(default=48, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    algorithm: Literal["tpe", "nsga2", "random", "grid"] = "tpe"
    space: Space = Space()
    max_delta_ne: float = Field(default=0.001, gt=0)
    max_table_bytes: str | None = None
    max_ms: float | None = Field(default=None, gt=0)
    sample_rows: int = Field(default=100_000, ge=100)
    selection_rows: int = Field(default=100_000, ge=100)
    gate_rows: int = Field(default=1_000_000, ge=100)
    rungs: tuple[float, ...] = (0.1, 0.3, 1.0)
    eta: int = Field(default=3, ge=2)
    start: int = Field(default=8, ge=1)
    finalists: int = Field(default=4, ge=1)
    gate_tries: int = Field(default=8, ge=1)
    calibrate: CalibrationPlan | None = CalibrationPlan()
    seed: int = 0

    @model_validator(mode="after")
    def _rising(self) -> SearchConfig:
        if not self.rungs or self.rungs[-1] != 1.0 or sorted(set(self.rungs)) != list(self.rungs) or self.rungs[0] <= 0:
            raise ValueError(f"rungs {list(self.rungs)}: rising shares of the sample, the last one is 1")
        return self


def load_plan(path: Path) -> CompressionPlan:
    """Read a plan's YAML. Raises: PlanError or ConfigError with every broken rule in one line."""
    try:
        return CompressionPlan.model_validate(load_yaml(path))
    except ValidationError as error:
        raise PlanError(describe(error, str(path))) from None
