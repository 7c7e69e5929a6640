"""What a run leaves to look at while it trains and after: metrics.jsonl, TensorBoard events, and MLflow where asked.

FOLDER/metrics.jsonl    one line an evaluation: samples, epoch, metrics, and what else the caller knows
FOLDER/tensorboard/     event files; the step is the number of samples trained on
FOLDER/mlflow.json      the MLflow run that a resumed run goes on in

Rank 0 alone tracks. Nothing here uses the network, except MLflow when the run's `tracking_uri` is a server.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from trainer.config import MlflowConfig, RunConfig
from trainer.errors import ConfigError, DataError
from trainer.files import write_json, write_text

FLUSH_S = 10
MLFLOW_PARAMS = 100  # of one request; MLflow's own bound (mlflow/utils/validation.py)
MLFLOW_PARAM_CHARS = 500


def check_tracking(run: RunConfig) -> None:
    """Raises: ConfigError when the run asks for MLflow and it is not installed. For the driver, before long work."""
    if run.train.mlflow is not None:
        import_mlflow()


def import_mlflow() -> Any:
    """The mlflow package. Raises: ConfigError when it is not installed."""
    try:
        return importlib.import_module("mlflow")
    except ImportError as error:
        raise ConfigError(
            f"train.mlflow: the package mlflow cannot be imported ({error}): pip install mlflow, or remove train.mlflow"
        ) from None


class Tracker:
    """Records one lineage of a run: what was recorded after `samples`, the position it goes on from, is dropped.

    `note` is told, once, when MLflow stops answering; training goes on without it.
    Raises: ConfigError when MLflow is asked for and not installed, or does not answer.
    """

    def __init__(
        self, folder: Path, run: RunConfig, *, samples: int = 0, note: Callable[[str], None] | None = None
    ) -> None:
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(folder) if line["samples"] <= samples]
        write_text(self.path, "".join(_line(record) for record in kept))
        events = folder / "tensorboard"
        self.writer = SummaryWriter(
            str(events),
            purge_step=samples + 1 if events.exists() else None,
            flush_secs=FLUSH_S,
            filename_suffix=f".{samples}.{os.getpid()}",  # two files of one second
        )
        self.mlflow = None if run.train.mlflow is None else MlflowRun(folder, run, run.train.mlflow, note)

    def evaluation(
        self, position_samples: int, epoch: float, metrics: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> None:
        """Record an evaluation: a line of metrics.jsonl; its numbers as val/..., those of `extra` as train/....

        Units: `position_samples` rows trained on so far. `metrics` and `extra` come as JSON-like values; what is not
        finite becomes null.
        """
        record = {"samples": position_samples, "epoch": epoch, **extra, "metrics": metrics}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        told = {f"val/{name}": value for name, value in numbers(metrics)}
        told |= {f"train/{name}": value for name, value in numbers({"epoch": epoch, **extra})}
        self.scalars(position_samples, told)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record numbers at a step (samples trained on) in TensorBoard and MLflow; what is not finite is left out."""
        finite = {name.replace("@", "_at_"): value for name, value in numbers(values)}
        for name, value in finite.items():
            self.writer.add_scalar(name, value, step)
        if self.mlflow is not None:
            self.mlflow.log(step, finite)

    def close(self, status: str = "FINISHED") -> None:
        """Write what is pending, and end the MLflow run as FINISHED, FAILED or KILLED."""
        self.writer.close()
        if self.mlflow is not None:
            self.mlflow.close(status)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The evaluations in a run's folder, in order; a torn last line is left out, and there may be none at all.

    Raises: DataError when another line is not what a tracker writes.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # a whole line ends in a newline
        try:
            record = json.loads(line)
            record["samples"], record["metrics"]
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{path}: line {number} is not an evaluation: remove that line") from None
        records.append(record)
    return records


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of nested mappings, by path: {"click": {"ne": 1}} -> ("click/ne", 1.0). Flags are left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def json_safe(value: Any) -> Any:
    """The same value with numpy scalars as Python's and None for numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(name): json_safe(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(json_safe(record), allow_nan=False) + "\n"


# -- MLflow ----------------------------------------------------------------------------------------------------------


class MlflowRun:
    """One run in MLflow, the same one after a resume as long as the store still has it."""

    def __init__(
        self, folder: Path, run: RunConfig, config: MlflowConfig, note: Callable[[str], None] | None = None
    ) -> None:
        mlflow = import_mlflow()
        self.entities = importlib.import_module("mlflow.entities")
        self.failure: type[Exception] = importlib.import_module("mlflow.exceptions").MlflowException
        self.note = note
        self.lost = False
        uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        uri = uri or f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        self.shown = re.sub(r"//[^/@]*@", "//", uri)  # without a password
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        try:
            self.run_id = self._resumed(folder, config) or self._created(folder, run, config)
        except self.failure as error:
            raise ConfigError(
                f"train.mlflow: {self.shown}: {_first_line(error)}: check tracking_uri, or remove train.mlflow"
            ) from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers at a step."""
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(name, value, now, step) for name, value in values.items()]
        self._try(lambda: self.client.log_batch(self.run_id, metrics=metrics))

    def close(self, status: str) -> None:
        """End the run."""
        self._try(lambda: self.client.set_terminated(self.run_id, status=status))

    def _resumed(self, folder: Path, config: MlflowConfig) -> str | None:
        path = folder / "mlflow.json"
        if not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["experiment"] != config.experiment:
            return None
        try:
            self.client.update_run(kept["run_id"], status="RUNNING")
        except self.failure:  # deleted there, or another store
            return None
        return kept["run_id"]

    def _created(self, folder: Path, run: RunConfig, config: MlflowConfig) -> str:
        experiment = self.client.get_experiment_by_name(config.experiment)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(config.experiment)
        run_id = self.client.create_run(experiment_id, run_name=run.name).info.run_id
        params = [self.entities.Param(name, value) for name, value in run_params(run)]
        for at in range(0, len(params), MLFLOW_PARAMS):
            self.client.log_batch(run_id, params=params[at : at + MLFLOW_PARAMS])
        write_json(folder / "mlflow.json", {"experiment": config.experiment, "run_id": run_id})
        return run_id

    def _try(self, call: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            call()
        except self.failure as error:  # a tracking server must not cost a training run
            self.lost = True
            if self.note is not None:
                self.note(f"MLflow at {self.shown} failed ({_first_line(error)}): going on without it")


def run_params(run: RunConfig) -> Iterable[tuple[str, str]]:
    """The run's model and train settings but for the MLflow section, as params: ("train.table_lr", "0.02")."""
    for section, values in (("model", run.model.model_dump()), ("train", run.train.model_dump(exclude={"mlflow"}))):
        for name, value in values.items():
            yield f"{section}.{name}", str(value)[:MLFLOW_PARAM_CHARS]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
