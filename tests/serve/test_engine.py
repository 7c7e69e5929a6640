"""The queue before the scoring thread: a real thread and a real event loop, and a handler that waits to be let go."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from serve.engine import OVERHEAD, Engine, Limits
from serve.errors import RequestError

PATIENCE_S = 20
GENEROUS = Limits(max_wait_s=1000.0, group=100)


class Handler:
    """Answers a request, which is its size, with its negative, once it is let go. `groups`: what came together."""

    def __init__(self, *, held: bool = False) -> None:
        self.groups: list[list[int]] = []
        self.begun = threading.Event()
        self.go = threading.Event()
        if not held:
            self.go.set()

    def __call__(self, asks: Sequence[int]) -> list[int]:
        self.groups.append(list(asks))
        self.begun.set()
        assert self.go.wait(PATIENCE_S)
        return [-ask for ask in asks]


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run the body of a test in an event loop, not for ever."""
    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


def engine_of(handler: Any, limits: Limits = GENEROUS, alone: int = 16) -> Engine[int, int]:
    return Engine(handler, lambda ask: ask, alone, limits)


async def held_by(handler: Handler, engine: Engine[int, int], first: int = 1) -> asyncio.Task[int]:
    """A first request that the thread is busy with."""
    task = asyncio.create_task(engine.ask(first))
    await asyncio.to_thread(handler.begun.wait, PATIENCE_S)
    return task


async def queued(engine: Engine[int, int], *sizes: int, deadline: float = math.inf) -> list[asyncio.Task[int]]:
    """Requests that have got into the queue, in this order."""
    tasks = [asyncio.create_task(engine.ask(size, deadline)) for size in sizes]
    await asyncio.sleep(0)
    return tasks


def refused(task: asyncio.Task[int]) -> RequestError:
    error = task.exception()
    assert isinstance(error, RequestError)
    return error


# -- grouping --------------------------------------------------------------------------------------------------------


def test_engine_answers_small_requests_that_wait_together_and_large_ones_alone() -> None:
    async def body() -> None:
        handler = Handler(held=True)
        engine = engine_of(handler)
        tasks = [await held_by(handler, engine), *await queued(engine, 2, 3, 50, 4, 5, 16, 6)]
        handler.go.set()
        assert await asyncio.gather(*tasks) == [-1, -2, -3, -50, -4, -5, -16, -6]
        assert handler.groups == [[1], [2, 3], [50], [4, 5], [16], [6]]
        engine.stop()

    run(body)


def test_engine_groups_no_more_candidates_than_its_limit() -> None:
    async def body() -> None:
        handler = Handler(held=True)
        engine = engine_of(handler, Limits(max_wait_s=1000.0, group=10))
        tasks = [await held_by(handler, engine), *await queued(engine, 4, 6, 1, 15, 10)]
        handler.go.set()
        await asyncio.gather(*tasks)
        assert handler.groups == [[1], [4, 6], [1], [15], [10]]  # one above the limit still goes through, by itself
        engine.stop()

    run(body)


def test_engine_waits_for_no_company() -> None:
    async def body() -> None:
        handler = Handler()
        engine = engine_of(handler)
        for size in (3, 40, 3):
            assert await engine.ask(size) == -size
        assert handler.groups == [[3], [40], [3]]
        assert engine.answered == 46
        engine.stop()

    run(body)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_engine_sheds_when_what_waits_takes_too_long_and_recovers() -> None:
    async def body() -> None:
        handler = Handler(held=True)
        engine = engine_of(handler, Limits(max_wait_s=0.05))
        first = await held_by(handler, engine, 2500)  # 25 ms by the first guess of the speed
        (second,) = await queued(engine, 3000)
        (third,) = await queued(engine, 1)
        await asyncio.wait([third])
        error = refused(third)
        assert (error.status, error.field) == (429, "server")
        assert error.retry_after_s is not None
        assert error.retry_after_s > 0.05
        assert engine.shed == 1
        handler.go.set()
        assert [await first, await second] == [-2500, -3000]
        assert engine.wait_s == 0
        assert await engine.ask(1) == -1  # whatever was measured: who finds nobody waiting is let in
        engine.stop()

    run(body)


def test_engine_lets_a_giant_in_when_nothing_waits_and_refuses_those_behind_it() -> None:
    async def body() -> None:
        handler = Handler(held=True)
        engine = engine_of(handler, Limits(max_wait_s=0.1))
        giant = await held_by(handler, engine, 100_000)  # a second by the first guess
        small = await queued(engine, *[1] * 5)
        await asyncio.wait(small)
        assert [refused(task).status for task in small] == [429] * 5
        handler.go.set()
        assert await giant == -100_000
        engine.stop()

    run(body)


def test_engine_refuses_at_once_what_would_miss_its_deadline() -> None:
    async def body() -> None:
        handler = Handler(held=True)
        engine = engine_of(handler)
        first = await held_by(handler, engine, 1_000_000)  # ten seconds by the first guess
        (hasty,) = await queued(engine, 1, deadline=time.monotonic() + 5)
        await asyncio.wait([hasty])
        assert refused(hasty).status == 429
        handler.go.set()
        await first
        assert handler.groups == [[1_000_000]]
        engine.stop()

    run(body)


def test_engine_does_not_work_on_what_is_late_by_the_time_it_is_taken() -> None:
    async def body() -> None:
        handler = Handler(held=True)
        engine = engine_of(handler)
        first = await held_by(handler, engine)
        deadline = time.monotonic() + 0.01  # beyond what waits by the guess: about a third of a millisecond
        (late,) = await queued(engine, 2, deadline=deadline)
        (patient,) = await queued(engine, 3)
        while time.monotonic() <= deadline:
            await asyncio.sleep(0.001)
        handler.go.set()
        await asyncio.wait([first, late, patient])
        assert (refused(late).status, refused(late).field) == (504, "timeout_ms")
        assert patient.result() == -3
        assert handler.groups == [[1], [3]]
        assert engine.wait_s == 0
        engine.stop()

    run(body)


