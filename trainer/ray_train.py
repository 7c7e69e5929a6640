"""Ray Train wiring: what each worker runs, and the driver that starts and watches the workers.

The loop itself is in trainer/loop.py, without Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from trainer.checkpoint import MANIFEST, Checkpoint, Position, open_checkpoint, resolve
from trainer.config import RunConfig, parse_run
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.schema import encodings
from trainer.errors import CheckpointError, ConfigError, DataError, SlimrankError
from trainer.files import check_new, write_json
from trainer.loop import keep_score, train_stages
from trainer.ranks import from_all
from trainer.ray_distill import score_with_teacher
from trainer.ray_progress import Teller, watched
from trainer.storage import Location
from trainer.tracking import Tracker, check_tracking
from trainer.worker import Place, Worker, build_worker

HEARTBEAT_S = 1.0
RECOVERIES = "recoveries.jsonl"
HEARTBEAT = ".heartbeat.json"
RAY_RECORD = "checkpoint_manager_snapshot.json"

Show = Callable[[dict[str, Any], list[Any]], None]  # told the latest progress, and the events since the last call


class RayReporter:
    """A run's Reporter on one worker: checkpoints go beside each other into the run's folder, which workers share."""

    def __init__(self, run: RunConfig, out: Path, teller: Teller, place: Place, position: Position) -> None:
        self.run = run
        self.out = out
        self.teller = teller
        self.rank = place.rank
        self.beat = 0.0
        self.tracker = Tracker(out, run, samples=position.samples, note=self.note) if place.rank == 0 else None

    def path(self, position: Position) -> Path:
        """Where a checkpoint is to be written."""
        return self.out / f"step-{position.samples:012d}"

    def commit(self, path: Path, position: Position, metrics: dict[str, Any], stage: int) -> None:
        """Tell Ray Train of a checkpoint that is whole on disk: it decides which to keep."""
        ray.train.report(
            {
                "keep": keep_score(metrics, stage, len(self.run.train.all_stages)),
                "samples": position.samples,
            },
            checkpoint=ray.train.Checkpoint.from_directory(str(path)),
            checkpoint_dir_name=path.name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )
        if self.rank == 0:
            self.heartbeat(position, committed=True)

    def progress(self, position: Position, latest: dict[str, Any]) -> None:
        """A step is done."""
        self.teller.tell(latest)
        if time.monotonic() - self.beat >= HEARTBEAT_S:
            self.heartbeat(position)

    def evaluation(self, event: dict[str, Any]) -> None:
        """The validation split was scored."""
        assert self.tracker is not None
        extra = {k: event[k] for k in ("stage", "samples_per_s", "lr", "best")}
        self.tracker.evaluation(event["samples"], event["epoch"], event["metrics"], extra)
        self.teller.tell({}, event)

    def note(self, text: str) -> None:
        """Something the user should read."""
        self.teller.tell({}, {"kind": "note", "text": text})

    def close(self, status: str) -> None:
        """The run has ended, FINISHED or FAILED: write what is pending."""
        if self.tracker is not None:
            self.tracker.close(status)

    def heartbeat(self, position: Position, committed: bool = False, done: bool = False) -> None:
        """Leave on disk how far training has come, so that a recovery can tell what it cost."""
        self.beat = time.monotonic()
        before = read_json(self.out / HEARTBEAT)
        now = {"samples": position.samples, "time": time.time()}
        last = now if committed else before.get("committed", {"samples": 0, "time": time.time()})
        with contextlib.suppress(OSError):  # a full disk ends a run at its next checkpoint, not for this
            write_json(self.out / HEARTBEAT, {**now, "committed": last, "done": done})

    def recovered(self, position: Position, workers: int) -> None:
        """Record what going on from `position` costs, if an attempt before this one was interrupted.

        What is redone is known to the last heartbeat: up to HEARTBEAT_S of work more may have been lost.
        """
        last = read_json(self.out / HEARTBEAT)
        self.heartbeat(position, committed=True)
        if not last or last.get("done"):
            return
        lost = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "workers": workers,
            "from_samples": position.samples,
            "samples_redone": max(last["samples"] - position.samples, 0),
            "seconds_redone": round(max(last["time"] - last["committed"]["time"], 0.0), 1),
            "seconds_down": round(max(time.time() - last["time"], 0.0), 1),
        }
        with (self.out / RECOVERIES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(lost) + "\n")
        self.note(
            f"interrupted: going on from {position.samples:,} samples with {workers} worker(s); "
            f"{lost['samples_redone']:,} samples are redone, {lost['seconds_down']:.0f} s passed"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping on disk, or an empty one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs. Returns (rank 0's counts) the summary that `train --json` prints."""
    quiet_libraries()
    torch.set_num_threads(1)
    run, out = parse_run(config["run"], "run"), Path(config["out"])
    dataset = open_dataset(config["data"]).sized(run.data, run.model.embedding_dim)
    context = ray.train.get_context()
    place = Place(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_world_size(),
        ray.train.torch.get_device(),
    )
    found = last_checkpoint(out)
    start = None if config["start"] is None else open_checkpoint(config["start"], verify=False)
    teacher = None if config["teacher"] is None else Path(config["teacher"])
    position = Position() if found is None else found.position
    reporter = RayReporter(run, out, Teller(config["board"]), place, position)
    if place.rank == 0:
        reporter.recovered(position, place.world_size)

    def build(stage: int, precision: Any, lanes: int | None) -> Worker:
        header = {"continues": None if start is None else start.version}
        return build_worker(
            run, dataset, place, stage, precision=precision, lanes=lanes, teacher=teacher, header=header
        )

    try:
        worker, position, speed = train_stages(build, run, reporter, found, start)
    except BaseException as error:
        reporter.close("FAILED")
        if isinstance(error, ConfigError):  # every rank's, and the next attempt's too: Ray Train would try it again
            return {"error": str(error)}
        raise
    best = best_checkpoint(out, len(run.train.all_stages))
    worker.load(best)
    summary = {
        "best": best.folder.name,
        "val": worker.evaluate("val"),
        "test": worker.evaluate("test"),
        "plan": worker.plan,
        "memory": from_all(worker.memory(), place.world_size),
        "precision": worker.precision,
        "samples": position.samples,
        "samples_per_s": speed.per_s,
    }
    if place.rank == 0:
        reporter.heartbeat(position, committed=True, done=True)
    reporter.close("FINISHED")
    return summary


