"""What to do to each table, and what to search: the `compress` and `tune` sections of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from compress.errors import PlanError
from trainer.config import describe, load_yaml
from trainer.data.schema import Config

Bits = Literal[2, 4, 8, 16, 32]


class TablePlan(Config):
    """One table: bits per value (16 and 32 are floats), and how many rows stay.

    `keep` is a share of the rows, `coverage` a share of the training lookups; the most frequent rows stay, the others
    read one shared centroid.
    """

    bits: Bits = 8
    keep: float | None = Field(default=None, gt=0, le=1)
    coverage: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_cut(self) -> TablePlan:
        if self.keep is not None and self.coverage is not None:
            raise ValueError("give keep (share of rows) or coverage (share of lookups), not both")
        return self


class CompressionPlan(Config):
    """What to do to every table: `default`, but for the tables named in `tables`."""

    version: Literal[1] = 1
    default: TablePlan = TablePlan()
    tables: dict[str, TablePlan] = Field(default_factory=dict)

    def of(self, table: str) -> TablePlan:
        """The plan of one table."""
        return self.tables.get(table, self.default)


class SearchConfig(Config):
    """The `tune` section: the grid of settings, the budget, and the samples.

    `sample_rows` of the validation split score every trial; `gate_rows` others, which no trial sees, decide.
    """

    trials: int = Field(default=24, ge=1)
    bits: tuple[Bits, ...] = Field(default=(8, 4, 2), min_length=1)
    coverage: tuple[float, ...] = Field(default=(1.0, 0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8), min_length=1)
    max_delta_ne: float = Field(default=0.001, gt=0)
    sample_rows: int = Field(default=100_000, ge=100)
    gate_rows: int = Field(default=1_000_000, ge=100)
    seed: int = 0

    @model_validator(mode="after")
    def _shares(self) -> SearchConfig:
        if any(not 0 < c <= 1 for c in self.coverage):
            raise ValueError(f"coverage {list(self.coverage)}: each is a share of lookups, above 0 and at most 1")
        return self


def load_plan(path: Path) -> CompressionPlan:
    """Read a plan's YAML. Raises: PlanError or ConfigError with every broken rule in one line."""
    try:
        return CompressionPlan.model_validate(load_yaml(path))
    except ValidationError as error:
        raise PlanError(describe(error, str(path))) from None
