"""How fast training is, against what it could be: python benchmarks/train.py [--quick] [--only NAME].

    ranks        one run on two gloo ranks against two runs of one rank at the same time
    ray          the same loop under Ray Train against torchrun, two workers
    peer         a step against nn.Embedding + dense Adam (plain, and FuxiCTR's classes), one core, two table sizes
    quality      test AUC against the same peer on real data, three seeds (needs SLIMRANK_TEST_DATA)
    checkpoint   save and load against the disk's own writing and reading
    prepare      raw log to prepared rows, and the memory it takes (benchmarks/prepare.py)

Prints one JSON object on the last line of stdout; what it is doing goes to stderr. Every ratio is of figures taken in
turns, or at the same time, in this one run; each process has one thread. FuxiCTR is used where `import fuxictr` works
(benchmarks/peers/fuxictr_dcn.py says how) and left out elsewhere.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT)]  # this tree's packages, also where another one is installed

from benchmarks import prepare as prepare_benchmark
from benchmarks.peers.data import make_run, write_prepared
from benchmarks.peers.loop import Job, job_of
from benchmarks.peers.turns import SIDES, median, take_turns

BATCH = 4096
MLP = (400, 400, 400)  # FuxiCTR's usual widths
SMALL, LARGE = 50_000, 5_000_000  # table rows
VERSIONS = ("torch", "torchrec", "fbgemm-gpu-cpu", "ray", "numpy", "pyarrow", "fuxictr")


@dataclass
class Bench:
    """One invocation: its folder, how much it may take, what it found."""

    folder: Path
    quick: bool
    full: bool
    results: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        """Say on stderr what is going on."""
        print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Say something that the reader of the figures needs to know."""
        self.notes.append(text)
        self.tell(text)

    def add(self, name: str, value: float, unit: str, to: str | None = None, ratio: float | None = None) -> None:
        """A figure."""
        rounded = None if ratio is None else round(ratio, 3)
        self.results.append(
            {
                "name": name,
                "value": round(value, 5 if value < 10 else 1),
                "unit": unit,
                "ratio_to": to,
                "ratio": rounded,
            }
        )
        self.tell(f"  {name}: {value:,.4g} {unit}" + ("" if to is None else f", {rounded} of {to}"))

    def data(self, table_rows: int, rows: int) -> Path:
        """A prepared data set, made once."""
        folder = self.folder / f"data-{table_rows}-{rows}"
        if not folder.exists():
            write_prepared(folder, rows, table_rows)
        return folder

    def fresh(self) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))


def environment() -> dict[str, str]:
    """Of child processes: this tree first on the path, one thread."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}


# -- ranks: two of one run against two runs of one --------------------------------------------------------------------


def ranks(bench: Bench) -> None:
    """Samples a second of two ranks over the sum of two lone ranks; the same rows a rank and step."""
    steps, rounds = (20, 2) if bench.quick else (40, 4)
    data = {size: bench.data(1_000_000, size) for size in (BATCH * steps, 2 * BATCH * steps)}
    together, apart = [], []
    for turn in range(rounds):
        for side in ("together", "apart") if turn % 2 == 0 else ("apart", "together"):
            if side == "together":
                job = loop_job(bench, data[2 * BATCH * steps], 2 * BATCH, 2)
                together.append(in_processes([(job, 0, 2), (job, 1, 2)])[0])
            else:
                jobs = [loop_job(bench, data[BATCH * steps], BATCH, 1) for _ in range(2)]
                apart.append(sum(in_processes([(job, 0, 1) for job in jobs])))
        bench.tell(f"  two ranks {together[-1]:,.0f}/s, two runs of one {apart[-1]:,.0f}/s")
    name = "two runs of one rank, together"
    bench.add(name, median(apart), "samples/s")
    pairs = [a / b for a, b in zip(together, apart, strict=True)]
    bench.add("two ranks of one run", median(together), "samples/s", name, median(pairs))


def loop_job(bench: Bench, data: Path, batch: int, workers: int) -> Job:
    """One epoch of the trainer's loop with one evaluation at its end."""
    run = make_run(
        1_000_000,
        {"top_mlp": MLP},
        {"batch_size": batch, "epochs": 1, "evals_per_epoch": 1, "workers": workers},
    )
    return job_of(run, data, bench.fresh())


