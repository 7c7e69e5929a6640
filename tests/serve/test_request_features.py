"""serve/features.py: raw request values become the rows that training made of the same values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from compress_builders import World

from compress.artifact import Artifact
from serve.errors import RequestError
from serve.features import FeatureReader, choose, to_array
from trainer.data.encoded import Encoded, Ragged
from trainer.data.schema import CategoricalFeature, MultiFeature, NumericFeature
from trainer.data.transform import as_text

CATEGORICAL = CategoricalFeature(name="x", kind="categorical")
MULTI = MultiFeature(name="x", kind="multi")
NUMERIC = NumericFeature(name="x", kind="numeric")


@pytest.fixture(scope="module")
def reader(artifact: Artifact) -> FeatureReader:
    return FeatureReader(artifact)


def same(a: Encoded, b: Encoded) -> bool:
    """Whether two encodings are equal to the last id."""
    return (
        list(a.sparse) == list(b.sparse)
        and all(np.array_equal(a.sparse[n].values, b.sparse[n].values) for n in a.sparse)
        and all(
            (a.sparse[n].lengths is None) == (b.sparse[n].lengths is None)
            and (a.sparse[n].lengths is None or np.array_equal(a.sparse[n].lengths, b.sparse[n].lengths))  # type: ignore[arg-type]
            for n in a.sparse
        )
        and np.array_equal(a.dense, b.dense)
    )


def user_of(row: dict[str, Any]) -> dict[str, Any]:
    """A log row's user-side and context columns."""
    return {c: row[c] for c in ("user_id", "recent", "town", "age", "income")}


def item_of(row: dict[str, Any]) -> dict[str, Any]:
    """A log row's item-side columns."""
    return {c: row[c] for c in ("item_id", "genres", "price")}


# -- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["ids", "objects", "objects that hold all"])
def test_request_encodes_as_the_log_row(world: World, artifact: Artifact, reader: FeatureReader, shape: str) -> None:
    raw = world.dataset.sample().slice(0, 60)
    expected = artifact.model.transform.encode(raw)
    for at, row in enumerate(raw.to_pylist()):
        if shape == "ids":
            found, ignored = reader.read(user_of(row), [row["item_id"]])
        elif shape == "objects":
            found, ignored = reader.read(user_of(row), [item_of(row)])
        else:
            found, ignored = reader.read({}, [{**user_of(row), **item_of(row)}])
        assert same(found, expected.take(np.array([at]))), row
        assert ignored == []


def test_candidates_as_objects_encode_as_catalogue_ids(world: World, reader: FeatureReader) -> None:
    """Many at once, so that bags of several lengths lie side by side."""
    rows = {r["item_id"]: r for r in world.raw.to_pylist()}
    ids = sorted(rows)[:80]
    user = user_of(world.raw.slice(5, 1).to_pylist()[0])
    by_id, _ = reader.read(user, ids)
    by_columns, _ = reader.read(user, [item_of(rows[i]) for i in ids])
    assert same(by_id, by_columns)
    assert len(by_id) == 80


def test_candidate_columns_win_over_the_users(reader: FeatureReader) -> None:
    mine, _ = reader.read({"town": "town-1", "age": 30}, [{"item_id": "i1", "town": "town-2"}, {"item_id": "i1"}])
    apart = [reader.read({"town": t, "age": 30}, [{"item_id": "i1"}])[0] for t in ("town-2", "town-1")]
    assert same(mine.take(np.array([0])), apart[0])
    assert same(mine.take(np.array([1])), apart[1])
    assert not same(apart[0], apart[1])


def test_unknown_item_reads_the_oov_row_and_misses_the_rest(reader: FeatureReader) -> None:
    found, _ = reader.read({}, ["nobody", "i3", "never"])
    assert found.sparse["item_id"].values[[0, 2]].tolist() == [0, 0]
    assert found.sparse["item_id"].values[1] > 1
    lengths = found.sparse["genres"].lengths
    assert lengths is not None
    assert lengths[[0, 2]].tolist() == [1, 1]
    assert found.sparse["genres"].values[[0, -1]].tolist() == [1, 1]
    price = reader.whole.dense_names.index("price.missing")
    assert found.dense[:, price].tolist() == [1.0, 0.0, 1.0]
    known, _ = reader.read({}, ["i3"])
    assert same(found.take(np.array([1])), known)


def test_unknown_user_reads_the_oov_row(reader: FeatureReader) -> None:
    found, _ = reader.read({"user_id": "stranger"}, ["i1"])
    assert found.sparse["user_id"].values.tolist() == [0]


@pytest.mark.parametrize("empty", [{}, {"user_id": None, "recent": None, "town": None, "age": None, "income": None}])
@pytest.mark.parametrize("candidate", ["i1", {"item_id": "i1"}])
def test_missing_values_read_the_missing_rows(reader: FeatureReader, empty: dict, candidate: Any) -> None:
    found, _ = reader.read(empty, [candidate, candidate])
    for name in ("user_id", "recent", "city", "income"):
        assert found.sparse[name].values.tolist() == [1, 1], name
    names = reader.whole.dense_names
    assert found.dense[:, names.index("age")].tolist() == [0, 0]
    assert found.dense[:, names.index("age.missing")].tolist() == [1, 1]