def checkpoints_in(out: Path) -> Iterator[Checkpoint]:
    """The whole checkpoints of a run's folder, the newest first; their files are not verified yet.

    A folder that has its name is whole (trainer/checkpoint.py), whether or not Ray Train came to record it: its own
    record is one file written in place, which a full disk can leave torn.
    """
    for path in sorted(out.glob(f"step-*/{MANIFEST}"), reverse=True):
        try:
            yield open_checkpoint(path.parent, verify=False)
        except CheckpointError:
            continue


def last_checkpoint(out: Path) -> Checkpoint | None:
    """The checkpoint that a run goes on from."""
    return next(checkpoints_in(out), None)


def best_checkpoint(out: Path, stages: int) -> Checkpoint:
    """The kept checkpoint with the lowest validation NE, among those of the last stage where there are some."""
    return min(checkpoints_in(out), key=lambda c: keep_score(c.metrics, c.manifest["stage"], stages))


def mend_records(out: Path, show: Show) -> None:
    """Put aside a record of Ray Train's that is torn: it would refuse to start, with every checkpoint whole."""
    path = out / RAY_RECORD
    if not path.exists():
        return
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        path.replace(path.with_suffix(".torn"))
        text = f"{path.name} is torn (a full disk?): put aside; going on from the newest checkpoint on disk"
        show({}, [{"kind": "note", "text": text}])