def in_processes(ranks: list[tuple[Job, int, int]]) -> list[float]:
    """Run (job, rank, world size) all at once, starting to train at the same moment; samples a second of each."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(ranks))
    answers: Any = context.Queue()
    processes = [
        context.Process(target=one_rank, args=(index, *rank, barrier, answers)) for index, rank in enumerate(ranks)
    ]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=600) for _ in ranks)
    for process in processes:
        process.join()
    return [found[index] for index in range(len(ranks))]


def one_rank(index: int, job: Job, rank: int, world_size: int, barrier: Any, answers: Any) -> None:
    """A process of `in_processes`."""
    from benchmarks.peers.loop import run_loop, start_group

    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[index % len(os.sched_getaffinity(0))]})
    place = start_group(rank, world_size, Path(job.out) / "store")
    answers.put((index, run_loop(job, place, ready=barrier.wait)["samples_per_s"]))


# -- ray: Ray Train against torchrun ----------------------------------------------------------------------------------


def ray(bench: Bench) -> None:
    """The same loop, started by torchrun and by Ray Train."""
    import ray as ray_module

    steps, rounds = (20, 1) if bench.quick else (40, 3)
    data = bench.data(1_000_000, 2 * BATCH * steps)
    sides: dict[str, list[float]] = {"torchrun": [], "Ray Train": []}
    home = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # socket paths have a limit: keep it short
    os.environ.update(environment())
    try:
        for turn in range(rounds):
            for side in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
                job = loop_job(bench, data, 2 * BATCH, 2)
                if side == "torchrun":
                    sides[side].append(under_torchrun(job))
                    continue
                ray_module.init(
                    address="local",
                    num_cpus=2,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _temp_dir=str(home),
                )
                try:
                    sides[side].append(under_ray(job))
                finally:
                    ray_module.shutdown()
            bench.tell("  " + ", ".join(f"{side} {rates[-1]:,.0f}/s" for side, rates in sides.items()))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    bench.add("torchrun", median(sides["torchrun"]), "samples/s")
    pairs = [a / b for a, b in zip(sides["Ray Train"], sides["torchrun"], strict=True)]
    bench.add("Ray Train", median(sides["Ray Train"]), "samples/s", "torchrun", median(pairs))


def under_torchrun(job: Job) -> float:
    """Samples a second of the loop in two processes that torchrun starts."""
    path = Path(job.out) / "job.json"
    path.write_text(json.dumps(vars(job)), encoding="utf-8")
    script = str(ROOT / "benchmarks" / "peers" / "loop.py")
    done = run_script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, str(path))
    if done.returncode:
        raise SystemExit(f"torchrun failed:\n{done.stderr[-4000:]}")
    return float(json.loads(path.with_suffix(".out").read_text(encoding="utf-8"))["samples_per_s"])


def under_ray(job: Job) -> float:
    """Samples a second of the loop in two workers of Ray Train."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    out = Path(job.out)
    trainer = TorchTrainer(
        on_ray,
        train_loop_config=vars(job),
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="ray", storage_path=str(out), worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}
        ),
    )
    return float(trainer.fit().return_value["samples_per_s"])


def on_ray(config: dict[str, Any]) -> dict[str, Any]:
    """What a Ray Train worker runs: what torchrun's processes run."""
    import torch
    from ray.train import get_context

    from benchmarks.peers.loop import run_loop
    from trainer.worker import Place

    context = get_context()
    place = Place(
        context.get_world_rank(), context.get_world_size(), context.get_local_world_size(), torch.device("cpu")
    )
    return run_loop(Job(**config), place)


# -- peer: a step against nn.Embedding and dense Adam -----------------------------------------------------------------


