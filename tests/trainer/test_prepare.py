"""trainer/data/prepare.py without Ray: what each pass does with one fragment, and how the parts come together."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trainer_builders import data_of, fitted, make_run, prepare_here, random_log, whole

from trainer.data import prepare
from trainer.data.clean import read_labels
from trainer.data.dataset import LABELS, SPLITS
from trainer.data.encoded import SPARSE
from trainer.data.latest import last_seen, timestamps
from trainer.data.log import Fragment, find_files, fragments_of
from trainer.data.prepare import Splitter, check_splits
from trainer.data.reader import read_split
from trainer.data.transform import OOV_ROW
from trainer.errors import DataError

ANY = {"name": "any", "kind": "categorical", "min_count": 1}
BY_TIME = data_of(ANY, split={"by": "timestamp"}, timestamp="time")


def assign_parts(raw: pa.Table, splitter: Splitter, sizes) -> np.ndarray:
    """Splits of a log that came in fragments of some sizes."""
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [
        splitter.assign(raw.slice(a, n), whole(raw.slice(a, n), start=int(a)))
        for a, n in zip(starts, sizes, strict=True)
    ]
    return np.concatenate(parts)


# -- splits ----------------------------------------------------------------------------------------------------------


def test_split_by_time_keeps_equal_instants_together():
    times = np.repeat([10, 20, 30, 40, 50], 4)
    got = Splitter(BY_TIME, (30.0, 50.0)).assign(pa.table({"time": times}), whole(pa.table({"time": times})))
    assert got.tolist() == [0] * 8 + [1] * 8 + [2] * 4


def test_split_by_time_cuts_at_the_fractions(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":  # unordered in time, in two fragments
        times = rng.integers(0, 300, 500)
        pq.write_table(pa.table({"any": times % 3, "label": times % 2, "time": times}), tmp_path / f"{name}.parquet")
    data = data_of(ANY, input=str(tmp_path / "*.parquet"), split={"by": "timestamp"}, timestamp="time")
    fragments = fragments_of(find_files(data), data)
    observed = [timestamps(f.read(["time"]), data) for f in fragments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_map", lambda function, items, what, progress: [function(i) for i in items])
        splitter = prepare._fit_splitter(fragments, data, lambda *a: None, tmp_path)
    splits = np.concatenate([splitter.assign(f.read(["time"]), f) for f in fragments])
    times = np.concatenate(observed)
    np.testing.assert_allclose(np.bincount(splits) / 1000, [0.8, 0.1, 0.1], atol=0.01)
    assert max(times[splits == 0]) < min(times[splits == 1])
    assert max(times[splits == 1]) < min(times[splits == 2])


@pytest.mark.parametrize("sizes", [[100], [50, 50], [79, 1, 20], [81, 19], [33, 33, 34]])
def test_split_by_row_does_not_depend_on_the_fragments(sizes, tmp_path):
    data = data_of(ANY)
    raw = pa.table({"any": np.arange(100)})
    fragments = [Fragment(i, "x", (0,), 0, n) for i, n in enumerate(sizes)]
    splitter = prepare._fit_splitter(fragments, data, lambda *a: None, tmp_path)
    assert assign_parts(raw, splitter, sizes).tolist() == [0] * 80 + [1] * 10 + [2] * 10


def test_split_by_column_reads_its_words():
    data = data_of(ANY, split={"column": "s"})
    raw = pa.table({"s": ["test", "train", "val", "train"]})
    assert Splitter(data).assign(raw, whole(raw)).tolist() == [2, 0, 1, 0]
    words = raw.set_column(0, "s", raw["s"].dictionary_encode())
    assert Splitter(data).assign(words, whole(words)).tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize("word", ["training", "", None, "Train"])
def test_split_by_column_refuses_other_words(word):
    raw = pa.table({"s": ["train", word]})
    with pytest.raises(DataError, match=r"column 's': .* name no split: its values must be train, val or test"):
        Splitter(data_of(ANY, split={"column": "s"})).assign(raw, whole(raw))


@pytest.mark.parametrize("split", SPLITS)
def test_split_by_files_goes_by_the_fragment(split):
    raw = pa.table({"any": [1, 2, 3]})
    assert Splitter(data_of(ANY)).assign(raw, whole(raw, split=split)).tolist() == [SPLITS.index(split)] * 3


# -- times -----------------------------------------------------------------------------------------------------------


DAYS = ["2024-03-01", "2023-12-31", "2024-01-05"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([3, 1, 2]),
        pa.array([3.0, 1.0, 2.0]),
        pa.array(["3", "1", "2"]),
        pa.array([3, 1, 2], pa.timestamp("s")),
        pa.array([3, 1, 2], pa.timestamp("us", tz="UTC")),
        pa.array([3, 1, 2], pa.date32()),
        pa.array(DAYS),
        pa.array(["2024-03-01T10:00:00+02:00", "2024-03-01T07:59:58Z", "2024-03-01T08:59:59+01:00"]),
        pa.array(pd.to_datetime(DAYS).astype("datetime64[ns]")),
    ],
    ids=lambda column: f"{column.type} {column[0]}",
)
def test_times_of_any_type_keep_their_order(column):
    times = timestamps(pa.table({"time": column}), BY_TIME)
    assert times.dtype == np.float64
    assert np.argsort(times).tolist() == [1, 2, 0]


@pytest.mark.parametrize("bad", ["yesterday", None, ""])
def test_times_that_are_none_are_shown(bad):
    with pytest.raises(DataError, match=r"column 'time': holds .*, which is no time"):
        timestamps(pa.table({"time": ["2024-01-01", bad]}), BY_TIME)


def test_times_in_text_have_one_unit_in_all_fragments():
    coarse = timestamps(pa.table({"time": ["2024-01-01T00:00:00"]}), BY_TIME)
    fine = timestamps(pa.table({"time": ["2023-01-01T00:00:00.123456789"]}), BY_TIME)
    assert fine[0] < coarse[0]


def test_times_in_integer_nanoseconds_are_read():
    times = timestamps(pa.table({"time": [1_700_000_001_000_000_001, 1_700_000_000_000_000_001]}), BY_TIME)
    assert times[1] < times[0]


# -- labels ----------------------------------------------------------------------------------------------------------


def test_labels_follow_the_rule_and_keep_what_is_missing():
    data = data_of(ANY, tasks=[{"name": "like", "column": "r", "positive": ">= 4"}, {"name": "seen", "column": "s"}])
    raw = pa.table({"r": pa.array([5, 4, 3, None]), "s": [True, False, None, True]})
    labels = read_labels(raw, data)
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, [[1, 1], [1, 0], [0, np.nan], [np.nan, 1]])


@pytest.mark.parametrize("seen", [2, -1, 0.5])
def test_label_that_is_neither_0_nor_1_needs_a_rule(seen):
    with pytest.raises(DataError, match=rf"task 'click': column 'label' holds {seen:g}, .*positive: '>= 4'"):
        read_labels(pa.table({"label": [0, 1, seen]}), data_of(ANY))


def test_label_of_words_is_refused():
    with pytest.raises(DataError, match="column 'label': string cannot be read as numbers"):
        read_labels(pa.table({"label": ["yes", "no"]}), data_of(ANY))


@pytest.mark.parametrize(("positives", "label"), [(0, 0), (10, 1)])
@pytest.mark.parametrize("split", SPLITS)
def test_label_of_one_class_is_refused(split, positives, label):
    counts = {s: [5] for s in SPLITS} | {split: [positives]}
    with pytest.raises(DataError, match=f"task 'click': all 10 labels of split {split} are {label}"):
        check_splits(dict.fromkeys(SPLITS, 10), counts, data_of(ANY))


def test_label_of_one_class_is_refused_for_each_task():
    data = data_of(ANY, tasks=[{"name": "a", "column": "x"}, {"name": "b", "column": "y"}])
    check_splits(dict.fromkeys(SPLITS, 10), {s: [5, 1] for s in SPLITS}, data)
    with pytest.raises(DataError, match="task 'b'"):
        check_splits(dict.fromkeys(SPLITS, 10), {s: [5, 10] for s in SPLITS}, data)


@pytest.mark.parametrize("split", SPLITS)
def test_empty_split_is_refused(split):
    with pytest.raises(DataError, match=f"split {split}: no rows: check data.split"):
        check_splits(dict.fromkeys(SPLITS, 10) | {split: 0}, {s: [5] for s in SPLITS}, data_of(ANY))


# -- items and groups ------------------------------------------------------------------------------------------------


def test_items_are_kept_as_last_seen():
    data = data_of(
        ANY | {"side": "item"}, timestamp="time", split={"by": "timestamp"}, ids={"item": "it"}, title="name"
    )
    raw = pa.table(
        {
            "it": ["a", "b", "a", None, "b"],
            "name": ["old", "new", "now", "x", "early"],
            "any": [1, 2, 3, 4, 5],
            "time": [1, 9, 2, 3, 4],
            "label": [0] * 5,
        }
    )
    items = prepare._seen_items(raw, data, whole(raw)).drop_columns(["_key", "_when"]).to_pylist()
    assert sorted(items, key=lambda r: r["it"]) == [
        {"it": "a", "name": "now", "any": 3},
        {"it": "b", "name": "new", "any": 2},
    ]


def test_last_seen_of_fragments_equals_last_seen_of_the_whole():
    rng = np.random.default_rng(0)
    items = pa.table({"x": np.arange(60), "_key": rng.integers(0, 9, 60).astype(np.uint64), "_when": np.arange(60.0)})
    parts = [last_seen(items.slice(a, 20)) for a in (40, 0, 20)]
    expected = last_seen(items)
    assert last_seen(pa.concat_tables(parts)).equals(expected)
    keys = items["_key"].to_numpy()
    assert expected["x"].to_pylist() == [int(np.flatnonzero(keys == k)[-1]) for k in np.unique(keys)]
    assert len(last_seen(items.slice(0, 0))) == 0


def test_items_without_an_item_id_are_none():
    raw = random_log(5)
    assert prepare._seen_items(raw, make_run().data, whole(raw)) is None


def test_groups_tell_users_apart():
    data = make_run(ids={"user": "u"}).data
    groups = prepare._groups(pa.table({"u": [7, 8, 7]}), data)
    assert groups[0] == groups[2] != groups[1]
    by_group = prepare._groups(pa.table({"u": [7, 8], "g": [1, 1]}), make_run(ids={"user": "u", "group": "g"}).data)
    assert by_group[0] == by_group[1]
    assert prepare._groups(pa.table({"u": [7]}), make_run().data) is None


def test_rows_without_a_user_join_no_users_group():
    groups = prepare._groups(pa.table({"u": [None, *range(70)]}), make_run(ids={"user": "u"}).data)
    assert groups[0] not in groups[1:]


# -- a fragment, and the whole ---------------------------------------------------------------------------------------


def test_fragment_is_written_split_by_split(tmp_path):
    log = random_log(90, split=["train"] * 60 + ["val"] * 20 + ["test"] * 10)
    labels = log["label"].to_pylist()
    labels[3] = labels[65] = None
    log = log.set_column(log.column_names.index("label"), "label", pa.array(labels, pa.int8()))
    pq.write_table(log, tmp_path / "log.parquet")
    data = make_run(split={"column": "split"}).data
    transform = fitted(random_log(12, seed=5), data)  # fitted elsewhere: so some ids are unknown
    for split in SPLITS:
        (tmp_path / split).mkdir()
    fragment = Fragment(7, str(tmp_path / "log.parquet"), (0,), 0, 90)
    written = prepare._write_rows(fragment, Splitter(data), transform, tmp_path)

    assert written.dropped == 2
    assert {s: f[0]["row_groups"] for s, f in written.files.items()} == {"train": [59], "val": [19], "test": [10]}
    kept = np.delete(np.arange(60), 3)
    table = pq.read_table(tmp_path / "train" / "part-00007.parquet")
    encoded = transform.encode(log.take(pa.array(kept)))
    assert table[f"{SPARSE}item"].to_pylist() == encoded.sparse["item"].values.tolist()
    assert table[f"{SPARSE}history"].combine_chunks().flatten().to_pylist() == encoded.sparse["history"].values.tolist()
    assert [x[0] for x in table[LABELS].to_pylist()] == [labels[i] for i in kept]
    assert written.positives["train"].tolist() == [sum(labels[i] for i in kept)]
    assert written.unknown["train"]["item"] == int((encoded.sparse["item"].values == OOV_ROW).sum()) > 0
    ((rows, counts),) = written.lookups["item"]
    both = np.concatenate([encoded.sparse["item"].values, encoded.sparse["history"].values])
    np.testing.assert_array_equal(rows, np.unique(both))
    np.testing.assert_array_equal(counts, np.unique(both, return_counts=True)[1])
    sample = log.drop_columns(["time"]).take(pa.array([i for i in range(60, 80) if i != 65]))
    assert written.sample.to_pylist() == sample.to_pylist()


def test_what_a_fragment_gives_back_is_small(tmp_path):
    log = random_log(6000, split=["train"] * 1000 + ["val"] * 5000)
    pq.write_table(log, tmp_path / "log.parquet")
    data = make_run(split={"column": "split"}).data
    for split in SPLITS:
        (tmp_path / split).mkdir()
    fragment = Fragment(0, str(tmp_path / "log.parquet"), (0,), 0, 6000)
    written = prepare._write_rows(fragment, Splitter(data), fitted(random_log(12, seed=5), data), tmp_path)
    assert len(written.sample) == prepare.SAMPLE_ROWS
    assert len(pickle.dumps(written)) < 0.2 * log.nbytes, "the sample does not bring the rows it was cut from"


def test_fragment_without_rows_of_a_split_writes_no_file_for_it(tmp_path):
    log = random_log(20, split=["val"] * 20)
    pq.write_table(log, tmp_path / "log.parquet")
    (tmp_path / "val").mkdir()
    data = make_run(split={"column": "split"}).data
    fragment = Fragment(0, str(tmp_path / "log.parquet"), (0,), 0, 20)
    written = prepare._write_rows(fragment, Splitter(data), fitted(log, data), tmp_path)
    assert [len(written.files[s]) for s in SPLITS] == [0, 1, 0]
    assert written.lookups == {}


def test_observed_rows_are_labelled_training_rows(tmp_path):
    log = pa.table({"any": ["a", "b", "c", "d"], "label": pa.array([1, None, 0, 1]), "s": ["train"] * 3 + ["val"]})
    pq.write_table(log, tmp_path / "log.parquet")
    data = data_of(ANY, split={"column": "s"})
    stats = prepare._observe_rows(Fragment(0, str(tmp_path / "log.parquet"), (0,), 0, 4), Splitter(data))
    assert stats.rows == 2
    assert len(stats.ids["any"][0][0]) == 2


@pytest.mark.parametrize("files", [1, 3])
def test_prepared_data_do_not_depend_on_how_the_log_is_cut(tmp_path, files):
    log = random_log(120)
    (tmp_path / "log").mkdir()
    for part, rows in enumerate(np.array_split(np.arange(120), files)):
        pq.write_table(log.take(pa.array(rows)), tmp_path / "log" / f"{part}.parquet", row_group_size=17)
    run = make_run(input=str(tmp_path / "log" / "*.parquet"), ids={"user": "user", "item": "item"})
    dataset = prepare_here(tmp_path / "out", run, cuts=(96.0, 108.0), row_group_rows=20)

    assert [dataset.rows(s) for s in SPLITS] == [96, 12, 12]
    transform = fitted(log.slice(0, 96), run.data)
    assert dataset.transform.tables == transform.tables
    assert dataset.manifest["fingerprint"] == dataset.transform.fingerprint()
    if files == 1:  # over several, means are sums in another order: equal but for their last bits
        assert dataset.transform.fingerprint() == transform.fingerprint()
    for split, (first, rows) in zip(SPLITS, [(0, 96), (96, 12), (108, 12)], strict=True):
        encoded, got = transform.encode(log.slice(first, rows)), read_split(dataset, split)
        np.testing.assert_allclose(got.encoded.dense, encoded.dense, rtol=1e-6, atol=1e-7)
        for name, ragged in encoded.sparse.items():
            np.testing.assert_array_equal(got.encoded.sparse[name].values, ragged.values)
        assert dataset.positives[split] == [int(got.labels.sum())]
    item = read_split(dataset, "train").encoded.sparse
    counted = np.bincount(
        np.concatenate([item["item"].values, item["history"].values]),
        minlength=dataset.transform.tables["item"].num_embeddings,
    )
    np.testing.assert_array_equal(dataset.counts("item"), counted)
    assert dataset.sample().drop_columns(["label"]).to_pylist() == (
        log.slice(96, 12).select(dataset.sample().drop_columns(["label"]).column_names).to_pylist()
    )
    assert sorted(dataset.items()["item"].to_pylist()) == sorted(set(log["item"].drop_null().to_pylist()))
