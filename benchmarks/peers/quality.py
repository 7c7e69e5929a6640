"""Test AUC of the trainer and of the dense-Adam peer on the same prepared real log, chosen on validation alike."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.dense_adam import MIN_LR, DenseAdamDCN, Peer, Recipe, Sample, sample_of
from benchmarks.peers.loop import PlainReporter, alone, job_of, quiet
from trainer.config import RunConfig, load_run, parse_run
from trainer.data.batch import to_batch
from trainer.data.dataset import Dataset, SplitName
from trainer.data.reader import LANES, Reader, read_split

OURS, PEER = "ours", "nn.Embedding + Adam"
EVALS_PER_EPOCH = 4
PATIENCE = 4  # evaluations, as the trainer's default
SCORE_ROWS = 4096


@dataclass(frozen=True)
class Case:
    """What both sides share, and the L2 weights of whole tables that the peer may choose from (on validation)."""

    model: dict[str, Any]
    train: dict[str, Any]
    regularizers: tuple[float, ...]
    plateau: bool


MODEL = {"top_mlp": [400, 400, 400], "dropout": 0.2}
TRAIN = {"batch_size": 1024, "epochs": 10, "workers": 1, "evals_per_epoch": EVALS_PER_EPOCH, "patience": PATIENCE}
CASES = {
    "as each comes": Case(MODEL, TRAIN, (0.0,), False),
    "whole recipe": Case(
        MODEL | {"batch_norm": True},
        TRAIN | {"plateau": {"factor": 0.1, "patience": 2}},
        (1e-6, 1e-5, 1e-4, 1e-3),
        True,
    ),
}


def prepare_log(config: Path, log: Path, out: Path, home: Path) -> None:
    """Prepare the real log with a local Ray whose files lie in `home`."""
    import ray

    from cluster.session import quiet as quiet_ray
    from trainer.data.prepare import prepare

    quiet_ray()
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _temp_dir=str(home),
    )  # fmt: skip
    prepare(load_run(config, str(log)), out, lambda *_: None)
    ray.shutdown()


def aucs_of(
    name: str, config: Path, data: Path, out: Path, seed: int, weights: tuple[float, ...]
) -> tuple[dict[str, float], float]:
    """Test AUC of both sides with one seed, and the L2 weight that the peer took of those it might."""
    quiet()
    case = CASES[name]
    content = load_run(config).model_dump(mode="json")
    content["model"] |= case.model
    content["train"] |= case.train | {"seed": seed}
    run = parse_run(content, name)
    dataset = job_of(run, data, out).open()[1]
    theirs, weight = peer(case, weights, run, dataset, seed)
    return {OURS: ours(run, data, out), PEER: theirs}, weight


def ours(run: RunConfig, data: Path, out: Path) -> float:
    """Train with the trainer's loop; the checkpoint of best validation NE is tested."""
    from trainer.checkpoint import open_checkpoint
    from trainer.loop import train_stages
    from trainer.worker import build_worker

    job = job_of(run, data, out)
    run, dataset = job.open()
    place = alone(job)
    reporter = PlainReporter(out)
    worker, _, _ = train_stages(
        lambda stage, precision, lanes: build_worker(run, dataset, place, stage, precision=precision, lanes=lanes),
        run,
        reporter,
        None,
        None,
    )
    assert reporter.best[1] is not None, "a run has an evaluation"
    worker.load(open_checkpoint(reporter.best[1], verify=False))
    auc = float(worker.evaluate("test")["auc"])
    torch.distributed.destroy_process_group()
    return auc


def peer(case: Case, weights: tuple[float, ...], run: RunConfig, dataset: Dataset, seed: int) -> tuple[float, float]:
    """Train the peer with each L2 weight; test AUC and weight of the one with the best validation AUC."""
    torch.set_float32_matmul_precision("highest")
    found = []
    for weight in weights:
        recipe = Recipe(embedding_regularizer=weight, epochs=run.train.epochs, reduce_lr_on_plateau=case.plateau)
        found.append((*fit(recipe, run, dataset, seed), weight))
    return max(found)[1:]


def fit(recipe: Recipe, run: RunConfig, dataset: Dataset, seed: int) -> tuple[float, float]:
    """Validation and test AUC of the peer's best state, with the data in the trainer's order."""
    torch.manual_seed(seed)
    trainer = Peer(DenseAdamDCN(run.model, dataset.transform), recipe)
    val, test = (list(samples_of(dataset, split)) for split in ("val", "test"))
    size = run.train.batch_rows(dataset.rows("train"))
    reader = Reader(dataset, "train", size, seed=seed, shuffle=True, lanes=LANES, oov_rate=run.train.oov_rate)
    every = -(-reader.num_batches() // EVALS_PER_EPOCH)
    best, state, stale = -1.0, copy.deepcopy(trainer.model.state_dict()), 0
    for epoch in range(recipe.epochs):
        for number, (batch, _) in enumerate(reader.batches(epoch), start=1):
            trainer.model.train()
            trainer.step(sample_of(batch))
            if number % every and number != reader.num_batches():
                continue
            auc = trainer.auc(val)
            if auc > best:
                best, state, stale = auc, copy.deepcopy(trainer.model.state_dict()), 0
                continue
            stale += 1
            if recipe.reduce_lr_on_plateau and stale % 2 == 0:
                for group in trainer.optimizer.param_groups:
                    group["lr"] = max(group["lr"] * 0.1, MIN_LR)
        if stale >= PATIENCE:
            break
    trainer.model.load_state_dict(state)
    return best, trainer.auc(test)


def samples_of(dataset: Dataset, split: SplitName) -> Iterator[Sample]:
    """A split in its own order."""
    rows = read_split(dataset, split)
    for first in range(0, len(rows), SCORE_ROWS):
        part = rows.take(np.arange(first, min(first + SCORE_ROWS, len(rows))))
        yield sample_of(to_batch(part.encoded, part.labels))
