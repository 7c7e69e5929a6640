"""trainer/results.py: results are whole in a storage or do not open, and a search can be resumed from there."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from trainer import results
from trainer.errors import SlimrankError, StorageError
from trainer.results import Mirror, check_new_place, moved, results_at, upload_steps, visible_files
from trainer.storage import RemotePath


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    """A storage whose files lie in tmp_path/store; scratch folders lie in tmp_path/scratch."""
    for name in ("store", "scratch"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv(results.SCRATCH, str(tmp_path / "scratch"))
    return RemotePath("test://b", "", pafs.SubTreeFileSystem(str(tmp_path / "store"), pafs.LocalFileSystem())) / "out"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def broken_after(monkeypatch: pytest.MonkeyPatch, files: int) -> list[str]:
    """Let a storage take so many files and then no more; returns what it took."""
    taken: list[str] = []
    real, turn = results.write_remote, threading.Lock()

    def write_remote(place: RemotePath, source: Any) -> None:
        with turn:
            if len(taken) == files:
                raise StorageError(f"{place}: cannot be written: the storage is full: make room")
            taken.append(place.name)
        real(place, source)

    monkeypatch.setattr(results, "write_remote", write_remote)
    return taken


def interrupted(place: RemotePath, error: BaseException, note: Any = print, **files: str) -> Path:
    """A block that writes and then fails; its scratch folder."""
    scratch: list[Path] = []

    def run() -> None:
        every_s = 60 if isinstance(error, KeyboardInterrupt) else None
        with results_at(place, every_s=every_s, note=note) as folder:
            scratch.append(folder)
            write(folder, **files)
            raise error

    with pytest.raises(type(error)):
        run()
    return scratch[0]


def test_manifests_go_up_after_what_they_speak_of() -> None:
    names = ["train.json", "step-1/checkpoint.json", "step-1/a", "metrics.jsonl", "deep/er/manifest.json", "x.json"]
    content, *manifests = upload_steps(names)
    assert content == ["metrics.jsonl", "step-1/a", "x.json"]
    assert manifests == [["deep/er/manifest.json"], ["step-1/checkpoint.json"], ["train.json"]]
    assert upload_steps([]) == []


def test_a_path_is_its_own_folder(tmp_path: Path) -> None:
    with results_at(tmp_path / "out") as folder:
        assert folder == tmp_path / "out"


def test_results_are_in_the_storage_when_the_block_ends(place: RemotePath, tmp_path: Path) -> None:
    with results_at(place) as folder:
        write(folder, manifest_json="{}", tables="abc", inner__a="1", **{".hidden": "no"})
        assert not place.exists()
    assert set(place.files()) == {"manifest.json", "tables", "inner/a"}
    assert (place / "inner" / "a").read_text() == "1"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_results_of_a_block_that_failed_stay_away(place: RemotePath, tmp_path: Path) -> None:
    interrupted(place, ZeroDivisionError(), tables="abc")
    assert place.files() == {}
    assert list((tmp_path / "scratch").iterdir()) == []


def test_an_upload_that_breaks_leaves_no_manifest_and_keeps_the_results(
    place: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = broken_after(monkeypatch, 2)
    with pytest.raises(StorageError, match="the results are whole in ") as broken, results_at(place) as folder:
        write(folder, manifest_json="{}", a="1", b="2", c="3")
    assert len(taken) == 2
    assert "manifest.json" not in place.files()
    assert str(folder) in str(broken.value)
    assert set(visible_files(folder)) == {"manifest.json", "a", "b", "c"}
    with pytest.raises(SlimrankError, match=r"^test://b/out: already there"):
        check_new_place(place)


def test_only_what_changed_goes_up_again_and_what_is_gone_goes(
    place: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    mirror = Mirror(folder, place)
    mirror.sync()
    assert not place.exists()
    write(folder, trials="1\n", old__checkpoint_json="{}", old__part="x", kept="k")
    mirror.sync()
    taken = broken_after(monkeypatch, 9)
    write(folder, trials="1\n2\n", new__checkpoint_json="{}")
    for path in (folder / "old" / "part", folder / "old" / "checkpoint.json"):
        path.unlink()
    mirror.sync()
    assert sorted(taken) == ["checkpoint.json", "trials"]
    assert set(place.files()) == {"trials", "kept", "new/checkpoint.json"}
    assert (place / "trials").read_text() == "1\n2\n"


def test_a_file_that_vanishes_ends_the_turn_before_its_manifest(
    place: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    write(folder, a="1", checkpoint_json="{}")
    mirror = Mirror(folder, place)
    seen = visible_files(folder)
    (folder / "a").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(results, "visible_files", lambda _: seen)
        mirror.sync()
    assert place.files() == {}


def test_a_search_resumes_from_the_storage(place: RemotePath) -> None:
    interrupted(place, KeyboardInterrupt(), trials="1\n", inner__x="y")
    with results_at(place, resume=True, every_s=60) as folder:
        assert (folder / "trials").read_text() == "1\n"
        assert (folder / "inner" / "x").read_text() == "y"
        write(folder, trials="1\n2\n", tune_json=json.dumps({"ok": 1}))
    assert set(place.files()) == {"trials", "inner/x", "tune.json"}
    with pytest.raises(SlimrankError, match="not empty"), results_at(place, every_s=60):
        pass


def test_results_go_up_while_the_block_runs(place: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = threading.Event()
    real = results.write_remote
    monkeypatch.setattr(results, "write_remote", lambda p, source: (real(p, source), arrived.set()))
    with results_at(place, every_s=0.01) as folder:
        write(folder, trials="1\n")
        assert arrived.wait(30)


def test_a_storage_that_fails_meanwhile_is_noted_and_results_are_kept(
    place: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_after(monkeypatch, 0)
    notes: list[str] = []
    folder = interrupted(place, KeyboardInterrupt(), notes.append, trials="1\n")
    assert str(folder) in notes[-1]
    assert (folder / "trials").read_text() == "1\n"


def test_names_that_lead_out_of_the_folder_are_not_fetched(
    place: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemotePath, "files", lambda self: {"../evil": 1})
    with pytest.raises(StorageError, match="leads out of its folder"):
        Mirror(tmp_path / "run", place).fetch()
    assert not (tmp_path / "evil").exists()


def test_paths_below_the_scratch_folder_become_uris(place: RemotePath) -> None:
    value = {"artifact": "/s/out/artifact", "all": ["/s/out", "/s/output", 3], "n": 1.5}
    found = moved(value, Path("/s/out"), place)
    assert found == {"artifact": "test://b/out/artifact", "all": ["test://b/out", "/s/output", 3], "n": 1.5}
