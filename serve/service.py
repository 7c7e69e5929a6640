"""What one replica does, without Ray and HTTP: a shelf of versions, and a queue before the thread that scores."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from serve.config import ServeConfig
from serve.engine import Engine, Limits
from serve.ranker import ALONE
from serve.request import RankRequest, RankResponse
from serve.shelf import Shelf


class Service:
    """Answers requests with the version that is live. To be used from one event loop."""

    def __init__(self, shelf: Shelf, config: ServeConfig) -> None:
        self.shelf = shelf
        self.config = config
        limits = Limits(config.max_wait_ms / 1000, config.batch_candidates)
        self.engine: Engine[RankRequest, RankResponse] = Engine(
            self._answer, lambda request: len(request.candidates), ALONE, limits
        )

    async def rank(self, request: RankRequest) -> RankResponse:
        """The top k of a request's candidates. Raises: RequestError as the engine and the ranker do."""
        timeout_ms = self.config.timeout_ms
        deadline = time.monotonic() + timeout_ms / 1000 if timeout_ms else math.inf
        return await self.engine.ask(request, deadline)

    def _answer(self, requests: Sequence[RankRequest]) -> Sequence[RankResponse | Exception]:
        return self.shelf.live.ranker.rank_many(requests)
