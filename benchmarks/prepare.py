"""How fast `data prepare` reads a log, and what it holds in memory: python benchmarks/prepare.py --rows 1000000.

Writes a synthetic log (13 numbers, 26 ids), prepares it with a local Ray, and prints one JSON object: rows a second,
and the peak anonymous resident bytes of the driver and of a worker, sampled from /proc every 0.1 s. A log
ten times as long should leave the peaks nearly where they are: what may grow is the vocabularies.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # this tree's packages, also where another one is installed

SAMPLE_S = 0.1


def main() -> None:
    """Parse, write the log, prepare it, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--max-ids", type=int, default=100_000, help="cap on the distinct ids of each field")
    parser.add_argument("--clean", action="store_true", help="seek duplicates and cut the splits by time, too")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder whose raw/ is used again when it is there")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # socket paths have a limit: keep it short
    try:
        log = args.keep or folder / "log"
        if not (log / "run.yaml").exists():
            _in_child(write_log, log, args.rows, args.max_ids)
        print(json.dumps(measure(folder, log, args.rows, args.clean, args.cpus)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_log(log: Path, rows: int, max_ids: int) -> None:
    """The synthetic log, with its run.yaml."""
    from trainer.data.sources.synthetic import write_synthetic

    write_synthetic(log, rows, 0, max_ids, lambda *_: None)


def measure(folder: Path, log: Path, rows: int, clean: bool, cpus: int) -> dict[str, Any]:
    """Prepare the log once, with the memory watched."""
    import ray

    from cluster.session import quiet
    from trainer.config import parse_run
    from trainer.data.prepare import prepare

    quiet()
    content = yaml.safe_load((log / "run.yaml").read_text(encoding="utf-8"))
    content["data"]["input"] = str(log / "raw" / "*.parquet")
    if clean:  # the columns that come closest to a key and to a clock in this log
        content["data"]["clean"] = {"duplicates": ["I1", "I2", "I3", "C3", "C4"], "required": ["I13"]}
        content["data"] |= {"timestamp": "I13", "split": {"by": "timestamp"}}
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=str(folder / "ray"),
    )
    stages: dict[str, float] = {}
    with Watch() as watch:
        begun = time.monotonic()
        result = prepare(
            parse_run(content, "run"), folder / "out", lambda what, *_: stages.update({what: time.monotonic() - begun})
        )
        seconds = time.monotonic() - begun
    ray.shutdown()
    return {
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("ray", "pyarrow", "numpy", "pandas")},
        "rows": rows,
        "table_rows": sum(t["num_embeddings"] for t in result["tables"].values()),
        "cleaned": result["cleaned"],
        "stage_ends_s": {what: round(s, 1) for what, s in stages.items()},
        "results": [
            _result("prepare", rows / seconds, "rows/s"),
            _result("driver before", watch.first / 2**20, "MiB"),
            _result("driver peak", watch.driver / 2**20, "MiB"),
            _result("worker peak", max(watch.workers.values(), default=0) / 2**20, "MiB"),
            _result("workers together, peak", watch.together / 2**20, "MiB"),
        ],
    }


class Watch:
    """Peak anonymous resident bytes of this process and of the Ray workers below it."""

    def __init__(self) -> None:
        self.first = self.driver = resident_bytes(os.getpid())
        self.workers: dict[int, int] = {}
        self.together = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.driver = max(self.driver, resident_bytes(os.getpid()))
            now = {pid: resident_bytes(pid) for pid in ray_workers(os.getpid())}
            self.together = max(self.together, sum(now.values()))
            for pid, size in now.items():
                self.workers[pid] = max(size, self.workers.get(pid, 0))


def resident_bytes(pid: int) -> int:
    """Anonymous resident bytes of a process: neither libraries nor Ray's mapped store; 0 when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    sizes = {k: int(v.split()[0]) * 1024 for k, v in (line.split(":", 1) for line in lines) if v.strip().endswith("kB")}
    return sizes.get("RssAnon", 0)


def ray_workers(root: int) -> list[int]:
    """The Ray worker processes among the descendants of a process."""
    parents, workers = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if (entry / "cmdline").read_bytes().startswith(b"ray::"):
                    workers.append(int(entry.name))
            except (OSError, IndexError):
                continue
    return [pid for pid in workers if root in _ancestors(pid, parents)]


def _ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    seen: set[int] = set()
    while pid in parents and pid not in seen:
        seen.add(pid)
        pid = parents[pid]
    return seen


def hardware() -> dict[str, Any]:
    """Cores and memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"machine": platform.machine(), "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}


def _result(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": round(value, 1), "unit": unit, "ratio_to": None, "ratio": None}


def _in_child(function: Any, *args: Any) -> None:
    """Run a function in a process of its own, so that its memory is not counted here."""
    import multiprocessing

    child = multiprocessing.get_context("spawn").Process(target=function, args=args)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(child.exitcode)


if __name__ == "__main__":
    main()
