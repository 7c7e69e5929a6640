"""cluster/output.py: the training table fits its terminal, and progress lines replace each other."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.output import Progress, count, evaluation_cells, fitting, training_line
from trainer.ray_progress import Teller

ONE = {"auc": 0.78123, "ne": 0.91234, "log_loss": 0.5, "calibration": 1.0, "gauc": 0.7, "ndcg@10": 0.4, "f1": 0.3}
LATEST = {"samples": 1_234_567, "total": 10_000_000, "samples_per_s": 12_345.6, "left_s": 190.0}


def evaluation(metrics: dict[str, Any] = ONE, **changes: Any) -> dict[str, Any]:
    event = {"kind": "evaluation", "epoch": 1.25, "samples": 100_000, "metrics": metrics}
    return event | {"samples_per_s": 12345.6, "lr": 0.001, "best": True} | changes


def heads(event: dict[str, Any], width: int) -> list[str]:
    return [cell.head for cell in fitting(evaluation_cells(event), width) if cell.head]


class Terminal(io.StringIO):
    """A stderr of some width that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def stderr_of(monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]) -> io.StringIO:
    """A stderr of 60 columns in place of pytest's, which changes between a fixture and its test."""
    out = kind()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", "60")
    return out


# -- which columns ---------------------------------------------------------------------------------------------------


def test_narrow_terminals_drop_columns_by_need() -> None:
    assert heads(evaluation(), 40) == ["epoch", "samples", "val NE"]
    assert heads(evaluation(), 60) == ["epoch", "samples", "val NE", "AUC", "GAUC"]
    assert heads(evaluation(), 80) == ["epoch", "samples", "val NE", "AUC", "GAUC", "samples/s", "lr"]
    wide = ["epoch", "samples", "val NE", "AUC", "GAUC", "NDCG@10", "log loss", "calib", "samples/s", "lr"]
    assert heads(evaluation(), 120) == wide


def test_several_tasks_show_the_mean_ne_and_each_auc() -> None:
    event = evaluation({"click": ONE, "buy": ONE | {"ne": 0.5, "auc": None}})
    assert heads(event, 60) == ["epoch", "samples", "val NE", "AUC click", "AUC buy"]
    cells = {cell.head: cell.text for cell in evaluation_cells(event)}
    assert cells["val NE"] == f"{(0.91234 + 0.5) / 2:.5f}"
    assert cells["AUC buy"] == "-"
    assert {"NE click", "GAUC buy", "NDCG@10 click"} < set(cells)


def test_what_is_not_known_is_a_dash() -> None:
    event = evaluation(ONE | {"ne": None}, samples_per_s=None, lr=None, best=False)
    cells = {cell.head: cell.text for cell in evaluation_cells(event)}
    assert (cells["val NE"], cells["samples/s"], cells["lr"], cells[""]) == ("-", "-", "-", "")


@pytest.mark.parametrize("number", [0, 999_999_999, 1_000_000_000, 9_999_999_999_999])
def test_counts_fit_their_column(number: int) -> None:
    assert len(count(number)) <= 11


@pytest.mark.parametrize("width", [45, 60, 80, 120])
@pytest.mark.parametrize("samples", [1, 999_999_999_999])
def test_training_lines_fit(width: int, samples: int) -> None:
    latest = LATEST | {"samples": samples, "total": 10**12}
    assert len(training_line(latest, width)) < width


def test_training_line_drops_the_rate_before_the_time_left() -> None:
    assert training_line(LATEST, 80) == "  train: 1,234,567 of 10,000,000  12,346 samples/s  at most 3m10s left"
    assert training_line(LATEST, 60) == "  train: 1,234,567 of 10,000,000  at most 3m10s left"
    assert training_line(LATEST | {"left_s": None, "samples_per_s": None}, 80) == "  train: 1,234,567 of 10,000,000"


# -- what is written -------------------------------------------------------------------------------------------------


def test_a_pipe_gets_the_head_once_and_a_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stderr_of(monkeypatch, io.StringIO)
    progress = Progress()
    progress.training({}, [evaluation(), {"kind": "note", "text": "resumed"}])
    progress.training(LATEST, [evaluation(epoch=12.5, samples=1_000_000, best=False)])
    assert shown.getvalue().splitlines() == [
        "   epoch      samples   val NE      AUC     GAUC",
        "    1.25      100,000  0.91234  0.78123  0.70000  best",
        "  resumed",
        "   12.50    1,000,000  0.91234  0.78123  0.70000",
    ]


def test_the_head_comes_again_when_the_columns_change(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stderr_of(monkeypatch, io.StringIO)
    progress = Progress()
    progress.training({}, [evaluation()])
    monkeypatch.setenv("COLUMNS", "80")
    progress.training({}, [evaluation()])
    assert [line.split()[0] for line in shown.getvalue().splitlines()] == ["epoch", "1.25", "epoch", "1.25"]
    assert max(map(len, shown.getvalue().splitlines())) < 80


def test_a_terminal_keeps_rows_and_moves_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stderr_of(monkeypatch, Terminal)
    progress = Progress()
    progress.training(LATEST, [])
    progress.training(LATEST | {"samples": 2_000_000}, [])
    progress.training({}, [evaluation()])
    progress.show("x" * 200)
    screen: list[str] = []
    for line in shown.getvalue().split("\n"):
        at = ""
        for text in line.split("\r"):
            at = text + at[len(text) :]
        screen.append(at.rstrip())
    assert screen == [
        "   epoch      samples   val NE      AUC     GAUC",
        "    1.25      100,000  0.91234  0.78123  0.70000  best",
        "x" * 59,
    ]


# -- the worker's side -----------------------------------------------------------------------------------------------


def test_teller_sends_events_at_once_and_states_now_and_then() -> None:
    told: list[tuple] = []
    teller = Teller(SimpleNamespace(tell=SimpleNamespace(remote=lambda *what: told.append(what))), interval_s=3600)
    teller._last = float("-inf")
    teller.tell(LATEST)
    teller.tell(LATEST)
    teller.tell({}, evaluation())
    teller.tell({}, "resumed")
    assert told == [(LATEST, None), ({}, evaluation()), ({}, {"kind": "note", "text": "resumed"})]
