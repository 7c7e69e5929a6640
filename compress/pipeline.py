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
from compress.errors import PlanError
from compress.evaluate import score_checkpoint
from compress.methods.calibrate import Calibration, calibrate
from compress.methods.gradual import on_the_way
from compress.model import score_split
from compress.search.budget import CODEBOOKS, parse_budget, plan_for_budget
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


@dataclass(frozen=True)
class Planned:
    """A plan, the profiles it was resolved with, and what it is expected to cost by table (nats of mean log loss)."""

    plan: CompressionPlan
    profiles: dict[str, TableProfile]
    predicted: dict[str, float] | None = None


def compress_checkpoint(
    checkpoint_path: str | Location,
    data: str | Location,
    plan_file: Path | None,
    out: Path,
    split: SplitName,
    progress: ReportProgress,
    budget: str | None = None,
) -> dict[str, Any]:
    """Write an artifact and compare it with its checkpoint on a split; returns what `compress --json` prints.

    The plan is the file's, or the best one for a `budget` ("2%", "300MB"), else the `compress` section of the
    checkpoint's run.
    Raises: SlimrankError for a bad plan, budget, checkpoint, data folder or output folder, before anything is written.
    """
    check_new(out)
    if budget is not None and plan_file is not None:
        raise PlanError("give a plan or a budget, not both: a budget makes the plan")
    asked = None if plan_file is None else load_plan(plan_file)
    checkpoint = open_checkpoint(checkpoint_path)
    dataset = data_of(checkpoint, open_dataset(data))
    if budget is not None:
        planned = plan_budget(checkpoint, dataset, budget, progress)
    else:
        plan = asked or CompressionPlan.model_validate(checkpoint.run.compress)
        check_made_for(plan, checkpoint)  # before the long work
        planned = Planned(plan, profiles_for(plan, checkpoint, dataset, progress))
    resolved = resolve(planned.plan, planned.profiles)
    by_table = measure_tables(checkpoint, dataset, planned, resolved, progress)
    calibrated = calibrate_plan(checkpoint, dataset, planned, resolved, progress)
    metrics: dict[str, Any] = {"by_table": by_table} if by_table else {}
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


def plan_budget(checkpoint: Checkpoint, dataset: Dataset, budget: str, progress: ReportProgress) -> Planned:
    """The plan of least predicted loss within a budget. Raises: PlanError when the budget is below the floor."""
    size = parse_budget(budget, sum(t.fp32_bytes for t in dataset.transform.tables.values()))
    fisher = sensitivities(checkpoint, dataset, progress)
    profiles = profile_tables(checkpoint, dataset, progress, "fisher", fisher, CODEBOOKS)
    predicted = predict(checkpoint, profiles, fisher, dataset.rows("train"), progress)
    found = plan_for_budget(profiles, predicted, size, checkpoint=checkpoint.version)
    return Planned(found.plan, profiles, found.predicted)


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
        logits = score(working, tables)
        return np.sum([row_losses(working.labels[:, t], logits[:, t]) for t in range(logits.shape[1])], axis=0)

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
