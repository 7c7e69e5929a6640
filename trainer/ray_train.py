"""Ray Train wiring: the training loop on each worker, and the driver that starts it.

The loop is in `train_worker`; what a step, an evaluation or a checkpoint is lives in files without Ray.
"""

from __future__ import annotations

import json
import logging
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from trainer.checkpoint import (
    MANIFEST,
    Checkpoint,
    Position,
    init_optimizer_state,
    load_into,
    open_checkpoint,
    save_checkpoint,
    training_state,
)
from trainer.config import RunConfig, parse_run
from trainer.data.dataset import Dataset, SplitName, open_dataset
from trainer.data.reader import Reader
from trainer.errors import ConfigError, DataError, SlimrankError
from trainer.files import check_new, write_json
from trainer.metrics import mean_ne, task_metrics
from trainer.models import Ranker, build_ranker
from trainer.optimizer import build_optimizer, fuse_table_optimizer
from trainer.ray_progress import Teller, watched
from trainer.sharding import describe_plan, make_plan, sharders
from trainer.step import gather_rows, predict, train_step

EVAL_ROWS = 8192  # global rows of an evaluation batch
WARMUP_STEPS = 10  # left out of samples_per_s
MAX_RESTARTS = 3  # of the worker group after a crash, each from the last checkpoint


@dataclass
class Worker:
    """One rank's share of a run."""

    run: RunConfig
    dataset: Dataset
    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    device: torch.device
    rank: int
    world_size: int
    plan: dict[str, Any]
    teller: Teller

    def evaluate(self, split: SplitName) -> dict[str, Any]:
        """Metrics of a split over all ranks."""
        reader = Reader(self.dataset, split, EVAL_ROWS, rank=self.rank, world_size=self.world_size)
        labels, logits = predict(self.model, reader.batches(), self.device)
        tasks = [t.name for t in self.run.data.tasks]
        return task_metrics(gather_rows(labels), gather_rows(logits), tasks)

    def report(self, position: Position, metrics: dict[str, Any]) -> None:
        """Write a checkpoint with the other ranks and hand it to Ray Train."""
        header = {
            "run": self.run.model_dump(mode="json"),
            "fingerprint": self.dataset.transform.fingerprint(),
            "position": asdict(position),
            "metrics": metrics,
            "plan": self.plan,
            "world_size": self.world_size,
        }
        with tempfile.TemporaryDirectory(prefix="slimrank-checkpoint-") as folder:
            save_checkpoint(
                Path(folder), training_state(self.model, self.optimizer), header, self.rank, self.world_size
            )
            ray.train.report(
                {"val_ne": mean_ne(metrics), "samples": position.samples},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step-{position.samples:012d}",
            )

    def load(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's weights and optimizer state into this rank's share."""
        load_into(training_state(self.model, self.optimizer), checkpoint)


def build_worker(run: RunConfig, dataset: Dataset, teller: Teller) -> Worker:
    """The sharded model and its optimizer on this rank."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.manual_seed(run.train.seed)
    model = build_ranker(run.model, dataset.transform)
    start_at_base_rate(model, dataset)
    model.head.to(device)
    fuse_table_optimizer(model.embeddings, run.train)
    plan = make_plan(
        model,
        dataset.transform,
        device,
        world_size=world_size,
        local_world_size=context.get_local_world_size(),
        batch_size=run.train.batch_rows(dataset.rows("train")),
    )
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders())
    optimizer = build_optimizer(sharded, run.train)
    init_optimizer_state(optimizer)
    worker = Worker(run, dataset, sharded, optimizer, device, rank, world_size, describe_plan(plan), teller)
    init_tables(worker)
    return worker


def start_at_base_rate(model: Ranker, dataset: Dataset) -> None:
    """Set each task's output bias to the log-odds of its rate in the training split."""
    rows = dataset.rows("train")
    rates = torch.tensor([positives / rows for positives in dataset.positives["train"]])
    with torch.no_grad():
        model.head.out.bias.copy_(torch.logit(rates))


