"""Ray Tune wiring: trials over plans on the working set, the winner gated on rows that no trial saw.

Nothing here decides: which plans are tried is in space.py, feasibility, bounds and the front in objective.py, what a
plan means in compressor.py.

    OUT/trials.jsonl   every finished trial as it finishes, which --resume goes on from
    OUT/tune.json      the result: front, choice, gate;  OUT/plan.yaml  the chosen plan
    OUT/artifact/      its artifact
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.tune
import torch
import yaml

from compress.artifact import load_artifact
from compress.compressor import compress, data_of, resolve, table_bytes
from compress.config import CompressionPlan, SearchConfig
from compress.errors import ArtifactError
from compress.model import translate_rows
from compress.search.objective import Quality, compare, pareto, rows_to_resolve
from compress.search.profile import TableProfile, profile_tables
from compress.search.space import plans
from compress.search.working_set import WorkingSet, extract, score
from trainer.checkpoint import open_checkpoint
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.reader import Rows, read_split
from trainer.errors import DataError, SlimrankError
from trainer.files import check_new, write_json, write_text
from trainer.progress import ReportProgress
from trainer.ray_train import quiet_libraries

SAME_SCORES = 1e-4  # log-odds: an artifact and its trial differ by the order of fp32 sums at most


@dataclass(frozen=True)
class Shared:
    """What all trials read: put in the object store once."""

    working: WorkingSet
    reference: np.ndarray
    profiles: dict[str, TableProfile]
    seed: int


def run_plan(shared: Shared, plan: CompressionPlan) -> tuple[dict[str, Any], np.ndarray]:
    """Bytes and quality of one plan on the sample, and its log-odds (N, T)."""
    resolved = resolve(plan, shared.profiles)
    logits = score(shared.working, resolved)
    quality = compare(shared.working.labels, logits, shared.reference, shared.seed)
    return {"table_bytes": table_bytes(resolved), **asdict(quality)}, logits


class Trial(ray.tune.Trainable):
    """One plan, scored in one step. The process is reused for the next plan, so that imports are paid once."""

    def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
        """Keep what all trials share."""
        quiet_libraries()
        torch.set_num_threads(1)
        assert shared is not None, "trials are made with tune.with_parameters"
        self.shared = shared
        self.plan = config["plan"]

    def step(self) -> dict[str, Any]:
        """Score the plan; a plan that cannot be done is a result that says so."""
        started = time.monotonic()
        try:
            result, _ = run_plan(self.shared, CompressionPlan.model_validate(self.plan))
        except SlimrankError as error:
            result = {"error": str(error)}
        return {**result, "seconds": time.monotonic() - started, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:  # noqa: ARG002
        """Nothing to save: a trial is one step, and its result is written down when it ends."""
        return {}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next plan in the same process."""
        self.plan = new_config["plan"]
        return True


class Recorder(ray.tune.Callback):
    """Writes each trial down as it finishes, and shows how far the search has come."""

    def __init__(self, path: Path, total: int, done: int, progress: ReportProgress) -> None:
        self.path = path
        self.total = total
        self.done = done
        self.progress = progress

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Append the trial's result to trials.jsonl."""
        kept = ("table_bytes", "delta_ne", "delta_ne_upper", "delta_auc", "seconds", "error")
        result = {k: trial.last_result[k] for k in kept if k in trial.last_result}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"plan": trial.config["plan"], **result}) + "\n")
        self.done += 1
        self.progress("trials", self.done, self.total)


