"""Artifacts of strangers: each is refused with one line, in bounded time and memory, and loads nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hostile_builders import FILES, Change, forge
from safetensors.torch import load_file, save_file

from compress.artifact import Artifact, load_artifact, read_manifest
from compress.errors import ArtifactError
from compress.manifest import MANIFEST, MANIFEST_BYTES
from trainer.data.transform import read_arrow, write_arrow


def refused(folder: Path, match: str | None = None, **options: Any) -> None:
    """Loading ends in one line of text that names the artifact or a file of it."""
    with pytest.raises(ArtifactError, match=match) as caught:
        load_artifact(folder, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value) or "head" in str(caught.value)
    assert len(str(caught.value)) < 1500


# -- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.name for p in FILES.glob("*.json")))
def test_manifest_of_a_stranger_is_refused(copy: Path, name: str) -> None:
    shutil.copyfile(FILES / name, copy / MANIFEST)
    refused(copy)
    with pytest.raises(ArtifactError):
        read_manifest(copy)


@pytest.mark.parametrize("name", sorted(p.name for p in FILES.glob("*.json")))
def test_transform_of_a_stranger_is_refused(copy: Path, name: str) -> None:
    shutil.copyfile(FILES / name, copy / "transform.json")
    forge(copy)
    refused(copy)


def test_manifest_longer_than_its_limit_is_not_read_whole(copy: Path) -> None:
    with (copy / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    refused(copy, "longer than 8,388,608 bytes")
    assert MANIFEST_BYTES == 8_388_608


@pytest.mark.parametrize(
    "name",
    [
        *("../tables.bin", "/etc/passwd", "a/b.bin", "..", ".", "", ".hidden", "TABLES.BIN", "tables.bin ", "con"),
        *(
            "tables.bin\0",
            "manifest.json",
            "manifest.sig",
            "model.pkl",
            "dense.pt",
            "tables.bin\n",
            "\x1b[2J",
            "\ud800",
        ),
    ],
)
def test_manifest_that_names_another_file_is_refused(copy: Path, name: str) -> None:
    forge(copy, lambda m: {**m, "files": {**m["files"], name: m["files"]["ids.arrow"]}})
    refused(copy, "names the file")


def table(index: int = 0, **changes: Any) -> Change:
    """A change of one table's entry."""
    return lambda m: {
        **m,
        "tables": [{**t, **changes} if i == index else t for i, t in enumerate(m["tables"])],
    }


def file_entry(**changes: Any) -> Change:
    """A change of what the manifest says of tables.bin."""
    return lambda m: {**m, "files": {**m["files"], "tables.bin": {**m["files"]["tables.bin"], **changes}}}


