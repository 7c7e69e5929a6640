"""How fast rows are encoded, and how well: OMP_NUM_THREADS=1 python benchmarks/codec.py

Encodes Gaussian and Laplace rows, and those of a checkpoint's largest table where one is given, with every codec on one
thread, and prints one JSON object: rows a second of processor time (the best of several runs), and the relative RMSE,
the root of the squared error's share of the squared norm. PyTorch core's greedy quantizer is the peer of INT4 and INT2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # this tree's packages, also where another one is installed

from benchmarks.prepare import hardware
from compress.methods.codec import dequantize_rows, quantize_rows
from compress.peers import greedy_rows
from trainer.checkpoint import open_checkpoint

RUNS = 3
GREEDY_ROWS = 4096  # of the peer, which is some ten times slower than the search


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1 << 17)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--checkpoint", type=Path, help="folder of a checkpoint: its largest table is measured, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained_ND = trained_rows(args.checkpoint, args.rows) if args.checkpoint else None
    results = []
    for dim in args.dims:
        for law, rows_ND in drawn_rows(args.rows, dim).items():
            results += measure(law, rows_ND)
    if trained_ND is not None:
        results += measure("trained", trained_ND)
    report = {
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "fbgemm-gpu-cpu")},
        "threads": torch.get_num_threads(),
        "rows": args.rows,
        "results": results,
    }
    print(json.dumps(report))


def drawn_rows(rows: int, dim: int) -> dict[str, Tensor]:
    """Rows (N, D) of unit variance, by law."""
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (rows, dim), generator=generator) * 2 - 1
    return {
        "gaussian": torch.randn((rows, dim), generator=generator),
        "laplace": torch.empty((rows, dim)).exponential_(generator=generator) * sign / 2**0.5,
    }


def trained_rows(folder: Path, rows: int) -> Tensor:
    """The first rows (N, D) of the largest table of a checkpoint."""
    checkpoint = open_checkpoint(folder)
    tables = [key for key in checkpoint.keys("tables/") if key.endswith("/weight")]
    largest = max(tables, key=lambda key: checkpoint.shape(key)[0])
    return checkpoint.read(largest, 0, min(rows, checkpoint.shape(largest)[0])).float()


def measure(law: str, rows_ND: Tensor) -> list[dict[str, Any]]:
    """Speed and error of every codec on some rows; ratios are to the peer at these bits, else to min-max."""
    dim = rows_ND.shape[1]
    results = []
    for bits in (16, 8, 4, 2):
        codecs: dict[str, Callable[[Tensor], Tensor]] = {"cast": partial(quantize_rows, bits=bits)}
        if bits < 16:
            codecs = {clip: partial(quantize_rows, bits=bits, clip=clip) for clip in ("minmax", "search")}
        if bits < 8:
            codecs["torch greedy"] = partial(greedy_rows, bits=bits)
        for name, encode in codecs.items():
            some_ND = rows_ND[:GREEDY_ROWS] if name == "torch greedy" else rows_ND
            seconds = min(_seconds(encode, some_ND) for _ in range(RUNS))
            error_ND = dequantize_rows(encode(some_ND), dim, bits) - some_ND
            results.append(
                {
                    "name": f"INT{bits} {name}" if bits < 16 else "FP16",
                    "rows_of": law,
                    "dim": dim,
                    "rows_per_s": round(len(some_ND) / seconds),
                    "relative_rmse": round(float(error_ND.norm() / some_ND.norm()), 5),
                }
            )
    return results


def _seconds(encode: Callable[[Tensor], Tensor], rows_ND: Tensor) -> float:
    begun = time.process_time()  # of this core alone, whoever else wants it
    encode(rows_ND)
    return time.process_time() - begun


if __name__ == "__main__":
    main()
