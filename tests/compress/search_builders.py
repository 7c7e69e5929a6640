"""Folders as a search leaves them, by its contract, of any shape: for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

FP32_BYTES = 480_000_000
BUDGET = 0.001
HOSTILE = '<script>alert("x")</script><img src="http://evil.example/a.png" onerror=alert(1)>[/red]\x1b[2J'


def quality(delta_ne: float, width: float = 2e-4) -> dict[str, float]:
    """The quality keys of a plan that loses so much NE."""
    return {
        "delta_ne": delta_ne,
        "delta_ne_upper": delta_ne + width,
        "delta_auc": -delta_ne / 3,
        "delta_auc_lower": -delta_ne / 3 - width / 2,
        "overlap": max(0.0, 1 - 20 * math.sqrt(abs(delta_ne)) / 10),
    }


def trial(number: int, rng: random.Random, tasks: list[str], slow: bool = False) -> dict[str, Any]:
    """A finished trial with plausible figures: smaller costs more, some knobs help, one does nothing."""
    params = {
        "budget": round(10 ** rng.uniform(-2.5, -0.8), 5),
        "bits": rng.choice(["2,4,8", "4,8", "8", "2,4,8,16"]),
        "dense": rng.choice(["float32", "int8", "bfloat16"]),
        "smoothing": round(rng.uniform(0, 1), 4),
        "clip": rng.choice(["minmax", "search"]),
        "centroids": rng.choice([4, 16, 64, 256]),
        "buckets": rng.choice([24, 48, 96]),
    }
    good = {"minmax": 1.6, "search": 1.0}[params["clip"]] * {"8": 4.0, "4,8": 1.5}.get(params["bits"], 1.0)
    delta = 2.2e-6 / params["budget"] ** 1.55 * good * rng.lognormvariate(0, 0.25) - 4e-5
    ms = 1.1 + 22 * params["budget"] + (params["dense"] != "int8") * 1.9 + 0.3 * ("2,4" in params["bits"])
    stopped = number % 3 == 1 and delta > BUDGET
    rungs = [{"rows": rows, "delta_ne": delta * rng.uniform(0.8, 1.2)} for rows in (10_000, 30_000, 100_000)]
    rungs = rungs[:1] if stopped else rungs
    table_bytes = int(FP32_BYTES * params["budget"])
    return {
        "number": number,
        "params": params,
        "origin": "start" if number < 3 else "sampler",
        "rung": len(rungs) - 1,
        "rows": rungs[-1]["rows"],
        "stopped": stopped,
        "rungs": rungs,
        "table_bytes": table_bytes,
        "artifact_bytes": table_bytes + 3_000_000,
        **quality(delta),
        "ms": round(ms, 3),
        "tasks": {task: quality(delta * (1 + i)) for i, task in enumerate(tasks)},
        "seconds": 2.5,
        "finished_s": 2.5 * number,
        "plan": {"version": 1},
    }


def table(index: int, rng: random.Random) -> dict[str, Any]:
    """A table of a few hundred to millions of rows as the chosen plan leaves it."""
    rows = int(10 ** rng.uniform(2, 6.5))
    own = max(4, int(rows * rng.uniform(0.01, 0.5)))
    centroid_rows = int((rows - own) * rng.uniform(0.2, 0.9))
    tiers = [{"rows": own // 4, "bits": 8}, {"rows": own // 4, "bits": 4}, {"rows": own - 2 * (own // 4), "bits": 2}]
    stored = sum(t["rows"] * (4 + 32 * t["bits"] // 8) for t in tiers)
    predicted = 10 ** rng.uniform(-8, -4.5)
    return {
        "rows": rows,
        "dim": 32,
        "tiers": tiers if index % 4 else tiers[:1],
        "centroids": 64,
        "own_rows": own,
        "centroid_rows": centroid_rows,
        "forgotten_rows": rows - own - centroid_rows,
        "bytes": stored,
        "id_map_bytes": int(1.5 * (own + centroid_rows)),
        "fp32_bytes": rows * 128,
        "predicted": predicted,
        "measured": predicted * rng.lognormvariate(0, 0.4) - 2e-8,
        "error": 0.2 * predicted + 3e-8,
    }


def peers() -> list[dict[str, Any]]:
    """Other libraries' points."""
    figures = [("torchrec INT8", 0.28, 2e-6), ("torchrec INT4", 0.16, 4e-4), ("torchrec INT2", 0.1, 2.5e-2)]
    figures += [("torch greedy INT4", 0.156, 3e-4), ("torch greedy INT2", 0.094, 1.9e-2)]
    return [
        {"name": name, "table_bytes": int(share * FP32_BYTES), "id_map_bytes": 20_000_000, **quality(delta)}
        for name, share, delta in figures
    ]


