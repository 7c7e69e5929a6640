"""A short fine-tune of the dense part after compression, always beside the fp32 model fine-tuned the same way.

The tables stay as they are coded: training rows are looked up through the compressed tables, and the head learns to
read what they hold. The control is the fp32 model with the same batches and steps: what it gains is not due to
compression, and what the compressed model gains beyond it is what calibration repairs.

Legend: N rows of a sample, B of a batch, L sum of the lookups' widths, T tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compress.compressor import ResolvedTable
from compress.config import CalibrationPlan
from compress.errors import PlanError
from compress.model import SCORE_ROWS, CompressedModel
from compress.search.working_set import WorkingSet, score, trial
from trainer.config import Distill, RunConfig
from trainer.data.batch import Batch, to_batch
from trainer.data.encoded import Encoded
from trainer.metrics import row_losses
from trainer.models import Head
from trainer.progress import ReportProgress
from trainer.step import Loss


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned head's state. `step`: after which it was the best (0: it was not improved).

    before, after: mean log loss on the held rows, in nats.
    """

    dense: dict[str, Tensor]
    step: int
    before: float
    after: float


@dataclass(frozen=True)
class Calibration:
    """The compressed model's head and the control's, which reads fp32 tables."""

    compressed: Tuned
    control: Tuned

    def describe(self) -> dict[str, dict[str, float]]:
        """What the artifact's manifest says of it."""
        both = {"compressed": self.compressed, "control": self.control}
        return {n: {"step": t.step, "held_loss_before": t.before, "held_loss": t.after} for n, t in both.items()}


@dataclass(frozen=True)
class Reading:
    """A sample as one model reads it."""

    model: CompressedModel
    sample: Encoded
    labels: np.ndarray

    @torch.no_grad()
    def rows(self, index: np.ndarray) -> tuple[Batch, Tensor]:
        """Some rows, and what they look up (B, L)."""
        batch = to_batch(self.sample.take(index))
        return batch, self.model.lookup(batch.sparse)


def calibrate(
    train: WorkingSet,
    held: WorkingSet,
    resolved: Mapping[str, ResolvedTable],
    plan: CalibrationPlan,
    negative_rate: float,
    progress: ReportProgress,
    on_the_way: Sequence[Mapping[str, ResolvedTable]] = (),
) -> Calibration:
    """Fine-tune the head on the rows of `train`, keep its best state on those of `held`; and the same in fp32.

    `on_the_way`: tables with a part of their cuts made (compress/methods/gradual.py), which the head learns to read
    before those of `resolved`; the steps are divided among all. Deterministic by the plan's seed.
    Raises: PlanError when a loss is not finite.
    """
    with torch.random.fork_rng(devices=[]):  # a head is built
        teacher = score(train, None)
    return Calibration(
        fine_tune(train, held, resolved, plan, negative_rate, teacher, progress, on_the_way),
        fine_tune(train, held, None, plan, negative_rate, teacher, progress, [None] * len(on_the_way)),
    )


