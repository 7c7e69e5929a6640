"""How small tables get at what loss, beside other people's quantization: python benchmarks/compress.py [--quick].

    criteo       criteo_head.parquet (needs SLIMRANK_TEST_DATA), trained here
    synthetic    a synthetic log of 4 million rows and 1.2 million table rows, trained here
    planted      the same log, every row of the tables set to what its id really does (benchmarks/planted.py)
    encode       rows a second of each codec (benchmarks/codec.py)

A seed is a model of its own; --quick takes one. For each: the best plan within 10, 5, 3, 2, 1 and .5% of the fp32
bytes, everything counted, as it is and calibrated, with the fp32 control calibrated the same way; and each peer beside
our best plan of the peer's own size, both with an id map for every id. Losses are against the same seed's fp32 model on
test rows, with one-sided 95% bounds (paired bootstrap for NE, DeLong for AUC). Or give a trained model: --checkpoint
and --data. Prints one JSON object on the last line of stdout; what it is doing goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # this tree's packages, also where another one is installed

import torch

from benchmarks.codec import drawn_rows
from benchmarks.codec import measure as measure_codec
from benchmarks.planted import planted_checkpoint
from benchmarks.prepare import hardware
from benchmarks.recipes import fit, prepared, write_log
from cluster.session import quiet
from compress.compressor import data_of, resolve, table_bytes
from compress.config import CalibrationPlan
from compress.errors import PlanError
from compress.methods.calibrate import calibrate, with_head
from compress.peers import PEERS, whole_id_maps_bytes
from compress.search.methods_table import CALIBRATION_ROWS, Bench
from compress.search.objective import compare
from compress.search.working_set import score
from trainer.checkpoint import Checkpoint, open_checkpoint
from trainer.config import parse_run
from trainer.data.dataset import Dataset, open_dataset
from trainer.metrics import auc, row_losses

BUDGETS = ("10%", "5%", "3%", "2%", "1%", "0.5%")
SYNTHETIC_ROWS = 4_000_000
MANY_IDS = 20_000_000  # more than any field of the synthetic log has
TEST_ROWS = 400_000
ENCODED_ROWS = 1 << 15
LOGS = ("criteo", "synthetic", "planted")


def main() -> None:
    """Parse, make models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--only", nargs="*", choices=[*LOGS, "encode"], default=[*LOGS, "encode"])
    parser.add_argument("--rows", type=int, default=SYNTHETIC_ROWS, help="of the synthetic log")
    parser.add_argument("--test-rows", type=int, default=TEST_ROWS, help="of the test split, to score at most")
    parser.add_argument("--checkpoint", type=Path, help="a trained model, in place of the logs")
    parser.add_argument("--data", type=Path, help="what that model was trained on")
    args = parser.parse_args()
    if (args.checkpoint is None) != (args.data is None):
        parser.error("give --checkpoint and --data together")
    quiet()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="compress-"))
    curves = []
    try:
        if args.checkpoint is not None:
            models = iter([("given", 0, open_checkpoint(args.checkpoint), open_dataset(args.data))])
        else:
            logs = [log for log in LOGS if log in args.only]
            models = trained_models(logs, 1 if args.quick else 3, args.rows, folder)
        for log, seed, checkpoint, dataset in models:
            curves.append({"log": log, "seed": seed, **curve(checkpoint, data_of(checkpoint, dataset), args.test_rows)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    encode = args.checkpoint is None and "encode" in args.only
    report = {
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "torchrec", "fbgemm-gpu-cpu")},
        "threads": torch.get_num_threads(),
        "curves": curves,
        "results": results(curves),
        "encode": [line for dim in (16, 64) for law, r in _drawn(dim) for line in measure_codec(law, r)]
        if encode
        else [],
    }
    print(json.dumps(report))


