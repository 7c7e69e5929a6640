"""compress/item_file.py: a catalogue beside its artifact, built from raw items, checked, put in place."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compress_builders import World

from compress.artifact import Artifact, load_artifact
from compress.catalogue import VERSION_KEY, Values, read_catalogue
from compress.errors import ArtifactError
from compress.item_file import build_catalogue, with_catalogue
from trainer.data.transform import read_arrow, write_arrow
from trainer.errors import DataError, SlimrankError


def items_of(world: World) -> pa.Table:
    items = world.dataset.items()
    assert items is not None
    return items


@pytest.fixture
def built(world: World, artifact: Artifact, tmp_path: Path) -> Path:
    """A catalogue of the log's items but the first ten, and one that the log does not know."""
    new = {"item_id": ["new"], "item_title": ["Brand new"], "genres": ["War|Noir"], "price": [3.5]}
    items = items_of(world).select(list(new))
    pq.write_table(pa.concat_tables([items.slice(10), pa.table(new, items.schema)]), tmp_path / "items.parquet")
    build_catalogue(artifact.folder, tmp_path / "items.parquet", tmp_path / "cat.arrow")
    return tmp_path / "cat.arrow"


def test_catalogue_of_the_same_items_holds_the_same_bytes(world: World, artifact: Artifact, tmp_path: Path) -> None:
    pq.write_table(items_of(world), tmp_path / "items.parquet")
    result = build_catalogue(artifact.folder, tmp_path / "items.parquet", tmp_path / "cat.arrow")
    own, other = read_arrow(artifact.folder / "items.arrow"), read_arrow(tmp_path / "cat.arrow")
    assert other.replace_schema_metadata(None).equals(own)
    assert result["items"] == len(own)
    assert result["bytes"] == (tmp_path / "cat.arrow").stat().st_size


def test_version_names_the_artifact_and_the_catalogue(artifact: Artifact, built: Path) -> None:
    changed = with_catalogue(artifact, built)
    version, digest = changed.version.split("+")
    assert version == artifact.version
    assert changed.catalogue_digest is not None
    assert changed.catalogue_digest.startswith(digest)
    assert len(digest) == 8
    assert load_artifact(artifact.folder).version == artifact.version


def test_new_items_are_found_and_old_ones_are_not(world: World, artifact: Artifact, built: Path) -> None:
    catalogue = with_catalogue(artifact, built).catalogue
    assert catalogue is not None
    titles = dict(zip(catalogue.ids, catalogue.titles, strict=True))
    assert titles["new"] == "Brand new"
    assert len(titles) == len(items_of(world)) - 10 + 1


def test_nothing_of_a_catalogue_is_copied_out_of_its_file(artifact: Artifact) -> None:
    gc.collect()
    before = pa.total_allocated_bytes()
    again = read_catalogue(artifact.folder / "items.arrow", artifact.model.transform)
    assert pa.total_allocated_bytes() <= before
    arrays = [again.keys, *again.dense]
    for ids in again.sparse.values():
        arrays += [a for a in (ids.values, ids.offsets, ids.weights) if a is not None]
    assert all(not a.flags.owndata and not a.flags.writeable for a in arrays)
    assert isinstance(again.ids, Values)


ITEMS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "no id column": (lambda t: t.drop_columns(["item_id"]), "no column 'item_id'"),
    "no feature": (lambda t: t.drop_columns(["price"]), "no column 'price'"),
    "no title": (lambda t: t.drop_columns(["item_title"]), "no column 'item_title'"),
    "an id twice": (lambda t: pa.concat_tables([t, t.slice(3, 1)]), "2 times"),
    "an item without id": (
        lambda t: t.set_column(0, "item_id", pa.array([None, *t["item_id"].to_pylist()[1:]])),
        "row 0",
    ),
    "prices of text": (
        lambda t: t.drop_columns(["price"]).append_column("price", pa.array(["dear"] * len(t))),
        "price",
    ),
}


