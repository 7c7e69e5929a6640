"""What a search costs and whether it finds more: OMP_NUM_THREADS=1 python benchmarks/tune.py [--quick] [--only NAME].

    size      a trial over 100 million table rows against one over a million, read by the same sample: time and memory
    naive     64 trials against compressing, loading and scoring the whole model for each, on sizes where that fits,
              with a line through them
    search    hypervolume of `tune` at equal wall time against random search; which of its parts helps; five seeds
    workers   trials a minute of two workers against one

The model is a DCN over a synthetic log (benchmarks/grown.py), the sample 100,000 of its validation rows. `size` runs
every turn in a process of its own. `naive`, `search` and `workers` run the trials as `slimrank tune` does, on a local
Ray. Prints one JSON object on the last line of stdout; what it is doing goes to stderr. --quick takes minutes on small
worlds: it shows that every part runs, its figures mean little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT)]  # this tree's packages, also where another one is installed

import numpy as np
import torch

from benchmarks.grown import World, grown, write_grown_log
from benchmarks.prepare import hardware
from cluster.session import ALWAYS, quiet
from compress.artifact import load_artifact
from compress.compressor import compress, resolve
from compress.config import CompressionPlan, Range, SearchConfig
from compress.model import translate_rows
from compress.search.decide import front_of, split_rows
from compress.search.halving import hypervolume
from compress.search.preparation import Preparation, prepare
from compress.search.ray_tune import run_trials
from compress.search.sampler import Limits
from compress.search.space import Params, start_points
from compress.search.trials import Running, Sample, Shared, quality
from compress.search.working_set import score
from trainer.data.reader import Rows, spread_rows

PARTS = ("size", "naive", "search", "workers")
SPAWN = multiprocessing.get_context("spawn")
NE_REFERENCE = 10.0  # times the allowed delta NE: a plan that loses more dominates nothing
NAIVE_RATIO = 20.0
SPLIT_KEYS = {"": "seconds", ", its plan": "plan_s", ", its scores": "score_s"}
SETTINGS: tuple[Params, ...] = tuple(
    {"budget": budget, "bits": bits, "centroids": centroids, "trust": trust, "tier_price": price, "dense": dense}
    for budget, bits, centroids, trust, price, dense in (
        (0.02, "2,4,8,16", "256", 0.0, 1e-5, "fp32"),
        (0.05, "2,4,8,16", "256", 0.5, 1e-4, "int8"),
        (0.1, "4,8,16", "1", 1.0, 1e-3, "fp32"),
        (0.2, "2,4,8,16", "1", 0.0, 1e-5, "int8"),
        (0.3, "8,16", "256", 1.0, 1e-4, "fp32"),
    )
)


@dataclass(frozen=True)
class Scale:
    """How large and long everything is. `rows`: of the smallest and the largest tables; `naive`: where that is run."""

    log_rows: int
    head_steps: int
    rows: tuple[int, int]
    naive: tuple[int, ...]
    sample_rows: int
    other_rows: int
    trials: int
    seeds: int
    seconds: float
    worker_trials: int
    turns: int

    def search(self, **options: Any) -> SearchConfig:
        """The search, its samples as large as here."""
        others = {"selection_rows": self.other_rows, "gate_rows": self.other_rows}
        return SearchConfig(sample_rows=self.sample_rows, **others, **options)


FULL = Scale(
    1_000_000, 1500, (1_000_000, 100_000_000), (1_000_000, 4_000_000, 10_000_000), 100_000, 100_000, 64, 5, 90.0, 48, 3
)
QUICK = Scale(48_000, 100, (50_000, 500_000), (50_000, 200_000), 13_400, 500, 6, 1, 12.0, 6, 1)


@dataclass(frozen=True)
class Ready:
    """What trials of a world need, in a file. whole: `shared` with its sample in one part, which stops no trial early.

    seconds, peak_bytes: of the preparation, in a process of its own.
    """

    rows: int
    path: Path
    seconds: float
    peak_bytes: int

    def load(self) -> tuple[Shared, Shared, Sample]:
        """What all trials share, the same with its sample whole, and the selection sample."""
        return pickle.loads(self.path.read_bytes())


@dataclass
class Bench:
    """One invocation: its folder, how much it may take, what it found."""

    folder: Path
    scale: Scale
    naive_rows: Sequence[int]
    ways: Sequence[str]
    began: float = field(default_factory=time.monotonic)
    log: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, torch.Tensor] | None = None
    ready: dict[int, Ready] = field(default_factory=dict)
    by_hand: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def tell(self, text: str) -> None:
        """Say on stderr what is going on, and when."""
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", file=sys.stderr, flush=True)

    def add(self, name: str, value: float, unit: str, to: str | None = None, ratio: float | None = None) -> None:
        """A figure."""
        rounded = None if ratio is None else round(ratio, 3)
        digits = 5 if abs(value) < 10 else 1
        self.results.append(
            {"name": name, "value": round(value, digits), "unit": unit, "ratio_to": to, "ratio": rounded}
        )
        self.tell(f"  {name}: {value:,.4g} {unit}" + ("" if to is None else f", {rounded} of {to}"))

    def prepared(self, rows: int) -> Ready:
        """A world of so many rows, prepared, and where the naive way is measured, that as well; then it is removed."""
        if rows in self.ready:
            return self.ready[rows]
        if not self.log:
            self.tell("writing the log")
            self.log = write_grown_log(self.folder / "log", self.scale.log_rows)
        self.tell(f"writing tables of {rows:,} rows")
        world = in_child(grown, self.log, rows, self.folder / f"world-{rows}", self.dense, self.scale.head_steps)
        self.dense = world.open()[0].dense_state() if self.dense is None else self.dense
        self.tell(f"preparing a search over {rows:,} rows")
        out = self.folder / f"shared-{rows}.pickle"
        settings = SETTINGS if rows in self.naive_rows else ()
        self.ready[rows], self.by_hand[rows] = in_child(prepared_world, world, self.scale.search(), out, settings)
        world.remove()
        return self.ready[rows]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small worlds and few trials: minutes")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", type=int, help="of the largest tables; 100 million, or a million with --quick")
    parser.add_argument("--seconds", type=float, help="of each search that is compared")
    parser.add_argument(
        "--ways", nargs="*", choices=WAYS, default=list(WAYS), help="that `search` compares with random"
    )
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    args = parser.parse_args()
    scale = QUICK if args.quick else FULL
    if args.rows is not None:
        scale = replace(scale, rows=(scale.rows[0], args.rows))
    if args.seconds is not None:
        scale = replace(scale, seconds=args.seconds)
    quiet()
    os.environ.update(ALWAYS)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    torch.set_num_threads(1)
    bench = Bench(
        Path(tempfile.mkdtemp(prefix="tune-", dir=args.folder)),
        scale,
        scale.naive if "naive" in args.only else (),
        args.ways,
    )
    try:
        for part in args.only:
            bench.tell(f"{part}:")
            {"size": size, "naive": naive, "search": search, "workers": workers}[part](bench)
    finally:
        shutil.rmtree(bench.folder, ignore_errors=True)
    versions = {name: version(name) for name in ("torch", "torchrec", "fbgemm-gpu-cpu", "ray", "optuna")}
    report = {"hardware": hardware(), "versions": versions, "quick": args.quick, "results": bench.results}
    print(json.dumps({**report, "details": bench.details}))


def in_child(function: Callable[..., Any], *given: Any) -> Any:
    """A function in a process of its own, whose peak of memory is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *given).result()


