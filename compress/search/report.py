"""The folder of a search as one plain value, for the page (report_html.py) and for a terminal (cluster/reports.py).

In: search.json, trials.jsonl and tune.json of `slimrank tune`, of which any may be missing, as a search that was killed
or an older version left them. Out: a Report. What is not there stays None, an infinity or NaN counts as not there; a
line of trials.jsonl that cannot be read is counted. Nothing is written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from compress.search.halving import fronts
from compress.search.importance import importance
from trainer.config import describe
from trainer.errors import SlimrankError

SEARCH, TRIALS, TUNE, PAGE = "search.json", "trials.jsonl", "tune.json", "report.html"

PartOf = TypeVar("PartOf", bound="Part")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
Count = Annotated[int | None, BeforeValidator(_finite)]


class Part(BaseModel):
    """A JSON object of the folder; keys that this version does not know are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Quality(Part):
    """Loss of quality against the fp32 model on the same rows. Units: shares; .001 of NE is a tenth of a percent."""

    delta_ne: Number = None
    delta_ne_upper: Number = None
    delta_auc: Number = None
    delta_auc_lower: Number = None
    overlap: Number = None


class Rung(Part):
    """How a trial stood after so many rows."""

    rows: Count = None
    delta_ne: Number = None


class Trial(Quality):
    """A line of trials.jsonl; with `error` it has no figures. ms: of 500 candidates, as predicted."""

    number: int = -1
    params: dict[str, Any] = Field(default_factory=dict)
    origin: str | None = None
    rows: Count = None
    stopped: bool = False
    rungs: tuple[Rung, ...] = ()
    table_bytes: Number = None
    artifact_bytes: Number = None
    ms: Number = None
    tasks: dict[str, Quality] = Field(default_factory=dict)
    seconds: Number = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether it has what a point of the plot needs."""
        return self.error is None and self.table_bytes is not None and self.delta_ne is not None


class Point(Trial):
    """A plan on the front. `selection`: the same quality on the selection sample; `measured_ms`: of finalists."""

    measured_ms: Number = None
    selection: Quality | None = None

    @property
    def quality(self) -> Quality:
        """On the selection sample where that was scored, as the peers are; on the search's else."""
        return self.selection or self

    @property
    def best_ms(self) -> float | None:
        """Time of 500 candidates: measured alone where it was, predicted else."""
        return self.ms if self.measured_ms is None else self.measured_ms


class Refused(Part):
    """A plan of the front that the gate did not let pass."""

    index: int
    delta_ne_upper: Number = None


class Gate(Quality):
    """The check of the chosen plan on rows that the search never saw."""

    passed: bool
    budget: Number = None
    rows: Count = None
    tried: tuple[int, ...] = ()
    refused: tuple[Refused, ...] = ()
    confidence: Number = None
    ms: Number = None
    max_ms: Number = None
    rows_to_resolve: Count = None
    tasks: dict[str, Quality] = Field(default_factory=dict)


class Tier(Part):
    """Rows of a table at one number of bits."""

    rows: int
    bits: int


class Table(Part):
    """What the chosen plan makes of a table. Units: bytes; nats of mean log loss of compressing it alone."""

    rows: int
    dim: Count = None
    tiers: tuple[Tier, ...] = ()
    centroids: int = 0
    own_rows: Count = None
    centroid_rows: int = 0
    forgotten_rows: int = 0
    bytes: int
    id_map_bytes: int = 0
    fp32_bytes: Count = None
    predicted: Number = None
    measured: Number = None
    error: Number = None

    @property
    def all_bytes(self) -> int:
        """Rows and id map."""
        return self.bytes + self.id_map_bytes

    @property
    def pruned_share(self) -> float:
        """Share of the rows that read a centroid or the shared row in place of their own."""
        return (self.centroid_rows + self.forgotten_rows) / max(self.rows, 1)


class Peer(Quality):
    """Another library's quantization of the same checkpoint; id maps like ours are counted beside its rows."""

    name: str
    table_bytes: float
    id_map_bytes: int = 0

    @property
    def all_bytes(self) -> float:
        """Rows and id map: what compares with `table_bytes` of a plan."""
        return self.table_bytes + self.id_map_bytes


class Fp32(Part):
    """The checkpoint as it is. ne and auc on the selection sample; ms of 500 candidates."""

    table_bytes: Number = None
    artifact_bytes: Number = None
    ne: Number = None
    auc: Number = None
    ms: Number = None


class Search(Part):
    """search.json: what was asked."""

    command: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    started: str | None = None
    checkpoint: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    fp32: Fp32 = Fp32()
    samples: dict[str, Any] = Field(default_factory=dict)
    knobs: tuple[str, ...] = ()
    hardware: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)


