"""One thread that answers: requests wait in a queue, small ones that wait together are answered together.

Nothing waits for company, and a large request is answered by itself. One that would wait too long is refused when it
arrives; one whose deadline has passed while it waited is not worked on. What an answer is, the engine does not know.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from serve.errors import RequestError

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")

OVERHEAD = (
    32  # candidates that take as long as what a request costs beside its candidates (two cores, DLRM of 26 tables)
)
MEMORY = 0.9  # share of what was known of the speed that one more group leaves


@dataclass(frozen=True)
class Limits:
    """What a queue takes. max_wait_s: longer than this nobody waits; group: candidates that are answered together."""

    max_wait_s: float = 0.1
    group: int = 2048


@dataclass(eq=False)
class Waiting(Generic[Ask, Answer]):
    """A request in the queue."""

    ask: Ask
    units: int
    deadline: float
    arrived: float
    answer: asyncio.Future[Answer]


class Engine(Generic[Ask, Answer]):
    """A queue, and the thread that works it off. Asked from one event loop only.

    `handle` answers a list of requests with as many answers, an answer may be an exception, which its asker gets.
    `candidates` says how large a request is; those of `alone` candidates and more are handled by themselves.
    """

    def __init__(
        self,
        handle: Callable[[Sequence[Ask]], Sequence[Answer | Exception]],
        candidates: Callable[[Ask], int],
        alone: int,
        limits: Limits,
    ) -> None:
        self.handle, self.candidates, self.alone, self.limits = handle, candidates, alone, limits
        self.busy_s = 0.0  # time spent answering since the start
        self.answered = 0  # candidates answered since the start
        self.s_per_unit = 0.0
        self._arrived_units = 0  # written by the loop alone
        self._left_units = 0  # written by the thread alone
        self._queue: SimpleQueue[Waiting[Ask, Answer] | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    @property
    def wait_s(self) -> float:
        """Seconds that a request that arrives now would wait, by the speed of those before it."""
        return (self._arrived_units - self._left_units) * self.s_per_unit

    async def ask(self, ask: Ask, deadline: float = math.inf) -> Answer:
        """The answer. `deadline`: on the clock of time.monotonic().

        Raises: RequestError 429 when too much is waiting, 504 when the deadline passed; what `handle` answers with.
        """
        self.admit()
        self._loop = asyncio.get_running_loop()
        units = self.candidates(ask) + OVERHEAD
        waiting: Waiting[Ask, Answer] = Waiting(ask, units, deadline, time.monotonic(), self._loop.create_future())
        self._arrived_units += units
        self._queue.put(waiting)
        return await waiting.answer

    def admit(self) -> None:
        """Raises: RequestError 429 when what waits takes longer than may be waited."""
        wait_s = self.wait_s
        if wait_s > self.limits.max_wait_s:
            raise RequestError(
                "server", f"overloaded, {wait_s * 1000:.0f} ms of work wait: try again", 429, retry_after_s=wait_s
            )

    def stop(self) -> None:
        """Answer what waits, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        backlog: deque[Waiting[Ask, Answer] | None] = deque()
        while True:
            backlog.append(self._queue.get()) if not backlog else None
            while True:
                try:
                    backlog.append(self._queue.get_nowait())
                except Empty:
                    break
            group = self._take(backlog)
            if group:
                self._answer(group)
            elif not backlog or backlog[0] is None:
                return

    def _take(self, backlog: deque[Waiting[Ask, Answer] | None]) -> list[Waiting[Ask, Answer]]:
        """The next requests to answer together: the oldest, and while they are small those behind it."""
        group: list[Waiting[Ask, Answer]] = []
        total = 0
        while backlog and backlog[0] is not None:
            mine = self.candidates(backlog[0].ask)
            if group and (mine >= self.alone or total + mine > self.limits.group):
                break
            group.append(backlog.popleft())  # type: ignore[arg-type]
            total += mine
            if mine >= self.alone:
                break
        return group

    def _answer(self, group: list[Waiting[Ask, Answer]]) -> None:
        now = time.monotonic()
        late = [w for w in group if w.deadline <= now]
        rest = [w for w in group if w.deadline > now]
        answers: list[Answer | Exception] = []
        if rest:
            try:
                answers = list(self.handle([w.ask for w in rest]))
            except Exception as error:  # noqa: BLE001: whatever it is, its askers must hear of it, and the next be served
                answers = [error] * len(rest)
            taken = time.monotonic() - now
            self._learn(taken, sum(w.units for w in rest))
            self.answered += sum(self.candidates(w.ask) for w in rest)
        too_late = [RequestError("timeout_ms", "the deadline passed before the answer was begun", 504) for _ in late]
        self._left_units += sum(w.units for w in group)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(deliver, [*zip(rest, answers, strict=True), *zip(late, too_late, strict=True)])

    def _learn(self, taken_s: float, units: int) -> None:
        self.busy_s += taken_s
        each = taken_s / units
        self.s_per_unit = each if not self.s_per_unit else MEMORY * self.s_per_unit + (1 - MEMORY) * each


def deliver(answers: Sequence[tuple[Waiting, object]]) -> None:
    """Hand answers out, in the event loop; whoever left in the meantime gets none."""
    for waiting, answer in answers:
        if waiting.answer.done():
            continue
        if isinstance(answer, Exception):
            waiting.answer.set_exception(answer)
        else:
            waiting.answer.set_result(answer)
