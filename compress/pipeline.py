"""`slimrank compress`: open, profile, plan, compress, compare. The command's work without its printing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.artifact import load_artifact
from compress.compressor import ResolvedTable, check_made_for, data_of, resolve
from compress.compressor import compress as write_artifact
from compress.config import CompressionPlan, load_plan
from compress.dense import sides_of
from compress.errors import PlanError
from compress.evaluate import score_checkpoint
from compress.methods.calibrate import Calibration, calibrate
from compress.methods.dense import DensePlan, simplify
from compress.methods.gradual import on_the_way
from compress.model import score_split
from compress.onnx_head import OnnxHead, head_of
from compress.search.budget import CODEBOOKS, parse_budget, plan_for_budget
from compress.search.latency import HeadTimes, Latency, calibrate_machine, request_of
from compress.search.methods_table import methods_table
from compress.search.objective import compare
from compress.search.profile import TableProfile, profile_tables
from compress.search.sensitivity import predict, sensitivities
from compress.search.working_set import extract, score
from trainer.checkpoint import Checkpoint, open_checkpoint
from trainer.data.dataset import Dataset, SplitName, open_dataset
from trainer.data.reader import spread_rows
from trainer.files import check_new
from trainer.metrics import row_losses
from trainer.progress import ReportProgress
from trainer.storage import Location

CALIBRATION_ROWS = 400_000  # of the training split at most: a working set of them is held in memory
MEASURED_ROWS = 50_000  # of the validation split: what each table's own loss is measured on
ASKED_ROWS = 10_000  # of the validation split: fp32 log loss and bag lengths for the price of time
# what a millisecond of 500 candidates must gain in NE, relative: at about this rate a narrower dense part sells
# milliseconds (docs/compression.md, "The dense part": 7.0 to 3.2 ms for 9.4e-4), so tables pay no more for one
NE_PER_MS = 2.5e-4


@dataclass(frozen=True)
class Planned:
    """A plan, the profiles it was resolved with, and what it is expected to cost by table (nats of mean log loss).

    latency: what its time was predicted to be, and from what.
    """

    plan: CompressionPlan
    profiles: dict[str, TableProfile]
    predicted: dict[str, float] | None = None
    latency: dict[str, Any] | None = None


def compress_checkpoint(
    checkpoint_path: str | Location,
    data: str | Location,
    plan_file: Path | None,
    out: Path,
    split: SplitName,
    progress: ReportProgress,
    budget: str | None = None,
    max_ms: float | None = None,
) -> dict[str, Any]:
    """Write an artifact and compare it with its checkpoint on a split; returns what `compress --json` prints.

    The plan is the file's, or the best one for a `budget` ("2%", "300MB"), else the `compress` section of the
    checkpoint's run. `max_ms` limits the predicted time of 500 candidates of a budget's plan.
    Raises: SlimrankError for a bad plan, budget, limit, checkpoint, data folder or output folder, before anything is
    written.
    """
    check_new(out)
    if budget is not None and plan_file is not None:
        raise PlanError("give a plan or a budget, not both: a budget makes the plan")
    if max_ms is not None and budget is None:
        raise PlanError(f"max-ms {max_ms:g}: limits what a budget's plan takes: give --budget too")
    asked = None if plan_file is None else load_plan(plan_file)
    checkpoint = open_checkpoint(checkpoint_path)
    dataset = data_of(checkpoint, open_dataset(data))
    if budget is not None:
        planned = plan_budget(checkpoint, dataset, budget, progress, max_ms)
    else:
        plan = asked or CompressionPlan.model_validate(checkpoint.run.compress)
        check_made_for(plan, checkpoint)  # before the long work
        planned = Planned(plan, profiles_for(plan, checkpoint, dataset, progress))
    resolved = resolve(planned.plan, planned.profiles)
    by_table = measure_tables(checkpoint, dataset, planned, resolved, progress)
    calibrated = calibrate_plan(checkpoint, dataset, planned, resolved, progress)
    metrics: dict[str, Any] = {"by_table": by_table} if by_table else {}
    if planned.latency is not None:
        metrics["latency"] = planned.latency
    if calibrated is not None:
        metrics["calibration"] = calibrated.describe()
    dense = None if calibrated is None else calibrated.compressed.dense
    manifest = write_artifact(checkpoint, dataset, planned.plan, out, planned.profiles, progress, metrics, dense)
    labels, logits = score_split(load_artifact(out).model, dataset, split)
    _, reference = score_checkpoint(checkpoint, dataset, split)
    if calibrated is not None:
        _, control = score_checkpoint(checkpoint, dataset, split, calibrated.control.dense)
        metrics["calibration"] |= {
            "control_against_fp32": asdict(compare(labels, control, reference)),
            "against_control": asdict(compare(labels, logits, control)),
        }
    return {
        "artifact": str(Path(out).absolute()),
        "version": manifest["version"],
        **manifest["sizes"],
        "split": split,
        **asdict(compare(labels, logits, reference)),
        **metrics,
    }


def compare_methods(
    checkpoint_path: str | Location,
    data: str | Location,
    progress: ReportProgress,
    split: SplitName = "test",
    rows: int = 100_000,
) -> dict[str, Any]:
    """Every way of compressing a checkpoint's tables, side by side; returns what `methods --json` prints.

    Raises: SlimrankError when checkpoint and data do not belong together.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    dataset = data_of(checkpoint, open_dataset(data))
    return {
        "checkpoint": checkpoint.version,
        "split": split,
        "rows": min(rows, dataset.rows(split)),
        "table_bytes_fp32": sum(t.fp32_bytes for t in dataset.transform.tables.values()),
        "methods": [m.describe() for m in methods_table(checkpoint, dataset, progress, split, rows)],
    }


