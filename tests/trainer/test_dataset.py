"""trainer/data/dataset.py: opening what prepare wrote, and refusing what is not that."""

from __future__ import annotations

import json

import numpy as np
import pytest
from trainer_builders import make_dataset

from trainer.data.dataset import open_dataset
from trainer.errors import DataError


def test_dataset_opens_with_its_rows_and_files(tmp_path):
    dataset = make_dataset(tmp_path, 30, files=2, row_group_rows=7)
    again = open_dataset(dataset.folder)
    assert [again.rows(s) for s in ("train", "val", "test")] == [30, 12, 12]
    assert [f.row_groups for f in again.files["train"]] == [(7, 7, 7, 6), (3,)]
    assert again.counts("user").sum() == 30
    assert len(again.counts("user")) == again.transform.tables["user"].num_embeddings
    assert again.items() is None
    assert np.issubdtype(again.counts("user").dtype, np.int64)


@pytest.mark.parametrize("content", [None, "{}", "[1]", "{", '{"format_version": 1, "files": {}}'])
def test_folder_that_is_no_dataset_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match="not a prepared data set: give --data the folder that 'data prepare' wrote"):
        open_dataset(tmp_path)


def test_folder_with_a_binary_manifest_is_refused(tmp_path):
    (tmp_path / "dataset.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(DataError, match="not a prepared data set"):
        open_dataset(tmp_path)


def test_dataset_of_another_format_is_refused(tmp_path):
    dataset = make_dataset(tmp_path, 20)
    path = dataset.folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(DataError, match="format 99, this version reads 1: prepare it again"):
        open_dataset(dataset.folder)


def test_dataset_without_one_of_its_files_is_refused(tmp_path):
    dataset = make_dataset(tmp_path, 20)
    gone = dataset.folder / "val" / "part-00001.parquet"
    gone.unlink()
    with pytest.raises(DataError, match=f"{gone}: missing from the prepared data set"):
        open_dataset(dataset.folder)
