"""What the user sees: progress with time left on stderr, results on stdout.

On a terminal progress is one line that moves; in a file or a pipe it is a line now and then.
"""

from __future__ import annotations

import json
import sys
import time
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


def size(number: float) -> str:
    """Bytes as people read them, in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError("unreachable")


class Progress:
    """Shows how far long work has come."""

    def __init__(self) -> None:
        self.moving = sys.stderr.isatty()
        self.shown = 0
        self.last = time.monotonic()
        self.started: dict[str, float] = {}
        self.printed: set[str] = set()

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

    def training(self, latest: dict[str, Any], lines: list[str]) -> None:
        """What a training run told: its latest count, and lines on evaluations."""
        for line in lines:
            self.line(f"  {line}")
        if latest:
            rate = f"{latest['samples_per_s']:,.0f} samples/s"
            left = f"at most {duration(latest['left_s'])} left"
            self.show(f"  train: {latest['samples']:,} of {latest['total']:,}  {rate}  {left}")

    def show(self, text: str, final: bool = False) -> bool:
        """Replace the moving line, or print a plain one if the last is long ago; tells whether it was shown."""
        if self.moving:
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
