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
from compress.lookup import pieces_of
from compress.manifest import MANIFEST, MANIFEST_BYTES, stored_tables
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


def first_tier(**changes: Any) -> Change:
    """A change of the first tier of the first table."""

    def change(m: dict[str, Any]) -> dict[str, Any]:
        tiers = m["tables"][0]["tiers"]
        assert set(changes) <= {"rows", "bits"} == set(tiers[0])
        return table(tiers=[{**tiers[0], **changes}, *tiers[1:]])(m)

    return change


def file_entry(**changes: Any) -> Change:
    """A change of what the manifest says of tables.bin."""
    return lambda m: {**m, "files": {**m["files"], "tables.bin": {**m["files"]["tables.bin"], **changes}}}


def reference(task: str = "click", **values: Any) -> Change:
    """Another spread of a task's scores."""
    good = {"edges": [0.5], "shares": [0.5, 0.5], "mean": 0.5, "rows": 100}
    return lambda m: {**m, "metrics": {"score_reference": {task: good | values}}}


def in_run(section: str, **changes: Any) -> Change:
    """A change of the run."""
    return lambda m: {**m, "run": {**m["run"], section: {**m["run"][section], **changes}}}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(first_tier(rows=2**31), id="rows past int32"),
        pytest.param(first_tier(rows=2**31 - 1), id="rows past int32 with the other tiers"),
        pytest.param(first_tier(rows=2**30), id="rows past the file"),
        pytest.param(first_tier(rows=2**63), id="rows of 64 bits"),
        pytest.param(first_tier(rows=0), id="no row"),
        pytest.param(first_tier(rows=-1), id="negative rows"),
        pytest.param(first_tier(rows=1.0), id="rows of a float"),
        pytest.param(first_tier(rows=True), id="rows of a truth value"),
        pytest.param(first_tier(bits="8"), id="bits of text"),
        pytest.param(first_tier(bits=0), id="no bits"),
        pytest.param(lambda m: table(tiers=m["tables"][0]["tiers"] * 9)(m), id="more tiers than there may be"),
        pytest.param(lambda m: table(tiers=m["tables"][0]["tiers"] * 2)(m), id="each tier twice"),
        pytest.param(table(tiers=[]), id="no tier"),
        pytest.param(table(dim=2**40), id="a wide dim"),
        pytest.param(table(dim=3), id="a dim below the width"),
        pytest.param(table(width=2**40, dim=2**40), id="wide rows"),
        pytest.param(table(width=3), id="a width that does not pack"),
        pytest.param(table(width=8), id="a width without a decoder"),
        pytest.param(table(centroids=257), id="more centroids than there may be"),
        pytest.param(table(centroids=200), id="more centroids than rows"),
        pytest.param(table(centroids=-1), id="negative centroids"),
        pytest.param(table(segments=0), id="no segment"),
        pytest.param(table(segments=17), id="more segments than there may be"),
        pytest.param(table(segments=2), id="a segment that ids.arrow has not"),
        pytest.param(table(features="user_id"), id="features of text"),
        pytest.param(table(features=["user_id"] * 5000), id="many features"),
        pytest.param(table(name="x" * 300), id="a long name"),
        pytest.param(table(name="../x"), id="a name that is a path"),
        pytest.param(table(index=1, name="user_id"), id="a table twice"),
        pytest.param(table(index=1, features=["user_id"]), id="a feature of two tables"),
        pytest.param(lambda m: {**m, "tables": m["tables"] * 7000}, id="very many tables"),
        pytest.param(lambda m: {**m, "tables": {}}, id="tables of a mapping"),
        pytest.param(lambda m: {**m, "surprise": 1}, id="an unknown key"),
        pytest.param(lambda m: {**m, "\x1b[2J\ud800": 1}, id="an unknown key for terminals"),
        pytest.param(lambda m: {**m, "sizes": {**m["sizes"], "table_bytes": -1}}, id="a negative size"),
        pytest.param(lambda m: {**m, "metrics": []}, id="metrics of a list"),
        pytest.param(reference(edges=[0.5, 0.5], shares=[0.2, 0.3, 0.5]), id="edges of scores that stand still"),
        pytest.param(reference(edges=[0.6, 0.5], shares=[0.2, 0.3, 0.5]), id="edges of scores that fall"),
        pytest.param(reference(edges=[]), id="no edge of scores"),
        pytest.param(reference(edges=[i / 1e6 for i in range(10**5)]), id="very many edges of scores"),
        pytest.param(reference(edges=[-1e300]), id="an edge of scores that is no probability"),
        pytest.param(reference(edges=[True]), id="an edge of scores that is a truth"),
        pytest.param(reference(shares=[0.5, 0.4]), id="shares of scores that are not all"),
        pytest.param(reference(shares=[1.5, -0.5]), id="shares of scores below 0"),
        pytest.param(reference(shares=[0.5, 0.25, 0.25]), id="shares of scores without an edge"),
        pytest.param(reference(mean=2.0), id="a mean score past 1"),
        pytest.param(reference(rows=0), id="scores of no rows"),
        pytest.param(reference(more=1), id="an unknown key of scores"),
        pytest.param(reference("buy"), id="scores of a task that is not there"),
        pytest.param(lambda m: {**m, "metrics": {"score_reference": [1]}}, id="scores of a list"),
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


