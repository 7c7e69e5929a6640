"""A replica's side of versions: does what the fleet orders, in the background, and reports. Knows nothing of Ray.

Requests notice none of it: a version is loaded and compared in a thread, and taken by one assignment.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from serve.fleet import Order, Place, Report, Result
from serve.rehearsal import compare
from serve.shelf import Served, Shelf, load
from serve.watch import Watch
from trainer.errors import SlimrankError

RETRY_S = 5.0  # after a version could not be loaded that has to be
SWITCH_S = 0.0005  # how long the loading thread may keep Python from the scoring one (Python's own: 5 ms)


class Follower:
    """Keeps a replica's shelf as ordered. To be used from one event loop."""

    def __init__(
        self,
        replica: str,
        watch: Watch,
        order: Order,
        loader: Callable[[Place], Served] | None = None,
        meter: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.replica, self.watch, self.order, self.meter = replica, watch, order, meter
        self.loader = loader or load_as
        self.result: Result | None = None
        self.error: str | None = None
        self._work: asyncio.Task[None] | None = None
        self._not_before = 0.0
        sys.setswitchinterval(SWITCH_S)

    @property
    def shelf(self) -> Shelf:
        """The versions of this replica."""
        return self.watch.shelf

    def report(self) -> Report:
        """What this replica has and does."""
        return Report(
            replica=self.replica,
            live=self.shelf.live.version,
            loaded=tuple(self.shelf.loaded),
            order=self.order,
            result=self.result,
            health=self.watch.health(),
            error=self.error,
            meter=self.meter(),
        )

    def take(self, order: Order) -> None:
        """Do what can be done at once, and begin what takes time."""
        self.order = order
        shelf, live = self.shelf, order.live.version
        previous = order.previous.version if order.previous else None
        shelf.fallback = shelf.loaded.get(previous) if previous and order.probation else None
        if live in shelf.loaded and shelf.live.version != live:
            if order.probation:  # one that is taken back to has proved itself: its counts stay
                self.watch.forget(live)
            shelf.flip(live)
        candidate = order.candidate.version if order.candidate else None
        shelf.drop({name for name in (live, previous, candidate) if name})
        if (self._work is None or self._work.done()) and self._next() is not None:
            self._work = asyncio.create_task(self._do())

    def _next(self) -> Place | None:
        """What is to be loaded, or compared, next: what is live before anything else."""
        order, loaded = self.order, self.shelf.loaded
        if time.monotonic() >= self._not_before:
            for place in (order.live, order.previous):
                if place is not None and place.version not in loaded:
                    return place
        done = self.result.attempt if self.result else 0
        return order.candidate if order.candidate is not None and done != order.attempt else None

    async def _do(self) -> None:
        while (place := self._next()) is not None:
            attempt = self.order.attempt if place == self.order.candidate else None
            try:
                # a candidate is loaded even where it is loaded already: its files may have changed
                served = await asyncio.to_thread(self.loader, place)
                self.shelf.add(served)
                if attempt is not None:
                    self.result = await asyncio.to_thread(self._compare, served, attempt)
                self.error = None
            except Exception as error:  # a new version may fail in any way, and must take nothing along
                said = str(error) if isinstance(error, SlimrankError) else f"{type(error).__name__}: {error}"
                if attempt is not None:
                    self.result = Result(attempt=attempt, error=said)
                else:
                    self.error = said
                    self._not_before = time.monotonic() + RETRY_S
            self.take(self.order)

    def _compare(self, served: Served, attempt: int) -> Result:
        agreement = compare(self.shelf.live.ranker, served.ranker, self.watch.recent.copy())
        return Result(attempt=attempt, agreement=agreement)


def load_as(place: Place, score: str | None = None, users: Path | None = None) -> Served:
    """Load a version; `score`, `users`: of ServeConfig.

    Raises: SlimrankError when what lies there is another one, or cannot be loaded.
    """
    served = load(place.path, score, users, place.catalogue)
    if served.version != place.version:
        raise SlimrankError(f"{place.path}: holds version {served.version} now, not {place.version}: deploy it anew")
    return served


async def follow(follower: Follower, sync: Callable[[Report], Awaitable[Order]], again_s: float = 1.0) -> None:
    """Report and obey for ever. While nobody answers, the replica goes on with what it has."""
    while True:
        try:
            follower.take(await sync(follower.report()))
        except asyncio.CancelledError:
            raise
        except Exception:  # Ray raises many kinds for a fleet that is away; it comes back
            await asyncio.sleep(again_s)
