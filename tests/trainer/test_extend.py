"""Vocabularies that grow: old rows stay where they are, new ids are appended, all else is as it was fitted first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from trainer_builders import data_of, fitted, make_run, random_log

from trainer.data.fit import extend_transform, observe
from trainer.data.schema import DataConfig
from trainer.data.transform import MISSING_ROW, OOV_ROW, IdMap, Transform, hash_ids, load_transform
from trainer.errors import DataError

ANY: dict[str, Any] = {"name": "any", "kind": "categorical"}
DATA = data_of(ANY, min_count=1)


def table(*ids: str) -> pa.Table:
    return pa.table({"any": list(ids)})


def extended(old: Transform, raw: pa.Table, data: DataConfig = DATA) -> Transform:
    return extend_transform(old, observe(raw, data, 0), data, 8)


def rows(transform: Transform, *ids: str | None) -> list[int]:
    return transform.encode_sparse("any", pa.table({"any": pa.array(ids, pa.string())})).values.tolist()


OLD = fitted(table("a", "b", "c", "d", "e"), DATA)
FIRST = rows(OLD, *"abcde")


def test_extended_vocabulary_keeps_old_rows_and_appends_new_ones():
    new = extended(OLD, table("z", "a", "y", "x"))
    assert rows(new, *"abcde") == FIRST
    appended = rows(new, "x", "y", "z")
    assert sorted(appended) == [7, 8, 9]
    order = np.argsort(hash_ids(pa.array(["x", "y", "z"]), "any")[0])
    assert np.argsort(appended).tolist() == order.tolist(), "in the order of their hashes"
    assert rows(new, "strange", None) == [OOV_ROW, MISSING_ROW]
    assert new.tables["any"].num_embeddings == 10
    assert rows(OLD, "x") == [OOV_ROW], "the old transform is left as it was"


def test_extended_twice_keeps_the_rows_of_both():
    once = extended(OLD, table("z", "y"))
    twice = extended(once, table(*"mnopqrs"))
    assert rows(twice, *"abcde") == FIRST
    assert rows(twice, "z", "y") == rows(once, "z", "y")
    assert sorted(rows(twice, *"mnopqrs")) == list(range(9, 16))
    assert twice.lineage == (OLD.fingerprint(), once.fingerprint())
    assert len({twice.fingerprint(), *twice.lineage}) == 3


def test_new_ids_are_appended_from_min_count_on():
    data = data_of(ANY, min_count=2)
    new = extended(OLD, table("z", "z", "y", "a"), data)
    assert rows(new, "z", "y", "a") == [7, OOV_ROW, FIRST[0]]


def test_fingerprint_covers_which_row_an_id_has():
    both = fitted(table(*"abcdexyz"), DATA)
    new = extended(OLD, table("x", "y", "z"))
    np.testing.assert_array_equal(both.id_maps["any"].keys, new.id_maps["any"].keys)
    assert both.fingerprint() != new.fingerprint()
    assert extended(OLD, table("a")).fingerprint() == OLD.fingerprint(), "no new id: encoded rows are the same"


def test_extended_transform_saves_and_loads(tmp_path):
    new = extended(extended(OLD, table("z", "y")), table(*"mnopqrs"))
    new.save(tmp_path)
    loaded = load_transform(tmp_path)
    ids = [*"abcdezymnopqrs", "strange", None]
    assert rows(loaded, *ids) == rows(new, *ids)
    assert (loaded.fingerprint(), loaded.lineage, loaded.tables) == (new.fingerprint(), new.lineage, new.tables)
    assert loaded.with_id_maps({}).lineage == new.lineage


@pytest.mark.parametrize("size", [0, 1, 2, 100])
def test_keys_by_row_are_what_a_map_was_made_of(size):
    keys = np.random.default_rng(size).permutation(np.arange(size, dtype=np.uint64) * 7)
    made = IdMap.of_rows(keys)
    np.testing.assert_array_equal(made.keys_by_row(), keys)
    assert made.rows(keys).tolist() == list(range(2, size + 2))
    assert (made.row(OOV_ROW), made.row(MISSING_ROW)) == (0, 1)
    assert made.rows(np.array([3], dtype=np.uint64)).tolist() == [OOV_ROW]


def test_all_else_of_an_extended_transform_is_the_old_ones():
    run = make_run()
    old = fitted(random_log(80), run.data)
    other = random_log(200, seed=9)
    new = extend_transform(old, observe(other, run.data, 0), run.data, 8)
    assert new.numerics == old.numerics
    assert new.tables["hashed"] == old.tables["hashed"]
    assert new.tables["age"] == old.tables["age"]
    before, after = old.encode(other), new.encode(other)
    np.testing.assert_array_equal(before.dense, after.dense)
    for name, ragged in before.sparse.items():
        got = after.sparse[name].values
        known = ragged.values != OOV_ROW
        np.testing.assert_array_equal(got[known], ragged.values[known], err_msg=name)
        grown = got[~known]
        assert ((grown == OOV_ROW) | (grown >= old.table_of(name).num_embeddings)).all()
    assert new.tables["tags"].features == old.tables["tags"].features


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([ANY | {"min_count": 3}], "feature 'any': min_count is 3, the data to continue from has None"),
        ([ANY | {"hash_size": 9}], "feature 'any': hash_size is 9"),
        ([ANY, {"name": "more", "kind": "categorical"}], "feature 'more': not in the data to continue from"),
        ([{"name": "other", "kind": "categorical"}], "feature 'any': not in the config"),
    ],
)
def test_other_features_are_refused_by_name(features, message):
    data = data_of(*features)
    with pytest.raises(DataError, match=message):
        extend_transform(OLD, observe(pa.table({"any": ["a"], "more": ["a"], "other": ["b"]}), data, 0), data, 8)


def test_another_embedding_dim_is_taken_and_changes_no_row():
    new = extend_transform(OLD, observe(table("a", "z"), DATA, 0), DATA, 16)
    assert (OLD.tables["any"].embedding_dim, new.tables["any"].embedding_dim) == (8, 16)
    assert rows(new, *"abcde") == FIRST
    wide = data_of(ANY | {"dim": 32}, min_count=1)
    assert extended(OLD, table("a"), wide).tables["any"].embedding_dim == 32