@pytest.mark.parametrize("metrics", [{}, {"score_reference": None}, {"score_reference": {}}])
def test_an_artifact_without_the_spread_of_its_scores_loads(metrics: dict[str, Any], copy: Path) -> None:
    forge(copy, lambda m: {**m, "metrics": metrics})
    assert load_artifact(copy).manifest["metrics"] == metrics


def test_a_spread_of_scores_that_keeps_the_rules_loads(copy: Path) -> None:
    forge(copy, reference())
    assert load_artifact(copy).manifest["metrics"]["score_reference"]["click"]["mean"] == 0.5


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


@pytest.mark.parametrize("name", ["city", "user_id"])
def test_ids_that_read_past_their_table_are_refused(copy: Path, name: str) -> None:
    """A table of fewer rows than the ids' segments say, its bytes made to fit."""
    index = column(copy / "ids.arrow", "table").index(name)
    manifest = json.loads((copy / MANIFEST).read_text())
    tiers = manifest["tables"][index]["tiers"]
    assert len(tiers) == 2
    shorter = [tiers[0], {**tiers[1], "rows": tiers[1]["rows"] - 1}]
    tables = [{**t, "tiers": shorter} if i == index else t for i, t in enumerate(manifest["tables"])]
    size = pieces_of(stored_tables({"tables": tables}))[1]
    with (copy / "tables.bin").open("r+b") as file:
        file.truncate(size)
    forge(copy, table(index, tiers=shorter))
    refused(copy, f"{name}: an id reads a row that the table has not")


CITY = 200 * 12 // 8  # bytes of nothing that any of these rows fill


@pytest.mark.parametrize("name", ["city", "user_id", "income"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"bits": -1}, id="negative bits"),
        pytest.param({"bits": 127}, id="bits past 64"),
        pytest.param({"bits": 64}, id="wider keys"),
        pytest.param({"bits": None}, id="null bits"),
        pytest.param({"loose": -1}, id="negative loose bits"),
        pytest.param({"loose": 127}, id="loose bits past 64"),
        pytest.param({"loose": None}, id="null loose bits"),
        pytest.param({"rows": []}, id="no segment"),
        pytest.param({"rows": None}, id="null segments"),
        pytest.param({"rows": [None, None]}, id="segments of null"),
        pytest.param({"rows": [-1, 1]}, id="a negative segment"),
        pytest.param({"rows": [2**62, 2**62]}, id="segments past 64 bits together"),
        pytest.param({"rows": [0] * 500}, id="many segments"),
        pytest.param({"packed": b"x"}, id="other keys"),
        pytest.param({"bits": 64, "loose": 0, "rows": [1, 1]}, id="wide segment numbers"),
        pytest.param({"bits": 5, "loose": 64, "packed": b"\xff" * CITY}, id="keys of a few bits"),
    ],
)
def test_ids_with_a_lie_are_refused(copy: Path, name: str, changes: dict[str, Any]) -> None:
    index = column(copy / "ids.arrow", "table").index(name)
    schema = read_arrow(copy / "ids.arrow").schema
    columns = {key: column(copy / "ids.arrow", key) for key in changes}
    for key, value in changes.items():
        columns[key][index] = value
    replace_arrow(copy / "ids.arrow", **{k: pa.array(v, schema.field(k).type) for k, v in columns.items()})
    forge(copy)
    refused(copy)


def test_ids_of_other_tables_are_refused(copy: Path) -> None:
    names = column(copy / "ids.arrow", "table")
    for changed in ([*names[:-1], "elsewhere"], [*names[:-1], names[0]]):
        replace_arrow(copy / "ids.arrow", table=pa.array(changed))
        forge(copy)
        refused(copy)


@pytest.mark.parametrize("end", [12, -1])
def test_keys_that_are_cut_short_are_refused(copy: Path, end: int) -> None:
    keys = column(copy / "ids.arrow", "packed")
    replace_arrow(copy / "ids.arrow", packed=pa.array([k[:end] for k in keys], pa.large_binary()))
    forge(copy)
    refused(copy, "ids.arrow")


def test_keys_with_bytes_left_over_are_refused(copy: Path) -> None:
    keys, names = (column(copy / "ids.arrow", key) for key in ("packed", "table"))
    for longer in names:  # a vocabulary, a hash table, buckets
        changed = [k + b"\0" * (n == longer) for k, n in zip(keys, names, strict=True)]
        replace_arrow(copy / "ids.arrow", packed=pa.array(changed, pa.large_binary()))
        forge(copy)
        refused(copy, f"ids.arrow: table {longer}")


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
