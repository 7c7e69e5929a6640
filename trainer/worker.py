"""One rank's share of a training run: the sharded model of a stage, its optimizer, what it evaluates, saves and loads.

In: a run, prepared data, a Place among the workers. Out: a Worker that starts alike under any sharding plan. The loop
that trains it is in trainer/loop.py. Imports no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from trainer.checkpoint import (
    Checkpoint,
    Position,
    init_optimizer_state,
    load_into,
    save_checkpoint,
    training_state,
    verify_together,
)
from trainer.config import RunConfig
from trainer.data.dataset import Dataset, SplitName
from trainer.data.reader import LANES, Reader
from trainer.evaluation import ScoreBuffer, cpu_group, metrics_over_ranks, score_rows
from trainer.memory import measured_memory, plan_memory
from trainer.models import Ranker, build_ranker
from trainer.optimizer import build_optimizer, fuse_table_optimizer
from trainer.precision import Precision, choose_precision, fp32, use_precision
from trainer.sharders import sharders
from trainer.sharding import describe_plan, make_plan

EVAL_ROWS = 8192  # global rows of an evaluation batch
INIT_ROWS = 65_536  # table rows that one generator fills
GROWN_INIT = 0.01  # of table_init, for columns that a stage adds: they start small, so that scores do not jump


@dataclass(frozen=True)
class Place:
    """Where this process stands among the workers."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device


@dataclass
class Worker:
    """One rank's share of a run, in one of its stages."""

    run: RunConfig
    dataset: Dataset
    place: Place
    stage: int
    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    precision: Precision
    plan: dict[str, Any]
    header: dict[str, Any]
    teacher: Path | None
    lanes: int
    group: Any = None

    def evaluate(self, split: SplitName) -> dict[str, Any]:
        """Metrics of a split over all ranks, scored in fp32 as `slimrank evaluate` and serving do."""
        place = self.place
        reader = Reader(self.dataset, split, EVAL_ROWS, rank=place.rank, world_size=place.world_size)
        ids = self.run.data.ids
        buffer = ScoreBuffer(len(self.run.data.tasks), grouped=(ids.group or ids.user) is not None)
        with fp32(self.model.module):
            score_rows(self.model, reader.slices(), place.device, buffer)
        return metrics_over_ranks(buffer, [t.name for t in self.run.data.tasks], self.run.train.metrics, self.group)

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the run, under its canonical name."""
        return training_state(self.model, self.optimizer)

    def save(self, path: Path, position: Position, metrics: dict[str, Any]) -> None:
        """Write a checkpoint with the other ranks."""
        header = {
            **self.header,
            "run": self.run.model_dump(mode="json"),
            "fingerprint": self.dataset.transform.fingerprint(),
            "table_dims": self.run.table_dims(self.stage),
            "position": asdict(position),
            "stage": self.stage,
            "metrics": metrics,
            "plan": self.plan,
            "precision": self.precision,
            "lanes": self.lanes,
            "world_size": self.place.world_size,
        }
        save_checkpoint(path, self.state(), header, self.place.rank, self.place.world_size)

    def load(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's weights and optimizer state into this rank's share; new rows and columns start afresh."""
        verify_together(checkpoint, self.place.rank, self.place.world_size)
        load_into(self.state(), checkpoint, grow=True)

    def memory(self) -> dict[str, Any]:
        """What this rank holds, beside what was planned."""
        estimate = plan_memory(
            self.plan, self.dataset.transform.tables, self.run.train.table_optimizer, self.place.world_size
        )
        return {"estimate": estimate[self.place.rank], "measured": measured_memory(self.state())}


def build_worker(
    run: RunConfig,
    dataset: Dataset,
    place: Place,
    stage: int,
    *,
    precision: Precision | None = None,
    lanes: int | None = None,
    teacher: Path | None = None,
    header: dict[str, Any] | None = None,
) -> Worker:
    """The sharded model of a stage and its optimizer on this rank.

    `precision` and `lanes` as a checkpoint has them, since what follows depends on them; else they are chosen.
    """
    train = run.train
    torch.manual_seed(train.seed)
    model = build_ranker(run.model, dataset.transform, dims=run.table_dims(stage))
    start_at_base_rate(model, dataset)
    model.head.to(place.device)
    batch = run.train.batch_rows(dataset.rows("train"), stage)
    if precision is None:
        precision = choose_precision(
            train.precision, model.head, len(dataset.transform.dense_names), model.width, place
        )
    use_precision(precision, model)
    fuse_table_optimizer(model.embeddings, train)
    plan = make_plan(
        model,
        dataset.transform,
        place.device,
        world_size=place.world_size,
        local_world_size=place.local_world_size,
        batch_size=batch,
        sharding=train.sharding,
        table_optimizer=train.table_optimizer,
    )
    sharded = DistributedModelParallel(
        model, device=place.device, plan=plan, sharders=sharders(train.sharding.comms, place.device)
    )
    optimizer = build_optimizer(sharded, train)
    init_optimizer_state(optimizer)
    worker = Worker(
        run,
        dataset,
        place,
        stage,
        sharded,
        optimizer,
        precision,
        describe_plan(plan),
        header or {},
        teacher,
        lanes or max(LANES, train.max_workers),
        cpu_group(),
    )
    init_tables(worker)
    return worker


def start_at_base_rate(model: Ranker, dataset: Dataset) -> None:
    """Set each task's output bias to the log-odds of its rate in the log (before negatives were sampled)."""
    rows = dataset.rows("train")
    rates = torch.tensor([positives / rows for positives in dataset.positives["train"]])
    with torch.no_grad():
        model.head.out.bias.copy_(torch.logit(rates) + math.log(dataset.negative_rate))


def init_tables(worker: Worker) -> None:
    """Fill each table a block of rows at a time from generators of their own: the start does not depend on the plan."""
    run, bound = worker.run, worker.run.model.table_init
    tables = list(worker.dataset.transform.tables)
    before = run.table_dims(worker.stage - 1) if worker.stage else {}
    for key, value in worker.state().items():
        if not (key.startswith("tables/") and key.endswith("/weight")):
            continue
        table = key.split("/")[1]
        full = worker.dataset.transform.tables[table].embedding_dim

        def rows_of(block: int, table: str = table, full: int = full, rows: int = value.size()[0]) -> Tensor:
            seed = (run.train.seed * 1_000_003 + tables.index(table)) * 1_000_003 + block
            generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
            count = min(INIT_ROWS, rows - block * INIT_ROWS)
            filled = torch.empty(count, full).uniform_(-bound, bound, generator=generator)
            filled[:, before.get(table, full) :] *= GROWN_INIT
            return filled

        parts = (
            [(s.tensor, list(s.metadata.shard_offsets)) for s in value.local_shards()]
            if hasattr(value, "local_shards")
            else [(value, [0, 0])]
        )
        for tensor, (first, left) in parts:
            fill(tensor, first, left, rows_of)


def fill(tensor: Tensor, first: int, left: int, rows_of: Callable[[int], Tensor]) -> None:
    """Fill the block of a table that begins at row `first` and column `left` from blocks of INIT_ROWS whole rows."""
    last = first + tensor.shape[0]
    with torch.no_grad():
        for block in range(first // INIT_ROWS, -(-last // INIT_ROWS)):
            rows = rows_of(block)
            begin, end = max(first, block * INIT_ROWS), min(last, block * INIT_ROWS + len(rows))
            inside = rows[begin - block * INIT_ROWS : end - block * INIT_ROWS, left : left + tensor.shape[1]]
            tensor[begin - first : end - first] = inside.to(tensor.device)
