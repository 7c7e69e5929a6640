"""How fast a large artifact loads, and what a second process on the node adds: python benchmarks/artifact.py --gb 10.

Writes two artifacts of random packed rows (INT8, D=64) through the project's own writers: one of hash tables of so many
GB together, one of a vocabulary of `--ids` ids. Every load is a process of its own; seconds run from the end of its
imports to the first score. Memory is the proportional set size (PSS) after both processes have scored the same rows and
touched every row. Prints one JSON object; the folder is removed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

sys.path[:1] = [str(Path(__file__).resolve().parents[1])]  # this tree's packages, also where another one is installed

from benchmarks.prepare import hardware

DIM, BITS = 64, 8
HASH_TABLES = 8
CHUNK_ROWS = 1 << 20
RAW_ROWS = 256
PAGE_BYTES = 4096
SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    """Parse, write, load, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=10.0, help="size of the hash tables, 1000^3 bytes")
    parser.add_argument("--ids", type=int, default=10_000_000, help="ids of the vocabulary")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="artifact-", dir=args.folder))
    os.environ["SLIMRANK_CACHE"] = str(folder / "cache")
    try:
        rows = int(args.gb * 1000**3 / HASH_TABLES / (DIM * BITS // 8 + 4))
        large = measure_tables(folder, dict.fromkeys((f"C{i + 1}" for i in range(HASH_TABLES)), rows))
        ids = measure_ids(folder, args.ids) if args.ids else []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    versions = {name: version(name) for name in ("torch", "fbgemm-gpu-cpu", "numpy", "pyarrow")}
    print(json.dumps({"hardware": hardware(), "versions": versions, "results": [*large, *ids]}))


def measure_tables(folder: Path, hashed: Mapping[str, int]) -> list[dict[str, Any]]:
    """Loads and memory of an artifact of hash tables."""
    artifact = folder / "large"
    seal_s, size = in_child(write_artifact, artifact, hashed, 0)
    loads = {
        "first load where it was written": load_once(artifact),
        "later load": load_once(artifact),
    }
    forget_pages(artifact)
    loads["later load, nothing of it in memory"] = load_once(artifact)
    os.environ["SLIMRANK_CACHE"] += "-elsewhere"
    loads["first load of a copy"] = load_once(artifact)
    loads["later load of the copy"] = load_once(artifact)
    loads["load, verify full"] = load_once(artifact, "full")
    alone, together = two_processes(artifact)
    os.environ["SLIMRANK_CACHE"] = os.environ["SLIMRANK_CACHE"].removesuffix("-elsewhere")
    shutil.rmtree(artifact)
    return [
        result("tables", size / 1000**3, "GB"),
        result("seal", seal_s, "s"),
        *(result(name, load["seconds"], "s") for name, load in loads.items()),
        result("one process, PSS", alone / 2**20, "MiB"),
        result("two processes, PSS", together / 2**20, "MiB"),
        result("second process adds, of the tables", 100 * (together - alone) / size, "%"),
    ]


def measure_ids(folder: Path, ids: int) -> list[dict[str, Any]]:
    """Loads and memory of an artifact whose only table has a vocabulary."""
    artifact = folder / "ids"
    in_child(write_artifact, artifact, {}, ids)
    stored = (artifact / "ids.arrow").stat().st_size
    loads = [load_once(artifact) for _ in range(2)]
    return [
        result("ids", ids, "ids"),
        result("an id on disk", stored / ids, "bytes"),
        result("later load of a vocabulary", loads[1]["seconds"], "s"),
        result("of these, reading its ids", loads[1]["ids_s"], "s"),
        result("an id in memory", loads[1]["id_bytes"] / ids, "bytes"),
        result("an id while loading, peak", loads[1]["grown"] / ids, "bytes"),
    ]


# -- writing ---------------------------------------------------------------------------------------------------------


def write_artifact(folder: Path, hashed: Mapping[str, int], ids: int) -> tuple[float, int]:
    """An artifact of hash tables of so many rows each, or of one vocabulary; returns seconds of seal, table bytes."""
    import torch
    from safetensors.torch import save_file

    from compress.artifact import golden_table, seal
    from compress.ids import Layout, read_ids, write_ids
    from compress.lookup import StoredTable, Tier, map_block, pieces_of
    from compress.model import build_model
    from trainer.data.fit import fit_transform, observe
    from trainer.data.transform import RESERVED_ROWS, IdMap, Transform, write_arrow
    from trainer.files import write_json
    from trainer.models import build_head

    run = run_of(hashed, ids)
    raw = pa.table(
        {f.source: [f"{f.name}-{i}" for i in range(RAW_ROWS)] for f in run.data.features}
        | {"click": [0, 1] * (RAW_ROWS // 2)}
    )
    transform = fit_transform(observe(raw, run.data, 0), run.data, DIM)
    if ids:
        keys = np.unique(np.random.default_rng(0).integers(0, 2**64, ids, dtype=np.uint64))
        infos = {n: replace(t, num_embeddings=len(keys) + RESERVED_ROWS) for n, t in transform.tables.items()}
        transform = Transform(transform.schema, infos, {"C1": IdMap.of_rows(keys)}, transform.numerics)
    infos = transform.tables
    tables = [StoredTable(t.name, DIM, DIM, (Tier(t.num_embeddings, BITS),), t.features) for t in infos.values()]
    size = pieces_of(tables)[1]
    folder.mkdir()
    write_rows(folder / "tables.bin", tables)
    write_json(folder / "transform.json", transform.describe())
    orders = {n: np.arange(t.num_embeddings, dtype=np.int32) for n, t in infos.items()}
    write_ids(folder / "ids.arrow", transform.id_maps, {n: Layout(o, (len(o),), len(o)) for n, o in orders.items()})
    own = transform.with_id_maps(read_ids(folder / "ids.arrow", infos, tables))
    torch.manual_seed(0)
    head = build_head(run.model, own).eval()
    save_file(head.state_dict(), folder / "dense.safetensors")
    model = build_model(run, own, tables, map_block(folder / "tables.bin", size), head, "unsealed")
    write_arrow(golden_table(raw, model), folder / "golden.arrow")
    manifest = {
        "name": run.name,
        "run": run.model_dump(mode="json"),
        "plan": {},
        "tables": [asdict(t) for t in tables],
        "sizes": {"table_bytes": size, "table_bytes_fp32": sum(t.fp32_bytes for t in infos.values())},
        "lineage": {},
        "metrics": {},
    }
    begun = time.monotonic()
    seal(folder, manifest)
    return time.monotonic() - begun, size


def run_of(hashed: Mapping[str, int], ids: int) -> Any:
    """The run of these tables, one feature each."""
    from trainer.config import parse_run

    features: list[dict[str, Any]] = [
        {"name": name, "kind": "categorical", "hash_size": rows, "dim": DIM} for name, rows in hashed.items()
    ]
    if ids:
        features.append({"name": "C1", "kind": "categorical", "dim": DIM})
    data = {"input": "log/*.parquet", "tasks": [{"name": "click", "column": "click"}], "features": features}
    model = {"arch": "dcn", "embedding_dim": DIM, "top_mlp": [256, 128]}
    return parse_run({"name": "large", "data": data, "model": model}, "run")


def write_rows(path: Path, tables: Any) -> None:
    """Random INT8 rows, each with a small scale and bias, a chunk at a time."""
    from compress.lookup import pieces_of

    rng = np.random.default_rng(0)
    header = np.array([0.001, -0.1], dtype=np.float16).view(np.uint8)
    pieces, size = pieces_of(tables)
    with path.open("wb") as file:
        file.truncate(size)
        for piece in pieces:
            width, left = DIM + len(header), piece.bytes
            file.seek(piece.first_byte)
            while left:
                rows = np.frombuffer(bytearray(rng.bytes(min(left, CHUNK_ROWS * width))), np.uint8).reshape(-1, width)
                rows[:, : len(header)] = header
                file.write(rows.data)
                left -= rows.nbytes
        file.flush()
        os.fsync(file.fileno())  # so that forget_pages can drop its pages


# -- loading ---------------------------------------------------------------------------------------------------------


def load_and_score(folder: Path, verify: Literal["full", "known", "none"]) -> tuple[Any, dict[str, float]]:
    """Load, score the golden rows once more; the artifact, seconds, and bytes that the peak of memory grew by."""
    import compress.artifact as artifacts
    import compress.ids as ids

    timed = {"ids_s": 0.0}

    def read_ids(*args: Any) -> Any:
        begun = time.monotonic()
        maps = ids.read_ids(*args)
        timed["ids_s"] += time.monotonic() - begun
        return maps

    artifacts.read_ids = read_ids
    before = status_bytes("VmHWM")
    begun = time.monotonic()
    artifact = artifacts.load_artifact(folder, verify=verify)
    artifact.model.score_encoded(artifact.model.transform.encode(artifact.golden))
    timed["seconds"] = time.monotonic() - begun
    timed["grown"] = status_bytes("VmHWM") - before
    maps = artifact.model.transform.id_maps.values()
    arrays = [a for m in maps for a in vars(m).values() if isinstance(a, np.ndarray)]
    timed["id_bytes"] = sum(a.nbytes for a in arrays)
    return artifact, timed


def load_once(folder: Path, verify: Literal["full", "known", "none"] = "known") -> dict[str, float]:
    """One load in a process of its own."""
    return in_child(timed_load, folder, verify)


def timed_load(folder: Path, verify: Literal["full", "known", "none"]) -> dict[str, float]:
    """What `load_and_score` measured."""
    return load_and_score(folder, verify)[1]


def two_processes(folder: Path) -> tuple[int, int]:
    """PSS bytes of one process that has loaded and touched everything, and of two of them together."""
    alone = 0
    begun: list[tuple[Any, Connection]] = []
    for _ in range(2):
        ours, theirs = SPAWN.Pipe()
        child = SPAWN.Process(target=load_and_stay, args=(folder, theirs))
        child.start()
        theirs.close()
        begun.append((child, ours))
        ours.recv()
        alone = alone or ask(ours, "pss")
    together = sum(ask(ours, "pss") for _, ours in begun)
    for child, ours in begun:
        ours.send("end")
        child.join()
    return alone, together


def load_and_stay(folder: Path, pipe: Connection) -> None:
    """Load, touch every page of the tables, and answer with the PSS until told to end."""
    artifact, _ = load_and_score(folder, "known")
    touched = int(artifact.model.lookup.block[::PAGE_BYTES].sum())
    pipe.send(touched)
    while pipe.recv() == "pss":
        pipe.send(status_bytes("Pss", "smaps_rollup"))


def ask(pipe: Connection, what: str) -> int:
    """A child's answer."""
    pipe.send(what)
    return pipe.recv()


def status_bytes(key: str, file: str = "status") -> int:
    """A figure of this process in /proc."""
    lines = Path(f"/proc/self/{file}").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def forget_pages(folder: Path) -> None:
    """Drop the pages of a folder's files from the machine's memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_child(function: Any, *args: Any) -> Any:
    """What a function returns in a new process."""
    with SPAWN.Pool(1) as pool:
        return pool.apply(function, args)


def result(name: str, value: float, unit: str) -> dict[str, Any]:
    """One figure."""
    return {"name": name, "value": round(value, 3), "unit": unit, "ratio_to": None, "ratio": None}


if __name__ == "__main__":
    main()