def quiet_libraries() -> None:
    """Keep the libraries' notes out of the way: they log hundreds of lines for each group of tables."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    for name in ("torchrec", "fbgemm_gpu", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


# -- the driver ------------------------------------------------------------------------------------------------------


def train(
    run: RunConfig,
    data: str | Location,
    out: Path,
    *,
    resume: bool,
    show: Show,
    continue_from: str | Location | None = None,
) -> dict[str, Any]:
    """Train a run on prepared data with Ray Train; Ray must be connected.

    `continue_from`: a checkpoint whose weights and optimizer state are the start, to train on new data alone.
    Returns the summary that `slimrank train --json` prints; `out` holds the kept checkpoints and train.json.
    Raises: SlimrankError when data and run do not fit, the cluster is too small, or `out` holds another run.
    """
    dataset = open_dataset(data)
    check_fits(run, dataset)
    check_tracking(run)
    out = Path(out).absolute()
    start = None if continue_from is None else resolve(continue_from)
    if start is not None:
        check_continues(run, dataset, open_checkpoint(start))
    if not resume:
        check_new(out)
    else:  # there may be nothing yet: a supervisor starts a run with the command that resumes it
        mend_records(out, show)
        check_resumes(run, dataset, out, show)
    before = read_json(out / "train.json").get("samples_per_s")
    use_gpu = ray.cluster_resources().get("GPU", 0) >= run.train.min_workers
    check_room(run.train.min_workers)
    started = time.monotonic()
    teacher = None if run.train.distill is None else score_with_teacher(run.train.distill, run, dataset, show)
    with watched(show) as board:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "run": run.model_dump(mode="json"),
                "data": str(dataset.folder),
                "out": str(out),
                "board": board,
                "start": None if start is None else str(start),
                "teacher": None if teacher is None else str(teacher),
            },
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=run.train.workers
                if isinstance(run.train.workers, int)
                else (run.train.workers.min, run.train.workers.max),
                use_gpu=use_gpu,
            ),
            run_config=ray.train.RunConfig(
                name=out.name,
                storage_path=str(out.parent),
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=run.train.keep_checkpoints,
                    checkpoint_score_attribute="keep",
                    checkpoint_score_order="min",
                ),
                failure_config=ray.train.FailureConfig(max_failures=run.train.max_failures),
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
            ),
        )
        try:
            result = fit_or_interrupt(trainer)
        except ray.train.v2.api.exceptions.TrainingFailedError as error:
            raise_user_error(error)
            if logging.getLogger().isEnabledFor(logging.INFO):
                raise
            raise SlimrankError(
                f"{out}: training stopped: {cause_of(error)}: mend it, then go on with --resume from the last "
                f"checkpoint (--debug shows the traceback)"
            ) from None
    summary = dict(result.return_value)
    if "error" in summary:
        raise ConfigError(summary["error"])
    if summary["samples_per_s"] is None and before is not None:  # nothing was left to train
        summary["samples_per_s"] = before
    summary["recoveries"] = read_recoveries(out)
    write_json(out / "train.json", {**summary, "seconds": time.monotonic() - started})
    return {
        "checkpoint": str(out / summary["best"]),
        **{k: summary[k] for k in ("samples", "samples_per_s", "val", "test", "recoveries", "memory", "precision")},
        "seconds": round(time.monotonic() - started, 1),
    }


def read_recoveries(out: Path) -> list[dict[str, Any]]:
    """What each interruption of a run cost; a line cut short is left out."""
    path = out / RECOVERIES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def fit_or_interrupt(trainer: TorchTrainer) -> Any:
    """Run a trainer; Ctrl-C ends it as KeyboardInterrupt (Ray Train's own handler aborts and exits the process)."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        return trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def check_resumes(run: RunConfig, dataset: Dataset, out: Path, show: Show) -> None:
    """Raises: ConfigError when the run in `out` has another model or data than the one to go on with."""
    checkpoint = last_checkpoint(out)
    if checkpoint is None:
        show({}, [{"kind": "note", "text": f"nothing to resume in {out}: starting from the beginning"}])
        return
    if checkpoint.run.model != run.model:
        was, now = checkpoint.run.model.model_dump(), run.model.model_dump()
        key = next(k for k in was if was[k] != now[k])
        raise ConfigError(f"{out}: trained with model.{key} {was[key]}, the config says {now[key]}: start a new --out")
    for key in ("table_optimizer", "dense_optimizer", "stages"):
        was, now = getattr(checkpoint.run.train, key), getattr(run.train, key)
        if was != now:
            raise ConfigError(f"{out}: trained with train.{key} {was}, the config says {now}: start a new --out")
    if checkpoint.fingerprint != dataset.transform.fingerprint():
        raise DataError(f"{dataset.folder}: not the prepared data that {out} was trained on: give that one to --data")


def check_continues(run: RunConfig, dataset: Dataset, checkpoint: Checkpoint) -> None:
    """Raises: SlimrankError when a checkpoint cannot be trained on with this run and data."""
    if checkpoint.run.model != run.model or checkpoint.run.table_dims() != run.table_dims():
        raise ConfigError(f"{checkpoint.folder}: of another model than the config's: use the model section it has")
    checkpoint.check_whole()
    if run.table_dims(0) != run.table_dims():
        raise ConfigError(
            f"train.stages: the first would cut the tables of {checkpoint.folder}: leave out its embedding_dim"
        )
    for key in ("table_optimizer", "dense_optimizer"):
        was, now = getattr(checkpoint.run.train, key), getattr(run.train, key)
        if was != now:
            raise ConfigError(f"{checkpoint.folder}: holds the state of train.{key} {was}, the config says {now}")
    known = (*dataset.transform.lineage, dataset.transform.fingerprint())
    if checkpoint.fingerprint not in known:
        raise DataError(
            f"{dataset.folder}: its ids are not those of {checkpoint.folder}: prepare the new data with "
            f"--continue-from and the data that the checkpoint was trained on"
        )


def raise_user_error(error: BaseException) -> None:
    """Raise the SlimrankError that a worker met, where that is what ended the run."""
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, SlimrankError):
                raise type(cause)(str(cause)) from None
            cause = cause.__cause__ or getattr(cause, "cause", None)


