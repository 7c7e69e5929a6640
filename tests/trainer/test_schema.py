"""trainer/data/schema.py: which data sections are refused, and in which words."""

from __future__ import annotations

import numpy as np
import pytest
from trainer_builders import data_of, make_run, run_content, write_run

from trainer.config import load_run
from trainer.data.schema import comparison, parse_comparison
from trainer.errors import ConfigError

CAT = {"name": "a", "kind": "categorical"}
NUM = {"name": "n", "kind": "numeric"}


def refused(tmp_path, **data) -> str:
    """The one line that a data section is refused with."""
    path = write_run(tmp_path, run_content(**data))
    with pytest.raises(ConfigError) as error:
        load_run(path)
    message = str(error.value)
    assert message.startswith(f"{path}: data")
    assert len(message.splitlines()) == 1
    assert message.count(str(path)) == 1, "one rule broken, one problem told"
    return message


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (
            [CAT | {"kind": "dense"}],
            "data.features.0: kind 'dense' is unknown: use one of 'categorical', 'multi', 'sequence', 'numeric'",
        ),
        ([{"name": "a"}], "data.features.0: kind is missing"),
        ([CAT | {"sizes": 3}], "data.features.0.categorical.sizes: unknown key"),
        ([CAT, CAT], "feature 'a' is named twice"),
        ([CAT, NUM | {"name": "a"}], "feature 'a' is named twice"),
        ([CAT | {"name": "a.b"}], "data.features.0.categorical.name"),
        ([CAT | {"dim": 6}], "dim: Input should be a multiple of 4 (got 6)"),
        ([CAT | {"hash_size": 1}], "hash_size: Input should be greater than or equal to 2 (got 1)"),
        ([CAT | {"min_count": 0}], "min_count: Input should be greater than or equal to 1 (got 0)"),
        ([CAT, NUM | {"dim": 8}], "'dim' belongs to an embedding table: use it with transform: bucketize"),
        ([NUM], "at least one categorical, multi or bucketized feature"),
        ([], "data.features: List should have at least 1 item"),
        ([CAT | {"table": "b"}], "feature 'a': table 'b' must be a feature with its own table"),
        ([CAT, NUM, CAT | {"name": "b", "table": "n"}], "feature 'b': table 'n' must be a feature with its own table"),
        (
            [CAT, CAT | {"name": "b", "table": "a"}, CAT | {"name": "c", "table": "b"}],
            "feature 'c': table 'b' must be a feature with its own table",
        ),
        (
            [NUM | {"transform": "bucketize"}, CAT | {"table": "n"}],
            "feature 'a': table 'n' holds buckets of a number, not ids",
        ),
        ([CAT, CAT | {"name": "b", "table": "a", "dim": 8}], "feature 'b' shares table 'a': set dim there"),
        ([CAT, CAT | {"name": "b", "table": "a", "min_count": 3}], "shares table 'a': set min_count there"),
        ([CAT, CAT | {"name": "b", "table": "a", "hash_size": 9}], "shares table 'a': set hash_size there"),
    ],
)
def test_features_that_break_a_rule_are_refused(tmp_path, features, says):
    assert says in refused(tmp_path, features=features)


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ({}, "give exactly one of by, column, files (got none)"),
        ({"by": "row", "column": "s"}, "give exactly one of by, column, files (got by, column)"),
        ({"by": "user"}, "data.split.by: Input should be 'timestamp' or 'row' (got 'user')"),
        ({"by": "timestamp"}, "split by timestamp needs 'timestamp'"),
        ({"by": "row", "fractions": [0.8, 0.1, 0.2]}, "must be positive and sum to 1"),
        ({"by": "row", "fractions": [1.0, 0.0, 0.0]}, "must be positive and sum to 1"),
        ({"by": "row", "fractions": [1.2, -0.1, -0.1]}, "must be positive and sum to 1"),
    ],
)
def test_split_that_breaks_a_rule_is_refused(tmp_path, split, says):
    assert says in refused(tmp_path, split=split)


def test_split_with_a_fraction_that_is_no_number_is_refused(tmp_path):
    assert "fractions" in refused(tmp_path, split={"by": "row", "fractions": [float("nan"), 0.5, 0.5]})


def test_split_files_must_name_all_three(tmp_path):
    assert "files must name train, val and test" in refused(
        tmp_path, input=None, split={"files": {"train": "a", "val": "b"}}
    )


def test_input_and_split_files_exclude_each_other(tmp_path):
    files = {"train": "a", "val": "b", "test": "c"}
    assert "give either 'input' or 'split.files'" in refused(tmp_path, split={"files": files})
    assert "give either 'input' or 'split.files'" in refused(tmp_path, input=None)


def test_task_names_are_unique(tmp_path):
    tasks = [{"name": "t", "column": "x"}, {"name": "t", "column": "y"}]
    assert "task names ['t', 't'] must be unique" in refused(tmp_path, tasks=tasks)


@pytest.mark.parametrize("rule", ["=> 4", "4", ">=", ">= four", "> 1 or < 0", ""])
def test_task_with_a_bad_comparison_is_refused(tmp_path, rule):
    message = refused(tmp_path, tasks=[{"column": "label", "positive": rule}])
    assert "data.tasks.0.positive" in message
    assert "is not a comparison" in message


@pytest.mark.parametrize(
    ("rule", "parsed"),
    [(">= 4", (">=", 4.0)), ("<-1.5", ("<", -1.5)), (" == 1e3 ", ("==", 1000.0)), ("!=+2.", ("!=", 2.0))],
)
def test_comparison_is_parsed(rule, parsed):
    assert parse_comparison(rule) == parsed


def test_comparison_works_on_arrays():
    values = np.array([3.0, 4.0, 5.0])
    expected = {">=": "011", "<=": "110", "==": "010", "!=": "101", ">": "001", "<": "100"}
    for sign, bits in expected.items():
        assert "".join(str(int(x)) for x in comparison(f"{sign} 4")(values, 4.0)) == bits


def test_columns_are_each_wanted_once():
    data = data_of(
        CAT | {"column": "raw"},
        {"name": "b", "kind": "categorical", "table": "a", "column": "raw"},
        timestamp="t",
        ids={"user": "raw", "item": "i"},
        title="name",
    )
    assert data.columns == ["raw", "label", "t", "i", "name"]


def test_features_are_dense_or_sparse_in_their_own_order():
    data = make_run().data
    assert [f.name for f in data.sparse_features] == ["user", "item", "history", "hashed", "tags", "age"]
    assert [f.name for f in data.dense_features] == ["price", "row"]