def init_tables(worker: Worker) -> None:
    """Fill each table from a generator of its own, so that the start does not depend on the plan."""
    bound = worker.run.model.table_init
    tables = list(worker.dataset.transform.tables)
    for key, value in training_state(worker.model, worker.optimizer).items():
        if key.startswith("tables/") and key.endswith("/weight"):
            generator = torch.Generator().manual_seed(worker.run.train.seed * 1000 + tables.index(key.split("/")[1]))
            for shard in value.local_shards():
                rows = torch.empty(shard.tensor.shape).uniform_(-bound, bound, generator=generator)
                shard.tensor.copy_(rows)


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs. Returns (rank 0's counts) the summary that `train --json` prints."""
    quiet_libraries()
    torch.set_num_threads(1)
    run = parse_run(config["run"], "run")
    dataset = open_dataset(Path(config["data"]))
    worker = build_worker(run, dataset, Teller(config["board"]))
    position = Position()
    found = ray.train.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            checkpoint = open_checkpoint(Path(folder))
            worker.load(checkpoint)
            position = checkpoint.position
    speed = run_epochs(worker, position)
    best = min(ray.train.get_all_reported_checkpoints(), key=lambda c: c.metrics["val_ne"])
    with best.checkpoint.as_directory() as folder:
        worker.load(open_checkpoint(Path(folder)))
    return {
        "best": Path(best.checkpoint.path).name,
        "val": worker.evaluate("val"),
        "test": worker.evaluate("test"),
        "plan": worker.plan,
        **speed,
    }


def run_epochs(worker: Worker, position: Position) -> dict[str, Any]:
    """Train from a position until the epochs are done or the validation NE stops improving."""
    train = worker.run.train
    reader = Reader(
        worker.dataset,
        "train",
        train.batch_rows(worker.dataset.rows("train")),
        rank=worker.rank,
        world_size=worker.world_size,
        seed=train.seed,
        shuffle=train.shuffle,
        oov_rate=train.oov_rate,
    )
    batches = reader.num_batches()
    eval_every = -(-batches // train.evals_per_epoch)
    timed_s, timed_samples, steps = 0.0, 0, 0
    started = time.monotonic()
    first_samples = position.samples
    while position.epoch < train.epochs and position.stale_evals < train.patience:
        mark = time.perf_counter()
        for batch, size in reader.batches(position.epoch, position.batch):
            seed_step(train.seed, position, worker.rank)
            train_step(worker.model, worker.optimizer, batch.to(worker.device), size, worker.world_size, train.table_l2)
            steps += 1
            now = time.perf_counter()
            if steps > WARMUP_STEPS:
                timed_s, timed_samples = timed_s + now - mark, timed_samples + size
            mark = now
            position = replace(position, batch=position.batch + 1, samples=position.samples + size)
            if steps == WARMUP_STEPS:
                started, first_samples = time.monotonic(), position.samples
            if worker.rank == 0 and steps > WARMUP_STEPS:
                _tell(worker, position, reader, started, first_samples)
            if position.batch % eval_every == 0 or position.batch == batches:
                position = evaluate_and_save(worker, position, batches)
                mark = time.perf_counter()
                if position.stale_evals >= train.patience:
                    break
        if position.batch >= batches:
            position = replace(position, epoch=position.epoch + 1, batch=0)
    return {"samples": position.samples, "samples_per_s": round(timed_samples / timed_s, 1) if timed_s else None}


def seed_step(seed: int, position: Position, rank: int) -> None:
    """Dropout depends on the step and the rank alone, so a resumed run drops what the whole run would have."""
    torch.manual_seed(hash((seed, position.epoch, position.batch, rank)) & 0x7FFF_FFFF_FFFF_FFFF)


def evaluate_and_save(worker: Worker, position: Position, batches: int) -> Position:
    """Validate, remember whether that was the best so far, and write a checkpoint."""
    metrics = worker.evaluate("val")
    ne = mean_ne(metrics)
    better = ne < position.best_ne
    position = replace(
        position, best_ne=min(ne, position.best_ne), stale_evals=0 if better else position.stale_evals + 1
    )
    stored = position if position.batch < batches else replace(position, epoch=position.epoch + 1, batch=0)
    worker.report(stored, metrics)
    if worker.rank == 0:
        by_task = {"": metrics} if "auc" in metrics else {f"{task} ": m for task, m in metrics.items()}
        shown = "  ".join(f"{task}NE {m['ne']:.5f}  AUC {m['auc']:.5f}" for task, m in by_task.items())
        line = f"epoch {position.epoch + position.batch / batches:.2f}  {position.samples:,} samples  val {shown}"
        worker.teller.tell({}, line + ("  best" if better else ""))
    return position


def _tell(worker: Worker, position: Position, reader: Reader, started: float, first_samples: int) -> None:
    total = worker.run.train.epochs * reader.rows
    done = position.samples - first_samples
    elapsed = time.monotonic() - started
    left = elapsed / done * (total - position.samples) if done else 0.0
    worker.teller.tell({"samples": position.samples, "total": total, "left_s": left, "samples_per_s": done / elapsed})


def quiet_libraries() -> None:
    """Keep the libraries' notes out of the way: they log hundreds of lines for each group of tables."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    for name in ("torchrec", "fbgemm_gpu", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


# -- the driver ------------------------------------------------------------------------------------------------------


def train(
    run: RunConfig,
    data: Path,
    out: Path,
    *,
    resume: bool,
    show: Callable[[dict[str, Any], list[str]], None],
) -> dict[str, Any]:
    """Train a run on prepared data with Ray Train; Ray must be connected.

    Returns the summary that `slimrank train --json` prints; `out` holds the kept checkpoints and train.json.
    Raises: SlimrankError when data and run do not fit, the cluster is too small, or `out` holds another run.
    """
    dataset = open_dataset(data)
    check_fits(run, dataset)
    out = Path(out).absolute()
    if not resume:
        check_new(out)
    elif not out.exists():
        raise ConfigError(f"{out}: nothing to resume there: leave out --resume to start a run")
    else:
        check_resumes(run, dataset, out)
    before = speed_before(out)
    use_gpu = ray.cluster_resources().get("GPU", 0) >= run.train.workers
    check_room(run.train.workers)
    started = time.monotonic()
    with watched(show) as board:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"run": run.model_dump(mode="json"), "data": str(dataset.folder), "board": board},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=run.train.workers, use_gpu=use_gpu),
            run_config=ray.train.RunConfig(
                name=out.name,
                storage_path=str(out.parent),
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=run.train.keep_checkpoints,
                    checkpoint_score_attribute="val_ne",
                    checkpoint_score_order="min",
                ),
                failure_config=ray.train.FailureConfig(max_failures=MAX_RESTARTS),
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
            ),
        )
        try:
            result = fit_or_interrupt(trainer)
        except ray.train.v2.api.exceptions.TrainingFailedError as error:
            raise_user_error(error)
            raise
    summary = dict(result.return_value)
    if summary["samples_per_s"] is None and before is not None:  # nothing was left to train
        summary["samples_per_s"] = before
    write_json(out / "train.json", {**summary, "workers": run.train.workers, "seconds": time.monotonic() - started})
    return {
        "checkpoint": str(out / summary["best"]),
        **{k: summary[k] for k in ("samples", "samples_per_s", "val", "test")},
        "seconds": round(time.monotonic() - started, 1),
    }


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


def check_resumes(run: RunConfig, dataset: Dataset, out: Path) -> None:
    """Raises: ConfigError when the run in `out` has another model or data than the one to go on with."""
    kept = sorted(p for p in out.glob("step-*") if (p / MANIFEST).exists())
    if not kept:
        return
    checkpoint = open_checkpoint(kept[-1], verify=False)
    if checkpoint.run.model != run.model:
        was, now = checkpoint.run.model.model_dump(), run.model.model_dump()
        key = next(k for k in was if was[k] != now[k])
        raise ConfigError(f"{out}: trained with model.{key} {was[key]}, the config says {now[key]}: start a new --out")
    if checkpoint.fingerprint != dataset.transform.fingerprint():
        raise DataError(f"{dataset.folder}: not the prepared data that {out} was trained on: give that one to --data")


def speed_before(out: Path) -> float | None:
    """samples_per_s of the run that ended in `out` before, if one did."""
    try:
        return json.loads((out / "train.json").read_text(encoding="utf-8"))["samples_per_s"]
    except (OSError, KeyError, ValueError):
        return None


def raise_user_error(error: BaseException) -> None:
    """Raise the SlimrankError that a worker met, where that is what ended the run."""
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, SlimrankError):
                raise type(cause)(str(cause)) from None
            cause = cause.__cause__ or getattr(cause, "cause", None)


def check_fits(run: RunConfig, dataset: Dataset) -> None:
    """Raises: DataError when the run's features are not those the data was prepared with."""
    prepared = dataset.transform.schema
    wanted = [f.model_dump() for f in run.data.features], [t.model_dump() for t in run.data.tasks]
    if wanted != ([f.model_dump() for f in prepared.features], [t.model_dump() for t in prepared.tasks]):
        raise DataError(f"{dataset.folder}: prepared with other features or tasks than the config's: prepare it again")
    for table in dataset.transform.tables.values():
        owner = dataset.transform.sparse[table.name]
        wanted_dim = owner.dim or run.model.embedding_dim
        if table.embedding_dim != wanted_dim:
            raise DataError(
                f"{dataset.folder}: table {table.name} was prepared with embedding_dim {table.embedding_dim}, "
                f"the config says {wanted_dim}: prepare the data again"
            )
    smallest = min(dataset.rows("train"), dataset.rows("val"), dataset.rows("test"))
    if smallest < run.train.workers:
        raise DataError(f"{dataset.folder}: a split has {smallest} rows, fewer than {run.train.workers} workers")


def check_room(workers: int) -> None:
    """Raises: ConfigError when the cluster has fewer cores than workers, which Ray would wait for without end."""
    cores = int(ray.cluster_resources().get("CPU", 0))
    if cores < workers:
        raise ConfigError(f"train.workers {workers}: the cluster has {cores} cores: pass --workers {max(cores, 1)}")