def split_rows(dataset: Dataset, search: SearchConfig) -> tuple[Rows, Rows]:
    """Validation rows for the trials and, disjoint from them, for the gate.

    Raises: DataError when the validation split is too small to be halved.
    """
    rows = read_split(dataset, "val")
    if len(rows) < 200:
        raise DataError(f"{dataset.folder}: {len(rows)} validation rows: a search and its gate need 200 at least")
    order = np.random.default_rng(search.seed).permutation(len(rows))
    for_search = min(search.sample_rows, len(rows) // 2)
    for_gate = min(search.gate_rows, len(rows) - for_search)
    chosen, gate = order[:for_search], order[for_search : for_search + for_gate]
    return rows.take(np.sort(chosen)), rows.take(np.sort(gate))


def tune(
    checkpoint_path: Path,
    data: Path,
    out: Path,
    search: SearchConfig,
    *,
    resume: bool,
    progress: ReportProgress,
) -> dict[str, Any]:
    """Search for the smallest plan that holds the NE budget, and write its artifact; Ray must be connected.

    Returns what `slimrank tune --json` prints.
    Raises: SlimrankError when checkpoint and data do not belong together, or `out` holds something and not `resume`.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    if not resume:
        check_new(out)
    checkpoint = open_checkpoint(checkpoint_path)
    dataset = data_of(checkpoint, open_dataset(data))
    out.mkdir(parents=True, exist_ok=True)
    profiles = profile_tables(checkpoint, dataset, progress)
    transform = dataset.transform
    slim = {name: p.slim() for name, p in profiles.items()}

    def share(rows: Rows) -> Shared:
        working = extract(checkpoint, transform, profiles, rows)
        return Shared(working, score(working, None), slim, search.seed)

    for_search, for_gate = split_rows(dataset, search)
    results = run_trials(share(for_search), plans(transform.tables, search), out, progress)
    usable = [r for r in results if "error" not in r and np.isfinite(r["delta_ne_upper"])]
    if not usable:
        first = results[0].get("error", "its scores are not finite") if results else "every trial was lost"
        raise DataError(f"no plan could be tried: {first}")
    front = [usable[i] for i in pareto([(r["table_bytes"], r["delta_ne_upper"]) for r in usable])]
    gate_shared = share(for_gate)
    chosen, gate = choose(front, gate_shared, search.max_delta_ne)
    plan = CompressionPlan.model_validate(front[chosen]["plan"])
    artifact = out / "artifact"
    if not (resume and artifact.exists()):
        compress(checkpoint, dataset, plan, artifact, profiles, progress, metrics={"gate": gate})
    check_artifact(artifact, dataset, for_gate, run_plan(gate_shared, plan)[1])
    summary = {
        "artifact": str(artifact),
        "trials": len(results),
        "failed_trials": len(results) - len(usable),
        "front": [{k: v for k, v in r.items() if k != "seconds"} for r in front],
        "chosen": chosen,
        "gate": gate,
        "table_bytes_fp32": sum(t.fp32_bytes for t in transform.tables.values()),
        "working_set_bytes": gate_shared.working.bytes,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "tune.json", summary)
    write_text(out / "plan.yaml", yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False))
    return summary


def run_trials(
    shared: Shared, wanted: list[CompressionPlan], out: Path, progress: ReportProgress
) -> list[dict[str, Any]]:
    """Run the plans that trials.jsonl does not hold yet, in parallel, and return all results."""
    path = out / "trials.jsonl"
    finished = read_trials(path)
    # a line that a crash cut short must not swallow the next one
    write_text(path, "".join(json.dumps(trial) + "\n" for trial in finished.values()))
    keys = [p.model_dump(mode="json") for p in wanted]
    missing = [k for k in keys if json.dumps(k) not in finished]
    progress("trials", len(keys) - len(missing), len(keys))
    if missing:
        with tempfile.TemporaryDirectory(prefix="slimrank-tune-") as scratch:
            ray.tune.Tuner(
                ray.tune.with_resources(ray.tune.with_parameters(Trial, shared=shared), {"CPU": 1}),
                param_space={"plan": ray.tune.grid_search(missing)},
                tune_config=ray.tune.TuneConfig(reuse_actors=True),
                run_config=ray.tune.RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[Recorder(path, len(keys), len(keys) - len(missing), progress)],
                ),
            ).fit()
        finished = read_trials(path)
    return [finished[json.dumps(k)] for k in keys if json.dumps(k) in finished]


def read_trials(path: Path) -> dict[str, dict[str, Any]]:
    """Finished trials by their plan; a line cut short by a crash is left out."""
    trials = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            trial = json.loads(line)
        except json.JSONDecodeError:
            continue
        trials[json.dumps(trial["plan"])] = trial
    return trials


def choose(front: list[dict[str, Any]], gate: Shared, budget: float) -> tuple[int, dict[str, Any]]:
    """The smallest point of the front that holds the budget on the search's rows and on the gate's.

    When none does: the point with the best bound, and a gate that says it did not pass and how many rows would resolve
    the budget.
    """
    tried = []
    for index, point in enumerate(front):
        if point["delta_ne_upper"] > budget:
            continue
        quality, passed = _gate(point, gate, budget)
        tried.append(index)
        if passed:
            return index, _verdict(True, quality, gate, budget, tried)
    last = len(front) - 1  # the front ends at its best bound
    quality, passed = _gate(front[last], gate, budget)
    return last, _verdict(passed, quality, gate, budget, tried)


def _gate(point: Mapping[str, Any], gate: Shared, budget: float) -> tuple[Quality, bool]:
    result, _ = run_plan(gate, CompressionPlan.model_validate(point["plan"]))
    quality = Quality(**{name: result[name] for name in Quality.__dataclass_fields__})
    return quality, quality.delta_ne_upper <= budget


def _verdict(passed: bool, quality: Quality, gate: Shared, budget: float, tried: list[int]) -> dict[str, Any]:
    rows = len(gate.working.labels)
    verdict = {"passed": passed, **asdict(quality), "budget": budget, "rows": rows, "tried": tried}
    if not passed:
        verdict["rows_to_resolve"] = rows_to_resolve(quality, rows, budget)
    return verdict


def check_artifact(path: Path, dataset: Dataset, rows: Rows, expected: np.ndarray) -> None:
    """Score the gate's rows with the written artifact itself.

    Raises: ArtifactError when it does not give the scores that its trial did.
    """
    model = load_artifact(path).model
    found = model.score_encoded(translate_rows(model, dataset, rows.encoded))
    worst = float(np.abs(found - expected).max())
    if worst > SAME_SCORES:
        raise ArtifactError(
            f"{path}: scores differ from the trial's by {worst:.2g}: this is a defect, please report it"
        )
