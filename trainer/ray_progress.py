"""How far remote work has come: workers tell a small actor, the driver shows it.

Workers' own output stays in Ray's log files, so the libraries' hundreds of lines do not reach the user.

What is told: `latest`, the state that replaces the one before ({"samples", "total", "samples_per_s", "left_s"}, or {}
when there is none to show), and events, which are shown each, in order:

    {"kind": "evaluation", "epoch": float, "samples": int, "metrics": {...}, "samples_per_s": x, "lr": x, "best": bool}
    {"kind": "note", "text": str}
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
    """Holds the latest state of the work, and events that must not be lost."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []

    def tell(self, latest: dict[str, Any], event: dict[str, Any] | None = None) -> None:
        """Replace the latest state; add an event."""
        self.latest = latest
        if event is not None:
            self.events.append(event)

    def read(self, seen: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The latest state, and the events after the first `seen`."""
        return self.latest, self.events[seen:]


@contextlib.contextmanager
def watched(show: Callable[[dict[str, Any], list[Any]], None]) -> Iterator[Any]:
    """A board for remote work to tell; `show` is called here with what it told until the block ends."""
    board = Board.remote()  # type: ignore[attr-defined]
    done = threading.Event()
    seen = 0

    def poll() -> None:
        nonlocal seen
        with contextlib.suppress(Exception):  # a lost board costs progress, never the work itself
            latest, events = ray.get(board.read.remote(seen), timeout=5)
            seen += len(events)
            show(latest, events)

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

    def tell(self, latest: dict[str, Any], event: dict[str, Any] | str | None = None) -> None:
        """Send the state if it is time, or at once with an event; a text is a note."""
        now = time.monotonic()
        if event is not None or now - self._last >= self.interval_s:
            self._last = now
            self.board.tell.remote(latest, {"kind": "note", "text": event} if isinstance(event, str) else event)