def in_turn(work: Callable[[Any, Any], Any], shared: Any, each: Sequence[Any]) -> list[Any]:
    """What a search does side by side, one after the other."""
    return [work(shared, item) for item in each]


def silent(_what: str, _step: int, _total: int) -> None:
    """Progress that nobody watches."""


# -- preparation and the naive way, in a child -------------------------------------------------------------------------


def prepared_world(
    world: World, asked: SearchConfig, out: Path, settings: Sequence[Params]
) -> tuple[Ready, list[dict[str, float]]]:
    """Prepare a search, write what trials need, and do some settings the naive way."""
    torch.set_num_threads(1)
    checkpoint, dataset = world.open()
    begun = time.monotonic()
    found = prepare(checkpoint, dataset, asked, in_turn, silent)
    seconds, peak = time.monotonic() - begun, peak_bytes()
    samples = (asked.sample_rows, asked.selection_rows, asked.gate_rows)
    rows = split_rows(spread_rows(dataset, "val", sum(samples)), samples, asked.seed)[0]
    whole = replace(found.shared, rungs=(found.sample(rows),))
    out.write_bytes(pickle.dumps((found.shared, whole, found.selection), protocol=5))
    lines = [naive_trial(found, whole.rungs[0], rows, s, out.with_suffix(".artifact")) for s in settings]
    return Ready(world.rows, out, seconds, peak), lines


