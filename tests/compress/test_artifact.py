"""compress/artifact.py: what is written is read, and what was damaged is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from compress_builders import World
from safetensors.torch import load_file, save_file

from compress.artifact import (
    GOLDEN_ROWS,
    GOLDEN_TOLERANCE,
    MANIFEST,
    Artifact,
    check_golden,
    golden_tolerance,
    is_artifact,
    load_artifact,
    seal,
)
from compress.config import CompressionPlan
from compress.dense import TOLERANCE
from compress.errors import ArtifactError
from compress.manifest import version_of
from compress.methods.dense import DensePlan
from trainer.data.transform import read_arrow, write_arrow
from trainer.files import sha256

FILES = ("tables.bin", "dense.safetensors", "transform.json", "ids.arrow", "items.arrow", "golden.arrow")
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def copy(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    return Path(shutil.copytree(artifact.folder, tmp_path / "artifact"))


def rewrite(folder: Path, change: Change) -> None:
    """Change the manifest in place, its version made to fit, so that only the change itself can betray it."""
    path = folder / MANIFEST
    before = json.loads(path.read_text())
    after = change(before)
    if after.get("version") == before["version"]:
        after["version"] = version_of(after)
    path.write_text(json.dumps(after))


def first_table(**changes: Any) -> Change:
    """A change of the first table's entry."""
    return lambda m: {**m, "tables": [{**m["tables"][0], **changes}, *m["tables"][1:]]}


def first_tier(**changes: Any) -> Change:
    """A change of the first table's first tier."""

    def change(manifest: dict[str, Any]) -> dict[str, Any]:
        first, *others = manifest["tables"]
        tiers = [{**first["tiers"][0], **changes}, *first["tiers"][1:]]
        return {**manifest, "tables": [{**first, "tiers": tiers}, *others]}

    return change


def without(key: str) -> Change:
    """A manifest that lacks a key."""
    return lambda m: {k: v for k, v in m.items() if k != key}


# -- whole -----------------------------------------------------------------------------------------------------------


def test_artifact_holds_the_files_it_names_and_no_others(artifact: Artifact) -> None:
    assert {p.name for p in artifact.folder.iterdir()} == {*FILES, MANIFEST}
    assert set(artifact.manifest["files"]) == set(FILES)
    for name in FILES:
        assert artifact.manifest["files"][name]["sha256"] == sha256(artifact.folder / name)
    assert artifact.version == artifact.manifest["version"] == version_of(artifact.manifest)


def test_artifact_bytes_are_all_files_on_disk(artifact: Artifact) -> None:
    assert artifact.sizes["artifact_bytes"] == sum(p.stat().st_size for p in artifact.folder.iterdir())
    assert artifact.sizes["table_bytes"] < artifact.sizes["table_bytes_fp32"]


@pytest.mark.parametrize("short_of", [-1, 0, 1, 2, 3])
def test_seal_counts_the_manifest_itself(copy: Path, short_of: int) -> None:
    """Around a power of ten, where counting itself makes the manifest a digit longer."""
    whole = sum(p.stat().st_size for p in copy.iterdir())
    with (copy / "golden.arrow").open("ab") as file:
        file.write(bytes(10 ** len(str(whole)) - whole - short_of))
    sealed = reseal(copy)
    assert sealed["sizes"]["artifact_bytes"] == sum(p.stat().st_size for p in copy.iterdir())
    assert json.loads((copy / MANIFEST).read_text()) == sealed