def fine_tune(
    train: WorkingSet,
    held: WorkingSet,
    resolved: Mapping[str, ResolvedTable] | None,
    plan: CalibrationPlan,
    negative_rate: float,
    teacher_NT: np.ndarray,
    progress: ReportProgress = lambda *_: None,
    on_the_way: Sequence[Mapping[str, ResolvedTable] | None] = (),
) -> Tuned:
    """`calibrate` of one model: the compressed one, or with nothing resolved the fp32 one.

    teacher_NT: the fp32 model's log-odds of the rows of `train`.
    """
    plan = plan.model_copy(update={"steps": max(plan.steps // (len(on_the_way) + 1), 1)})
    found: Tuned | None = None
    with torch.random.fork_rng(devices=[]):  # heads are built, and may drop out
        torch.manual_seed(plan.seed)
        teacher = teacher_NT if plan.target != "labels" else None
        for each in (*on_the_way, resolved):
            own = [w if found is None else with_head(w, found.dense) for w in (train, held)]
            sides = [reading(w, each) for w in own]
            found = tune_head(sides[0], sides[1], train.run, plan, negative_rate, teacher, progress)
    assert found is not None
    return found


def reading(working: WorkingSet, resolved: Mapping[str, ResolvedTable] | None) -> Reading:
    """A working set as the compressed model reads it, or the fp32 one. The head stays as wide as it was trained."""
    whole = None if resolved is None else {name: part.unfolded() for name, part in resolved.items()}
    return Reading(*trial(working, whole), working.labels)


def with_head(working: WorkingSet, dense: Mapping[str, Tensor]) -> WorkingSet:
    """The same sample for a model with another head."""
    return replace(working, dense={key: value.numpy() for key, value in dense.items()})


def tune_head(
    train: Reading,
    held: Reading,
    run: RunConfig,
    plan: CalibrationPlan,
    negative_rate: float,
    teacher_NT: np.ndarray | None,
    progress: ReportProgress,
) -> Tuned:
    """Train a copy of a model's head with Adam, and return its best state on the held rows."""
    head = copy.deepcopy(train.model.head)
    loss_of = Loss(calibration_run(run, plan), negative_rate)
    optimizer = torch.optim.Adam(head.parameters(), lr=plan.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    before = held_loss(head, held)
    best = Tuned(_state(head), 0, before, before)
    every = max(plan.steps // plan.evaluations, 1)
    rng = np.random.default_rng(plan.seed)
    torch.manual_seed(plan.seed)  # dropout
    for step in range(1, plan.steps + 1):
        index = rng.choice(len(train.labels), min(plan.batch_size, len(train.labels)), replace=False)
        batch, looked_up_BL = train.rows(index)
        head.train()
        target = _target(batch, train.labels[index], None if teacher_NT is None else teacher_NT[index])
        loss = loss_of(head(batch.dense, looked_up_BL), looked_up_BL, target, torch.zeros(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == plan.steps:
            after = held_loss(head, held)
            if not np.isfinite(after):
                raise PlanError(f"calibrate: loss is {after} after {step} steps: use a smaller lr than {plan.lr:g}")
            if after < best.after:
                best = Tuned(_state(head), step, before, after)
            progress("calibrate", step, plan.steps)
    return best


@torch.no_grad()
def held_loss(head: Head, held: Reading) -> float:
    """Mean log loss of a head over the tasks of a sample, in nats."""
    head.eval()
    total = 0.0
    for at in range(0, len(held.labels), SCORE_ROWS):
        index = np.arange(at, min(at + SCORE_ROWS, len(held.labels)))
        batch, looked_up_BL = held.rows(index)
        logits_BT = head(batch.dense, looked_up_BL).numpy()
        with np.errstate(invalid="ignore"):  # a diverged head's logits
            total += float(row_losses(held.labels[index], logits_BT).sum())
    return total / held.labels.size


def calibration_run(run: RunConfig, plan: CalibrationPlan) -> RunConfig:
    """A run whose loss is a calibration's: its target in place of the run's own teacher, no penalty on table rows."""
    distill = None
    if plan.target != "labels":
        alpha = 1.0 if plan.target == "teacher" else plan.alpha
        distill = Distill(teacher="fp32", alpha=alpha, temperature=plan.temperature)
    train = run.train.model_copy(update={"distill": distill, "table_l2": 0.0})
    return run.model_copy(update={"train": train})


def _target(batch: Batch, labels_BT: np.ndarray, teacher_BT: np.ndarray | None) -> Batch:
    teacher = None if teacher_BT is None else torch.from_numpy(teacher_BT)
    return replace(batch, labels=torch.from_numpy(labels_BT), teacher=teacher, rows=len(labels_BT))


def _state(head: Head) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in head.state_dict().items()}