class Tune(Part):
    """tune.json: how the search ended."""

    artifact: str | None = None
    interrupted: bool = False
    front: tuple[Point, ...] = ()
    chosen: int | None = None
    why: str | None = None
    gate: Gate | None = None
    tables: dict[str, Table] = Field(default_factory=dict)
    peers: tuple[Peer, ...] = ()
    fp32_bytes: Number = Field(default=None, validation_alias=AliasChoices("table_bytes_fp32"))
    seconds: Number = None
    lineage: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A search, whether it ended or not. `tune` is None where it did not; then the front is what the trials give.

    `importance`: share of each knob in what set the trials on the front apart, the largest first; empty where too few
    trials tell. `unreadable`: lines of trials.jsonl that a crash cut short or that are none.
    """

    folder: Path
    search: Search
    tune: Tune | None
    trials: tuple[Trial, ...]
    front: tuple[Point, ...]
    importance: Mapping[str, float]
    unreadable: int = 0

    @property
    def name(self) -> str:
        """The run's name, or the folder's."""
        return str(self.search.checkpoint.get("name") or self.folder.name)

    @property
    def finished(self) -> list[Trial]:
        """Trials with figures."""
        return [t for t in self.trials if t.finished]

    @property
    def failed(self) -> list[Trial]:
        """Trials that ended in an error."""
        return [t for t in self.trials if not t.finished]

    @property
    def chosen(self) -> Point | None:
        """The plan that was taken."""
        index = None if self.tune is None else self.tune.chosen
        return self.front[index] if index is not None and 0 <= index < len(self.front) else None

    @property
    def fp32_bytes(self) -> float | None:
        """Bytes of all tables in fp32."""
        ended = None if self.tune is None else self.tune.fp32_bytes
        return ended or self.search.fp32.table_bytes

    @property
    def gate(self) -> Gate | None:
        """The gate, where the search came to it."""
        return None if self.tune is None else self.tune.gate

    @property
    def tables(self) -> list[tuple[str, Table]]:
        """Tables of the chosen plan, by falling bytes."""
        return sorted(self.tune.tables.items(), key=lambda item: -item[1].all_bytes) if self.tune else []

    @property
    def peers(self) -> tuple[Peer, ...]:
        """Other libraries' quantization of the same checkpoint."""
        return () if self.tune is None else self.tune.peers

    @property
    def budget(self) -> float | None:
        """The largest delta NE allowed."""
        if self.gate is not None and self.gate.budget is not None:
            return self.gate.budget
        asked = self.search.config.get("max_delta_ne")
        return float(asked) if isinstance(asked, int | float) else None

    @property
    def status(self) -> str:
        """How it ended, in a few words."""
        if self.tune is None:
            return "the search did not end"
        ended = "the search was interrupted" if self.tune.interrupted else ""
        gate = "" if self.gate is None else "gate passed" if self.gate.passed else "gate not passed"
        return ", ".join(filter(None, [ended, gate])) or "no gate"

    @property
    def summary(self) -> dict[str, Any]:
        """What `slimrank report --json` prints beside the page's path."""
        return {
            "name": self.name,
            "status": self.status,
            "ended": self.tune is not None,
            "trials": len(self.trials),
            "failed_trials": len(self.failed),
            "stopped_trials": sum(t.stopped for t in self.trials),
            "front": len(self.front),
            "chosen": None if self.tune is None else self.tune.chosen,
            "gate_passed": None if self.gate is None else self.gate.passed,
            "importance": dict(self.importance),
            "unreadable_lines": self.unreadable,
        }


def read_report(folder: Path) -> Report:
    """What is in the folder of a search.

    Raises: SlimrankError when it holds no search, or search.json or tune.json is not what a search writes.
    """
    folder = Path(folder).absolute()
    if not any((folder / name).is_file() for name in (SEARCH, TRIALS, TUNE)):
        raise SlimrankError(f"{folder}: not a search: no {SEARCH}, {TRIALS} or {TUNE}; give what 'tune --out' wrote")
    tune = _read(Tune, folder / TUNE)
    trials, unreadable = read_trials(folder / TRIALS)
    front = tune.front if tune is not None else front_of(trials)
    search = _read(Search, folder / SEARCH) or Search()
    points = [(t.params, (t.table_bytes or 0.0, t.delta_ne or 0.0)) for t in trials if t.finished]
    return Report(folder, search, tune, trials, front, importance(points), unreadable)


def _read(kind: type[PartOf], path: Path) -> PartOf | None:
    """A JSON file of the folder; None where it is missing."""
    if not path.is_file():
        return None
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise SlimrankError(describe(error, str(path))) from None
    except (ValueError, RecursionError) as error:
        raise SlimrankError(f"{path}: not JSON ({error}): run the search again with --resume") from None


def read_trials(path: Path) -> tuple[tuple[Trial, ...], int]:
    """Trials in the order they finished, and how many lines are none; a trial without a number gets its line's."""
    trials, unreadable = [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for index, line in enumerate(lines):
        try:
            trial = Trial.model_validate(json.loads(line))
        except (ValueError, RecursionError):
            unreadable += 1
            continue
        trials.append(trial if trial.number >= 0 else trial.model_copy(update={"number": index}))
    return tuple(trials), unreadable


def front_of(trials: Sequence[Trial]) -> tuple[Point, ...]:
    """The Pareto front of bytes and the bound of delta NE, over the trials that were not stopped early."""
    whole = [t for t in trials if t.finished and not t.stopped and t.delta_ne_upper is not None]
    points = np.array([(t.table_bytes or 0.0, t.delta_ne_upper or 0.0) for t in whole]).reshape(-1, 2)
    keep = sorted(np.flatnonzero(fronts(points) == 0).tolist(), key=lambda i: tuple(points[i]))
    return tuple(Point.model_validate(whole[i].model_dump()) for i in keep)