def test_seal_refuses_what_no_loader_would_take(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    before = (copy / MANIFEST).read_bytes()
    with pytest.raises(ArtifactError, match="names the file 'notes.txt'"):
        reseal(copy)
    assert (copy / MANIFEST).read_bytes() == before


def test_seal_writes_null_for_figures_that_are_none(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    kept = {k: v for k, v in manifest.items() if k not in ("files", "version", "format_version")}
    sealed = seal(copy, {**kept, "metrics": {"auc": float("nan"), "front": ({"ne": float("inf")}, 0.5)}})
    assert sealed["metrics"] == {"auc": None, "front": [{"ne": None}, 0.5]}
    assert load_artifact(copy).manifest == sealed


def test_artifact_can_be_moved(copy: Path, artifact: Artifact, tmp_path: Path) -> None:
    moved = load_artifact(copy.rename(tmp_path / "elsewhere"))
    assert moved.version == artifact.version
    assert moved.folder == tmp_path / "elsewhere"


def test_artifact_without_a_catalogue_has_none(two_tasks: World) -> None:
    artifact = two_tasks.artifact(two_tasks.uniform(8))
    assert artifact.catalogue is None
    assert artifact.model.tasks == ["click", "buy"]
    assert not (artifact.folder / "items.arrow").exists()


def test_artifact_opens_read_only_folders(copy: Path) -> None:
    for path in copy.iterdir():
        path.chmod(0o444)
    copy.chmod(0o555)
    try:
        assert load_artifact(copy).model.tasks == ["click"]
    finally:
        copy.chmod(0o755)


def test_version_tells_files_apart() -> None:
    assert version_of({"a": "1", "b": "2", "version": "x"}) == version_of({"b": "2", "a": "1"})
    assert len({version_of(f) for f in ({"a": "1"}, {"a": "2"}, {"b": "1"}, {})}) == 4


# -- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_artifact_with_a_byte_altered_is_refused(copy: Path, name: str, place: float) -> None:
    path = copy / name
    content = bytearray(path.read_bytes())
    content[-1 if place == -1 else int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"artifact/{name}: .*altered or cut short"):
        load_artifact(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_artifact_with_a_file_cut_short_is_refused(copy: Path, name: str, keep: float) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ArtifactError, match=rf"artifact/{name}: "):
        load_artifact(copy)


@pytest.mark.parametrize("name", FILES)
def test_artifact_without_a_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=rf"artifact/{name}: missing"):
        load_artifact(copy)


@pytest.mark.parametrize("name", FILES)
def test_artifact_with_two_files_swapped_is_refused(copy: Path, name: str) -> None:
    other = FILES[FILES.index(name) - 1]
    (copy / name).write_bytes((copy / other).read_bytes())
    with pytest.raises(ArtifactError, match=rf"artifact/{name}: "):
        load_artifact(copy)


@pytest.mark.parametrize("name", [f for f in FILES if f not in ("items.arrow", "golden.arrow")])
@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"{}"])
def test_artifact_unverified_still_says_what_it_cannot_load(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=str(copy)):
        load_artifact(copy, verify="none")


# -- the manifest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", '"x"', "{}", "\0", '{"name": "x"}'])
def test_manifest_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="not an artifact"):
        load_artifact(copy)


def test_manifest_of_bytes_that_are_no_text_is_refused(copy: Path) -> None:
    (copy / MANIFEST).write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(ArtifactError, match="not an artifact"):
        load_artifact(copy)


@pytest.mark.parametrize("version", [0, 2, 99, "1", None])
def test_manifest_of_another_format_is_refused(copy: Path, version: object) -> None:
    rewrite(copy, lambda m: {**m, "format_version": version})
    with pytest.raises(ArtifactError, match="compress again"):
        load_artifact(copy)


@pytest.mark.parametrize(
    "change",
    [
        *[pytest.param(without(k), id=f"no {k}") for k in ("files", "tables", "run", "version")],
        *[pytest.param(lambda m, k=k: {**m, k: None}, id=f"null {k}") for k in ("tables", "run")],
        pytest.param(lambda m: {**m, "tables": []}, id="no table"),
        pytest.param(lambda m: {**m, "tables": [1]}, id="tables of numbers"),
        pytest.param(lambda m: {**m, "tables": m["tables"][:-1]}, id="a table less"),
        pytest.param(lambda m: {**m, "tables": m["tables"][::-1]}, id="tables reversed"),
        pytest.param(first_tier(bits=3), id="unknown bits"),
        pytest.param(first_tier(bits=32), id="other bits"),
        pytest.param(first_tier(rows=5), id="fewer rows"),
        pytest.param(first_tier(rows=5000), id="more rows"),
        pytest.param(first_tier(rows=-1), id="negative rows"),
        pytest.param(first_tier(rows=10**30), id="very many rows"),
        pytest.param(first_tier(rows="x"), id="rows of text"),
        pytest.param(first_table(tiers=[]), id="no tier"),
        pytest.param(first_table(tiers=None), id="null tiers"),
        pytest.param(first_table(tiers=[{"rows": 5}]), id="a tier without bits"),
        pytest.param(first_table(centroids=0), id="a centroid less"),
        pytest.param(first_table(centroids=70), id="more centroids"),
        pytest.param(first_table(width=8), id="another width"),
        pytest.param(first_table(dim=12), id="another dim"),
        pytest.param(first_table(features=[]), id="a table that nothing reads"),
        pytest.param(first_table(colour="red"), id="an unknown key"),
        pytest.param(lambda m: {**m, "run": {**m["run"], "model": {"arch": "dlrm"}}}, id="another head"),
        pytest.param(
            lambda m: {**m, "files": {**m["files"], "dense.onnx": m["files"]["ids.arrow"]}}, id="a file too many"
        ),
    ],
)
def test_manifest_that_does_not_fit_its_files_is_refused(copy: Path, change: Change) -> None:
    rewrite(copy, change)
    with pytest.raises(ArtifactError, match=str(copy)):
        load_artifact(copy)


@pytest.mark.parametrize("files", [[], None, "x"])
def test_manifest_whose_files_are_no_mapping_is_refused(copy: Path, files: object) -> None:
    rewrite(copy, lambda m: {**m, "files": files})
    with pytest.raises(ArtifactError):
        load_artifact(copy)