@pytest.mark.parametrize("value", ["", [], [None], [""]])
def test_empty_text_and_empty_bags_are_missing(reader: FeatureReader, value: Any) -> None:
    assert same(reader.read({"recent": value}, ["i1"])[0], reader.read({}, ["i1"])[0])


def test_candidate_object_without_anything_is_all_missing(reader: FeatureReader) -> None:
    found, _ = reader.read({}, [{}])
    assert all(r.values.tolist() == [1] for r in found.sparse.values())
    assert len(found) == 1


def test_feature_may_be_named_by_feature_or_by_column(reader: FeatureReader) -> None:
    by_name, _ = reader.read({"city": "town-3"}, ["i1"])
    by_column, _ = reader.read({"town": "town-3"}, ["i1"])
    assert same(by_name, by_column)
    assert not same(by_name, reader.read({}, ["i1"])[0])


def test_keys_that_no_feature_reads_are_told(reader: FeatureReader) -> None:
    _, ignored = reader.read({"zodiac": "leo", "age": 3, "click": 1}, ["i1"])
    assert ignored == ["click", "zodiac"]


def test_item_side_keys_of_the_user_are_ignored_beside_catalogue_ids(reader: FeatureReader) -> None:
    user = {"age": 3, "price": "no number", "genres": "Drama", "item_id": "i2"}
    found, ignored = reader.read(user, ["i1"])
    assert ignored == ["genres", "item_id", "price"]
    assert same(found, reader.read({"age": 3}, ["i1"])[0])
    assert reader.read({"age": 3, "genres": "Drama"}, [{"item_id": "i1"}])[1] == []


@pytest.mark.parametrize("value", [1000, 1000.0, "1000"])
def test_ids_are_read_as_text(reader: FeatureReader, value: object) -> None:
    found, _ = reader.read({"user_id": value}, ["i1"])
    assert (
        found.sparse["user_id"].values.tolist()
        == reader.read({"user_id": 1000}, ["i1"])[0].sparse["user_id"].values.tolist()
    )
    assert found.sparse["user_id"].values[0] > 1


@pytest.mark.parametrize("value", [7, 7.0, -0.0, 7.5, 0.1, -3.25, True, False, 2**60, 2.0**52])
def test_one_id_is_the_text_that_the_log_gives(value: object) -> None:
    assert to_array([value], CATEGORICAL, "x").to_pylist() == as_text(pa.array([value]), "x").to_pylist()


@pytest.mark.parametrize("value", [float("nan"), 1e20, 2.0**60, 1e-7, 123456789012.5])
def test_one_id_of_an_odd_float_is_the_text_that_the_log_gives(value: float) -> None:
    """JSON's NaN and large floats reach this code: json.loads accepts both."""
    assert to_array([value], CATEGORICAL, "x").to_pylist() == as_text(pa.array([value]), "x").to_pylist()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        ("user_id", [1], "must be one id .* not list"),
        ("user_id", {"id": 1}, "must be one id .* not dict"),
        ("town", ["a", "b"], "must be one id"),
        ("recent", {"a": 1}, "must be a list of ids"),
        ("recent", [["i1"]], "must be a list of ids"),
        ("recent", ["i1", {}], "must be a list of ids"),
        ("age", [30], "must be a number, not list"),
        ("age", {"years": 30}, "must be a number, not dict"),
        ("age", "thirty", "must be a number, not 'thirty'"),
        ("age", "1,5", "must be a number"),
        ("age", 10**400, "must be a number, not '10{39}'$"),
        ("income", "rich", "must be a number, not 'rich'"),
    ],
)
def test_user_value_of_the_wrong_type_names_its_column(
    reader: FeatureReader, column: str, value: object, rule: str
) -> None:
    with pytest.raises(RequestError, match=rule) as caught:
        reader.read({column: value}, ["i1"])
    assert caught.value.field == f"user.{column}"
    assert caught.value.status == 422


@pytest.mark.parametrize(
    ("candidate", "field"),
    [
        ({"item_id": ["a"]}, "candidates.item_id"),
        ({"price": "cheap"}, "candidates.price"),
        ({"price": []}, "candidates.price"),
        ({"genres": {"a": 1}}, "candidates.genres"),
    ],
)
def test_candidate_value_of_the_wrong_type_names_its_column(
    reader: FeatureReader, candidate: dict[str, Any], field: str
) -> None:
    with pytest.raises(RequestError) as caught:
        reader.read({}, [{"item_id": "i1"}, candidate])
    assert caught.value.field == field