def in_run(section: str, **changes: Any) -> Change:
    """A change of the run."""
    return lambda m: {**m, "run": {**m["run"], section: {**m["run"][section], **changes}}}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(table(rows=2**31), id="rows past int32"),
        pytest.param(table(rows=2**31 - 1), id="rows past the file"),
        pytest.param(table(rows=2**63), id="rows of 64 bits"),
        pytest.param(table(rows=0), id="no row"),
        pytest.param(table(rows=-1), id="negative rows"),
        pytest.param(table(rows=1.0), id="rows of a float"),
        pytest.param(table(rows=True), id="rows of a truth value"),
        pytest.param(table(dim=2**40), id="a wide dim"),
        pytest.param(table(dim=3), id="a dim that does not pack"),
        pytest.param(table(bits="8"), id="bits of text"),
        pytest.param(table(features="user_id"), id="features of text"),
        pytest.param(table(features=["user_id"] * 5000), id="many features"),
        pytest.param(table(name="x" * 300), id="a long name"),
        pytest.param(table(name="../x"), id="a name that is a path"),
        pytest.param(table(index=1, name="user_id"), id="a table twice"),
        pytest.param(table(index=1, features=["user_id"]), id="a feature of two tables"),
        pytest.param(lambda m: {**m, "tables": m["tables"] * 7000}, id="very many tables"),
        pytest.param(lambda m: {**m, "tables": {}}, id="tables of a mapping"),
        pytest.param(lambda m: {**m, "cuts": {**m["cuts"], "user_id": -1}}, id="a negative cut"),
        pytest.param(lambda m: {**m, "cuts": {**m["cuts"], "other": 3}}, id="a cut of no table"),
        pytest.param(lambda m: {**m, "surprise": 1}, id="an unknown key"),
        pytest.param(lambda m: {**m, "\x1b[2J\ud800": 1}, id="an unknown key for terminals"),
        pytest.param(lambda m: {**m, "sizes": {**m["sizes"], "table_bytes": -1}}, id="a negative size"),
        pytest.param(lambda m: {**m, "metrics": []}, id="metrics of a list"),
        pytest.param(lambda m: {**m, "run": []}, id="run of a list"),
        pytest.param(lambda m: {**m, "run": {"data": {"features": 3}}}, id="features of a number"),
        pytest.param(file_entry(bytes=2**62), id="a file past its limit"),
        pytest.param(file_entry(bytes=7), id="a file of another size"),
        pytest.param(file_entry(sha256="0" * 63), id="a short checksum"),
        pytest.param(file_entry(sha256="0" * 64), id="another checksum"),
        pytest.param(file_entry(sha256=None), id="no checksum"),
        pytest.param(file_entry(mode=0o777), id="an unknown key of a file"),
        pytest.param(in_run("model", top_mlp=[10**9, 10**9]), id="a head of 4 EB"),
        pytest.param(in_run("model", top_mlp=[2**62]), id="a head past 64 bits"),
        pytest.param(in_run("model", top_mlp=[1] * 100_000), id="a head of a million layers"),
        pytest.param(in_run("model", cross_rank=2**40), id="a cross layer of 32 TB"),
        pytest.param(in_run("model", experts=2**40), id="very many experts"),
        pytest.param(lambda m: in_run("data", features=m["run"]["data"]["features"] * 700)(m), id="many features"),
    ],
)
def test_manifest_with_a_lie_is_refused(copy: Path, change: Change) -> None:
    forge(copy, change)
    refused(copy)


# -- the folder ------------------------------------------------------------------------------------------------------

NAMES = ("tables.bin", "dense.safetensors", "transform.json", "ids.arrow", "items.arrow", "golden.arrow", MANIFEST)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["link", "link to a device", "pipe", "folder", "dangling link"])
def test_file_that_is_no_regular_file_is_refused(copy: Path, tmp_path: Path, name: str, kind: str) -> None:
    path = copy / name
    moved = path.rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link": moved, "link to a device": Path("/dev/zero")}.get(kind, tmp_path / "nothing"))
    refused(copy, "not a regular file|not an artifact")