def peer(bench: Bench) -> None:
    """Samples a second on one core, in turns: few table rows, many, and the default widths."""
    turns, seconds = (2, 2.0) if bench.quick else (5, 5.0)
    two = ("ours", "nn.Embedding + Adam")
    cases = [("50k rows", SMALL, MLP, BATCH, tuple(SIDES)), ("5M rows", LARGE, MLP, BATCH, two)]
    if not bench.quick:
        cases.append(("50k rows, MLP 256-128", SMALL, (256, 128), BATCH, two))
        cases.append(("50k rows, batch 2048", SMALL, MLP, BATCH // 2, two))
        cases.append(("5M rows, batch 2048", LARGE, MLP, BATCH // 2, two))
    for case, table_rows, widths, batch, sides in cases:
        bench.tell(f"peer, {case}")
        data = bench.data(table_rows, 48 * BATCH)
        run = make_run(table_rows, {"top_mlp": widths}, {"batch_size": batch, "epochs": 1000, "workers": 1})
        jobs = {side: job_of(run, data, bench.fresh()) for side in sides}
        rates = take_turns(jobs, turns, seconds, lambda text: bench.tell(f"  {text}"))
        if set(sides) - set(rates):
            bench.note(f"left out, since it cannot run here: {', '.join(sorted(set(sides) - set(rates)))}")
        against = [side for side in rates if not side.startswith("ours")]
        for side in against:
            bench.add(f"{case}: {side}", median(rates[side]), "samples/s")
        for side in rates:
            if side.startswith("ours"):
                for other in against:
                    pairs = [a / b for a, b in zip(rates[side], rates[other], strict=True)]
                    bench.add(f"{case}: {side}", median(rates[side]), "samples/s", f"{case}: {other}", median(pairs))


# -- quality: the same peer on real data ------------------------------------------------------------------------------


def quality(bench: Bench) -> None:
    """Test AUC of both on the head of a real log, as each comes and with the peer's whole recipe on both sides."""
    from benchmarks.peers.quality import CASES, aucs_of, prepare_log

    folder = os.environ.get("SLIMRANK_TEST_DATA")
    if folder is None:
        bench.note("quality: left out: SLIMRANK_TEST_DATA does not name the folder of criteo_head.parquet")
        return
    config, data = ROOT / "configs" / "criteo.yaml", bench.folder / "criteo"
    home = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    try:
        in_child(prepare_log, config, Path(folder) / "criteo_head.parquet", data, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    seeds = range(1 if bench.quick else 3)
    for case in CASES:
        found: dict[str, list[float]] = {}
        weights = CASES[case].regularizers
        for seed in seeds:
            aucs, chosen = run_in_child(aucs_of, case, config, data, bench.fresh(), seed, weights)
            weights = (chosen,)  # chosen on validation with the first seed
            for side, auc in aucs.items():
                found.setdefault(side, []).append(auc)
            bench.tell(f"  {case}, seed {seed}: " + ", ".join(f"{s} {a[-1]:.5f}" for s, a in found.items()))
        (mine, own), (other, theirs) = found.items()
        spread = [a - b for a, b in zip(own, theirs, strict=True)]
        bench.add(f"{case}: {other}", statistics.mean(theirs), "test AUC")
        bench.add(f"{case}: {mine}", statistics.mean(own), "test AUC", f"{case}: {other}", None)
        bench.add(f"{case}: difference, mean", statistics.mean(spread), "AUC")
        bench.add(f"{case}: difference, worst seed", min(spread), "AUC")
        bench.note(f"{case}: the peer's embedding_regularizer is {weights[0]:g}, the best on validation")


# -- checkpoint, prepare ----------------------------------------------------------------------------------------------


def checkpoint(bench: Bench) -> None:
    """Save and load, against plain files of as many bytes in the same folder."""
    from benchmarks.peers.checkpoints import measure

    table_rows = 2_000_000 if bench.quick else 16_000_000
    data = bench.data(table_rows, 4096)
    for world_size in (1, 2):
        found = measure(bench, table_rows, data, world_size, rounds=2 if bench.quick else 3)
        size = found.pop("bytes")
        for name, (raw, value) in found.items():
            base = f"{name}, plain file, {world_size} rank(s)"
            bench.add(base, size / median(raw) / 1e6, "MB/s")
            pairs = [a / b for a, b in zip(raw, value, strict=True)]
            bench.add(
                f"{name}, checkpoint, {world_size} rank(s)", size / median(value) / 1e6, "MB/s", base, median(pairs)
            )
    bench.note(
        f"checkpoint: {size / 1e9:.2f} GB; save ends with fsync on both sides; 'cold' reads come after the pages of "
        "the files were dropped (posix_fadvise), 'warm' reads are from the page cache"
    )


def prepare(bench: Bench) -> None:
    """benchmarks/prepare.py at 1M rows; 200k with --quick, 20M with --full."""
    rows = 20_000_000 if bench.full else 200_000 if bench.quick else 1_000_000
    script = str(ROOT / "benchmarks" / "prepare.py")
    done = run_script(script, "--rows", str(rows))
    if done.returncode:
        raise SystemExit(f"prepare failed:\n{done.stderr[-4000:]}")
    for result in json.loads(done.stdout.strip().splitlines()[-1])["results"]:
        bench.add(f"{rows:,} rows: {result['name']}", result["value"], result["unit"])


PARTS: dict[str, Callable[[Bench], None]] = {
    "ranks": ranks,
    "ray": ray,
    "peer": peer,
    "quality": quality,
    "checkpoint": checkpoint,
    "prepare": prepare,
}


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with this tree on its path."""
    return subprocess.run([sys.executable, *arguments], env=environment(), capture_output=True, text=True, check=False)


def in_child(function: Any, *args: Any) -> None:
    """Run a function in a process of its own."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=args)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def run_in_child(function: Any, *args: Any) -> Any:
    """What a function returns, run in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns: for a look, not for a claim")
    parser.add_argument("--full", action="store_true", help="prepare 20 million rows")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="this part alone; may be repeated")
    parser.add_argument("--dir", type=Path, help="folder to work in (its disk is what checkpoints are measured on)")
    args = parser.parse_args()
    os.environ.update(environment())
    folder = Path(tempfile.mkdtemp(prefix="slimrank-bench-", dir=args.dir))
    bench = Bench(folder, args.quick, args.full)
    try:
        for name in args.only or PARTS:
            begun = time.monotonic()
            bench.tell(name)
            PARTS[name](bench)
            bench.tell(f"{name}: {time.monotonic() - begun:.0f} s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        json.dumps(
            {
                "hardware": prepare_benchmark.hardware(),
                "versions": versions(),
                "notes": bench.notes,
                "results": bench.results,
            }
        )
    )


def versions() -> dict[str, str]:
    """Of what took part."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