def naive_trial(found: Preparation, sample: Sample, rows: Rows, params: Params, out: Path) -> dict[str, float]:
    """Seconds of a trial that compresses the whole model, loads it and scores the sample through it.

    The head is converted already, as in a search's own trials. Shows that it scores as such a trial does.
    """
    shared = found.shared
    begun = time.monotonic()
    running = Running(shared, params)
    planned = time.monotonic()
    compress(found.checkpoint, found.dataset, running.plan, out, found.profiles, silent, head=running.head)
    compressed = time.monotonic()
    model = load_artifact(out).model
    loaded = time.monotonic()
    logits = model.score_encoded(translate_rows(model, found.dataset, rows.encoded))
    told = quality(sample.labels, logits, sample.reference, running.tasks, shared.seed)
    ended = time.monotonic()
    own = score(sample.working, running.resolved, running.head)
    shutil.rmtree(out)
    return {
        "seconds": ended - begun,
        "plan_s": planned - begun,
        "compress_s": compressed - planned,
        "load_s": loaded - compressed,
        "score_s": ended - loaded,
        "delta_ne": told["delta_ne"],
        "log_odds_off": float(np.abs(own - logits).max()),
    }


# -- size --------------------------------------------------------------------------------------------------------------


def size(bench: Bench) -> None:
    """Seconds and memory of trials over small and large tables, in turns."""
    ready = [bench.prepared(rows) for rows in bench.scale.rows]
    turns: dict[int, list[dict[str, Any]]] = {r.rows: [] for r in ready}
    for _ in range(bench.scale.turns):
        for r in ready:
            turns[r.rows].append(in_child(trials_alone, r))
    bench.details["size"] = {f"{rows:,} rows": found for rows, found in turns.items()}
    small: dict[str, float] = {}
    for r in ready:
        rows = f"{r.rows:,} rows"
        bench.add(f"preparation, {rows}", r.seconds, "s")
        bench.add(f"preparation, {rows}: peak memory", r.peak_bytes / 2**20, "MiB")
        found = {
            **{f"trial{what}": typical(turns[r.rows], key) for what, key in SPLIT_KEYS.items()},
            "working set": turns[r.rows][0]["working_set_bytes"] / 2**20,
            "process of the trials: peak memory": statistics.median(t["peak_bytes"] for t in turns[r.rows]) / 2**20,
            "growth of memory by trials": statistics.median(t["grown_bytes"] for t in turns[r.rows]) / 2**20,
        }
        for name, value in found.items():
            unit = "s" if name.startswith("trial") else "MiB"
            to = f"{ready[0].rows:,} rows" if small else None
            bench.add(f"{name}, {rows}", value, unit, to, value / small[name] if small else None)
        small = small or found


