"""Whether the cost model of lookups holds: OMP_NUM_THREADS=1 python benchmarks/latency.py

Calibrates this machine as `slimrank compress --budget` does, then predicts and measures lookups that the calibration
never saw: 500 rows of 5 to 40 tables, dims 8 to 64, 1 to 4 tiers of mixed bits, bags, weights and decoders. Prints one
JSON object: how well predictions rank and how far they are off, in all and by number of tiers, and each lookup.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # this tree's packages, also where another one is installed

from benchmarks.prepare import hardware
from compress.search.latency import CANDIDATES, Shape, calibrate_machine, drawn_shapes, measure_shapes
from compress.search.objective import midranks

FEWEST_TABLES = 5
HELD_OUT_SEED = 1000


def main() -> None:
    """Parse, calibrate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lookups", type=int, default=40, help="held out, to predict and measure")
    parser.add_argument("--seconds", type=float, default=4.0, help="of calibration, and of measuring")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    costs = calibrate_machine(args.seconds)
    seconds = time.monotonic() - begun
    shapes = held_out(args.lookups)
    measured = measure_shapes(shapes, args.seconds)
    predicted = [costs.ms(shape.work) for shape in shapes]
    report = {
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "torchrec", "fbgemm-gpu-cpu")},
        "threads": torch.get_num_threads(),
        "costs": costs.model_dump(),
        "results": [_result("calibration", seconds, "s"), *results(shapes, predicted, measured)],
        "lookups": [
            {**_described(shape), "predicted_ms": round(p, 4), "measured_ms": round(m, 4)}
            for shape, p, m in zip(shapes, predicted, measured, strict=True)
        ],
    }
    print(json.dumps(report))


def held_out(count: int) -> list[Shape]:
    """Shapes of other seeds than the calibration's, with FEWEST_TABLES at least, of one request's candidates."""
    drawn = [s for s in drawn_shapes(4 * count, HELD_OUT_SEED) if len(s.tables) >= FEWEST_TABLES]
    return [replace(shape, rows=CANDIDATES) for shape in drawn[:count]]


def results(shapes: Sequence[Shape], predicted: Sequence[float], measured: Sequence[float]) -> list[dict[str, Any]]:
    """Rank correlation and relative error of all, and of those with so many tiers a table."""
    predicted_N, measured_N = np.array(predicted), np.array(measured)
    errors_N = np.abs(predicted_N / measured_N - 1)
    ranks = np.corrcoef(midranks(predicted_N), midranks(measured_N))[0, 1]
    tiers_N = np.array([_tiers(shape) for shape in shapes])
    found = [
        _result("rank correlation", float(ranks), "Spearman's rho"),
        _result("relative error, median", float(np.median(errors_N)), "of measured ms"),
        _result("relative error, 90th percentile", float(np.quantile(errors_N, 0.9)), "of measured ms"),
    ]
    for most in np.unique(tiers_N):
        median = float(np.median(errors_N[tiers_N == most]))
        found.append(_result(f"relative error, median, tables of up to {most} tiers", median, "of measured ms"))
    return found


def _tiers(shape: Shape) -> int:
    return max(len(table.tiers) for table in shape.tables)


def _described(shape: Shape) -> dict[str, Any]:
    return {
        "tables": len(shape.tables),
        "tiers": sum(len(t.tiers) for t in shape.tables),
        "dims": sorted({t.dim for t in shape.tables}),
        "ids_a_row": sum(shape.workload.lengths.values()),
        "weighted": shape.workload.weighted,
        "decoders": sum(t.width < t.dim for t in shape.tables),
    }


def _result(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "unit": unit, "ratio_to": None, "ratio": None}


if __name__ == "__main__":
    main()
