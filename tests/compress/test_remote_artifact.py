"""An artifact in a storage: fetched once, checked as it arrives, its manifest read alone for `show`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest

from compress import artifact as artifacts
from compress.artifact import MANIFEST, Artifact, is_artifact, load_artifact, local_copy
from compress.describe import describe_artifact, verify_artifact
from compress.errors import ArtifactError
from compress.signing import generate_keys, sign_manifest
from compress.verified import cache_folder
from trainer.storage import RemotePath


@pytest.fixture
def place(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    """A copy of the artifact in a storage, whose files lie in tmp_path/store/a; an empty cache."""
    monkeypatch.setenv("SLIMRANK_CACHE", str(tmp_path / "cache"))
    shutil.copytree(artifact.folder, tmp_path / "store" / "a")
    return RemotePath("test://b", "", pafs.SubTreeFileSystem(str(tmp_path / "store"), pafs.LocalFileSystem())) / "a"


def test_it_is_fetched_once_and_scores_alike(
    artifact: Artifact, place: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load_artifact(place)
    assert found.version == artifact.version
    assert found.folder.parent == cache_folder("artifacts")
    rows = artifact.model.transform.encode(artifact.golden)
    assert np.array_equal(found.model.score_encoded(rows), artifact.model.score_encoded(rows))
    monkeypatch.setattr(artifacts, "download", None)  # a second fetch would fail
    assert load_artifact(place).folder == found.folder


def test_show_reads_the_manifest_alone(artifact: Artifact, place: RemotePath, tmp_path: Path) -> None:
    (tmp_path / "store" / "a" / "tables.bin").unlink()
    shown = describe_artifact(place)
    assert (shown["artifact"], shown["version"]) == ("test://b/a", artifact.version)
    assert not cache_folder("artifacts").exists()


@pytest.mark.parametrize("damage", ["flipped", "longer", "gone"])
def test_a_damaged_file_is_named_and_nothing_is_kept(place: RemotePath, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "store" / "a" / "tables.bin"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content if damage == "flipped" else content + b"x")
    if damage == "gone":
        file.unlink()
    with pytest.raises(ValueError, match=r"^test://b/a/tables.bin: "):
        load_artifact(place)
    assert list(cache_folder("artifacts").glob("*")) == []


def test_verify_reads_the_storage_though_a_copy_is_whole(place: RemotePath, tmp_path: Path) -> None:
    assert verify_artifact(place)["artifact"] == "test://b/a"
    file = tmp_path / "store" / "a" / "ids.arrow"
    file.write_bytes(file.read_bytes() + b"x")
    assert load_artifact(place).folder.parent == cache_folder("artifacts")
    with pytest.raises(ArtifactError, match=r"^test://b/a/ids.arrow: altered"):
        verify_artifact(place)


def test_a_signature_is_asked_for_and_makes_another_copy(place: RemotePath, tmp_path: Path) -> None:
    unsigned = local_copy(place)
    generate_keys(tmp_path / "private", tmp_path / "public")
    with pytest.raises(ArtifactError, match=r"^test://b/a: unsigned"):
        load_artifact(place, trusted_keys=[tmp_path / "public"])
    sign_manifest(tmp_path / "store" / "a", tmp_path / "private")
    signed = load_artifact(place, trusted_keys=[tmp_path / "public"])
    assert signed.folder != unsigned


def test_an_upload_that_did_not_finish_is_told(place: RemotePath, tmp_path: Path) -> None:
    (tmp_path / "store" / "a" / MANIFEST).unlink()
    assert not is_artifact(place)
    with pytest.raises(ArtifactError, match="has no manifest.json: an upload that did not finish"):
        load_artifact(place)


def test_a_cache_that_cannot_be_written_is_named(
    place: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIMRANK_CACHE", str(tmp_path / "file"))
    with pytest.raises(ArtifactError, match=r"test://b/a cannot be kept here"):
        load_artifact(place)
