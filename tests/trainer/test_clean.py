"""Rows left out by declared rules: which, how many by rule, and what the splits are then cut on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from trainer_builders import data_of, make_run, prepare_locally

from trainer.config import RunConfig, parse_run
from trainer.data import clean as clean_module
from trainer.data.clean import check_rows, find_duplicates, kept_negatives, row_keys
from trainer.data.dataset import SPLITS, open_dataset
from trainer.data.log import Fragment, check_log
from trainer.data.reader import read_split
from trainer.data.transform import hash_ids
from trainer.errors import ConfigError, DataError

ANY: dict[str, Any] = {"name": "any", "kind": "categorical", "min_count": 1}
NUMBER: dict[str, Any] = {"name": "row", "kind": "numeric", "transform": "none"}


def write_log(folder: Path, log: pa.Table, files: int = 3, groups: int = 20) -> Path:
    folder.mkdir()
    for part, rows in enumerate(np.array_split(np.arange(len(log)), files)):
        pq.write_table(log.take(pa.array(rows)), folder / f"{part}.parquet", row_group_size=groups)
    return folder


def log_of(rows: int, **columns: Any) -> pa.Table:
    numbers = np.arange(rows)
    base = {"any": numbers % 5, "row": numbers, "label": numbers * 7 % 3 == 0, "time": numbers // 2}
    return pa.table({k: pa.array(v) for k, v in {**base, **columns}.items()})


def run_of(folder: Path, **data: Any) -> RunConfig:
    return make_run(input=str(folder / "*.parquet"), features=[ANY, NUMBER], ids={"group": "row"}, **data)


def rows_of(out: Path) -> dict[str, list[int]]:
    """The number in the log of each prepared row: its group is the hash of that."""
    dataset = open_dataset(out)
    number = {int(key): row for row, key in enumerate(hash_ids(pa.array(range(3000)), "row")[0])}
    return {split: [number[int(key)] for key in read_split(dataset, split).groups] for split in SPLITS}


# -- rules -----------------------------------------------------------------------------------------------------------


def test_rows_out_of_range_or_without_a_value_are_dropped_and_counted_once():
    raw = pa.table(
        {
            "any": ["a", None, "", "d", "e", "f"],
            "price": [1.0, 2.0, 3.0, -1.0, 99.0, None],
            "age": [20, 20, 20, 20, 300, 10],
        }
    )
    data = data_of(
        {"name": "any", "kind": "categorical"},
        clean={"required": ["any"], "ranges": {"price": [0, None], "age": [None, 120]}},
    )
    keep, dropped = check_rows(raw, data)
    assert keep.tolist() == [True, False, False, False, False, True], "a missing price passes its range"
    assert (dropped.required, dropped.ranges, dropped.duplicates) == ({"any": 2}, {"price": 1, "age": 1}, 0)


@pytest.mark.parametrize(("ends", "left"), [([2, 4], [2, 3, 4]), ([None, 2], [0, 1, 2]), ([4, None], [4, 5])])
def test_range_holds_its_ends(ends, left):
    keep, _ = check_rows(pa.table({"x": range(6)}), data_of(ANY, clean={"ranges": {"x": ends}}))
    assert np.flatnonzero(keep).tolist() == left


@pytest.mark.parametrize("parts", [2, 32])
@pytest.mark.parametrize("size", [0, 1, 2, 500])
def test_duplicates_are_all_but_the_first(monkeypatch, parts, size):
    monkeypatch.setattr(clean_module, "KEY_PARTS", parts)
    rng = np.random.default_rng(size)
    keys = rng.choice(rng.integers(0, 2**64, 90, dtype=np.uint64), size)
    first = np.zeros(size, dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    np.testing.assert_array_equal(find_duplicates(keys), ~first)


def test_row_keys_tell_columns_and_missing_values_apart(tmp_path):
    raw = pa.table(
        {
            "a": ["x", "y", None, "", "x", "x", "x"],
            "b": ["y", "x", None, None, "y", "y", "y"],
            "c": [["1", "2"], ["1", "2"], [], None, ["12"], ["1", "2"], ["1", "2"]],
            "any": ["k"] * 7,
            "label": pa.array([0, 1, 0, 1, 0, 0, None]),
        }
    )
    pq.write_table(raw, tmp_path / "log.parquet")
    fragment = Fragment(0, str(tmp_path / "log.parquet"), (0,), 0, 7)

    def keys(*columns: str) -> np.ndarray:
        return row_keys(fragment, data_of(ANY, clean={"duplicates": list(columns)}))[0]

    assert len(keys("a")) == 6, "a row without a label takes no part"
    assert len(np.unique(keys("a", "b"))) == 3
    assert len(np.unique(keys("c"))) == 3, "an empty list is as none"
    assert keys("a", "b", "c")[0] == keys("a", "b", "c")[5]
    assert keys("a", "b")[0] != keys("b", "a")[0]


# -- the whole -------------------------------------------------------------------------------------------------------


def test_clean_log_prepares_as_the_log_without_the_bad_rows(tmp_path):
    rows = 120
    rng = np.random.default_rng(0)
    log = log_of(
        rows,
        key=rng.integers(0, 100, rows),
        price=pa.array(rng.normal(10, 6, rows), mask=rng.random(rows) < 0.1),
        owner=pa.array(["o"] * rows, mask=rng.random(rows) < 0.1),
    )
    price, owner = log["price"].to_pylist(), log["owner"].to_pylist()
    good, seen, counts = [], set(), {"price": 0, "owner": 0, "duplicates": 0}
    for row, key in enumerate(log["key"].to_pylist()):
        if owner[row] is None:
            counts["owner"] += 1
        elif price[row] is not None and not 0 <= price[row] <= 20:
            counts["price"] += 1
        elif key in seen:
            counts["duplicates"] += 1
        else:
            seen.add(key)
            good.append(row)
    rules = {"duplicates": ["key"], "ranges": {"price": [0, 20]}, "required": ["owner"]}
    for split in ({"by": "row"}, {"by": "timestamp"}):
        folder = tmp_path / next(iter(split.values()))
        folder.mkdir()
        bad = run_of(write_log(folder / "bad", log), split=split, timestamp="time", clean=rules)
        clean = run_of(write_log(folder / "good", log.take(pa.array(good))), split=split, timestamp="time")
        result = prepare_locally(bad, folder / "a")
        prepare_locally(clean, folder / "b")
        assert rows_of(folder / "a") == rows_of(folder / "b"), "the splits are cut on the rows that remain"
        expected = {
            "duplicates": counts["duplicates"],
            "ranges": {"price": counts["price"]},
            "required": {"owner": counts["owner"]},
        }
        assert min(counts.values()) > 0
        assert result["cleaned"] == json.loads((folder / "a" / "dataset.json").read_text())["cleaned"] == expected
        assert [p.name for p in (folder / "a").iterdir() if p.name.startswith(".")] == []


def test_log_without_rules_counts_nothing(tmp_path):
    result = prepare_locally(run_of(write_log(tmp_path / "log", log_of(60))), tmp_path / "out")
    assert result["cleaned"] == {"duplicates": 0, "ranges": {}, "required": {}}
    assert result["negative_rate"] == 1.0
    assert sum(result["rows"].values()) == 60


def test_rules_mend_what_would_be_refused(tmp_path):
    """A label of -1 and a row without a time: refused as they are, dropped by a rule that says so."""
    rows = 60
    label = np.where(np.arange(rows) == 17, -1, np.arange(rows) * 7 % 3 == 0)
    log = log_of(rows, label=label, time=pa.array(np.arange(rows), mask=np.arange(rows) == 40))
    folder = write_log(tmp_path / "log", log)
    options = {"split": {"by": "timestamp"}, "timestamp": "time"}
    with pytest.raises(DataError, match="'time'"):
        prepare_locally(run_of(folder, **options, clean={"ranges": {"label": [0, 1]}}), tmp_path / "out")
    with pytest.raises(DataError, match="holds -1"):
        prepare_locally(run_of(folder, **options, clean={"required": ["time"]}), tmp_path / "out")
    rules = {"ranges": {"label": [0, 1]}, "required": ["time"]}
    prepare_locally(run_of(folder, **options, clean=rules), tmp_path / "out")
    kept = sorted(n for split in rows_of(tmp_path / "out").values() for n in split)
    assert kept == [n for n in range(rows) if n not in (17, 40)]


def test_rules_that_leave_nothing_are_named(tmp_path):
    run = run_of(write_log(tmp_path / "log", log_of(30)), clean={"ranges": {"row": [100, None]}})
    with pytest.raises(DataError, match=r"data.clean: no row of the log passes .*100"):
        prepare_locally(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rule_for_a_column_that_is_absent_is_refused(tmp_path):
    run = run_of(write_log(tmp_path / "log", log_of(30)), clean={"ranges": {"prize": [0, 1]}})
    with pytest.raises(DataError, match=r"column 'prize' \(data.clean\) is not in"):
        check_log(run.data)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"ranges": {"x": [None, None]}}, "'x' has neither end"),
        ({"ranges": {"x": [3, 1]}}, r"'x' \[3, 1\] holds no number"),
        ({"ranges": {"x": [1]}}, "x"),
        ({"duplicates": []}, "duplicates"),
        ({"dups": ["x"]}, "unknown key"),
    ],
)
def test_bad_rules_are_refused(rules, message):
    with pytest.raises(ConfigError, match=message):
        make_run(clean=rules)


# -- negatives -------------------------------------------------------------------------------------------------------


def test_negatives_of_the_training_split_are_sampled(tmp_path):
    rows = 3000
    log = log_of(rows)
    folder = write_log(tmp_path / "log", log)
    prepare_locally(run_of(folder), tmp_path / "all")
    result = prepare_locally(run_of(folder, sample_negatives=0.25), tmp_path / "some")
    whole, some = rows_of(tmp_path / "all"), rows_of(tmp_path / "some")
    label = np.asarray(log["label"])
    assert (whole["val"], whole["test"]) == (some["val"], some["test"])
    assert [n for n in some["train"] if label[n]] == [n for n in whole["train"] if label[n]], "positives all stay"
    negatives = sum(not label[n] for n in whole["train"])
    kept = sum(not label[n] for n in some["train"])
    assert abs(kept / negatives - 0.25) < 0.04
    dataset = open_dataset(tmp_path / "some")
    assert dataset.negative_rate == result["negative_rate"] == 0.25
    assert open_dataset(tmp_path / "all").negative_rate == 1.0
    before = {"rows": len(whole["train"]), "positives": [len(whole["train"]) - negatives]}
    for out in ("all", "some"):
        assert open_dataset(tmp_path / out).manifest["train_before_sampling"] == before
    assert dataset.counts("any").sum() == len(some["train"]), "counted on the rows that are trained on"


@pytest.mark.parametrize("files", [1, 5])
def test_sampled_negatives_do_not_depend_on_how_the_log_is_cut(tmp_path, files):
    log = log_of(400)
    expected = [n for n in range(320) if kept_negatives(np.asarray(log["label"])[:, None], np.arange(400), 0.5)[n]]
    run = run_of(write_log(tmp_path / "log", log, files, groups=31), sample_negatives=0.5)
    prepare_locally(run, tmp_path / "out")
    assert rows_of(tmp_path / "out")["train"] == expected


def test_sampling_goes_by_the_number_in_the_log_whatever_was_cleaned(tmp_path):
    log = log_of(400)
    folder = write_log(tmp_path / "log", log)
    options: dict[str, Any] = {"sample_negatives": 0.5, "split": {"files": None, "by": "row"}}
    prepare_locally(run_of(folder, **options), tmp_path / "all")
    prepare_locally(run_of(folder, **options, clean={"ranges": {"row": [50, None]}}), tmp_path / "late")
    late, whole = rows_of(tmp_path / "late")["train"], rows_of(tmp_path / "all")["train"]
    assert [n for n in late if n < 320] == [n for n in whole if n >= 50]


def test_negatives_are_sampled_of_one_task_only():
    tasks = [{"name": "a", "column": "x"}, {"name": "b", "column": "y"}]
    with pytest.raises(ConfigError, match=r"sample_negatives 0.5: a row has 2 labels \(a, b\)"):
        make_run(tasks=tasks, sample_negatives=0.5)
    for rate in (0, 1.5, -1):
        with pytest.raises((ConfigError, ValidationError), match="sample_negatives"):
            make_run(sample_negatives=rate)
    parse_run(make_run(sample_negatives=1.0).model_dump(), "run")


# -- going on from data prepared before ------------------------------------------------------------------------------


def test_prepare_continues_from_data_prepared_before(tmp_path):
    run = run_of(write_log(tmp_path / "first", log_of(100)))
    prepare_locally(run, tmp_path / "a")
    later = run_of(write_log(tmp_path / "second", log_of(100, any=np.arange(100) % 9)))
    result = prepare_locally(later, tmp_path / "b", tmp_path / "a")
    a, b = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")
    assert (a.transform.tables["any"].num_embeddings, b.transform.tables["any"].num_embeddings) == (7, 11)
    ids = pa.table({"any": range(9)})
    before, after = (d.transform.encode_sparse("any", ids).values for d in (a, b))
    np.testing.assert_array_equal(after[:5], before[:5])
    assert sorted(after[5:]) == [7, 8, 9, 10]
    assert b.transform.numerics == a.transform.numerics
    assert b.transform.lineage == (a.transform.fingerprint(),)
    assert b.manifest["extends"] == a.manifest["fingerprint"]
    assert b.manifest["lineage"] == [a.manifest["fingerprint"]]
    assert a.manifest["extends"] is None
    assert len(b.counts("any")) == result["tables"]["any"]["num_embeddings"] == 11


def test_prepare_continues_only_from_prepared_data_of_the_same_features(tmp_path):
    run = run_of(write_log(tmp_path / "first", log_of(100)))
    with pytest.raises(DataError, match="not a transform"):
        prepare_locally(run, tmp_path / "b", tmp_path / "first")
    prepare_locally(run, tmp_path / "a")
    other = make_run(input=run.data.input, features=[ANY | {"hash_size": 7}, NUMBER])
    with pytest.raises(DataError, match="feature 'any': hash_size is 7"):
        prepare_locally(other, tmp_path / "b", tmp_path / "a")
    assert not (tmp_path / "b").exists()