def test_engine_counts_what_the_event_loop_is_behind_by_while_something_waits() -> None:
    async def body() -> None:
        handler = Handler()
        engine = engine_of(handler, Limits(max_wait_s=0.02))
        task = asyncio.create_task(engine.ask(1))
        await asyncio.sleep(0)
        assert handler.begun.wait(PATIENCE_S)
        handler.begun.clear()
        time.sleep(0.05)  # a loop that is busy with other things
        assert await task == -1
        assert engine.loop_wait_s > 0.02
        handler.go.clear()
        first = await held_by(handler, engine)
        with pytest.raises(RequestError, match="overloaded"):
            engine.admit()
        handler.go.set()
        await first
        engine.admit()
        engine.stop()

    run(body)


# -- what leaves, fails, ends ----------------------------------------------------------------------------------------


def test_engine_does_not_work_for_those_who_left() -> None:
    async def body() -> None:
        handler = Handler(held=True)
        engine = engine_of(handler)
        first = await held_by(handler, engine)
        gone, stays = await queued(engine, 20, 2)
        gone.cancel()
        await asyncio.wait([gone])
        first.cancel()  # leaves while it is worked on
        await asyncio.wait([first])
        handler.go.set()
        assert await stays == -2
        assert handler.groups == [[1], [2]]
        assert engine.wait_s == 0
        engine.stop()

    run(body)


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit("broken"), StopIteration("broken")])
def test_engine_tells_all_of_a_group_of_a_failure_and_serves_the_next(error: BaseException) -> None:
    async def body() -> None:
        def handle(asks: Sequence[int]) -> list[int]:
            if 7 in asks:
                raise error
            return list(asks)

        engine = engine_of(handle)
        for _ in range(3):
            with pytest.raises((ValueError, RuntimeError), match="broken"):
                await engine.ask(7)
            assert await engine.ask(8) == 8
        engine.stop()

    run(body)


def test_engine_survives_a_handler_that_forgets_an_answer() -> None:
    async def body() -> None:
        engine = engine_of(lambda asks: [])
        with pytest.raises(RuntimeError, match="0 answers to 1 requests"):
            await engine.ask(1)
        with pytest.raises(RuntimeError, match="0 answers"):
            await engine.ask(1)
        engine.stop()

    run(body)


def test_engine_gives_an_asker_the_exception_that_is_its_answer_and_the_others_theirs() -> None:
    async def body() -> None:
        handler = Handler(held=True)

        def handle(asks: Sequence[int]) -> list[Any]:
            return [RequestError("user", "bad") if a == 13 else -a for a in asks if handler(asks)]

        engine = engine_of(handle)
        first = await held_by(handler, engine)
        good, bad, other = await queued(engine, 2, 13, 3)
        handler.go.set()
        await asyncio.wait([first, good, bad, other])
        assert [good.result(), refused(bad).field, other.result()] == [-2, "user", -3]
        engine.stop()

    run(body)


def test_engine_that_stops_answers_what_waits_and_takes_no_more() -> None:
    async def body() -> None:
        handler = Handler(held=True)
        engine = engine_of(handler)
        tasks = [await held_by(handler, engine), *await queued(engine, 2, 50, 3)]
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
        while not engine._stopped:
            await asyncio.sleep(0)
        with pytest.raises(RequestError) as caught:
            await engine.ask(4)
        assert caught.value.status == 503
        handler.go.set()
        await stopping
        assert await asyncio.gather(*tasks) == [-1, -2, -50, -3]
        engine.stop()  # once more does nothing

    run(body)


def test_engine_goes_on_after_the_loop_of_those_who_asked_has_closed() -> None:
    handler = Handler(held=True)
    engine = engine_of(handler)

    async def leave() -> None:
        task = await held_by(handler, engine)
        task.cancel()

    async def come() -> None:
        assert await engine.ask(2) == -2

    run(leave)
    handler.go.set()
    run(come)
    engine.stop()


# -- what it knows of its speed --------------------------------------------------------------------------------------


def test_engine_learns_its_speed_by_candidates_not_by_groups() -> None:
    engine = engine_of(Handler())
    for _ in range(200):
        engine._learn(0.1, 10_000)
        engine._learn(0.001, 10)  # ten times slower each, and a thousandth of the work
    assert engine.s_per_unit == pytest.approx(0.101 / 10_010, rel=0.1)
    engine.stop()


def test_engine_has_an_estimate_before_the_first_answer() -> None:
    async def body() -> None:
        handler = Handler(held=True)
        engine = engine_of(handler, Limits(max_wait_s=0.1))
        tasks = await queued(engine, *[500] * 100)
        let_in = 100 - engine.shed
        assert 10 <= let_in <= 30  # about 0.1 s of work, not all that come
        assert engine.wait_s == pytest.approx(let_in * (500 + OVERHEAD) * engine.s_per_unit)
        handler.go.set()
        await asyncio.wait(tasks)
        engine.stop()

    run(body)


def test_engine_counts_the_time_of_a_group_while_it_is_answered() -> None:
    async def body() -> None:
        handler = Handler(held=True)
        engine = engine_of(handler)
        first = await held_by(handler, engine)
        before = engine.busy_s
        while engine.busy_s <= before:
            await asyncio.sleep(0.001)
        handler.go.set()
        await first
        after = engine.busy_s
        await asyncio.sleep(0.002)
        assert engine.busy_s == after
        engine.stop()

    run(body)
