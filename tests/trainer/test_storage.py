"""trainer/storage.py and tensor_files.py: a storage reads as a folder does, in few requests, and says what is wrong."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch
from trainer_builders import make_dataset, make_run

from trainer import tensor_files
from trainer.checkpoint import MANIFEST, Position, _commit, open_checkpoint, save_checkpoint, write_tensors
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.reader import Reader
from trainer.errors import CheckpointError, DataError, StorageError
from trainer.storage import RemotePath, chunks_of_file, location, open_parquet, remote_sha256, storage_step
from trainer.tensor_files import MappedTensors, RangedTensors, parse_header, row_ranges

TENSORS = {
    "wide": torch.randn(700, 12),
    "half": torch.randn(50, 3).half(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def remote(folder: Path) -> RemotePath:
    """A folder as a filesystem that is none of this machine's to the code."""
    folder.mkdir(parents=True, exist_ok=True)
    return RemotePath("test://bucket", "", pafs.SubTreeFileSystem(str(folder.parent), pafs.LocalFileSystem())) / (
        folder.name
    )


HEADER = {
    "run": make_run().model_dump(mode="json"),
    "fingerprint": "abc",
    "position": vars(Position()),
    "metrics": {"ne": 0.9},
    "plan": {},
    "world_size": 1,
    "precision": {},
    "table_dims": {},
}


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_checkpoint(folder, tensors, HEADER, 0, 1)
    return folder


# -- places ----------------------------------------------------------------------------------------------------------


def test_plain_paths_and_file_uris_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert location("run/one") == tmp_path / "run" / "one"
    assert location(Path("a")) == tmp_path / "a"
    assert location(f"file://{tmp_path}/with%20space") == tmp_path / "with space"


def test_a_uri_is_joined_before_its_query_and_travels_as_itself() -> None:
    place = location("mock:///bucket/run/?region=x&scheme=http")
    assert isinstance(place, RemotePath)
    inner = place / "step-1" / "a b.json"
    assert str(inner) == "mock:///bucket/run/step-1/a%20b.json?region=x&scheme=http"
    assert (inner.name, inner.path) == ("a b.json", "bucket/run/step-1/a b.json")
    assert pickle.loads(pickle.dumps(inner)) == inner
    assert location(inner) is inner
    assert len({inner, location(str(inner))}) == 1


@pytest.mark.parametrize(
    ("uri", "words"),
    [("s3://key:secret@bucket/run", "environment"), ("nowhere://a/b", "cannot be resolved")],
)
def test_a_uri_that_cannot_be_used_is_refused_in_one_line(uri: str, words: str) -> None:
    with pytest.raises(StorageError, match=words) as refused:
        location(uri)
    assert "secret@" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("AWS Error ACCESS_DENIED during GetObject\nmore"), "AWS_ACCESS_KEY_ID"),
        (OSError("AWS Error NO_SUCH_BUCKET during PutObject"), "make the bucket"),
        (OSError("curlCode: 7, Could not connect to server"), "network"),
        (FileNotFoundError("gone"), "not there"),
    ],
)
def test_what_a_storage_raises_names_place_step_and_next_step(error: OSError, words: str) -> None:
    with pytest.raises(StorageError, match=words) as told, storage_step("s3://b/x", "cannot be written"):
        raise error
    assert str(told.value).startswith("s3://b/x: cannot be written: ")
    assert "more" not in str(told.value)


# -- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_chosen_rows_come_in_ranges_of_bounded_gap_and_span(seed: int) -> None:
    rng = np.random.default_rng(seed)
    row_bytes = int(rng.choice([4, 256, 5000]))
    rows = np.unique(rng.integers(0, 10 ** int(rng.integers(2, 7)), 400))
    ranges = row_ranges(rows, row_bytes)
    assert np.concatenate([rows[r] for r in ranges]).tolist() == rows.tolist()
    for part in ranges:
        assert (np.diff(rows[part]) - 1).max(initial=0) * row_bytes <= tensor_files.GAP_BYTES
        assert (rows[part][-1] - rows[part][0]) * row_bytes < tensor_files.PIECE_BYTES + row_bytes
    between = [rows[b.start] - rows[a.stop - 1] - 1 for a, b in zip(ranges, ranges[1:], strict=False)]
    assert len(ranges) <= 1 + sum(rows[-1:] * row_bytes // tensor_files.PIECE_BYTES) + sum(
        gap * row_bytes > tensor_files.GAP_BYTES for gap in between
    )
    assert row_ranges(rows[:0], row_bytes) == []


def test_tensors_of_a_storage_are_those_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "c", TENSORS)
    here = MappedTensors(folder / "dense.safetensors")
    there = RangedTensors(remote(folder) / "dense.safetensors")
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 480)
    monkeypatch.setattr(tensor_files, "GAP_BYTES", 96)
    for name, tensor in TENSORS.items():
        assert torch.equal(there.whole(name), tensor)
        assert there.whole(name).dtype == tensor.dtype
    rows = np.unique(np.random.default_rng(0).integers(0, 700, 90))
    assert torch.equal(there.take("wide", rows), here.take("wide", rows))
    assert torch.equal(there.rows("wide", 13, 611), here.rows("wide", 13, 611))
    assert there.take("wide", rows[:0]).shape == (0, 12)


