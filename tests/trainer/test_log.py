"""trainer/data/log.py: files on disk become fragments, Parquet and CSV alike."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from trainer_builders import data_of, fitted, make_run

from trainer.data import log
from trainer.data.log import csv_to_parquet, find_files, fragments_of
from trainer.errors import DataError

ANY = {"name": "any", "kind": "categorical"}


def write(folder, name: str, rows: int, group: int = 1 << 20, **columns):
    table = pa.table({"any": np.arange(rows), "label": np.arange(rows) % 2, **columns})
    pq.write_table(table, folder / name, row_group_size=group)


def config(folder, pattern: str = "*.parquet", **data):
    return data_of(ANY, input=str(folder / pattern), **data)


# -- finding ---------------------------------------------------------------------------------------------------------


def test_files_are_found_in_name_order(tmp_path):
    for name in ("b.parquet", "a.parquet", "c.csv"):
        (tmp_path / name).write_bytes(b"")
    found = find_files(config(tmp_path, "*"))
    assert [(f.path, f.is_csv) for f in found] == [
        (str(tmp_path / n), n == "c.csv") for n in ("a.parquet", "b.parquet", "c.csv")
    ]


def test_files_of_a_folder_leave_out_hidden_ones(tmp_path):
    for name in ("b.parquet", ".hidden.parquet", "_SUCCESS"):
        (tmp_path / name).write_bytes(b"")
    assert [f.path for f in find_files(config(tmp_path, ""))] == [str(tmp_path / "b.parquet")]


def test_files_of_splits_carry_their_split(tmp_path):
    for name in ("one.pq", "two.tsv", "three.txt"):
        (tmp_path / name).write_bytes(b"")
    files = {"train": str(tmp_path / "one.pq"), "val": str(tmp_path / "two.*"), "test": str(tmp_path / "three.txt")}
    found = find_files(data_of(ANY, input=None, split={"files": files}))
    assert [(f.split, f.is_csv) for f in found] == [("train", False), ("val", True), ("test", True)]


def test_no_match_names_the_pattern(tmp_path):
    with pytest.raises(DataError, match=r"none\*\.parquet: no file matches: correct data\.input"):
        find_files(config(tmp_path, "none*.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file matches"):
        find_files(config(tmp_path, "empty"))


def test_unknown_suffix_asks_for_the_format(tmp_path):
    (tmp_path / "log.dat").write_bytes(b"")
    with pytest.raises(DataError, match=r"log\.dat: cannot tell its format .* set data\.format"):
        find_files(config(tmp_path, "log.dat"))
    assert find_files(config(tmp_path, "log.dat", format="csv"))[0].is_csv
    assert not find_files(config(tmp_path, "log.dat", format="parquet"))[0].is_csv


# -- fragments -------------------------------------------------------------------------------------------------------


def test_fragments_number_rows_across_row_groups_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "FRAGMENT_ROWS", 10)
    write(tmp_path, "a.parquet", 23, group=4)  # groups of 4 4 4 4 4 3
    write(tmp_path, "b.parquet", 5)
    write(tmp_path, "c.parquet", 30)
    data = config(tmp_path)
    fragments = fragments_of(find_files(data), data)
    assert [(f.index, f.row_groups, f.start, f.rows) for f in fragments] == [
        (0, (0, 1, 2), 0, 12),
        (1, (3, 4, 5), 12, 11),
        (2, (0,), 23, 5),
        (3, (0,), 28, 30),
    ]
    assert fragments[1].read(["any"])["any"].to_pylist() == list(range(12, 23))


def test_fragments_leave_out_files_without_rows(tmp_path):
    write(tmp_path, "a.parquet", 0)
    write(tmp_path, "b.parquet", 3)
    data = config(tmp_path)
    assert [(f.path, f.start, f.rows) for f in fragments_of(find_files(data), data)] == [
        (str(tmp_path / "b.parquet"), 0, 3)
    ]


def test_log_without_rows_is_refused(tmp_path):
    write(tmp_path, "a.parquet", 0)
    data = config(tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet: the log has no rows"):
        fragments_of(find_files(data), data)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"features": [ANY, {"name": "f", "kind": "categorical", "column": "gone"}]}, r"column 'gone' \(feature 'f'\)"),
        ({"tasks": [{"name": "t", "column": "gone"}]}, r"column 'gone' \(task 't'\)"),
        ({"timestamp": "gone"}, r"column 'gone' \(data section\)"),
    ],
)
def test_missing_column_is_named_with_who_wants_it(tmp_path, extra, says):
    write(tmp_path, "a.parquet", 3)
    data = make_run(**{"features": [ANY], "input": str(tmp_path / "a.parquet"), **extra}).data
    with pytest.raises(DataError, match=says + r" is not in .*a\.parquet, which has: any, label;"):
        fragments_of(find_files(data), data)


def test_missing_column_of_a_later_file_is_named(tmp_path):
    write(tmp_path, "a.parquet", 3, x=["1"] * 3)
    write(tmp_path, "b.parquet", 3)
    data = data_of(ANY, {"name": "x", "kind": "categorical"}, input=str(tmp_path / "*.parquet"))
    with pytest.raises(DataError, match=r"column 'x' \(feature 'x'\) is not in .*b\.parquet"):
        fragments_of(find_files(data), data)


def test_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    data = config(tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file") as error:
        fragments_of(find_files(data), data)
    assert len(str(error.value).splitlines()) == 1


def test_truncated_parquet_is_named(tmp_path):
    write(tmp_path, "a.parquet", 300)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    data = config(tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        fragments_of(find_files(data), data)


def test_parquet_with_a_damaged_page_is_named(tmp_path):
    write(tmp_path, "a.parquet", 3000)
    data = config(tmp_path)
    (fragment,) = fragments_of(find_files(data), data)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:2000] = b"\xff" * 1996
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read") as error:
        fragment.read(["any"])
    assert len(str(error.value).splitlines()) == 1


# -- csv -------------------------------------------------------------------------------------------------------------

FEATURES = (
    {"name": "id", "kind": "categorical", "min_count": 1},
    {"name": "word", "kind": "categorical", "min_count": 1},
    {"name": "tags", "kind": "multi", "separator": " ", "min_count": 1},
    {"name": "n", "kind": "numeric"},
)
TABLE = pa.table(
    {
        "id": pa.array([7, 8, None, 7, 12_345_678_901], pa.int64()),
        "word": ["a,b", "", None, 'say "x"', "é"],
        "tags": ["x y", None, "z", "", "y"],
        "n": pa.array([1.5, None, -3.0, 1e6, 0.1]),
        "label": [0, 1, 0, 1, 1],
    }
)


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_csv_and_parquet_encode_alike(tmp_path, delimiter):
    pq.write_table(TABLE, tmp_path / "log.parquet")
    pa_csv.write_csv(TABLE, tmp_path / "log.csv", pa_csv.WriteOptions(delimiter=delimiter))
    data = data_of(*FEATURES, delimiter=delimiter, input="unused")
    csv_to_parquet(str(tmp_path / "log.csv"), str(tmp_path / "from_csv.parquet"), data)
    encoded, transforms = [], []
    for name in ("log", "from_csv"):
        raw = pq.read_table(tmp_path / f"{name}.parquet", columns=data.columns)
        transforms.append(fitted(raw, data))
        encoded.append(transforms[-1].encode(raw))
    assert transforms[0].fingerprint() == transforms[1].fingerprint()
    np.testing.assert_array_equal(encoded[0].dense, encoded[1].dense)
    for name, ragged in encoded[0].sparse.items():
        np.testing.assert_array_equal(ragged.values, encoded[1].sparse[name].values)
        np.testing.assert_array_equal(ragged.lengths, encoded[1].sparse[name].lengths)


def test_csv_of_many_blocks_keeps_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "CSV_BLOCK_BYTES", 256)
    lines = ["any,label", *[f"id{i},{i % 2}" for i in range(500)]]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    csv_to_parquet(str(tmp_path / "log.csv"), str(tmp_path / "out.parquet"), config(tmp_path))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["any"].to_pylist() == [f"id{i}" for i in range(500)]
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups > 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"any,label\nx,0\ny,one\n", "cannot be read as CSV: .*column 'label'.*one"),
        (b"any,label\nx,0\ny\n", "cannot be read as CSV: .*Expected 2 columns"),
        (b"", "log.csv: cannot be read as CSV: the file is empty"),
        (b"any,label\n\xff\xfe,0\n", r"log\.csv: cannot be read as CSV: 'utf-8' codec can't decode byte 0xff"),
        (b"other,label\nx,0\n", r"column 'any' \(feature 'any'\) is not in .*log\.csv"),
        (b"any;label\nx;0\n", r"column 'any' \(feature 'any'\) is not in .*log\.csv"),
    ],
)
def test_csv_that_cannot_be_read_is_named(tmp_path, content, says):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        csv_to_parquet(str(tmp_path / "log.csv"), str(tmp_path / "out.parquet"), config(tmp_path))
    assert "log.csv" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_csv_column_that_no_one_wants_may_hold_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "CSV_BLOCK_BYTES", 256)
    lines = ["any,label,note", *[f"id{i},{i % 2},{i if i < 100 else 'late'}" for i in range(200)]]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    csv_to_parquet(str(tmp_path / "log.csv"), str(tmp_path / "out.parquet"), config(tmp_path))
    assert pq.ParquetFile(tmp_path / "out.parquet").metadata.num_rows == 200
