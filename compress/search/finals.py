"""What is done to a few plans after the trials: heads fine-tuned, scored on other rows, measured alone.

A finalist is a trial of the front, as it is or with a head that was fine-tuned on training rows read through its
tables. Functions of (what all share, one item) are run side by side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from compress.catalogue import item_transform, request_transform
from compress.compressor import ResolvedTable, resolve
from compress.config import CalibrationPlan, CompressionPlan
from compress.dense import make_runtime, sides_of
from compress.methods.calibrate import Tuned, fine_tune
from compress.methods.dense import DensePlan, simplify
from compress.onnx_head import head_of
from compress.search.preparation import Lessons
from compress.search.trials import Sample, Shared, quality, sizes
from compress.search.working_set import WorkingSet, score, trial
from trainer.data.encoded import Encoded
from trainer.data.transform import Transform

CANDIDATES = 500
TIMED_RUNS = 31
NEAR = 4.0  # times the limit of delta NE: calibration was seen to halve a loss, so farther plans are not tried


@dataclass(frozen=True)
class Finalist:
    """A plan that is looked at closely. head: what scores (None: the checkpoint's own); tuned: its fp32 weights."""

    trial: Mapping[str, Any]
    plan: CompressionPlan
    head: nn.Module | None
    tuned: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Classroom:
    """What heads are fine-tuned with: training rows, held rows, and rows to convert heads by."""

    shared: Shared
    train: Sample
    held: WorkingSet
    lessons: Lessons
    plan: CalibrationPlan
    negative_rate: float


def finalist_of(shared: Shared, trial_line: Mapping[str, Any]) -> Finalist:
    """A trial of the front, as it is."""
    plan = CompressionPlan.model_validate(trial_line["plan"])
    return Finalist(trial_line, plan, shared.variants[str(trial_line["params"]["dense"])].head)


def worth_calibrating(front: Sequence[Mapping[str, Any]], max_delta_ne: float, count: int) -> list[Mapping[str, Any]]:
    """The smallest artifacts whose loss is not out of a calibration's reach, `count` at most."""
    near = [t for t in front if t["delta_ne"] <= NEAR * max_delta_ne]
    return sorted(near, key=lambda t: t["artifact_bytes"])[:count]


def tuned_control(room: Classroom) -> Tuned:
    """The fp32 model's head fine-tuned as the finalists' are."""
    return fine_tune(room.train.working, room.held, None, room.plan, room.negative_rate, room.train.reference)


def calibrated(room: Classroom, finalist: Finalist) -> Finalist:
    """A finalist with its head fine-tuned and converted as its plan asks."""
    begun, train = time.monotonic(), room.train.working
    resolved = resolve(finalist.plan, room.shared.planner.profiles)
    tuned = fine_tune(train, room.held, resolved, room.plan, room.negative_rate, room.train.reference)
    head: nn.Module = head_of(train.run, train.transform, tuned.dense)
    if finalist.plan.dense != DensePlan():
        head = room.lessons.convert(head, finalist.plan.dense)
    plan = finalist.plan.model_copy(update={"calibrate": room.plan})
    rungs = room.shared.rungs
    logits = np.concatenate([score(r.working, resolved, head) for r in rungs])
    labels, reference = (np.concatenate([getattr(r, name) for r in rungs]) for name in ("labels", "reference"))
    line = {
        **finalist.trial,
        "params": {**finalist.trial["params"], "calibrate": f"{room.plan.steps} steps"},
        "origin": "calibrated",
        **sizes(room.shared, plan, resolved, room.shared.variants[str(finalist.trial["params"]["dense"])]),
        **quality(labels, logits, reference, tasks_of(train.transform), room.shared.seed),
        "rungs": [],
        "plan": plan.model_dump(mode="json", exclude_defaults=True),
        "seconds": round(time.monotonic() - begun, 3),
    }
    return Finalist(line, plan, head, tuned.dense)


def judged(shared: tuple[Shared, Sample], finalist: Finalist) -> dict[str, Any]:
    """Quality of a finalist on other rows than the search's."""
    search, sample = shared
    logits = score(sample.working, resolve(finalist.plan, search.planner.profiles), finalist.head)
    tasks = tasks_of(sample.working.transform)
    return quality(sample.labels, logits, sample.reference, tasks, search.seed + 1)


def measured_ms(sample: Sample, finalist: Finalist, resolved: Mapping[str, ResolvedTable]) -> float:
    """Median milliseconds of 500 candidates of one request, ranked as a server does, from the sample's tables.

    Processor time of this thread, which does all of it: other processes on the machine do not count.
    """
    model, encoded = trial(sample.working, resolved)
    head = simplify(model.head) if finalist.head is None else finalist.head
    model.head = make_runtime(head, sides_of(model.transform), finalist.plan.dense)
    rows = encoded.take(np.resize(np.arange(len(encoded)), CANDIDATES))
    request = side(model.transform, request_transform(model.transform), rows.take(np.zeros(1, dtype=np.int64)))
    items = side(model.transform, item_transform(model.transform), rows)
    times = []
    for _ in range(TIMED_RUNS):
        begun = time.thread_time()
        model.rank(request, items)
        times.append(1000 * (time.thread_time() - begun))
    return statistics.median(times)


def side(transform: Transform, part: Transform, encoded: Encoded) -> Encoded:
    """The features of one side of encoded rows."""
    columns = [transform.dense_names.index(name) for name in part.dense_names]
    return Encoded({name: encoded.sparse[name] for name in part.sparse}, encoded.dense[:, columns])


def tasks_of(transform: Transform) -> list[str]:
    """Names of the tasks."""
    return [t.name for t in transform.schema.tasks]