def test_file_that_the_manifest_does_not_name_is_never_read(copy: Path) -> None:
    os.mkfifo(copy / "dense.onnx")
    (copy / "model.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert load_artifact(copy).model.tasks == ["click"]


def test_catalogue_that_the_manifest_does_not_name_is_not_read(copy: Path) -> None:
    forge(copy, lambda m: {**m, "files": {k: v for k, v in m["files"].items() if k != "items.arrow"}})
    assert load_artifact(copy).catalogue is None


# -- the files, with checksums that fit ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["ids.arrow", "items.arrow", "golden.arrow"])
@pytest.mark.parametrize("name", sorted(p.name for p in FILES.glob("*.arrow")))
def test_arrow_file_of_a_stranger_is_refused(copy: Path, name: str, target: str) -> None:
    shutil.copyfile(FILES / name, copy / target)
    forge(copy)
    refused(copy, target)


@pytest.mark.parametrize("name", sorted(p.name for p in FILES.glob("*.safetensors")))
def test_safetensors_file_of_a_stranger_is_refused(copy: Path, name: str) -> None:
    shutil.copyfile(FILES / name, copy / "dense.safetensors")
    forge(copy)
    refused(copy)


def replace_arrow(path: Path, **columns: Any) -> None:
    """Put other columns into an Arrow file."""
    old = read_arrow(path)
    kept = {n: old[n].combine_chunks() for n in old.column_names}
    write_arrow(pa.table({**kept, **columns}), path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def column(path: Path, name: str) -> list[Any]:
    """A column's values."""
    return read_arrow(path)[name].to_pylist()


def test_ids_that_read_past_their_table_are_refused(copy: Path) -> None:
    tables, remaps = (column(copy / "ids.arrow", name) for name in ("table", "remap"))
    index = tables.index("city")
    for row in (10**6, -1, 2**31 - 1):
        remap = np.frombuffer(remaps[index], dtype=np.int32).copy()
        remap[17] = row
        changed = [remap.tobytes() if i == index else r for i, r in enumerate(remaps)]
        replace_arrow(copy / "ids.arrow", remap=pa.array(changed, pa.large_binary()))
        forge(copy)
        refused(copy, "city: an id reads a row that the table has not")


def test_ids_of_other_tables_are_refused(copy: Path) -> None:
    names = column(copy / "ids.arrow", "table")
    for changed in ([*names[:-1], "elsewhere"], [*names[:-1], names[0]]):
        replace_arrow(copy / "ids.arrow", table=pa.array(changed))
        forge(copy)
        refused(copy)


def test_fewer_ids_than_the_transform_says_are_refused(copy: Path) -> None:
    keys = column(copy / "ids.arrow", "keys")
    replace_arrow(copy / "ids.arrow", keys=pa.array([k[:12] for k in keys], pa.large_binary()))
    forge(copy)
    refused(copy, "ids are not as many")


@pytest.mark.parametrize("row", [-1, 10**6])
def test_item_that_reads_past_its_table_is_refused(copy: Path, row: int) -> None:
    rows = column(copy / "items.arrow", "sparse.item_id")
    replace_arrow(copy / "items.arrow", **{"sparse.item_id": pa.array([row, *rows[1:]], pa.int32())})
    forge(copy)
    refused(copy, "item reads a row that the table has not")


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param({"key": pa.array(["a", "b"])}, id="keys of text"),
        pytest.param({"dense.price": pa.array(["a", "b"])}, id="numbers of text"),
        pytest.param({"dense.price": pa.array([1.0, float("nan")], pa.float32())}, id="NaN"),
        pytest.param({"sparse.item_id": pa.array(["a", "b"])}, id="rows of text"),
        pytest.param({"sparse.item_id": pa.array([2, None], pa.int32())}, id="rows of null"),
        pytest.param({"sparse.genres": pa.array([2, 3], pa.int32())}, id="a bag of one"),
    ],
)
def test_items_of_other_types_are_refused(copy: Path, columns: dict[str, pa.Array]) -> None:
    whole = read_arrow(copy / "items.arrow").slice(0, 2)
    write_arrow(whole, copy / "new")
    (copy / "new").replace(copy / "items.arrow")
    replace_arrow(copy / "items.arrow", **columns)
    forge(copy)
    try:
        catalogue = load_artifact(copy).catalogue
    except ArtifactError:
        return
    assert catalogue is not None  # a bag of one id a row is a bag
    assert "sparse.genres" in columns


def test_unsorted_items_are_refused(copy: Path) -> None:
    whole = read_arrow(copy / "items.arrow")
    write_arrow(whole.take(pa.array(np.arange(len(whole))[::-1])), copy / "new")
    (copy / "new").replace(copy / "items.arrow")
    forge(copy)
    refused(copy, "not sorted")


@pytest.mark.parametrize("rows", [0, 5000])
def test_golden_rows_are_some_and_not_many(copy: Path, rows: int) -> None:
    whole = read_arrow(copy / "golden.arrow")
    write_arrow(whole.take(pa.array(np.arange(rows) % len(whole))), copy / "new")
    (copy / "new").replace(copy / "golden.arrow")
    forge(copy)
    refused(copy, f"{rows:,} golden rows")