@pytest.mark.parametrize(("column", "value"), [("age", "thirty"), ("user_id", [1])])
def test_user_value_of_the_wrong_type_is_the_users_beside_objects_too(
    reader: FeatureReader, column: str, value: object
) -> None:
    with pytest.raises(RequestError) as caught:
        reader.read({column: value}, [{"item_id": "i1"}])
    assert caught.value.field == f"user.{column}"


def test_the_value_that_is_no_number_is_the_one_told(reader: FeatureReader) -> None:
    with pytest.raises(RequestError, match="'cheap'"):
        reader.read({}, [{"price": "12.5"}, {"price": "cheap"}])


@pytest.mark.parametrize(
    ("user", "candidates", "field"),
    [
        ({"user_id": "\ud800"}, ["i1"], "user.user_id"),
        ({"recent": ["i1", "\udfff"]}, ["i1"], "user.recent"),
        ({"recent": "i1\udfff"}, ["i1"], "user.recent"),
        ({"age": "\ud800"}, ["i1"], "user.age"),
        ({}, [{"item_id": "\ud800"}], "candidates.item_id"),
        ({}, [{"genres": "Drama|\ud800"}], "candidates.genres"),
    ],
)
def test_text_that_is_no_unicode_is_refused(reader: FeatureReader, user: dict, candidates: list, field: str) -> None:
    """JSON may hold such text: json.loads('"\\\\ud800"') gives it. A request's own decoder takes none."""
    with pytest.raises(RequestError) as caught:
        reader.read(user, candidates)
    assert caught.value.field == field


def test_candidate_ids_need_a_catalogue(two_task_ranker: Any) -> None:
    with pytest.raises(RequestError, match="no item catalogue") as caught:
        two_task_ranker.reader.read({}, ["i1"])
    assert caught.value.field == "candidates"


# -- candidates do not disturb each other ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "candidates",
    [
        [{"item_id": "i1", "genres": "Drama|War"}, {"item_id": "i2"}, {"item_id": "i3", "genres": "Noir"}],
        [{"item_id": "i1", "price": 3}, {"price": "4.5"}, {"item_id": 7, "price": None}],
        [{"item_id": "i1", "genres": ["Drama", "War"]}, {"genres": ["Noir"]}, {"genres": []}],
        [{"town": "town-1"}, {"income": 5e4}, {"age": 3}],
    ],
)
def test_candidates_encode_together_as_alone(reader: FeatureReader, candidates: list[dict[str, Any]]) -> None:
    together, _ = reader.read({"user_id": 1000}, candidates)
    for at, candidate in enumerate(candidates):
        assert same(together.take(np.array([at])), reader.read({"user_id": 1000}, [candidate])[0])


def test_bag_as_text_beside_a_bag_as_list_is_still_cut(reader: FeatureReader) -> None:
    candidates = [{"item_id": "i1", "genres": "Drama|War"}, {"item_id": "i2", "genres": ["Noir"]}]
    together, _ = reader.read({}, candidates)
    assert same(together.take(np.array([0])), reader.read({}, candidates[:1])[0])


def test_candidates_may_spell_a_column_differently(reader: FeatureReader) -> None:
    candidates = [{"item_id": "i1", "city": "town-1"}, {"item_id": "i1", "town": "town-1"}]
    together, _ = reader.read({}, candidates)
    alone, _ = reader.read({}, candidates[:1])
    assert same(together.take(np.array([0])), alone)
    assert same(together.take(np.array([1])), alone)


# -- columns of JSON values ------------------------------------------------------------------------------------------


def test_to_array_of_bags_takes_lists_text_and_nothing() -> None:
    assert to_array([["a", 7, 7.0, None], None, "b"], MULTI, "x").to_pylist() == [["a", "7", "7", None], None, ["b"]]
    assert to_array(["a|b", None], MULTI, "x").to_pylist() == [["a|b"], None]
    cut = MULTI.model_copy(update={"separator": "|"})
    assert to_array(["a|b", None, ["c|d"]], cut, "x").to_pylist() == [["a", "b"], None, ["c|d"]]


def test_to_array_of_numbers_takes_numbers_and_their_text() -> None:
    assert to_array([1, 2.5, " 3 ", None, "", " ", True], NUMERIC, "x").to_pylist() == [1, 2.5, 3, None, None, None, 1]


def test_choose_takes_each_row_from_its_side() -> None:
    yes = Encoded({"a": Ragged(np.arange(3)), "b": Ragged(np.arange(4), np.array([2, 1, 1]))}, np.ones((3, 1)))
    no = Encoded(
        {"a": Ragged(np.arange(3) + 10), "b": Ragged(np.arange(3) + 10, np.array([1, 1, 1]))}, np.zeros((3, 1))
    )
    mixed = choose(np.array([True, False, True]), yes, no)
    assert mixed.sparse["a"].values.tolist() == [0, 11, 2]
    assert mixed.sparse["b"].values.tolist() == [0, 1, 11, 3]
    assert mixed.sparse["b"].lengths is not None
    assert mixed.sparse["b"].lengths.tolist() == [2, 1, 1]
    assert mixed.dense.ravel().tolist() == [1, 0, 1]