def profiles_for(
    plan: CompressionPlan, checkpoint: Checkpoint, dataset: Dataset, progress: ReportProgress
) -> dict[str, TableProfile]:
    """Profiles whose rows are ranked as a plan asks."""
    fisher = sensitivities(checkpoint, dataset, progress) if plan.order == "fisher" else None
    counts = {plan.of(name).centroids for name in dataset.transform.tables}
    return profile_tables(checkpoint, dataset, progress, plan.order, fisher, sorted(counts))


def plan_budget(
    checkpoint: Checkpoint, dataset: Dataset, budget: str, progress: ReportProgress, max_ms: float | None = None
) -> Planned:
    """The plan of least predicted loss within a budget, where a millisecond must gain NE_PER_MS.

    Raises: PlanError when the budget is below the floor, or `max_ms` below what any plan takes.
    """
    size = parse_budget(budget, sum(t.fp32_bytes for t in dataset.transform.tables.values()))
    fisher = sensitivities(checkpoint, dataset, progress)
    profiles = profile_tables(checkpoint, dataset, progress, "fisher", fisher, CODEBOOKS)
    predicted = predict(checkpoint, profiles, fisher, dataset.rows("train"), progress)
    latency = price_time(checkpoint, dataset, profiles, progress, max_ms)
    found = plan_for_budget(profiles, predicted, size, checkpoint=checkpoint.version, latency=latency)
    told = {
        "candidates": latency.request.candidates,
        "predicted_ms": found.ms,
        "head_ms": latency.head_ms,
        "ne_per_ms": NE_PER_MS,
        "max_ms": max_ms,
        "relative_error": latency.costs.relative_error,
    }
    return Planned(found.plan, profiles, found.predicted, told)


def price_time(
    checkpoint: Checkpoint,
    dataset: Dataset,
    profiles: Mapping[str, TableProfile],
    progress: ReportProgress,
    max_ms: float | None,
) -> Latency:
    """What this machine takes for a request of this model, and what a millisecond must gain. Takes some seconds."""
    progress("time lookups", 0, 1)
    asked = spread_rows(dataset, "val", ASKED_ROWS)
    head = head_of(checkpoint.run, dataset.transform, checkpoint.dense_state())
    foreign = isinstance(head, OnnxHead)
    request = request_of(dataset.transform, asked.encoded, shared=not foreign)
    times = HeadTimes(sides_of(dataset.transform), request)
    head_ms = times.ms(DensePlan(), lambda: head if foreign else simplify(head))
    working = extract(checkpoint, dataset.transform, profiles, asked)
    nats = NE_PER_MS * float(log_losses(working.labels, score(working, None)).mean())
    costs = calibrate_machine()
    progress("time lookups", 1, 1)
    return Latency(request, costs, head_ms, nats, max_ms)


def log_losses(labels_NT: np.ndarray, logits_NT: np.ndarray) -> np.ndarray:
    """Log loss (N,) of each row, summed over tasks: nats."""
    return np.sum([row_losses(labels_NT[:, t], logits_NT[:, t]) for t in range(labels_NT.shape[1])], axis=0)


def calibrate_plan(
    checkpoint: Checkpoint,
    dataset: Dataset,
    planned: Planned,
    resolved: Mapping[str, ResolvedTable],
    progress: ReportProgress,
) -> Calibration | None:
    """The head fine-tuned as the plan asks, and its control; None where the plan does not ask."""
    asked = planned.plan.calibrate
    if asked is None:
        return None
    train = spread_rows(dataset, "train", min(asked.steps * asked.batch_size, CALIBRATION_ROWS))
    held = spread_rows(dataset, "val", asked.held_rows)
    train_set, held_set = (extract(checkpoint, dataset.transform, planned.profiles, rows) for rows in (train, held))
    shares = np.arange(1, asked.rounds) / asked.rounds
    stages = [resolve(on_the_way(planned.plan, resolved, share), planned.profiles) for share in shares]
    return calibrate(train_set, held_set, resolved, asked, dataset.negative_rate, progress, stages)


def measure_tables(
    checkpoint: Checkpoint,
    dataset: Dataset,
    planned: Planned,
    resolved: Mapping[str, ResolvedTable],
    progress: ReportProgress,
) -> dict[str, dict[str, float]]:
    """What compressing each table alone costs on validation rows, beside what was predicted: nats of mean log loss.

    `error`: standard error of the measured figure. Empty where nothing was predicted.
    """
    if planned.predicted is None:
        return {}
    working = extract(checkpoint, dataset.transform, planned.profiles, spread_rows(dataset, "val", MEASURED_ROWS))

    def losses(tables: Mapping[str, ResolvedTable] | None) -> np.ndarray:
        return log_losses(working.labels, score(working, tables))

    base = losses(None)
    measured = {}
    for index, (name, part) in enumerate(resolved.items()):
        change = losses({name: part}) - base
        measured[name] = {
            "predicted": planned.predicted[name],
            "measured": float(change.mean()),
            "error": float(change.std() / np.sqrt(len(change))),
        }
        progress("measure", index + 1, len(resolved))
    return measured
