"""trainer/data/transform.py: raw columns become rows and floats, alike in prepare and in serve."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from trainer_builders import data_of, fitted, make_run, random_log

from trainer.data.encoded import Encoded
from trainer.data.transform import MISSING_ROW, OOV_ROW, as_numbers, as_text, load_transform, pick
from trainer.errors import DataError

CAT = {"name": "a", "kind": "categorical", "min_count": 1}
BAG = {"name": "a", "kind": "multi", "min_count": 1}
MISSING = {  # the same absence, as different logs spell it
    "null": pa.array([None], pa.string()),
    "null of ints": pa.array([None], pa.int64()),
    "nan": pa.array([float("nan")]),
    "empty text": pa.array([""]),
    "null type": pa.nulls(1),
}


def rows_of(transform, column) -> list[int]:
    return transform.encode(pa.table({"a": column})).sparse["a"].values.tolist()


def bags_of(transform, column) -> list[list[int]]:
    ragged = transform.encode(pa.table({"a": column})).sparse["a"]
    return [part.tolist() for part in np.split(ragged.values, np.cumsum(ragged.lengths)[:-1])]


def assert_same(left: Encoded, right: Encoded) -> None:
    np.testing.assert_array_equal(left.dense, right.dense)
    assert list(left.sparse) == list(right.sparse)
    for name, ragged in left.sparse.items():
        np.testing.assert_array_equal(ragged.values, right.sparse[name].values, err_msg=name)
        np.testing.assert_array_equal(ragged.lengths, right.sparse[name].lengths, err_msg=name)


# -- ids -------------------------------------------------------------------------------------------------------------


def test_id_is_the_same_as_integer_float_and_text():
    transform = fitted(pa.table({"a": [7, 8, 9]}), data_of(CAT))
    row = rows_of(transform, pa.array([7]))
    assert row[0] >= 2
    for same in (
        pa.array([7.0]),
        pa.array(["7"]),
        pa.array([7], pa.int8()),
        pa.array(np.array([7], np.float32)),
        pa.array(["7"], pa.large_string()),
        pa.array(["7"]).dictionary_encode(),
        pa.chunked_array([[7]]),
    ):
        assert rows_of(transform, same) == row, same
    assert rows_of(transform, pa.array([7.5])) == [OOV_ROW]


def test_id_too_large_for_a_float_keeps_all_its_digits():
    transform = fitted(pa.table({"a": [2**60, 2**60 + 1]}), data_of(CAT))
    assert sorted(rows_of(transform, pa.array([2**60, 2**60 + 1]))) == [2, 3]
    assert rows_of(transform, pa.array([str(2**60)])) == rows_of(transform, pa.array([2**60]))


@pytest.mark.parametrize("spelling", MISSING)
def test_missing_id_reads_the_missing_row(spelling):
    for feature in (CAT, CAT | {"hash_size": 10}):
        transform = fitted(pa.table({"a": ["x", "y", None]}), data_of(feature))
        assert rows_of(transform, MISSING[spelling]) == [MISSING_ROW]


def test_unknown_id_reads_the_unknown_row():
    transform = fitted(pa.table({"a": ["x", "y"]}), data_of(CAT))
    assert rows_of(transform, pa.array(["z", "x ", "X"])) == [OOV_ROW] * 3


def test_vocabulary_without_ids_knows_none():
    transform = fitted(pa.table({"a": pa.array([None, None], pa.string())}), data_of(CAT))
    assert transform.tables["a"].num_embeddings == 2
    assert rows_of(transform, pa.array(["x", None])) == [OOV_ROW, MISSING_ROW]


@pytest.mark.parametrize("min_count", [1, 2, 4])
def test_rare_ids_read_the_unknown_row_and_others_a_row_each(min_count):
    ids = np.random.default_rng(0).integers(0, 40, 150).tolist()
    transform = fitted(pa.table({"a": ids}), data_of(CAT | {"min_count": min_count}))
    kept = {i for i, n in Counter(ids).items() if n >= min_count}
    rows = dict(zip(ids, rows_of(transform, pa.array(ids)), strict=True))
    assert {i for i, row in rows.items() if row != OOV_ROW} == kept
    assert sorted(rows[i] for i in kept) == list(range(2, 2 + len(kept)))
    assert transform.tables["a"].num_embeddings == 2 + len(kept)


def test_min_count_of_the_data_section_holds_where_a_feature_has_none():
    data = data_of({"name": "a", "kind": "categorical"}, CAT | {"name": "b"}, min_count=2)
    transform = fitted(pa.table({"a": ["x", "x", "y"], "b": ["x", "x", "y"]}), data)
    assert (transform.tables["a"].num_embeddings, transform.tables["b"].num_embeddings) == (3, 4)


def test_hashed_ids_stay_within_their_table():
    transform = fitted(pa.table({"a": ["x"]}), data_of(CAT | {"hash_size": 5}))
    rows = rows_of(transform, pa.array([f"id{i}" for i in range(200)]))
    assert set(rows) == {2, 3, 4, 5, 6}
    assert (transform.tables["a"].kind, transform.tables["a"].num_embeddings) == ("hash", 7)


def test_features_that_share_a_table_share_rows():
    data = data_of(CAT, BAG | {"name": "b", "table": "a", "min_count": None})
    transform = fitted(pa.table({"a": ["x", "y"], "b": [["y", "z"], ["z"]]}), data)
    encoded = transform.encode(pa.table({"a": ["x", "y", "z"], "b": [["x", "y"], ["z"], []]}))
    x, y, z = encoded.sparse["a"].values
    assert sorted([x, y, z]) == [2, 3, 4]
    assert encoded.sparse["b"].values.tolist() == [x, y, z, MISSING_ROW]
    assert transform.tables["a"].features == ("a", "b")


def test_categorical_column_of_lists_is_refused_with_a_hint():
    transform = fitted(pa.table({"a": ["x"]}), data_of(CAT))
    with pytest.raises(DataError, match=r"column 'a': holds list<.*use kind: multi"):
        rows_of(transform, pa.array([["x"]]))


def test_column_of_bytes_that_are_no_text_is_refused():
    with pytest.raises(DataError, match="column 'a': binary cannot be read as ids"):
        as_text(pa.array([b"\xff"]), "a")


# -- bags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.dictionary(pa.int32(), pa.string()))]
)
def test_bags_of_list_columns(kind):
    transform = fitted(pa.table({"a": [["x", "y"], ["z"]]}), data_of(BAG))
    x, y, z = (bags_of(transform, pa.array([[i]]))[0][0] for i in "xyz")
    column = pa.array([["x", "y"], [], None, ["z", None, "", "new"]], pa.list_(pa.string())).cast(kind)
    assert bags_of(transform, column) == [[x, y], [1], [1], [z, 1, 1, 0]]
    assert bags_of(transform, column.slice(2)) == [[1], [z, 1, 1, 0]]


def test_bags_of_fixed_size_lists():
    transform = fitted(pa.table({"a": [[1, 2]]}), data_of(BAG))
    one, two = bags_of(transform, pa.array([[1, 2]]))[0]
    column = pa.array([[9, 9], [1, 2], None, [2, None]], pa.list_(pa.int64(), 2))
    assert bags_of(transform, column) == [[0, 0], [one, two], [1], [two, 1]]
    assert bags_of(transform, column.slice(1)) == [[one, two], [1], [two, 1]]


def test_bags_of_separated_text_equal_bags_of_lists():
    lists = pa.array([["x", "y"], None, ["z"]])
    by_list = fitted(pa.table({"a": lists}), data_of(BAG))
    by_text = fitted(pa.table({"a": ["x|y", None, "z"]}), data_of(BAG | {"separator": "|"}))
    assert bags_of(by_text, pa.array(["x|y", "", None, "z"])) == bags_of(
        by_list, pa.array([["x", "y"], [], None, ["z"]])
    )


def test_bags_of_text_without_a_separator_hold_one_id():
    transform = fitted(pa.table({"a": ["x y", "x"]}), data_of(BAG))
    bags = bags_of(transform, pa.array(["x y", None, "x", ""]))
    assert [len(b) for b in bags] == [1, 1, 1, 1]
    assert bags[1] == bags[3] == [MISSING_ROW]
    assert sorted([bags[0][0], bags[2][0]]) == [2, 3]


def test_bags_are_cut_at_their_longest():
    transform = fitted(pa.table({"a": [["x", "y", "z"]]}), data_of(BAG | {"max_length": 2}))
    assert transform.tables["a"].num_embeddings == 4, "what is cut off is not counted either"
    (bag,) = bags_of(transform, pa.array([["y", "x", "y", "x"]]))
    assert bag == bags_of(transform, pa.array([["y", "x"]]))[0]


def test_bags_all_empty_read_the_missing_row():
    transform = fitted(pa.table({"a": [["x"]]}), data_of(BAG))
    for column in (pa.array([[], []], pa.list_(pa.string())), pa.nulls(2), pa.array([None, None], pa.string())):
        assert bags_of(transform, column) == [[MISSING_ROW], [MISSING_ROW]]


# -- numbers ---------------------------------------------------------------------------------------------------------

VALUES = np.array([0.0, 1.0, 5.0, 10.0, 100.0])


def number(transform: str, raw, values=VALUES) -> np.ndarray:
    """What one number becomes, fitted on VALUES."""
    data = data_of({"name": "n", "kind": "numeric", "transform": transform}, CAT)
    known = pa.table({"n": pa.array(values), "a": ["x"] * len(values)})
    return fitted(known, data).encode(pa.table({"n": raw})).dense


def test_standardized_number_follows_the_formula():
    expected = (VALUES - VALUES.mean()) / VALUES.std()
    np.testing.assert_allclose(number("standardize", pa.array(VALUES))[:, 0], expected, rtol=1e-6)


def test_log_number_follows_the_formula():
    values = np.array([-10.0, 0.0, 3.0, 50.0])
    warped = np.sign(values) * np.log1p(np.abs(values))
    got = number("log1p", pa.array(values), values)[:, 0]
    np.testing.assert_allclose(got, (warped - warped.mean()) / warped.std(), rtol=1e-6)


def test_untransformed_number_stays_as_it_is():
    np.testing.assert_array_equal(number("none", pa.array(VALUES))[:, 0], VALUES.astype(np.float32))


def test_number_outside_the_training_range_is_clipped():
    for transform in ("standardize", "log1p", "none"):
        got = number(transform, pa.array([-1e9, 0.0, 100.0, 1e9]))[:, 0]
        assert (got[0], got[3]) == (got[1], got[2])


def test_constant_number_stays_finite():
    np.testing.assert_array_equal(number("standardize", pa.array([3.0, 3.0]), np.array([3.0, 3.0])), [[0.0], [0.0]])


@pytest.mark.parametrize("transform", ["standardize", "log1p", "none"])
@pytest.mark.parametrize("absent", [None, float("nan"), float("inf"), float("-inf")])
def test_missing_number_is_zero_beside_an_indicator(transform, absent):
    fit_on = pa.array([1.0, 2.0, 6.0, absent])
    got = number(transform, pa.array([absent, 2.0]), fit_on)
    assert got.shape == (2, 2)
    assert got[:, 1].tolist() == [1.0, 0.0]
    assert got[0, 0] == 0.0
    assert got[1, 0] == number(transform, pa.array([2.0]), pa.array([1.0, 2.0, 6.0]))[0, 0]


def test_number_never_missing_in_training_has_no_indicator_but_may_be_missing_later():
    assert number("standardize", pa.array([None, float("inf")], pa.float64())).tolist() == [[0.0], [0.0]]


def test_number_of_which_training_has_none_is_refused():
    data = data_of({"name": "n", "kind": "numeric", "column": "raw"}, CAT)
    with pytest.raises(DataError, match="feature 'n': column 'raw' has no number in the training rows"):
        fitted(pa.table({"raw": pa.array([None, float("nan")], pa.float64()), "a": ["x", "y"]}), data)


def test_bucketized_number_falls_between_quantiles():
    values = np.random.default_rng(0).normal(size=500)
    data = data_of({"name": "a", "kind": "numeric", "transform": "bucketize", "buckets": 5})
    transform = fitted(pa.table({"a": values}), data)
    cuts = np.quantile(values, [0.2, 0.4, 0.6, 0.8])
    assert rows_of(transform, pa.array(values)) == [2 + int(sum(v >= c for c in cuts)) for v in values]
    assert rows_of(transform, pa.array([-1e9, 1e9, None, float("nan"), float("inf")])) == [2, 6, 1, 1, 1]
    assert (transform.tables["a"].kind, transform.tables["a"].num_embeddings) == ("buckets", 7)


def test_bucketized_constant_has_no_more_rows_than_buckets_it_can_fill():
    data = data_of({"name": "a", "kind": "numeric", "transform": "bucketize"})
    transform = fitted(pa.table({"a": [3.0] * 10}), data)
    rows = rows_of(transform, pa.array([2.0, 3.0, 4.0]))
    assert rows == [2, 3, 3]
    assert transform.tables["a"].num_embeddings == 4


@pytest.mark.parametrize(
    "column", [pa.array(["1", " ", "", None, "2.5"]), pa.array(["1", None, None, None, "2.5"], pa.large_string())]
)
def test_numbers_are_read_from_text(column):
    np.testing.assert_array_equal(as_numbers(column, "n"), [1, np.nan, np.nan, np.nan, 2.5])


def test_numbers_are_read_from_booleans_and_dates():
    np.testing.assert_array_equal(as_numbers(pa.array([True, False, None]), "n"), [1, 0, np.nan])
    np.testing.assert_array_equal(as_numbers(pa.array([1], pa.date32()), "n"), [86_400e6])


@pytest.mark.parametrize("column", [pa.array(["1", "many"]), pa.array([[1.0]]), pa.array([{"x": 1}])])
def test_column_that_holds_no_numbers_is_named(column):
    with pytest.raises(DataError, match="column 'n': .* cannot be read as numbers") as error:
        as_numbers(column, "n")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "column", [pa.array([2**60]), pa.array([1_700_000_000_000_000_001]).cast(pa.timestamp("ns"))], ids=["int", "time"]
)
def test_numbers_are_read_from_large_integers(column):
    np.testing.assert_allclose(as_numbers(column, "n"), [float(column.cast(pa.int64())[0].as_py())], rtol=1e-15)


def test_numbers_of_a_time_of_day_are_read():
    assert as_numbers(pa.array([5], pa.time32("s")), "n").tolist() == [5.0]


# -- whole rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_rows_encode_alike_alone_and_together(seed):
    data = make_run().data
    transform = fitted(random_log(80, seed=9), data)
    raw = random_log(90, seed=seed)  # above and below the length at which hashing takes its other path
    together = transform.encode(raw)
    for at in range(len(raw)):
        assert_same(transform.encode(raw.slice(at, 1)), together.take(np.array([at])))


def test_row_of_python_values_encodes_as_the_log_does():
    transform = fitted(random_log(80, seed=9), make_run().data)
    raw = random_log(20, seed=1)
    for at, row in enumerate(raw.to_pylist()):
        known = {k: v for k, v in row.items() if v is not None}
        assert_same(transform.encode(pa.Table.from_pylist([known])), transform.encode(raw.slice(at, 1)))


@pytest.mark.parametrize("column", ["user", "history", "hashed", "tags", "price", "age", "row"])
def test_absent_column_encodes_as_missing(column):
    transform = fitted(random_log(80), make_run().data)
    raw = random_log(30, seed=1)
    at = raw.column_names.index(column)
    nulls = raw.set_column(at, column, pa.nulls(len(raw), raw[column].type))
    assert_same(transform.encode(raw.drop_columns([column])), transform.encode(nulls))
    assert_same(
        transform.encode(raw.drop_columns([column])), transform.encode(raw.set_column(at, column, pa.nulls(30)))
    )


def test_no_rows_encode_to_no_rows():
    encoded = fitted(random_log(80), make_run().data).encode(random_log(80).slice(0, 0))
    assert encoded.dense.shape == (0, 3)
    assert {len(r) for r in encoded.sparse.values()} == {0}


def test_dense_inputs_have_the_order_of_their_names():
    transform = fitted(random_log(80), make_run().data)
    assert transform.dense_names == ["price", "price.missing", "row"]
    raw = random_log(30, seed=1)
    dense = transform.encode(raw).dense
    np.testing.assert_array_equal(dense[:, 1], raw["price"].is_null().to_numpy())
    np.testing.assert_array_equal(dense[:, 2], np.arange(30))


def test_pick_encodes_the_chosen_features_alike():
    transform = fitted(random_log(80), make_run().data)
    raw = random_log(30, seed=1)
    few = pick(transform, [transform.sparse["item"], transform.sparse["tags"]])
    encoded, full = few.encode(raw), transform.encode(raw)
    assert list(encoded.sparse) == ["item", "tags"]
    assert encoded.dense.shape == (30, 0)
    np.testing.assert_array_equal(encoded.sparse["tags"].values, full.sparse["tags"].values)


# -- files -----------------------------------------------------------------------------------------------------------


def test_saved_transform_loads_identical(tmp_path):
    transform = fitted(random_log(80), make_run().data)
    transform.save(tmp_path)
    loaded = load_transform(tmp_path)
    raw = random_log(50, seed=2)
    assert_same(loaded.encode(raw), transform.encode(raw))
    assert loaded.fingerprint() == transform.fingerprint()
    assert (loaded.tables, loaded.numerics, loaded.schema) == (transform.tables, transform.numerics, transform.schema)
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "transform.json").read_bytes() == (tmp_path / "transform.json").read_bytes()


def test_saved_transform_with_an_empty_vocabulary_loads(tmp_path):
    transform = fitted(pa.table({"a": ["x"]}), data_of(CAT | {"min_count": 2}))
    transform.save(tmp_path)
    assert rows_of(load_transform(tmp_path), pa.array(["x", None])) == [OOV_ROW, MISSING_ROW]


def test_fingerprint_is_the_same_for_the_same_rows():
    assert (
        fitted(random_log(80), make_run().data).fingerprint() == fitted(random_log(80), make_run().data).fingerprint()
    )


def test_fingerprint_changes_with_what_changes_encoding():
    base = fitted(pa.table({"a": ["x", "y"], "n": [1.0, 2.0]}), data_of(CAT, {"name": "n", "kind": "numeric"}))
    other_id = fitted(pa.table({"a": ["x", "z"], "n": [1.0, 2.0]}), data_of(CAT, {"name": "n", "kind": "numeric"}))
    other_mean = fitted(pa.table({"a": ["x", "y"], "n": [1.0, 3.0]}), data_of(CAT, {"name": "n", "kind": "numeric"}))
    other_kind = fitted(
        pa.table({"a": ["x", "y"], "n": [1.0, 2.0]}),
        data_of(CAT, {"name": "n", "kind": "numeric", "transform": "none"}),
    )
    prints = {t.fingerprint() for t in (base, other_id, other_mean, other_kind)}
    assert len(prints) == 4


def test_folder_without_a_transform_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"transform\.json: not a transform"):
        load_transform(tmp_path)
    (tmp_path / "transform.json").write_text("[1]")
    with pytest.raises(DataError, match=r"transform\.json: not a transform"):
        load_transform(tmp_path)


def test_transform_of_another_format_is_refused(tmp_path):
    transform = fitted(random_log(80), make_run().data)
    transform.save(tmp_path)
    content = json.loads((tmp_path / "transform.json").read_text()) | {"format_version": 99}
    (tmp_path / "transform.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="format 99, this version reads 1"):
        load_transform(tmp_path)


def test_transform_with_a_damaged_vocabulary_is_refused(tmp_path):
    transform = fitted(pa.table({"a": ["x"]}), data_of(CAT))
    transform.save(tmp_path)
    (tmp_path / "vocabulary" / "a.arrow").write_bytes(b"nothing of it")
    with pytest.raises(DataError, match=r"a\.arrow: not a readable Arrow file"):
        load_transform(tmp_path)


def test_transform_with_a_schema_of_other_keys_is_refused_in_one_line(tmp_path):
    transform = fitted(pa.table({"a": ["x"]}), data_of(CAT))
    transform.save(tmp_path)
    content = json.loads((tmp_path / "transform.json").read_text())
    content["schema"]["from_the_future"] = 1
    (tmp_path / "transform.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="transform.json"):
        load_transform(tmp_path)


def test_transform_of_binary_rubbish_is_refused_in_one_line(tmp_path):
    (tmp_path / "transform.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(DataError, match="transform.json"):
        load_transform(tmp_path)