def test_golden_scores_of_other_tasks_are_refused(copy: Path) -> None:
    scores = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(128, dtype=np.float32)), 2)
    replace_arrow(copy / "golden.arrow", _expected=scores)
    forge(copy)
    refused(copy, "golden scores are")


@pytest.mark.parametrize("change", ["a weight less", "a weight more", "another shape", "fp16 bytes"])
def test_weights_of_another_head_are_refused(copy: Path, change: str) -> None:
    path = copy / "dense.safetensors"
    dense = {k: v.clone() for k, v in load_file(path).items()}
    first = sorted(dense)[0]
    if change == "a weight less":
        del dense[first]
    elif change == "a weight more":
        dense["another"] = dense[first].clone()
    elif change == "another shape":
        dense[first] = dense[first][..., :1].contiguous()
    else:
        dense = {k: v.half() for k, v in dense.items()}
        dense[first] = dense[first] + 1.0
    save_file(dense, path)
    forge(copy)
    refused(copy)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x08\x0a" + b"\xff" * 100, id="not ONNX"),
        pytest.param(b"\x08\x0a\x12\x08location\x1a\x0b/etc/passwd", id="weights elsewhere"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_onnx_head_of_a_stranger_is_refused(copy: Path, content: bytes) -> None:
    import torch

    save_file({"onnx": torch.tensor(list(content), dtype=torch.uint8)}, copy / "dense.safetensors")
    forge(copy)
    refused(copy)


@pytest.mark.parametrize("part", ["features", "tables"])
def test_transform_with_a_long_list_is_refused(copy: Path, part: str) -> None:
    content = json.loads((copy / "transform.json").read_text())
    where = content["schema"] if part == "features" else content
    where[part] = where[part] * 1000
    (copy / "transform.json").write_text(json.dumps(content))
    forge(copy)
    refused(copy, "not a list of at most 4096")


@pytest.mark.parametrize("value", [2**62, -5, 1, "many", None, 3.5])
def test_transform_with_other_rows_is_refused(copy: Path, value: Any) -> None:
    content = json.loads((copy / "transform.json").read_text())
    content["tables"][0]["num_embeddings"] = value
    (copy / "transform.json").write_text(json.dumps(content))
    forge(copy)
    refused(copy)


# -- time and memory -------------------------------------------------------------------------------------------------

BOMBS = """
import json, resource, shutil, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hostile_builders import FILES, forge
from compress.artifact import load_artifact
from compress.errors import ArtifactError
valid, work = Path(sys.argv[2]), Path(sys.argv[3])
load_artifact(valid)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
grown, slowest = {}, {}
for path in sorted(FILES.iterdir()):
    kinds = {".json": ["manifest.json", "transform.json"], ".safetensors": ["dense.safetensors"]}
    for target in kinds.get(path.suffix, ["ids.arrow", "golden.arrow"]):
        folder = Path(shutil.copytree(valid, work / f"{path.name}-{target}"))
        shutil.copyfile(path, folder / target)
        if target != "manifest.json":
            forge(folder)
        before, started = peak(), time.monotonic()
        try:
            load_artifact(folder)
        except ArtifactError:
            pass
        else:
            raise SystemExit(f"{path.name} as {target} was loaded")
        grown[f"{path.name} as {target}"] = peak() - before
print(json.dumps(grown))
"""


def test_bombs_take_no_memory(artifact: Artifact, tmp_path: Path) -> None:
    """Each hostile file, in one process whose peak memory is watched; the largest claims 2**60 bytes and more."""
    command = [sys.executable, "-c", BOMBS, str(Path(__file__).parent), str(artifact.folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout.splitlines()[-1])
    assert len(grown) > 40
    assert {name: mib for name, mib in grown.items() if mib > 64} == {}