@pytest.mark.parametrize("name", ITEMS)
def test_items_that_cannot_be_encoded_are_refused(world: World, artifact: Artifact, tmp_path: Path, name: str) -> None:
    change, words = ITEMS[name]
    items = items_of(world).select(["item_id", "item_title", "genres", "price"])
    pq.write_table(change(items), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=words):
        build_catalogue(artifact.folder, tmp_path / "items.parquet", tmp_path / "cat.arrow")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.parquet"]


def test_file_that_is_no_parquet_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_text("item_id\n1\n")
    with pytest.raises(DataError, match="not a readable Parquet"):
        build_catalogue(artifact.folder, tmp_path / "items.parquet", tmp_path / "cat.arrow")
    with pytest.raises(SlimrankError, match="is a folder"):
        build_catalogue_of_folder(artifact, tmp_path)


def build_catalogue_of_folder(artifact: Artifact, folder: Path) -> None:
    items = pa.table({"item_id": ["a"], "item_title": ["A"], "genres": ["War"], "price": [1.0]})
    pq.write_table(items, folder / "good.parquet")
    build_catalogue(artifact.folder, folder / "good.parquet", folder)


def test_catalogue_of_another_artifact_is_refused(world: World, built: Path) -> None:
    other = world.artifact(world.uniform(8))
    with pytest.raises(ArtifactError, match="made for artifact .* run 'slimrank catalogue build'"):
        with_catalogue(other, built)


def test_items_of_an_artifact_are_no_catalogue_file(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="made for artifact unknown"):
        with_catalogue(artifact, artifact.folder / "items.arrow")


STRANGE: dict[str, Callable[[pa.Table], dict[str, pa.Array]]] = {
    "rows past the table": lambda t: {"sparse.item_id": pa.array([10**6] * len(t), pa.int32())},
    "rows below 0": lambda t: {"sparse.item_id": pa.array([-1] * len(t), pa.int32())},
    "rows of floats": lambda t: {"sparse.item_id": pa.array([1.0] * len(t), pa.float32())},
    "bags past the table": lambda t: {"sparse.genres": pa.array([[10**6]] * len(t), pa.list_(pa.int32()))},
    "no bags": lambda t: {"sparse.genres": pa.array([2] * len(t), pa.int32())},
    "a bag for an id": lambda t: {"sparse.item_id": pa.array([[2]] * len(t), pa.list_(pa.int32()))},
    "large bags": lambda t: {"sparse.genres": pa.array([[2]] * len(t), pa.large_list(pa.int32()))},
    "bags of null": lambda t: {"sparse.genres": pa.array([[None]] * len(t), pa.list_(pa.int32()))},
    "infinite": lambda t: {"dense.price": pa.array([np.inf] * len(t), pa.float32())},
    "doubles": lambda t: {"dense.price": pa.array([1.0] * len(t), pa.float64())},
    "keys of null": lambda t: {"key": pa.array([None] * len(t), pa.uint64())},
    "falling keys": lambda t: {"key": pa.array(t["key"].to_numpy()[::-1])},
    "weights without need": lambda t: {"weights.genres": pa.array([[1.0]] * len(t), pa.list_(pa.float32()))},
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_file_is_refused_whatever_it_holds(artifact: Artifact, built: Path, tmp_path: Path, name: str) -> None:
    stored = read_arrow(built)
    for column, values in STRANGE[name](stored).items():
        stored = stored.drop_columns([column] if column in stored.column_names else []).append_column(column, values)
    write_arrow(stored.replace_schema_metadata({VERSION_KEY: artifact.version}), tmp_path / "strange.arrow")
    with pytest.raises(ArtifactError, match="strange.arrow"):
        with_catalogue(artifact, tmp_path / "strange.arrow")


@pytest.mark.parametrize("at", [0, 40, -30, -200])
def test_damaged_file_is_refused_or_reads_within_its_tables(artifact: Artifact, built: Path, at: int) -> None:
    content = bytearray(built.read_bytes())
    content[at] ^= 0xFF
    built.write_bytes(content)
    try:
        catalogue = with_catalogue(artifact, built).catalogue
    except ArtifactError:
        return
    assert catalogue is not None
    assert len(catalogue.take(np.arange(len(catalogue)))) == len(catalogue)


def test_absent_file_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cat.arrow"):
        with_catalogue(artifact, tmp_path / "cat.arrow")
