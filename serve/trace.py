"""What one request goes through, from its last byte to its answer: filled in on the way, read when it is over.

The middleware (serve/access.py) makes a Trace for each request and everything behind finds it by `current()`; so no
function hands it on. Times are seconds of time.monotonic(), 0 where the request never came so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Trace:
    """One request. The scoring thread writes begun, ended and version; the event loop all else."""

    read: float = 0.0  # its last byte had come
    parsed: float = 0.0
    begun: float = 0.0  # scoring, after its wait in the queue
    ended: float = 0.0
    answered: float = 0.0  # the answer's head was sent
    candidates: int = 0
    status: int = 0
    version: str | None = None
    request_id: str | None = None
    key: str | None = None  # the name of its API key
    limited: bool = False  # refused at a limit of its key
    charge: Callable[[int], None] | None = None  # takes candidates from what its key may ask

    def admit(self, candidates: int) -> None:
        """It was parsed, and asks for so many candidates. Raises: RequestError 429 at its key's limit."""
        self.parsed, self.candidates = time.monotonic(), candidates
        if self.charge is not None:
            self.charge(candidates)


_CURRENT: ContextVar[Trace | None] = ContextVar("slimrank_trace", default=None)


def current() -> Trace:
    """The request that is being answered; one that nobody reads where there is none (offline, tests)."""
    return _CURRENT.get() or Trace()


def follow(trace: Trace) -> None:
    """Let `current()` find a trace in this task."""
    _CURRENT.set(trace)
