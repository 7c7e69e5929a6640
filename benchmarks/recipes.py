"""What each training recipe gains: python benchmarks/recipes.py --seeds 3, or with --rows 100000 for a synthetic log.

Reads criteo_head.parquet from SLIMRANK_TEST_DATA where that is set and --rows is not, split by row 75 / 12.5 / 12.5;
else writes a synthetic log of --rows. Trains in this process alone (one thread, no Ray), as a worker does: early
stopping on validation, the best checkpoint scored on test. Prints one JSON object on the last line: for each recipe
test AUC and NE with their spread over seeds, what it gains on its peer seed by seed, samples and seconds.

Seconds are of this process's CPU (the reader's thread included), so that a busy machine does not change them much.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # this tree's packages, also where another one is installed

from cluster.session import quiet
from trainer.checkpoint import Position, open_checkpoint
from trainer.config import RunConfig, parse_run
from trainer.data import prepare
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.sources.synthetic import write_synthetic
from trainer.distill import score_file
from trainer.loop import keep_score, train_stages
from trainer.metrics import mean_ne
from trainer.worker import Place, Worker, build_worker

ROOT = Path(__file__).parents[1]
LOG = "criteo_head.parquet"
ALONE = Place(0, 1, 1, torch.device("cpu"))
ONE_PASS = {"epochs": 1}
GROWTH = [{"data_fraction": 0.25, "embedding_dim": 4}, {"data_fraction": 0.5, "embedding_dim": 8}]
SMALL = {"embedding_dim": 8, "top_mlp": [64]}
LARGE = {"embedding_dim": 32, "top_mlp": [512, 256]}


@dataclass(frozen=True)
class Recipe:
    """A change of the run, and the recipe that it is compared with; `teacher` names one, `average` takes all seeds'."""

    name: str
    peer: str | None = "default"
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    average: bool = False


RECIPES = (
    Recipe("default", None),
    Recipe("plateau", train={"plateau": {"factor": 0.1, "patience": 2}}),
    Recipe("batch norm", model={"batch_norm": True}),
    Recipe("warm-up 100", train={"schedule": {"warmup_steps": 100}}),
    Recipe("1 epoch", train=ONE_PASS),
    Recipe("1 epoch, cosine", "1 epoch", train=ONE_PASS | {"schedule": {"warmup_steps": 20, "decay": "cosine"}}),
    Recipe("2 epochs, cosine", train={"epochs": 2, "schedule": {"warmup_steps": 20, "decay": "cosine"}}),
    Recipe("precision highest", train={"precision": "highest"}),
    Recipe("precision medium", train={"precision": "medium"}),
    Recipe("precision bf16", "precision highest", train={"precision": "bf16"}),
    Recipe("stages", train={"stages": [*GROWTH, {"epochs": 8}]}),
    Recipe("large teacher", model=LARGE),
    Recipe("small", None, SMALL),
    Recipe("small, distilled", "small", SMALL, {"distill": {"teacher": "-"}}, "large teacher"),
    Recipe("small, distilled .9", "small", SMALL, {"distill": {"teacher": "-", "alpha": 0.9}}, "large teacher"),
    Recipe("small, average of teachers", "small", SMALL, {"distill": {"teacher": "-"}}, "large teacher", True),
)


@dataclass
class Trained:
    """What one run came to. `path` is its best checkpoint; `trail` (seconds, validation NE, test metrics) of each."""

    path: Path
    test: dict[str, Any]
    samples: int
    seconds: float
    step_rate: float | None
    precision: str
    trail: list[tuple[float, float, dict[str, Any]]]


def main() -> None:
    """Parse, prepare, train every recipe with every seed, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="rows of a synthetic log, in place of the real one")
    parser.add_argument("--max-ids", type=int, default=10_000, help="cap on the distinct ids of each synthetic field")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="recipes to run; peers and teachers must be among them")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="recipes-"))
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        content, known = write_log(folder, args.rows, args.max_ids)
        dataset = prepared(content, folder / "prepared")
        wanted = [r for r in RECIPES if not args.only or r.name in args.only]
        found = run_all(content, dataset, wanted, args.seeds, folder)
        print(
            json.dumps(
                {
                    "hardware": hardware(),
                    "versions": {name: version(name) for name in ("torch", "torchrec", "fbgemm-gpu-cpu")},
                    "log": LOG if known is None else {k: known[k] for k in ("rows", "attainable_auc")},
                    "rows": {split: dataset.rows(split) for split in ("train", "val", "test")},
                    "seeds": args.seeds,
                    "recipes": [summary(r, found) for r in wanted],
                    "results": [result for r in wanted for result in results(r, found)],
                }
            )
        )
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        shutil.rmtree(folder, ignore_errors=True)


def write_log(folder: Path, rows: int | None, max_ids: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The run's mapping with its input, and what is known of a synthetic log."""
    data = os.environ.get("SLIMRANK_TEST_DATA")
    if rows is None and data:
        content = yaml.safe_load((ROOT / "configs" / "criteo.yaml").read_text(encoding="utf-8"))
        content["data"]["input"] = str(Path(data) / LOG)
        return content, None
    known = write_synthetic(folder / "log", rows or 100_000, 0, max_ids, lambda *_: None)
    content = yaml.safe_load((folder / "log" / "run.yaml").read_text(encoding="utf-8"))
    content["data"]["input"] = str(folder / "log" / "raw" / "*.parquet")
    return content, known