def typical(turns: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median over settings of the quickest turn of each: what other processes do to a turn only ever adds."""
    return statistics.median(
        min(each) for each in zip(*([t[key] for t in turn["trials"]] for turn in turns), strict=True)
    )


def trials_alone(ready: Ready) -> dict[str, Any]:
    """Each of the settings, scored to the end in this process; memory at its peak, and beyond what it began with."""
    torch.set_num_threads(1)
    _, shared, _ = ready.load()
    before = held_bytes()
    found = []
    for params in (SETTINGS[0], *SETTINGS):  # the first one warms up
        begun = time.monotonic()
        running = Running(shared, params)
        planned = time.monotonic()
        told = running.step()
        ended = time.monotonic()
        found.append(
            {
                "seconds": ended - begun,
                "plan_s": planned - begun,
                "score_s": ended - planned,
                "table_bytes": told["table_bytes"],
                "delta_ne": told["delta_ne"],
            }
        )
    return {
        "trials": found[1:],
        "working_set_bytes": shared.rungs[0].working.bytes,
        "peak_bytes": peak_bytes(),
        "grown_bytes": max(peak_bytes() - before, 0),
    }


def held_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most that this process's memory was: VmHWM, as ru_maxrss counts the parent of a process as well."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# -- naive -------------------------------------------------------------------------------------------------------------


def naive(bench: Bench) -> None:
    """Seconds of the naive way by table rows, and how many times those of as many trials of a search."""
    sizes, costs = [], []
    for rows in bench.scale.naive:
        ready = bench.prepared(rows)
        lines = bench.by_hand[rows]
        bench.details.setdefault("naive", {})[f"{ready.rows:,} rows"] = lines
        sizes.append(ready.rows)
        costs.append(statistics.median(line["seconds"] for line in lines))
        bench.add(f"naive trial, {ready.rows:,} rows", costs[-1], "s")
        bench.add("scores of both ways differ by", max(line["log_odds_off"] for line in lines), "log-odds")
    slope, start = np.polyfit(sizes, costs, 1)
    bench.add("naive trial grows by", 1e6 * slope, "s a million rows")
    bench.add("naive trial without any rows", start, "s")
    asked = bench.scale.search(trials=bench.scale.trials)
    each = 0.0
    for rows in bench.scale.rows:
        ready = bench.prepared(rows)
        with local_ray(bench.folder / "ray", 1):
            lines = searched(bench, ready.load()[0], asked, start=True)
        took = lines[-1]["finished_s"]
        each = max(each, took / len(lines))
        known = dict(zip(sizes, costs, strict=True)).get(ready.rows)
        ratio = len(lines) * (start + slope * ready.rows if known is None else known) / took
        kind = "by its line" if known is None else "measured"
        bench.add(f"{len(lines)} trials, {ready.rows:,} rows", took, "s", "naive (times faster, " + kind + ")", ratio)
    bench.add(
        f"rows from which on naive takes {NAIVE_RATIO:g} times as long", (NAIVE_RATIO * each - start) / slope, "rows"
    )


# -- search ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to search. stops: trials that do not look promising; start: from the closed form's plans."""

    algorithm: str
    stops: bool
    start: bool


WAYS = {
    "tune": Way("tpe", stops=True, start=True),
    "random": Way("random", stops=False, start=False),
    "random, halving": Way("random", stops=True, start=False),
    "random, start": Way("random", stops=False, start=True),
}


def search(bench: Bench) -> None:
    """Hypervolume of each way and seed at half the time and at all of it, on rows that no search saw."""
    asked = bench.scale.search(trials=100_000, minutes=bench.scale.seconds / 60)
    shared, whole, selection = bench.prepared(bench.scale.rows[0]).load()
    ways = {name: way for name, way in WAYS.items() if name in (*bench.ways, "random")}
    found: dict[str, dict[float, list[float]]] = {name: {0.5: [], 1.0: []} for name in ways}
    counts: dict[str, list[int]] = {name: [] for name in ways}
    for seed, (name, way) in itertools.product(range(bench.scale.seeds), ways.items()):
        own = asked.model_copy(update={"algorithm": way.algorithm, "seed": seed})
        with local_ray(bench.folder / "ray", os.cpu_count() or 1):
            lines = searched(bench, shared if way.stops else whole, own, start=way.start)
        counts[name].append(len(lines))
        scored: dict[int, float] = {}
        for share, volumes in found[name].items():
            there = [t for t in lines if t["finished_s"] <= share * bench.scale.seconds]
            volumes.append(volume(front_of(there), shared, selection, asked.max_delta_ne, scored))
        bench.tell(f"  seed {seed}, {name}: {len(lines)} trials, hypervolume {found[name][1.0][-1]:.4f}")
    bench.details["search"] = {"trials": counts, "hypervolume": found, "seconds": bench.scale.seconds}
    for name, shares in found.items():
        bench.add(f"{name}: trials", statistics.mean(counts[name]), "trials")
        for share, volumes in shares.items():
            add_volumes(bench, f"{name}, {share * bench.scale.seconds:g} s", volumes, found["random"][share])


def add_volumes(bench: Bench, name: str, volumes: Sequence[float], random: Sequence[float]) -> None:
    """Mean hypervolume of a way over seeds, and in how many it is above random search's of the same seed."""
    mean = statistics.mean(volumes)
    better = sum(a > b for a, b in zip(volumes, random, strict=True))
    to = mean / (statistics.mean(random) or math.nan)
    bench.add(f"{name}: hypervolume", mean, "nats x delta NE / limit", "random", to)
    bench.add(f"{name}: seeds above random", better, f"of {len(volumes)} seeds")


def volume(
    front: Sequence[Mapping[str, Any]], shared: Shared, selection: Sample, limit: float, scored: dict[int, float]
) -> float:
    """Hypervolume of a front: log table bytes below the largest budget, by delta NE below NE_REFERENCE limits.

    Delta NE is taken anew on the selection sample, as the best of many trials looks better on its own; a gain counts
    as no loss. `scored` remembers it by the trial's number.
    """
    space = shared.space.budget
    largest = space.high if isinstance(space, Range) else max(space.choice)
    points = []
    for trial in front:
        if trial["number"] not in scored:
            plan = CompressionPlan.model_validate(trial["plan"])
            head = shared.variants[str(trial["params"]["dense"])].head
            logits = score(selection.working, resolve(plan, shared.planner.profiles), head)
            tasks = [t.name for t in selection.working.transform.schema.tasks]
            scored[trial["number"]] = quality(selection.labels, logits, selection.reference, tasks, 0)["delta_ne"]
        lost = max(scored[trial["number"]], 0.0) / limit
        points.append((float(np.log(trial["table_bytes"] / (largest * shared.planner.fp32_bytes))), lost))
    return hypervolume(np.array(points).reshape(-1, 2), (0.0, NE_REFERENCE))


# -- workers -----------------------------------------------------------------------------------------------------------


def workers(bench: Bench) -> None:
    """Trials a minute of one worker and of two, in turns, once all of them are at work."""
    _, whole, _ = bench.prepared(bench.scale.rows[0]).load()
    asked = bench.scale.search(trials=bench.scale.worker_trials, algorithm="random")
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(bench.scale.turns):
        for count, found in rates.items():
            with local_ray(bench.folder / "ray", count):
                ends = sorted(t["finished_s"] for t in searched(bench, whole, asked, start=False))
            first = 2 * count - 1  # each worker has started and done one
            found.append(60 * (len(ends) - 1 - first) / (ends[-1] - ends[first]))
    one = max(rates[1])
    bench.add("one worker", one, "trials/min")
    bench.add("two workers", max(rates[2]), "trials/min", "one worker", max(rates[2]) / one)
    bench.details["workers"] = {f"{count}": found for count, found in rates.items()}


def searched(bench: Bench, shared: Shared, asked: SearchConfig, start: bool) -> list[dict[str, Any]]:
    """Finished trials of a search on the Ray that is connected."""
    first = {"start": start_points(shared.space, min(asked.start, asked.trials))} if start else {}
    with tempfile.TemporaryDirectory(dir=bench.folder) as out:
        return run_trials(shared, asked, Limits(asked.max_delta_ne, float("inf")), Path(out), first, silent)[0]


@contextmanager
def local_ray(folder: Path, cpus: int) -> Iterator[None]:
    """A Ray of our own on this machine with so many workers."""
    import ray

    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=cpus, object_store_memory=1 << 30, _temp_dir=str(folder), **options)
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
