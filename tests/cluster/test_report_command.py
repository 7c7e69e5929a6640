"""`slimrank report`: writes the page, prints the same as text in any width, and ends in one line on bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))  # its builders; the package `compress` stays itself

from search_builders import HOSTILE, write_old_search, write_search  # noqa: E402

from cluster.cli import main  # noqa: E402


def run(*words: object) -> Result:
    """The command's result; anything but a clean exit is a defect."""
    result = CliRunner().invoke(main, ["report", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("columns", [36, 60, 100, 200])
def test_the_text_fits_its_terminal(tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    folder = write_search(tmp_path / "s", 60, 12, ("click", "like"), errors=3)
    lines = run(folder, "--out", tmp_path / "r.html").stdout.splitlines()
    assert lines.pop() == f"page: {tmp_path / 'r.html'}"
    assert max(map(len, lines)) <= columns
    text = "\n".join(lines)
    for word in ("> trial", "torchrec INT8", "t_cat_11", "gate passed", "to reproduce", "what mattered", "3 failed"):
        assert word in text
    assert ("delta AUC" in text) == (columns >= 60)
    assert (tmp_path / "r.html").exists()


def test_json_names_the_page(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s", 40, errors=2)
    told = json.loads(run(folder, "--json").stdout)
    assert told["report"] == str(folder / "report.html")
    assert (told["trials"], told["failed_trials"], told["ended"], told["gate_passed"]) == (40, 2, True, True)
    assert Path(told["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("shape", [{"ended": False}, {"trials": 10, "errors": 9}, {"with_peers": False}, {"tables": 0}])
def test_whatever_a_search_left_is_reported(tmp_path: Path, shape: dict) -> None:
    result = run(write_search(tmp_path / "s", **shape))
    assert result.exit_code == 0
    assert ("did not end" in result.stdout) == ("ended" in shape)


def test_an_old_search_is_reported(tmp_path: Path) -> None:
    assert "the command is not known" in run(write_old_search(tmp_path / "s")).stdout


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s", 20, 3, (HOSTILE, "b"), names=(HOSTILE,), errors=1, error=HOSTILE)
    result = run(folder)
    assert "\x1b" not in result.stdout
    assert "<script>alert" in result.stdout


def test_bad_input_ends_in_one_line(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert (result.exit_code, result.stderr.startswith("error: ")) == (2, True)
    assert "not a search" in result.stderr
    folder = write_search(tmp_path / "s", 3)
    result = run(folder, "--out", tmp_path / "none" / "r.html")
    assert result.exit_code == 2
    assert "no such folder" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_markup_in_names_is_not_read_by_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.tables import render

    monkeypatch.setenv("COLUMNS", "60")
    assert "[/red] [bold]x :smile:" in "\n".join(render("t", ["name"], [["[/red] [bold]x :smile:"]]))