def prepared(content: dict[str, Any], out: Path) -> Dataset:
    """What `data prepare` writes, its passes run here, one fragment after another."""

    def in_turn(function: Callable[[Any], Any], items: Iterable[Any], *_: Any) -> Iterable[Any]:
        return map(function, items)

    with mock.patch.object(prepare, "_map", in_turn):
        prepare.prepare(parse_run(content, "run"), out, lambda *_: None)
    return open_dataset(out)


def run_all(
    content: dict[str, Any], dataset: Dataset, recipes: list[Recipe], seeds: int, folder: Path
) -> dict[tuple[str, int], Trained]:
    """Every recipe with every seed; a recipe's teachers come before it."""
    found: dict[tuple[str, int], Trained] = {}
    for recipe in recipes:
        for seed in range(seeds):
            changed = {**content, "model": content["model"] | recipe.model}
            changed["train"] = content.get("train", {}) | recipe.train | {"seed": seed}
            teachers = []
            if recipe.teacher is not None:
                chosen = range(seeds) if recipe.average else [seed]
                teachers = [found[recipe.teacher, s].path for s in chosen]
            run = parse_run(changed, recipe.name)
            out = folder / f"{recipe.name}-{seed}".replace(" ", "-")
            found[recipe.name, seed] = fit(run, dataset, out, teacher_of(teachers, dataset, out))
            one = found[recipe.name, seed]
            print(
                f"{recipe.name} seed {seed}: AUC {one.test['auc']:.5f} NE {one.test['ne']:.5f} "
                f"{one.samples:,} samples {one.seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return found


def teacher_of(teachers: list[Path], dataset: Dataset, out: Path) -> Path | None:
    """The folder of the log-odds of the training rows: a teacher's, or the mean of several."""
    if not teachers:
        return None
    folders = []
    for number, teacher in enumerate(teachers):
        folders.append(out.with_name(f"{out.name}-teacher-{number}"))
        (folders[-1] / "train").mkdir(parents=True)
        for index in range(len(dataset.files["train"])):
            score_file(str(teacher), str(dataset.folder), index, str(folders[-1]))
    for path in (folders[0] / "train").iterdir():
        parts = [pq.ParquetFile(f / "train" / path.name) for f in folders]
        sizes = [parts[0].metadata.row_group(g).num_rows for g in range(parts[0].metadata.num_row_groups)]
        tables = [part.read() for part in parts]
        width = tables[0].schema.field("logits").type
        values = [t["logits"].combine_chunks().flatten().to_numpy() for t in tables]
        mean = pa.FixedSizeListArray.from_arrays(pa.array(np.mean(values, axis=0, dtype=np.float32)), type=width)
        schema = tables[0].schema
        with pq.ParquetWriter(path, schema) as writer:
            at = 0
            for rows in sizes:
                writer.write_table(pa.table([mean.slice(at, rows)], schema=schema), row_group_size=rows)
                at += rows
    return folders[0]


class Keeper:
    """A Reporter that notes when each checkpoint was whole."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.begun = time.process_time()
        self.commits: list[tuple[Path, float, dict[str, Any], int]] = []

    def path(self, position: Position) -> Path:
        """Where a checkpoint is to be written."""
        return self.out / f"step-{position.samples:012d}"

    def commit(self, path: Path, position: Position, metrics: dict[str, Any], stage: int) -> None:  # noqa: ARG002
        """A checkpoint is whole."""
        self.commits.append((path, time.process_time() - self.begun, metrics, stage))

    def progress(self, position: Position, latest: dict[str, Any]) -> None:
        """Nobody watches."""

    def evaluation(self, event: dict[str, Any]) -> None:
        """Told by `commit`."""


def fit(run: RunConfig, dataset: Dataset, out: Path, teacher: Path | None) -> Trained:
    """Train a run and score its checkpoints on test; the best one by validation is kept."""
    sized = dataset.sized(run.data, run.model.embedding_dim)
    out.mkdir()
    keeper = Keeper(out)

    def build(stage: int, precision: Any, lanes: int | None) -> Worker:
        return build_worker(run, sized, ALONE, stage, precision=precision, lanes=lanes, teacher=teacher)

    worker, position, speed = train_stages(build, run, keeper, None, None)
    seconds = time.process_time() - keeper.begun
    stages = len(run.train.all_stages)
    last = [c for c in keeper.commits if c[3] == stages - 1]  # earlier stages hold narrower tables
    best = min(last, key=lambda c: keep_score(c[2], c[3], stages))
    trail = []
    for path, at, metrics, _ in last:
        worker.load(open_checkpoint(path, verify=False))
        trail.append((at, mean_ne(metrics), worker.evaluate("test")))
        if path == best[0]:
            test = trail[-1][2]
        else:
            shutil.rmtree(path)
    return Trained(best[0], test, position.samples, seconds, speed.per_s, worker.precision, trail)


# -- what was found --------------------------------------------------------------------------------------------------


def summary(recipe: Recipe, found: dict[tuple[str, int], Trained]) -> dict[str, Any]:
    """Means and spreads over seeds, and the gain on the peer, seed by seed."""
    runs = runs_of(recipe.name, found)
    told: dict[str, Any] = {
        "name": recipe.name,
        "peer": recipe.peer,
        "precision": runs[0].precision,
        "test_auc": spread([r.test["auc"] for r in runs]),
        "test_ne": spread([r.test["ne"] for r in runs]),
        "samples": round(statistics.mean(r.samples for r in runs)),
        "seconds": spread([r.seconds for r in runs], 1),
        "step_samples_per_s": round(statistics.mean(r.step_rate or 0.0 for r in runs)),
    }
    peers = runs_of(recipe.peer, found) if recipe.peer else []
    if peers:
        told["gain_auc"] = spread([r.test["auc"] - p.test["auc"] for r, p in zip(runs, peers, strict=True)])
        told["gain_ne"] = spread([p.test["ne"] - r.test["ne"] for r, p in zip(runs, peers, strict=True)])
        if recipe.name == "stages":
            there = [at_seconds(p, best_at(r)) for r, p in zip(runs, peers, strict=True)]
            told["seconds_to_best"] = spread([best_at(r) for r in runs], 1)
            told["peer_seconds_to_best"] = spread([best_at(p) for p in peers], 1)
            told["gain_ne_at_equal_seconds"] = spread(
                [p["ne"] - r.test["ne"] for r, p in zip(runs, there, strict=True)]
            )
    return told


def runs_of(name: str | None, found: dict[tuple[str, int], Trained]) -> list[Trained]:
    """A recipe's runs in the order of their seeds."""
    return [run for (own, _), run in sorted(found.items()) if own == name]


def best_at(run: Trained) -> float:
    """Seconds from the start until the best checkpoint was whole."""
    return min(run.trail, key=lambda t: t[1])[0]


def at_seconds(run: Trained, seconds: float) -> dict[str, Any]:
    """Test metrics of the best checkpoint that a run had after some time; its first, where it had none."""
    had = [t for t in run.trail if t[0] <= seconds] or run.trail[:1]
    return min(had, key=lambda t: t[1])[2]


def spread(values: list[float], digits: int = 5) -> dict[str, float]:
    """Mean, least and most."""
    return {
        "mean": round(statistics.mean(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
    }


def results(recipe: Recipe, found: dict[tuple[str, int], Trained]) -> list[dict[str, Any]]:
    """The figures in the shape that all benchmarks print."""
    runs, peers = runs_of(recipe.name, found), runs_of(recipe.peer, found)
    told = []
    for metric in ("auc", "ne"):
        value = statistics.mean(r.test[metric] for r in runs)
        ratio = value / statistics.mean(p.test[metric] for p in peers) if peers else None
        told.append(
            {
                "name": f"{recipe.name}: test {metric.upper()}",
                "value": round(value, 5),
                "unit": metric,
                "ratio_to": recipe.peer if peers else None,
                "ratio": None if ratio is None else round(ratio, 5),
            }
        )
    return told


def hardware() -> dict[str, Any]:
    """Cores and memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"machine": platform.machine(), "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}


if __name__ == "__main__":
    main()
