"""What the user sees: progress with time left on stderr, results on stdout.

On a terminal progress is one line that moves; in a file or a pipe it is a line now and then. Training adds a table
above it, a row an evaluation, with as many columns as the width allows.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLAIN_EVERY_S = 10.0


def duration(seconds: float) -> str:
    """A length of time as people read it: 45s, 3m10s, 2h05m."""
    whole = max(int(round(seconds)), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def terminal_width() -> int:
    """Columns of the terminal that stderr goes to; COLUMNS where it is set, 80 where there is no terminal."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return shutil.get_terminal_size((columns or 80, 24)).columns


# -- the training table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One figure of an evaluation. `need`: the columns of the lowest need go into a narrow terminal first."""

    need: int
    head: str
    text: str
    width: int

    @property
    def columns(self) -> int:
        """Room it takes, with the gap before it."""
        return 2 + max(self.width, len(self.head))


def evaluation_cells(event: Mapping[str, Any]) -> list[Cell]:
    """All figures of an evaluation event (trainer/ray_progress.py), from left to right."""
    metrics = event["metrics"]
    tasks = {"": metrics} if "ne" in metrics else {f" {task}": inner for task, inner in metrics.items()}
    losses = [inner["ne"] for inner in tasks.values()]
    mean_ne = None if None in losses else sum(losses) / len(losses)
    cells = [
        Cell(0, "epoch", f"{event['epoch']:.2f}", 6),
        Cell(0, "samples", count(event["samples"]), 11),
        Cell(0, "val NE", figure(mean_ne), 7),
    ]
    wanted = {"auc": ("AUC", 1), "gauc": ("GAUC", 3), "ne": ("NE", 7)}
    for inner in tasks.values():
        wanted |= {key: (key.replace("ndcg", "NDCG"), 8) for key in inner if "@" in key}
    wanted |= {"log_loss": ("log loss", 9), "calibration": ("calib", 9)}
    for key, (word, need) in wanted.items():
        for place, (name, inner) in enumerate(tasks.items()):
            if key in inner and (key != "ne" or len(tasks) > 1):
                cells.append(Cell(need + (place > 0), f"{word}{name}", figure(inner[key]), 7))
    cells.append(Cell(5, "samples/s", figure(event.get("samples_per_s"), "{:,.0f}"), 9))
    cells.append(Cell(6, "lr", figure(event.get("lr"), "{:.2g}"), 7))
    cells.append(Cell(0, "", "best" if event.get("best") else "", 4))
    return cells


def fitting(cells: Sequence[Cell], width: int) -> list[Cell]:
    """The cells that fit into a line of `width`, by need, in their order; those of need 0 always."""
    room, chosen = width - 1, set()  # a full last column wraps on some terminals
    for index in sorted(range(len(cells)), key=lambda i: cells[i].need):
        if cells[index].need == 0 or cells[index].columns <= room:
            chosen.add(index)
            room -= cells[index].columns
    return [cell for index, cell in enumerate(cells) if index in chosen]


def count(number: int) -> str:
    """A count in 11 columns: 12,345,678, and 1.235B from a thousand million on."""
    return f"{number:,}" if number < 1e9 else f"{number / 1e9:,.3f}B"


def figure(value: float | None, form: str = "{:.5f}") -> str:
    """A number as the table shows it; - where it is not known."""
    return "-" if value is None else form.format(value)


def training_line(latest: Mapping[str, Any], width: int) -> str:
    """How far training has come, in less than `width` columns: the rate goes first, then the total."""
    done, total = f"{latest['samples']:,}", f"{latest['total']:,}"
    rate, seconds = latest.get("samples_per_s"), latest.get("left_s")
    speed = [] if rate is None else [f"{rate:,.0f} samples/s"]
    left = [] if seconds is None else [f"at most {duration(seconds)} left"]
    whole = f"train: {done} of {total}"
    choices = [[whole, *speed, *left], [whole, *left], [f"train: {done}", *left], [f"train: {done}"]]
    lines = ["  " + "  ".join(parts) for parts in choices]
    return next((line for line in lines if len(line) < width), lines[-1])


# -- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """Shows how far long work has come."""

    def __init__(self) -> None:
        self.moving = sys.stderr.isatty()
        self.shown = 0
        self.last = time.monotonic()
        self.started: dict[str, float] = {}
        self.printed: set[str] = set()
        self.heads: list[str] = []

    def step(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of `what` are finished."""
        now = time.monotonic()
        begun = self.started.setdefault(what, now)
        known = done > 2 and now - begun > 2.0  # the first units pay for starting up
        left = f"  {duration((now - begun) / done * (total - done))} left" if known and done < total else ""
        text, whole = f"  {what}: {done:,} of {total:,}{left}", done >= total
        if not self.moving and whole and what in self.printed:
            self.line(text)  # a log that showed the start shows the end
        elif self.show(text, final=whole):
            self.printed.add(what)

    def training(self, latest: dict[str, Any], events: list[Any]) -> None:
        """What a training run told (trainer/ray_progress.py): its latest count, evaluations and notes."""
        for event in events:
            if event["kind"] == "evaluation":
                self.evaluation(event)
            else:
                self.line(f"  {event['text']}")
        if latest:
            self.show(training_line(latest, terminal_width()))

    def evaluation(self, event: Mapping[str, Any]) -> None:
        """A row of the training table; its head first, and again when the columns change."""
        cells = fitting(evaluation_cells(event), terminal_width())
        heads = [cell.head for cell in cells]
        if heads != self.heads:
            self.heads = heads
            self.line("".join(cell.head.rjust(cell.columns) for cell in cells).rstrip())
        self.line("".join(cell.text.rjust(cell.columns) for cell in cells).rstrip())

    def show(self, text: str, final: bool = False) -> bool:
        """Replace the moving line, or print a plain one if the last is long ago; tells whether it was shown."""
        if self.moving:
            text = text[: max(terminal_width() - 1, 1)]  # a line that wraps cannot be written over
            sys.stderr.write("\r" + text.ljust(self.shown) + ("\n" if final else ""))
            self.shown = 0 if final else len(text)
            sys.stderr.flush()
        elif time.monotonic() - self.last >= PLAIN_EVERY_S:
            self.line(text)
        else:
            return False
        return True

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.moving and self.shown:
            sys.stderr.write("\r" + " " * self.shown + "\r")
            self.shown = 0
        self.last = time.monotonic()
        print(text, file=sys.stderr, flush=True)


def emit(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """The result on stdout: lines for people, or one JSON object."""
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        for line in lines:
            print(line, flush=True)