def tell(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def _drawn(dim: int) -> list[tuple[str, torch.Tensor]]:
    return list(drawn_rows(ENCODED_ROWS, dim).items())


# -- models ------------------------------------------------------------------------------------------------------------


def trained_models(
    logs: list[str], seeds: int, rows: int, folder: Path
) -> Iterator[tuple[str, int, Checkpoint, Dataset]]:
    """Log, seed, checkpoint and prepared data of each model, made when it is asked for."""
    if "criteo" in logs and not os.environ.get("SLIMRANK_TEST_DATA"):
        tell("criteo: SLIMRANK_TEST_DATA is not set: left out")
        logs = [log for log in logs if log != "criteo"]
    if logs:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        if "criteo" in logs:
            yield from _of_log("criteo", write_log(folder, None, MANY_IDS)[0], seeds, folder, ["criteo"])
        if {"synthetic", "planted"} & set(logs):
            content, _ = write_log(folder, rows, MANY_IDS)
            content["train"] = {"epochs": 1, "batch_size": 4096}
            yield from _of_log("synthetic", content, seeds, folder, logs)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _of_log(
    name: str, content: dict[str, Any], seeds: int, folder: Path, wanted: list[str]
) -> Iterator[tuple[str, int, Checkpoint, Dataset]]:
    tell(f"{name}: preparing")
    dataset = prepared(content, folder / f"{name}-prepared")
    for seed in range(seeds):
        run = parse_run({**content, "train": content.get("train", {}) | {"seed": seed}}, name)
        if name in wanted:
            tell(f"{name}: training seed {seed}")
            yield name, seed, open_checkpoint(fit(run, dataset, folder / f"{name}-{seed}", None).path), dataset
        if name == "synthetic" and "planted" in wanted:
            tell(f"planted: training the head of seed {seed}")
            sized = dataset.sized(run.data, run.model.embedding_dim)
            raw = Path(content["data"]["input"]).parent
            yield "planted", seed, planted_checkpoint(run, sized, raw, folder / f"planted-{seed}", seed), dataset


# -- measures ----------------------------------------------------------------------------------------------------------


def curve(checkpoint: Checkpoint, dataset: Dataset, limit: int) -> dict[str, Any]:
    """What one model's tables cost at each size, and its peers."""
    bench = Bench(checkpoint, dataset, "test", limit, lambda *_: None)
    labels, reference = bench.working.labels, bench.reference
    ids = whole_id_maps_bytes(bench.by_fisher)
    told: dict[str, Any] = {
        "table_rows": sum(t.num_embeddings for t in dataset.transform.tables.values()),
        "fp32_bytes": bench.fp32_bytes,
        "whole_id_map_bytes": ids,
        "rows": {split: dataset.rows(split) for split in ("train", "val", "test")},
        "test_rows": len(labels),
        "fp32_auc": auc(labels[:, 0], reference[:, 0]),
        "fp32_log_loss": float(row_losses(labels[:, 0], reference[:, 0]).mean()),
        "sizes": list(sizes(bench)),
        "peers": list(peers(bench, ids)),
    }
    return told


def sizes(bench: Bench) -> Iterator[dict[str, Any]]:
    """The best plan within each budget, plain and calibrated, with the control."""
    asked = CalibrationPlan()
    train = bench.sample("train", CALIBRATION_ROWS, bench.by_fisher)
    held = bench.sample("val", asked.held_rows, bench.by_fisher)
    labels, reference = bench.working.labels, bench.reference
    for budget in BUDGETS:
        begun = time.process_time()
        try:
            resolved = resolve(bench.budget_plan(budget), bench.by_fisher)
        except PlanError as error:
            tell(f"  {budget}: {error}")
            continue
        seconds = time.process_time() - begun
        plain = compare(labels, score(bench.working, resolved), reference)
        found = calibrate(train, held, resolved, asked, bench.dataset.negative_rate, lambda *_: None)
        calibrated = score(with_head(bench.working, found.compressed.dense), resolved)
        control = score(with_head(bench.working, found.control.dense), None)
        tell(f"  {budget}: {table_bytes(resolved):,} bytes, delta AUC {plain.delta_auc:+.6f}")
        yield {
            "budget": budget,
            "bytes": table_bytes(resolved),
            "id_map_bytes": sum(r.id_map_bytes for r in resolved.values()),
            "share": table_bytes(resolved) / bench.fp32_bytes,
            "plan_s": round(seconds, 1),
            "plain": asdict(plain),
            "calibrated": asdict(compare(labels, calibrated, reference)),
            "control": asdict(compare(labels, control, reference)),
            "calibrated_against_control": asdict(compare(labels, calibrated, control)),
            "calibration": found.describe(),
        }


def peers(bench: Bench, ids: int) -> Iterator[dict[str, Any]]:
    """Each peer, and our best plan of its size, both with an id map."""
    labels, reference = bench.working.labels, bench.reference
    for peer in PEERS:
        try:
            size = peer.table_bytes(bench.dataset.transform.tables) + ids
            theirs = compare(labels, peer.logits(bench.working), reference)
        except PlanError as error:
            tell(f"  {peer.label}: {error}")
            continue
        resolved = resolve(bench.budget_plan(str(size)), bench.by_fisher)
        ours = compare(labels, score(bench.working, resolved), reference)
        tell(f"  {peer.label}: {size:,} bytes, delta NE {theirs.delta_ne:+.6f}; ours {ours.delta_ne:+.6f}")
        yield {
            "name": peer.label,
            "bytes": size - ids,
            "share": (size - ids) / bench.fp32_bytes,
            "share_with_ids": size / bench.fp32_bytes,
            "quality": asdict(theirs),
            "ours_of_its_size": asdict(ours),
            "ours_bytes": table_bytes(resolved),
        }


def results(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, in the shape that all benchmarks print."""
    found = []
    for log in dict.fromkeys(c["log"] for c in curves):
        several = [c for c in curves if c["log"] == log]
        for budget in BUDGETS:
            points = [p for c in several for p in c["sizes"] if p["budget"] == budget]
            for kind in ("plain", "calibrated", "control") if points else ():
                for unit in ("delta_ne", "delta_ne_upper", "delta_auc", "delta_auc_lower"):
                    value = statistics.mean(p[kind][unit] for p in points)
                    found.append(_result(f"{log}: {budget} {kind}", value, unit))
        for peer in dict.fromkeys(p["name"] for c in several for p in c["peers"]):
            points = [p for c in several for p in c["peers"] if p["name"] == peer]
            for unit in ("delta_ne", "delta_auc"):
                found.append(_result(f"{log}: {peer}", statistics.mean(p["quality"][unit] for p in points), unit))
                ours = statistics.mean(p["ours_of_its_size"][unit] for p in points)
                found.append(_result(f"{log}: ours of the size of {peer}", ours, unit))
    return found


def _result(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": round(value, 7), "unit": unit, "ratio_to": None, "ratio": None}


if __name__ == "__main__":
    main()
