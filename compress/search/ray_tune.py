"""Ray Tune wiring: trials on any number of nodes, stopped early by halving, written down as they finish.

Nothing here decides: what is tried next is in sampler.py, who goes on in halving.py, what a trial does in trials.py.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.tune
import torch
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from compress.config import SearchConfig
from compress.search.decide import OBJECTIVES
from compress.search.halving import Point, goes_on
from compress.search.sampler import STUDY, Limits, distributions, make_study
from compress.search.space import Params
from compress.search.trials import Running, Shared
from trainer.errors import SlimrankError
from trainer.files import write_text
from trainer.progress import ReportProgress
from trainer.ray_train import quiet_libraries

RETRIES = 3  # of a trial whose process or node was lost
KEPT = ("table_bytes", "artifact_bytes", "delta_ne", "delta_ne_upper", "delta_auc", "delta_auc_lower", "overlap", "ms")


class Trial(ray.tune.Trainable):
    """One setting, a rung a step. The process is reused for the next one, so that imports are paid once."""

    def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
        """Keep what all trials share."""
        quiet_libraries()
        torch.set_num_threads(1)
        assert shared is not None, "trials are made with tune.with_parameters"
        self.shared = shared
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next setting in the same process."""
        self.params: Params = dict(new_config)
        self.running: Running | None = None
        self.rungs: list[dict[str, Any]] = []
        return True

    def step(self) -> dict[str, Any]:
        """Score the next part of the sample; a setting that cannot be planned is a result that says so."""
        try:
            if self.running is None:
                self.running = Running(self.shared, self.params)
            result = self.running.step()
        except SlimrankError as error:
            return {"error": str(error), "seconds": 0.0, "done": True}
        self.rungs = [*self.rungs, {k: result[k] for k in ("rows", "delta_ne")}]
        plan = self.running.plan.model_dump(mode="json", exclude_defaults=True)
        return {
            **result,
            "rungs": self.rungs,
            "plan": json.dumps(plan),
            "node": ray.get_runtime_context().get_node_id(),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:  # noqa: ARG002
        """Nothing to save: what was lost half way is done again."""
        return {}


class Search(OptunaSearch):
    """Optuna's suggestions, told what a trial must hold, and that a setting failed."""

    def __init__(self, limits: Limits, **options: Any) -> None:
        """`options`: OptunaSearch's own."""
        super().__init__(**options)
        self.limits = limits

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Tell the study how a trial ended."""
        failed = error or not result or "error" in result
        if not failed and trial_id in self._ot_trials and trial_id not in self._completed_trials:
            assert result is not None
            for name, value in self.limits.violations(result).items():
                self._ot_trials[trial_id].set_constraint(name, value)
        super().on_trial_complete(trial_id, None if failed else result, error=failed)


class Halving(FIFOScheduler):
    """Stops a trial that is not among the best one in `eta` on its rung; those in `whole` go to the end."""

    def __init__(self, eta: int, limits: Limits, whole: Sequence[Params]) -> None:
        super().__init__()
        self.eta = eta
        self.limits = limits
        self.whole = whole
        self.seen: dict[int, list[Point]] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        """Judge a trial when it gets to a rung."""
        if result.get("done"):
            return TrialScheduler.CONTINUE
        mine = point_of(result, self.limits)
        seen = self.seen.setdefault(result["rung"], [])
        on = trial.config in self.whole or goes_on(seen, mine, self.eta)
        seen.append(mine)
        return TrialScheduler.CONTINUE if on else TrialScheduler.STOP


def point_of(result: Mapping[str, Any], limits: Limits) -> Point:
    """What a rung's result is judged by: only what is surely above its limit breaks it."""
    surely = {**result, "delta_ne": result["delta_ne"] - 2.0 * result["delta_ne_error"]}
    broken = max(0.0, *limits.violations(surely).values())
    return Point(tuple(float(result[name]) for name in OBJECTIVES), broken)


@dataclass
class Recorder(ray.tune.Callback):
    """Writes each trial down as it finishes, and shows how far the search has come."""

    path: Path
    total: int
    progress: ReportProgress
    origin: Callable[[Params], str]
    began: float
    numbers: int = 0
    dropped: int = 0

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Append the trial's result."""
        self._write(trial.config, trial.last_result)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:  # noqa: ARG002
        """A trial whose process was lost too often, or that met a defect.

        One that was lost less often Tune has dropped: its reused process died before it had begun. It is made again.
        """
        if trial.run_metadata.num_failures <= RETRIES:
            self.dropped += 1
            return
        said = str(trial.get_error() or "its process was lost").strip().splitlines()
        self._write(trial.config, {"error": said[-1], "seconds": 0.0})

    def _write(self, params: Params, result: Mapping[str, Any]) -> None:
        line: dict[str, Any] = {"number": self.numbers, "params": params, "origin": self.origin(params)}
        if "error" in result:
            line["error"] = result["error"]
        else:
            kept = [name for name in ("rung", "rows", *KEPT, "tasks", "rungs", "node") if name in result]
            line |= {name: result[name] for name in kept}
            # Tune says "done" of what the scheduler stopped as well; the last rung alone has all figures
            line |= {"stopped": "overlap" not in result, "plan": json.loads(result["plan"])}
        line |= {"seconds": round(result["seconds"], 3), "finished_s": round(time.monotonic() - self.began, 2)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.numbers += 1
        self.progress("trials", self.numbers, self.total)


def run_trials(
    shared: Shared,
    search: SearchConfig,
    limits: Limits,
    out: Path,
    first: Mapping[str, Sequence[Params]],
    progress: ReportProgress,
) -> tuple[list[dict[str, Any]], bool]:
    """Run the trials that trials.jsonl does not hold yet, and return all results, and whether Ctrl-C ended it.

    `first`: settings to begin with, by what they come from.
    """
    path = out / "trials.jsonl"
    finished = [trial for trial in read_trials(path) if trial.get("origin") != "calibrated"]  # these are made again
    # a line that a crash cut short must not swallow the next one
    write_text(path, "".join(json.dumps(trial) + "\n" for trial in finished))
    done = [trial["params"] for trial in finished]
    origins = [(params, name) for name, several in first.items() for params in several]
    waiting = [params for params, _ in origins if params not in done]
    missing = search.trials - len(finished)
    progress("trials", len(finished), search.trials)
    if missing <= 0:
        return finished, False
    storage, sampler = make_study(search, limits, finished, waiting)
    # as many trials start at once as there are CPUs; no more are drawn ahead, so that each knows what others came to
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(int(ray.cluster_resources().get("CPU", 1)), 1))
    # a setting that cannot be planned has no figures; without this Tune ends the whole search over it
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    recorder = Recorder(
        path,
        search.trials,
        progress,
        lambda params: next((name for known, name in origins if known == params), "sampler"),
        time.monotonic() - max((t["finished_s"] for t in finished), default=0.0),
        len(finished),
    )
    with tempfile.TemporaryDirectory(prefix="slimrank-tune-") as scratch:
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(ray.tune.with_parameters(Trial, shared=shared), {"CPU": 1}),
            tune_config=ray.tune.TuneConfig(
                search_alg=Search(
                    limits,
                    space=distributions(search.space),
                    metric=list(OBJECTIVES),
                    mode=["min"] * len(OBJECTIVES),
                    sampler=sampler,
                    study_name=STUDY,
                    storage=storage,
                ),
                scheduler=Halving(search.eta, limits, [params for params, _ in origins]),
                num_samples=missing,
                time_budget_s=None if search.minutes is None else 60 * search.minutes,
                reuse_actors=True,
            ),
            run_config=ray.tune.RunConfig(
                name="search",
                storage_path=scratch,
                verbose=0,
                failure_config=ray.tune.FailureConfig(max_failures=RETRIES),
                callbacks=[recorder],
            ),
        )
        try:
            tuner.fit()
        except KeyboardInterrupt:
            return read_trials(path), True
        finally:
            if recorder.numbers < search.trials:  # Ctrl-C, or the minutes are over
                progress("trials", recorder.numbers, recorder.numbers)
    if recorder.dropped and search.minutes is None:
        return run_trials(shared, search, limits, out, first, progress)
    return read_trials(path), False


def read_trials(path: Path) -> list[dict[str, Any]]:
    """Finished trials in the order they finished; a line cut short by a crash is left out."""
    trials = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            trials.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return trials


def in_parallel(work: Callable[..., Any], shared: Any, each: Iterable[Any]) -> list[Any]:
    """`work(shared, item)` of each item on the cluster's nodes, one CPU each; `shared` is stored once."""
    place = ray.put(shared)
    task = ray.remote(num_cpus=1)(_quietly)
    return ray.get([task.remote(work, place, item) for item in each])


def _quietly(work: Callable[..., Any], shared: Any, item: Any) -> Any:
    quiet_libraries()
    torch.set_num_threads(1)
    return work(shared, item)
