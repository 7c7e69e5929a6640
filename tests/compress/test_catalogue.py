"""compress/catalogue.py: items encoded once, found by id, joined with the request's side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from compress_builders import World

from compress.artifact import Artifact
from compress.catalogue import (
    Catalogue,
    item_transform,
    join_sides,
    read_catalogue,
    request_transform,
    write_catalogue,
)
from trainer.data.transform import hash_ids


def catalogue_of(artifact: Artifact) -> Catalogue:
    assert artifact.catalogue is not None
    return artifact.catalogue


def test_catalogue_holds_each_item_of_the_log_once(world: World, artifact: Artifact) -> None:
    catalogue = catalogue_of(artifact)
    assert sorted(catalogue.ids) == sorted(set(world.raw["item_id"].to_pylist()))  # type: ignore[type-var]
    assert len(catalogue) == len(catalogue.ids) == len(catalogue.titles)
    assert (np.diff(catalogue.keys.astype(object)) > 0).all()
    titles = dict(zip(world.raw["item_id"].to_pylist(), world.raw["item_title"].to_pylist(), strict=True))
    assert dict(zip(catalogue.ids, catalogue.titles, strict=True)) == titles
    assert None in titles.values()


def test_catalogue_finds_known_ids_and_no_others(artifact: Artifact) -> None:
    catalogue = catalogue_of(artifact)
    wanted = ["i3", "nobody", "i0", "i3", "", "I3"]
    found, known = catalogue.find(hash_ids(pa.array(wanted), "item_id")[0])
    assert known.tolist() == [True, False, True, True, False, False]
    assert [catalogue.ids[i] for i in found[known]] == ["i3", "i0", "i3"]


def test_catalogue_finds_the_first_and_the_last_key(artifact: Artifact) -> None:
    catalogue = catalogue_of(artifact)
    ends = catalogue.keys[[0, -1]]
    found, known = catalogue.find(np.array([ends[0], ends[1], ends[1] + 1, ends[0] - 1], dtype=np.uint64))
    assert known.tolist() == [True, True, False, False]
    assert found[:2].tolist() == [0, len(catalogue) - 1]


def test_catalogue_without_items_knows_none() -> None:
    empty = Catalogue(np.zeros(0, dtype=np.uint64), [], [], {}, [])
    found, known = empty.find(np.array([1, 2], dtype=np.uint64))
    assert found.shape == known.shape == (2,)
    assert not known.any()


def test_catalogue_rows_are_the_items_encoded(world: World, artifact: Artifact) -> None:
    """Each catalogue row is what the artifact's transform makes of the item's raw columns."""
    catalogue = catalogue_of(artifact)
    raw = world.raw.select(["item_id", "genres", "price"])
    first = {i: at for at, i in enumerate(raw["item_id"].to_pylist())}
    rows = raw.take(pa.array([first[i] for i in catalogue.ids]))
    expected = item_transform(artifact.model.transform).encode(rows)
    encoded = catalogue.take(np.arange(len(catalogue)))
    assert list(encoded.sparse) == ["item_id", "genres"]
    for name, ragged in expected.sparse.items():
        assert np.array_equal(encoded.sparse[name].values, ragged.values)
        lengths = encoded.sparse[name].lengths
        assert (lengths is None and ragged.lengths is None) or np.array_equal(lengths, ragged.lengths)  # type: ignore[arg-type]
    assert np.array_equal(encoded.dense, expected.dense)


def test_catalogue_survives_writing(world: World, artifact: Artifact, tmp_path: Path) -> None:
    items = pa.table(
        {"item_id": ["i1", None, "new"], "item_title": [None, "no id", "New"], "genres": ["Drama|War", None, ""]}
    ).append_column("price", pa.array([None, 1.0, 2.0]))
    write_catalogue(tmp_path / "items.arrow", items, artifact.model.transform)
    read = read_catalogue(tmp_path / "items.arrow", artifact.model.transform)
    assert set(read.ids) == {"i1", None, "new"}
    titles = dict(zip(read.ids, read.titles, strict=True))
    assert titles == {"i1": None, None: "no id", "new": "New"}
    at = read.ids.index("i1")
    bag = read.take(np.array([at])).sparse["genres"]
    assert bag.lengths is not None
    assert bag.lengths.tolist() == [2]


def test_sides_split_the_features_and_join_in_order(world: World) -> None:
    transform = world.dataset.transform
    item, request = item_transform(transform), request_transform(transform)
    assert set(item.sparse) == {"item_id", "genres"}
    assert set(request.sparse) == {"user_id", "recent", "city", "income"}
    assert item.dense_names == ["price", "price.missing"]
    assert request.dense_names == ["age", "age.missing"]
    raw = world.raw.slice(0, 40)
    whole = transform.encode(raw)
    joined = join_sides(transform, [(request, request.encode(raw)), (item, item.encode(raw))])
    assert list(joined.sparse) == list(whole.sparse)
    assert all(np.array_equal(joined.sparse[n].values, r.values) for n, r in whole.sparse.items())
    assert np.array_equal(joined.dense, whole.dense)