def test_a_few_rows_cost_a_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(200_000, 16)
    there = RangedTensors(remote(saved(tmp_path / "c", {"t": table})) / "dense.safetensors")
    asked: list[int] = []
    read = there._at
    monkeypatch.setattr(there, "_at", lambda offset, length: asked.append(length) or read(offset, length))
    rows = np.array([3, 4, 10, 150_000, 199_999])
    assert torch.equal(there.take("t", rows), table[rows])
    assert sorted(asked) == [64, 64, 8 * 64], "neighbours in one request, what is far apart in its own"


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 1600]},
        {"dtype": "F32", "shape": [400], "data_offsets": [0, 4]},
        {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(entry: dict) -> None:
    header = json.dumps({"t": entry}).encode()
    with pytest.raises((ValueError, KeyError)):
        parse_header(header, 8 + len(header) + 100)


@pytest.mark.parametrize("kept", [0, 5, 40, 900])
def test_a_file_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    file = saved(tmp_path / "c", TENSORS) / "dense.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        RangedTensors(remote(tmp_path / "c") / "dense.safetensors")


# -- checkpoints and prepared data -----------------------------------------------------------------------------------


def test_a_checkpoint_of_a_storage_is_verified_and_described(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", {"tables/x/weight": TENSORS["wide"], "dense/head.b": TENSORS["half"]})
    here, there = open_checkpoint(folder), open_checkpoint(remote(folder))
    assert there.version == here.version
    assert {**there.describe(), "checkpoint": ""} == {**here.describe(), "checkpoint": ""}
    rows = np.array([0, 5, 699])
    assert torch.equal(there.table_rows("x", rows), TENSORS["wide"][rows])
    assert torch.equal(next(there.table_chunks("x"))[1], TENSORS["wide"])
    content = bytearray((folder / "dense.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "dense.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^test://bucket/c/dense.safetensors: altered"):
        open_checkpoint(remote(folder))


@pytest.mark.parametrize("where", ["disk", "storage"])
def test_rows_come_in_the_order_asked_for_whatever_parts_they_lie_in(tmp_path: Path, where: str) -> None:
    table, told = torch.randn(90, 6), []
    (tmp_path / "parts").mkdir()
    for rank, (row, column) in enumerate([(0, 0), (0, 4), (50, 0), (50, 4)]):
        values = table[row : 50 if row == 0 else 90, column : 4 if column == 0 else 6].contiguous()
        file, name = f"rank-{rank}.safetensors", f"tables/x/weight@{row},{column}"
        part = {"file": file, "name": name, "offsets": [row, column], "sizes": list(values.shape)}
        entry = {"tables/x/weight": {"shape": [90, 6], "parts": [part]}}
        told.append((entry, {file: write_tensors(tmp_path / "parts" / file, {name: values})}, None))
    _commit(tmp_path / "parts", tmp_path / "whole", HEADER, told)
    checkpoint = open_checkpoint(tmp_path / "whole" if where == "disk" else remote(tmp_path / "whole"))
    rows = np.random.default_rng(0).permutation(90)[:40]
    assert torch.equal(checkpoint.table_rows("x", rows), table[rows])
    assert torch.equal(checkpoint.read("tables/x/weight", 30, 71), table[30:71])
    assert checkpoint.table_rows("x", rows[:0]).shape == (0, 6)


def test_a_run_of_a_storage_opens_its_best_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path / "run" / "step-7", TENSORS)
    (tmp_path / "run" / "train.json").write_text('{"best": "step-7"}')
    assert str(open_checkpoint(remote(tmp_path / "run")).folder) == "test://bucket/run/step-7"


def test_why_a_storage_holds_no_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", TENSORS)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"^test://bucket/c: .*no checkpoint.json: an upload that did not finish"):
        open_checkpoint(remote(folder))
    with pytest.raises(CheckpointError, match="nothing is there"):
        open_checkpoint(remote(folder) / "gone")


def same_rows(one: Dataset, other: Dataset) -> None:
    for split in ("train", "val", "test"):
        pairs = zip(Reader(one, split, 16).slices(), Reader(other, split, 16).slices(), strict=True)
        for (a, _), (b, _) in pairs:
            assert np.array_equal(a.labels, b.labels)
            assert np.array_equal(a.encoded.dense, b.encoded.dense)
            for name in a.encoded.sparse:
                assert np.array_equal(a.encoded.sparse[name].values, b.encoded.sparse[name].values)


def test_prepared_data_of_a_storage_is_that_of_the_disk(tmp_path: Path) -> None:
    here = make_dataset(tmp_path / "data", 60)
    there = open_dataset(remote(here.folder))
    same_rows(here, there)
    assert there.transform.fingerprint() == here.transform.fingerprint()
    assert there.sample().equals(here.sample())
    for name in here.transform.tables:
        assert np.array_equal(there.counts(name), here.counts(name))


def test_prepared_data_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    here = make_dataset(tmp_path / "data", 60)
    lost = next((here.folder / "val").iterdir())
    lost.unlink()
    with pytest.raises(DataError, match=f"^test://bucket/prepared/val/{lost.name}: missing"):
        open_dataset(remote(here.folder))
    (here.folder / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"has no dataset.json: an upload that did not finish"):
        open_dataset(remote(here.folder))


def test_files_are_streamed_and_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.storage.PIECE_BYTES", 1000)
    content = np.random.default_rng(0).bytes(54_321)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(content)
    place = remote(tmp_path / "d") / "f"
    assert b"".join(chunks_of_file(place)) == content
    assert remote_sha256(place) == hashlib.sha256(content).hexdigest()
    with pytest.raises(StorageError, match=r"^test://bucket/d/none: cannot be opened: it is not there"):
        (remote(tmp_path / "d") / "none").open()
    with pytest.raises(StorageError, match="cannot be read"):
        open_parquet(place)
