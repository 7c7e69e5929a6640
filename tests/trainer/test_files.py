"""trainer/files.py: files and folders that are whole or absent."""

from __future__ import annotations

import hashlib
import json

import pytest

from trainer.errors import SlimrankError
from trainer.files import check_new, new_directory, sha256, write_json


def test_new_directory_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_directory(out) as staging:
        (staging / "a").write_text("1")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["a"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_new_directory_leaves_nothing_when_the_block_fails(tmp_path):
    def write_half() -> None:
        with new_directory(tmp_path / "out") as staging:
            (staging / "a").write_text("1")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_new_directory_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_new_directory_keeps_an_empty_one_when_the_block_fails(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match="half"), new_directory(tmp_path / "out"):
        raise RuntimeError("half")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_new_directory_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(SlimrankError, match="already there and not empty"), new_directory(tmp_path / "out"):
        pytest.fail("the block ran")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]


def test_check_new_refuses_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(SlimrankError, match="already there"):
        check_new(tmp_path / "out")


def test_write_json_replaces_and_leaves_no_staging_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2}
    assert len(list(tmp_path.iterdir())) == 1


def test_sha256_is_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()