def cause_of(error: BaseException) -> str:
    """What ended a run, in one line: the last line of the innermost error."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), getattr(error, "controller_failure", error))
    while (inner := cause.__cause__ or getattr(cause, "cause", None)) is not None:
        cause = inner
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1].strip() if lines else 'no message'}"


def check_fits(run: RunConfig, dataset: Dataset) -> None:
    """Raises: DataError when the run's features are not those the data was prepared with."""
    prepared = dataset.transform.schema
    wanted = encodings(run.data.features), [(t.name, t.column, t.positive) for t in run.data.tasks]
    if wanted != (encodings(prepared.features), [(t.name, t.column, t.positive) for t in prepared.tasks]):
        raise DataError(f"{dataset.folder}: prepared with other features or tasks than the config's: prepare it again")
    smallest = min(dataset.rows("train"), dataset.rows("val"), dataset.rows("test"))
    if smallest < run.train.max_workers:
        raise DataError(f"{dataset.folder}: a split has {smallest} rows, fewer than {run.train.max_workers} workers")


def check_room(workers: int) -> None:
    """Raises: ConfigError when the cluster has fewer cores than workers, which Ray would wait for without end."""
    cores = int(ray.cluster_resources().get("CPU", 0))
    if cores < workers:
        raise ConfigError(f"train.workers {workers}: the cluster has {cores} cores: pass --workers {max(cores, 1)}")
