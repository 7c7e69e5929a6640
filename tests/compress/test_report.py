"""The folder of a search as a Report: any shape that a search, a crash or an older version leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from search_builders import BUDGET, FP32_BYTES, HOSTILE, quality, write_old_search, write_search

from compress.search import report_words as words
from compress.search.report import Report, Trial, front_of, read_report
from trainer.errors import SlimrankError


def read(folder: Path, *args: int, **kwargs: object) -> Report:
    return read_report(write_search(folder, *args, **kwargs))


def test_a_whole_search_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = read(tmp_path, 200, 39, errors=4)
    told = json.loads((tmp_path / "tune.json").read_text())
    assert len(report.trials) == 200
    assert len(report.failed) == 4
    assert [p.number for p in report.front] == [p["number"] for p in told["front"]]
    assert report.chosen is report.front[told["chosen"]]
    assert (report.name, report.budget, report.fp32_bytes) == ("criteo", BUDGET, FP32_BYTES)
    assert report.status == "gate passed"
    sizes = [t.all_bytes for _, t in report.tables]
    assert len(sizes) == 39
    assert sizes == sorted(sizes, reverse=True)
    assert report.peers[0].all_bytes == told["peers"][0]["table_bytes"] + 20_000_000
    assert words.errors_by_words(report)[0][1:] == (4, 196)


def test_points_are_told_on_the_selection_sample_with_measured_time_where_they_have_them(tmp_path: Path) -> None:
    report = read(tmp_path)
    first, second = report.front[:2]
    assert first.quality.delta_ne == pytest.approx(1.1 * (first.delta_ne or 0))
    assert first.best_ms == first.ms
    assert second.best_ms == second.measured_ms != second.ms


@pytest.mark.parametrize(
    ("shape", "status"),
    [
        ({"passed": False}, "gate not passed"),
        ({"interrupted": True}, "the search was interrupted, gate passed"),
        ({"ended": False}, "the search did not end"),
    ],
)
def test_the_status_says_how_it_ended(tmp_path: Path, shape: dict, status: str) -> None:
    report = read(tmp_path, **shape)
    assert report.status == status
    assert report.summary["status"] == status
    assert (words.state_words(report) is None) == ("passed" in shape)


def test_a_search_that_did_not_end_has_the_front_of_its_trials_and_no_choice(tmp_path: Path) -> None:
    report = read(tmp_path, ended=False)
    assert report.chosen is None
    assert report.gate is None
    assert report.budget == BUDGET
    bounds = [p.delta_ne_upper for p in report.front]
    assert bounds == sorted(bounds, reverse=True)
    assert not any(p.stopped for p in report.front)
    assert words.headline(report) == f"{len(report.front)} plans on the front so far"


def test_the_front_of_trials_leaves_out_what_others_beat() -> None:
    figures = [(100, 0.01), (200, 0.02), (300, 0.001)]
    trials = [Trial(number=i, table_bytes=b, **quality(d)) for i, (b, d) in enumerate(figures)]
    assert [p.number for p in front_of(trials)] == [0, 2]


def test_an_old_search_is_reported_without_what_it_did_not_write(tmp_path: Path) -> None:
    report = read_report(write_old_search(tmp_path / "old"))
    assert (report.name, len(report.trials), report.search.command) == ("old", 4, None)
    assert [t.number for t in report.trials] == [0, 1, 2, 3]
    assert report.chosen is not None
    assert report.chosen.best_ms is None
    assert (report.tables, report.peers, report.importance) == ([], (), {})


def test_lines_that_a_crash_cut_are_counted(tmp_path: Path) -> None:
    write_search(tmp_path, 5)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write('{"number": 5, "par\n[]\n{"number": "x"}\n' + "[" * 100_000)
    report = read_report(tmp_path)
    assert (len(report.trials), report.unreadable) == (5, 4)
    assert "4 lines of trials.jsonl cannot be read" in words.course_words(report)


def test_figures_that_are_not_finite_are_not_there(tmp_path: Path) -> None:
    write_search(tmp_path, 3, ended=False)
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    trial = json.loads(lines[0]) | {"delta_ne": float("nan"), "ms": float("inf")}
    (tmp_path / "trials.jsonl").write_text("\n".join([json.dumps(trial), *lines[1:]]))
    report = read_report(tmp_path)
    assert (report.trials[0].delta_ne, report.trials[0].ms) == (None, None)
    assert report.failed == [report.trials[0]]


def test_only_one_trial_that_did_not_fail(tmp_path: Path) -> None:
    report = read(tmp_path, 10, errors=9)
    assert len(report.finished) == len(report.front) == 1
    assert report.importance == {}


def test_what_is_no_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SlimrankError, match="not a search: no search.json"):
        read_report(tmp_path)
    write_search(tmp_path, 3)
    (tmp_path / "tune.json").write_text('{"front": [')
    with pytest.raises(SlimrankError, match="tune.json: not JSON"):
        read_report(tmp_path)
    (tmp_path / "tune.json").write_text('{"front": 3}')
    with pytest.raises(SlimrankError, match="tune.json: front"):
        read_report(tmp_path)


def test_a_choice_beyond_the_front_is_none(tmp_path: Path) -> None:
    write_search(tmp_path, 5)
    told = json.loads((tmp_path / "tune.json").read_text())
    (tmp_path / "tune.json").write_text(json.dumps(told | {"chosen": 99}))
    assert read_report(tmp_path).chosen is None


def test_gate_words_say_what_would_help(tmp_path: Path) -> None:
    gate = read(tmp_path / "a", passed=False).gate
    assert gate is not None
    lines = words.gate_words(gate)
    assert lines[0].startswith("The gate did NOT pass on 1,000,000 rows")
    assert "about 16,000,000 rows would" in lines[-1]
    assert "larger --max-delta-ne" in words.gate_words(gate.model_copy(update={"rows_to_resolve": 0}))[-1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0%"), (1.0, "100.0%"), (0.124, "12.4%"), (0.021, "2.1%"), (4.3e-4, "0.043%")],
)
def test_shares_have_two_digits(value: float | None, text: str) -> None:
    assert words.share(value) == text


def test_names_are_shortened_and_hold_no_control_characters() -> None:
    assert words.shown("a\x1b[2J\nb") == "a?[2J b"
    assert len(words.shown(HOSTILE)) == 40
