"""One thread that answers: requests wait in a queue, small ones that wait together are answered together.

Nothing waits for company, and a large request is answered by itself. One that would wait too long is refused when it
arrives; one whose deadline has passed while it waited, or whose asker has left, is not worked on. What an answer is,
the engine does not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from serve.errors import RequestError
from serve.trace import Trace, current

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")

OVERHEAD = 32  # candidates that take as long as a request costs beside its candidates (two cores, DLRM of 26 tables)
MEMORY = 0.9  # share of what was known of the speed that one more group leaves
FIRST_GUESS = (500 * 10e-6, 500)  # seconds of so many candidates, until some were answered (two cores, toy DLRM)


@dataclass(frozen=True)
class Limits:
    """What a queue takes. max_wait_s: longer than this nobody waits; group: candidates that are answered together."""

    max_wait_s: float = 0.1
    group: int = 2048


@dataclass(eq=False)
class Waiting(Generic[Ask, Answer]):
    """A request in the queue. candidates: its size; units: its size with what a request costs anyway."""

    ask: Ask
    candidates: int
    units: int
    deadline: float
    arrived: float
    answer: asyncio.Future[Answer]
    trace: Trace = field(default_factory=current)


class Engine(Generic[Ask, Answer]):
    """A queue, and the thread that works it off. Asked from one event loop at a time.

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
        self.handling: Sequence[Waiting[Ask, Answer]] = ()  # by `handle` at this moment; the thread's
        self.answered = 0  # candidates answered since the start
        self.shed = 0  # requests refused since the start, because too much waited
        self.loop_wait_s = 0.0  # how long the event loop took to get to the last answers: what it is behind by
        self._done_s = 0.0  # time spent answering, in groups that are finished
        self._begun: float | None = None  # when the group now being answered was begun
        self._known_s: float = FIRST_GUESS[0]
        self._known_units: float = FIRST_GUESS[1]
        self._arrived_units = 0  # written by the loop alone
        self._left_units = 0  # written by the thread alone
        self._stopped = False
        self._queue: SimpleQueue[Waiting[Ask, Answer] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """Seconds spent answering since the start."""
        begun = self._begun
        return self._done_s + (time.monotonic() - begun if begun is not None else 0.0)

    @property
    def s_per_unit(self) -> float:
        """Seconds a candidate took lately."""
        return self._known_s / self._known_units

    @property
    def wait_s(self) -> float:
        """Seconds that a request that arrives now would wait, by the speed of those before it.

        What the event loop is behind by counts too, but only while something is waiting: so an old measurement cannot
        keep everybody out.
        """
        units = self._arrived_units - self._left_units
        return units * self.s_per_unit + self.loop_wait_s if units else 0.0

    async def ask(self, ask: Ask, deadline: float = math.inf) -> Answer:
        """The answer. `deadline`: on the clock of time.monotonic().

        Raises: RequestError 429 when too much is waiting, 504 when the deadline passed, 503 when the engine has
            stopped; what `handle` answers with.
        """
        self.admit(deadline)
        candidates = self.candidates(ask)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting = Waiting(ask, candidates, candidates + OVERHEAD, deadline, time.monotonic(), answer)
        self._arrived_units += waiting.units
        self._queue.put(waiting)
        return await waiting.answer

    def admit(self, deadline: float = math.inf) -> None:
        """Raises: RequestError 429 when what waits takes longer than may be waited, 503 when the engine has stopped."""
        if self._stopped:
            raise RequestError("server", "is shutting down: try again", 503, retry_after_s=0.0)
        wait_s = self.wait_s
        if wait_s > self.limits.max_wait_s or (wait_s and time.monotonic() + wait_s > deadline):
            self.shed += 1
            raise RequestError(
                "server", f"overloaded, {wait_s * 1000:.0f} ms of work wait: try again", 429, retry_after_s=wait_s
            )

    def stop(self) -> None:
        """Take no more, answer what waits, and end the thread. To be called where requests are asked."""
        self._stopped = True
        self._queue.put(None)
        self._thread.join()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        backlog: deque[Waiting[Ask, Answer] | None] = deque()
        while True:
            if not backlog:
                backlog.append(self._queue.get())
            with contextlib.suppress(Empty):
                while True:
                    backlog.append(self._queue.get_nowait())
            group = self._take(backlog)
            if not group:  # the word to stop came first, and nothing is taken after it
                return
            self._answer(group)

    def _take(self, backlog: deque[Waiting[Ask, Answer] | None]) -> list[Waiting[Ask, Answer]]:
        """The next requests to answer together: the oldest, and while they are small those behind it."""
        group: list[Waiting[Ask, Answer]] = []
        total = 0
        while backlog and (first := backlog[0]) is not None:
            if group and (first.candidates >= self.alone or total + first.candidates > self.limits.group):
                break
            backlog.popleft()
            group.append(first)
            total += first.candidates
            if first.candidates >= self.alone:
                break
        return group

    def _answer(self, group: list[Waiting[Ask, Answer]]) -> None:
        now = time.monotonic()
        wanted = [w for w in group if not w.answer.cancelled()]
        late = [w for w in wanted if w.deadline <= now]
        rest = [w for w in wanted if w.deadline > now]
        too_late = [RequestError("timeout_ms", "the deadline passed before the answer was begun", 504) for _ in late]
        answers: Sequence[Answer | Exception] = []
        if rest:
            self._begun, self.handling = now, rest
            answers = self._handled(rest)
            taken_s = time.monotonic() - now
            for waiting in rest:
                waiting.trace.begun, waiting.trace.ended = now, now + taken_s
            self._done_s, self._begun = self._done_s + taken_s, None
            self._learn(taken_s, sum(w.units for w in rest))
            self.answered += sum(w.candidates for w in rest)
        self._left_units += sum(w.units for w in group)
        self._send([*zip(rest, answers, strict=True), *zip(late, too_late, strict=True)])

    def _handled(self, group: Sequence[Waiting[Ask, Answer]]) -> Sequence[Answer | Exception]:
        """One answer for each. Whatever goes wrong, the askers must hear of it, and the next be served."""
        try:
            answers = list(self.handle([w.ask for w in group]))
        except BaseException as error:  # the thread outlives a SystemExit too
            return [_told(error)] * len(group)
        if len(answers) != len(group):
            return [RuntimeError(f"{len(answers)} answers to {len(group)} requests")] * len(group)
        return answers

    def _learn(self, taken_s: float, units: int) -> None:
        """Groups count by their size, so that small ones do not stand for large ones."""
        self._known_s, self._known_units = MEMORY * self._known_s + taken_s, MEMORY * self._known_units + units

    def _send(self, answers: Sequence[tuple[Waiting[Ask, Answer], Any]]) -> None:
        """Hand answers over to the loop of those who asked; where that has closed, nobody waits any more."""
        if answers:
            with contextlib.suppress(RuntimeError):
                answers[0][0].answer.get_loop().call_soon_threadsafe(self._deliver, answers, time.monotonic())

    # -- the event loop again --------------------------------------------------------------------------------------

    def _deliver(self, answers: Iterable[tuple[Waiting[Ask, Answer], Any]], sent: float) -> None:
        """Hand answers out; whoever left in the meantime gets none."""
        self.loop_wait_s = time.monotonic() - sent
        for waiting, answer in answers:
            if waiting.answer.done():
                continue
            if isinstance(answer, Exception):
                waiting.answer.set_exception(_told(answer))
            else:
                waiting.answer.set_result(answer)


def _told(error: BaseException) -> Exception:
    """An exception that a future takes: neither one that ends threads nor one that ends iterations."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
