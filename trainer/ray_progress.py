"""How far remote work has come: workers tell a small actor, the driver shows it.

Workers' own output stays in Ray's log files, so the libraries' hundreds of lines do not reach the user.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

POLL_S = 0.5


@ray.remote(num_cpus=0)
class Board:
    """Holds the latest message of the work, and lines that must not be lost."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}
        self.lines: list[str] = []

    def tell(self, latest: dict[str, Any], line: str | None = None) -> None:
        """Replace the latest state; add a line."""
        self.latest = latest
        if line is not None:
            self.lines.append(line)

    def read(self, seen: int) -> tuple[dict[str, Any], list[str]]:
        """The latest state, and the lines after the first `seen`."""
        return self.latest, self.lines[seen:]


@contextlib.contextmanager
def watched(show: Callable[[dict[str, Any], list[str]], None]) -> Iterator[Any]:
    """A board for remote work to tell; `show` is called here with what it told until the block ends."""
    board = Board.remote()  # type: ignore[attr-defined]
    done = threading.Event()
    seen = 0

    def poll() -> None:
        nonlocal seen
        with contextlib.suppress(Exception):  # a lost board costs progress lines, never the work itself
            latest, lines = ray.get(board.read.remote(seen), timeout=5)
            seen += len(lines)
            show(latest, lines)

    def run() -> None:
        while not done.wait(POLL_S):
            poll()

    thread = threading.Thread(target=run, daemon=True, name="slimrank-progress")
    thread.start()
    try:
        yield board
    finally:
        done.set()
        thread.join(timeout=6)
        poll()
        ray.kill(board)


class Teller:
    """A worker's side of a board: tells at most every `interval_s`, never waits."""

    def __init__(self, board: Any, interval_s: float = 0.5) -> None:
        self.board = board
        self.interval_s = interval_s
        self._last = 0.0

    def tell(self, latest: dict[str, Any], line: str | None = None) -> None:
        """Send the state if it is time, or at once with a line."""
        now = time.monotonic()
        if line is not None or now - self._last >= self.interval_s:
            self._last = now
            self.board.tell.remote(latest, line)
