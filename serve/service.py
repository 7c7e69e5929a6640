"""What one replica does, without Ray and HTTP: a shelf of versions, and a queue before the thread that scores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from serve.config import ServeConfig
from serve.drift import Drift
from serve.engine import Engine, Limits
from serve.errors import RequestError
from serve.meter import Meter
from serve.ranker import ALONE, Answer
from serve.request import RankRequest, RankResponse, ScoreRequest, ScoreResponse
from serve.scaling import Load
from serve.shelf import Shelf
from serve.trace import current
from serve.watch import Watch


class Service:
    """Answers requests with the version that is live. To be used from one event loop."""

    def __init__(self, shelf: Shelf, config: ServeConfig) -> None:
        self.shelf = shelf
        self.config = config
        self.watch = Watch(shelf, config.swap.requests, self._rows)
        self.meter, self.drift = Meter(), Drift()
        self.replicas = 1  # that share the traffic and so the limits of keys; the fleet tells
        limits = Limits(config.max_wait_ms / 1000, config.batch_candidates)
        self.engine: Engine[ScoreRequest, Answer] = Engine(self._answer, self._rows, ALONE, limits)
        self.load = Load(self.engine, time.monotonic())

    async def rank(self, request: RankRequest) -> RankResponse:
        """The top k of a request's candidates. Raises: RequestError as the engine and the ranker do."""
        return await self._ask(request)  # type: ignore[return-value]

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """The scores of all of a request's candidates. Raises: RequestError as the engine and the ranker do."""
        return await self._ask(request)  # type: ignore[return-value]

    async def _ask(self, request: ScoreRequest) -> Answer:
        trace = current()
        trace.admit(request.count)
        answer = await self._in_time(request)
        trace.version = answer.version
        return answer

    async def _in_time(self, request: ScoreRequest) -> Answer:
        timeout_ms = request.timeout_ms or self.config.timeout_ms
        if not timeout_ms:
            return await self.engine.ask(request)
        deadline = time.monotonic() + timeout_ms / 1000
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await self.engine.ask(request, deadline)
        except TimeoutError:
            raise RequestError("timeout_ms", f"no answer within {timeout_ms:g} ms", 504) from None

    def _rows(self, request: ScoreRequest) -> int:
        return self.shelf.live.ranker.rows(request)

    def _answer(self, requests: Sequence[ScoreRequest]) -> Sequence[Answer | Exception]:
        live = self.shelf.live.version
        for waiting in self.engine.handling:  # an answer may name another one, a failure names none
            waiting.trace.version = live
        return self.watch.answer(requests)

    def report(self) -> dict[str, Any]:
        """This replica's figures as plain JSON, for heartbeats and metrics: sums since its start, and how it stands.

        serve.meter.merge adds the sums of several replicas up.
        """
        engine, shelf = self.engine, self.shelf
        state = {"live": shelf.live.version, "loaded": sorted(shelf.loaded), "waiting_s": engine.wait_s}
        sums = self.meter.report() | self.drift.report(shelf.loaded, time.monotonic())
        return sums | state | {"busy_s": engine.busy_s}