def search_json(command: str = "slimrank tune --checkpoint runs/criteo --data prepared --out runs/tune") -> dict:
    """search.json."""
    return {
        "version": 1,
        "command": command,
        "config": {"trials": 200, "max_delta_ne": BUDGET, "space": {"budget": {"low": 0.003, "high": 0.15}}},
        "started": "2026-11-22T15:30:00+00:00",
        "checkpoint": {"path": "/data/runs/criteo", "version": "9f2c1a7be0", "name": "criteo"},
        "data": {"path": "/data/prepared", "fingerprint": "4be19a0d77"},
        "fp32": {"table_bytes": FP32_BYTES, "artifact_bytes": 483_000_000, "ne": 0.78712, "auc": 0.78934, "ms": 6.4},
        "samples": {"search": 100_000, "selection": 200_000, "gate": 1_000_000, "rungs": [10_000, 30_000, 100_000]},
        "knobs": ["budget", "bits", "dense", "smoothing", "clip", "centroids", "buckets"],
        "hardware": {"cpu": "2 cores", "memory_gib": 15.6},
        "versions": {"slimrank": "0.1.0", "torch": "2.13.0", "torchrec": "1.8.0"},
    }


def tune_json(trials: list[dict], tables: dict[str, dict], passed: bool, with_peers: bool, interrupted: bool) -> dict:
    """tune.json of finished trials."""
    whole = [t for t in trials if "error" not in t and not t["stopped"]]
    front: list[dict[str, Any]] = []
    for one in sorted(whole, key=lambda t: t["table_bytes"]):
        if not front or one["delta_ne_upper"] < front[-1]["delta_ne_upper"]:
            front.append({k: v for k, v in one.items() if k != "plan"})
    for index, point in enumerate(front):
        point["measured_ms"] = round(point["ms"] * 1.07, 3) if index % 2 else None
        point["selection"] = quality(point["delta_ne"] * 1.1, 1.4e-4)
    holds = [i for i, p in enumerate(front) if p["delta_ne_upper"] <= BUDGET] or [len(front) - 1]
    chosen = holds[1] if passed and len(holds) > 1 else holds[0]
    refused = [{"index": holds[0], "delta_ne_upper": 0.00118}] if chosen != holds[0] else []
    point = front[chosen]
    gate = {"passed": passed, "budget": BUDGET, "rows": 1_000_000, "confidence": 0.95}
    gate |= quality(point["delta_ne"] if passed else 0.0009, 1e-4 if passed else 4e-4)
    gate |= {"tried": sorted({holds[0], chosen}), "refused": refused, "tasks": point["tasks"]}
    if not passed:
        gate["rows_to_resolve"] = 16_000_000
    return {
        "artifact": None if interrupted else "/data/runs/tune/artifact",
        "trials": len(trials),
        "failed_trials": sum("error" in t for t in trials),
        "stopped_trials": sum(t.get("stopped", False) for t in trials),
        "interrupted": interrupted,
        "front": front,
        "chosen": chosen,
        "why": "the smallest plan on the front whose bound holds the budget on the gate's rows",
        "gate": gate,
        "tables": tables,
        "peers": peers() if with_peers else [],
        "table_bytes_fp32": FP32_BYTES,
        "working_set_bytes": 31_000_000,
        "seconds": 412.5,
        "lineage": {"checkpoint": "9f2c1a7be0", "data": "4be19a0d77", "samples": 9_000_000, "seed": 0},
    }


def write_search(
    folder: Path,
    trials: int = 40,
    tables: int = 8,
    tasks: tuple[str, ...] = ("click",),
    *,
    errors: int = 0,
    passed: bool = True,
    with_peers: bool = True,
    interrupted: bool = False,
    ended: bool = True,
    names: tuple[str, ...] = (),
    error: str = "table t_cat_03: embedding_dim 10 is not a multiple of 4, which INT4 needs",
) -> Path:
    """A folder of a search; `names` go to the first tables, the last `errors` trials fail."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    done = [trial(n, rng, list(tasks)) for n in range(trials)]
    done[trials - errors :] = [
        {"number": t["number"], "params": t["params"], "error": error, "seconds": 0.4, "finished_s": t["finished_s"]}
        for t in done[trials - errors :]
    ]
    (folder / "search.json").write_text(json.dumps(search_json()))
    (folder / "trials.jsonl").write_text("".join(json.dumps(t) + "\n" for t in done))
    if ended:
        called = [names[i] if i < len(names) else f"t_cat_{i:02d}" for i in range(tables)]
        by_name = {name: table(i, rng) for i, name in enumerate(called)}
        told = tune_json(done, by_name, passed, with_peers, interrupted)
        (folder / "tune.json").write_text(json.dumps(told))
    return folder


def write_old_search(folder: Path) -> Path:
    """A folder as the grid search of before left it: no search.json, no knobs, no latency."""
    folder.mkdir(parents=True, exist_ok=True)
    points = [{"table_bytes": 10_000 * 2**i, "artifact_bytes": 50_000, **quality(4e-3 / 4**i)} for i in range(4)]
    points = [{"plan": {"version": 1, "default": {"bits": 8}}, **p} for p in points]
    (folder / "trials.jsonl").write_text("".join(json.dumps({**p, "seconds": 1.0}) + "\n" for p in points))
    gate = {"passed": True, **quality(2e-4), "budget": BUDGET, "rows": 10_000, "tried": [1, 2]}
    told = {"artifact": "/runs/tune/artifact", "trials": 4, "failed_trials": 0, "front": points, "chosen": 2}
    told |= {"gate": gate, "table_bytes_fp32": 320_000, "working_set_bytes": 1000, "seconds": 9.0}
    (folder / "tune.json").write_text(json.dumps(told))
    return folder