def test_manifest_nested_without_end_is_refused(copy: Path) -> None:
    (copy / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(ArtifactError):
        load_artifact(copy)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: {**m, "files": {}}, id="no checksums"),
        pytest.param(lambda m: {**m, "version": "0" * 12}, id="another version"),
        pytest.param(without("sizes"), id="no sizes"),
    ],
)
def test_manifest_that_lost_part_of_itself_is_refused(copy: Path, change: Change) -> None:
    rewrite(copy, change)
    with pytest.raises(ArtifactError):
        load_artifact(copy)


@pytest.mark.parametrize("make", ["nothing", "empty folder", "file", "prepared data", "checkpoint"])
def test_what_is_no_artifact_is_refused(world: World, tmp_path: Path, make: str) -> None:
    path = tmp_path / "x"
    if make == "empty folder":
        path.mkdir()
    elif make == "file":
        path.write_text("hello")
    elif make == "prepared data":
        path = world.dataset.folder
    elif make == "checkpoint":
        path = world.checkpoint.folder
    assert not is_artifact(path)
    with pytest.raises(ArtifactError, match=rf"{path}: not an artifact"):
        load_artifact(path)


def test_is_artifact_of_an_artifact(artifact: Artifact) -> None:
    assert is_artifact(artifact.folder)


# -- golden rows -----------------------------------------------------------------------------------------------------


def test_golden_rows_are_the_models_own_scores(world: World, artifact: Artifact) -> None:
    golden = read_arrow(artifact.folder / "golden.arrow")
    assert len(golden) == GOLDEN_ROWS
    raw = world.dataset.sample().slice(0, GOLDEN_ROWS)
    assert golden.drop_columns(["_expected"]).to_pylist() == raw.to_pylist()
    expected = golden["_expected"].combine_chunks().flatten().to_numpy()
    assert np.array_equal(artifact.model.score_encoded(artifact.model.transform.encode(raw)).ravel(), expected)
    assert expected.std() > 0.1
    check_golden(artifact)


def reseal(folder: Path) -> dict[str, Any]:
    """Give an altered artifact checksums that fit, so that only its scores can betray it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    return seal(folder, {k: v for k, v in manifest.items() if k not in ("files", "version", "format_version")})


@pytest.mark.parametrize(("shift", "refused"), [(GOLDEN_TOLERANCE / 2, False), (2 * GOLDEN_TOLERANCE, True)])
def test_golden_scores_may_differ_by_their_tolerance(copy: Path, shift: float, refused: bool) -> None:
    golden = read_arrow(copy / "golden.arrow")
    expected = golden["_expected"].combine_chunks().flatten().to_numpy().copy()
    expected[7] += shift
    rows = golden.drop_columns(["_expected"])
    column = pa.FixedSizeListArray.from_arrays(pa.array(expected), 1)
    write_arrow(pa.table({**{n: rows[n].combine_chunks() for n in rows.column_names}, "_expected": column}), copy / "g")
    (copy / "g").replace(copy / "golden.arrow")
    reseal(copy)
    if refused:
        with pytest.raises(ArtifactError, match="golden scores differ by 0.0002"):
            load_artifact(copy)
    else:
        load_artifact(copy)


@pytest.mark.parametrize("value", [0.25, float("nan"), float("inf")])
def test_golden_rows_catch_other_weights(copy: Path, value: float) -> None:
    """A head of another training run, rightly sealed; NaN compares false with everything and must not slip through."""
    dense = load_file(copy / "dense.safetensors")
    dense["out.bias"] = dense["out.bias"] + value
    save_file({k: v.contiguous() for k, v in dense.items()}, copy / "dense.safetensors")
    reseal(copy)
    with pytest.raises(ArtifactError, match="golden scores differ by"):
        load_artifact(copy)
    assert load_artifact(copy, verify="none").model.tasks == ["click"]


def test_golden_rows_catch_other_table_bytes(copy: Path) -> None:
    block = np.fromfile(copy / "tables.bin", dtype=np.uint8)
    block[:600] ^= 0x11
    block.tofile(copy / "tables.bin")
    reseal(copy)
    with pytest.raises(ArtifactError, match="golden scores differ"):
        load_artifact(copy)


def test_loading_shares_no_memory_with_a_writer(artifact: Artifact) -> None:
    """The tables come from the file itself: nothing of their size is copied."""
    block = artifact.model.lookup.block
    again = load_artifact(artifact.folder).model.lookup.block
    assert torch.equal(block, again)
    with Path("/proc/self/maps").open() as maps:
        mapped = [line for line in maps if str(artifact.folder / "tables.bin") in line]
    assert len(mapped) >= 2
    assert all(line.split()[1].startswith("r--") for line in mapped)


def test_golden_scores_of_coarse_layers_may_round_another_way(world: World, artifact: Artifact) -> None:
    assert golden_tolerance(artifact) == GOLDEN_TOLERANCE
    coarse = world.artifact(CompressionPlan(dense=DensePlan(dtype="int8", max_loss=1.0)))
    assert golden_tolerance(coarse) == TOLERANCE["int8"] > GOLDEN_TOLERANCE
