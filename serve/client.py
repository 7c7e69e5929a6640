"""The Python client of a ranker: `RankClient`, and `AsyncRankClient` for asyncio.

    client = RankClient("http://127.0.0.1:8000")
    client.rank({"user_id": "196"}, ["242", "302"], k=2).items

Connections are kept and used again. A call asks once more (`retries`) where another replica may answer: the connection
broke, 502, 503 or 504, and 429 after the time that the server names, all within `timeout_s`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import httpx

from serve.client_messages import (
    AnswerError,
    Candidates,
    Message,
    RankedItem,
    Ranking,
    RefusedError,
    Reply,
    Scores,
    UnreachableError,
    encode,
    ranking,
    scores,
    wait_s,
)
from trainer.errors import SlimrankError

__all__ = [
    "AnswerError",
    "AsyncRankClient",
    "RankClient",
    "RankedItem",
    "Ranking",
    "RefusedError",
    "Scores",
    "UnreachableError",
]

RANK, SCORE = "/v1/rank", "/v1/score"
Outcome = Reply | httpx.RequestError | TimeoutError


class _Client:
    """What both clients share: the options, and what is said and read."""

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 1.0, retries: int = 1) -> None:
        if not url.startswith(("http://", "https://")):
            raise SlimrankError(f"url {url!r}: must begin with http:// or https://")
        if timeout_s <= 0 or retries < 0:
            raise SlimrankError(f"timeout_s {timeout_s:g} must be above 0, and retries {retries} at least 0")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.retries = retries
        self._headers = {"accept-encoding": "identity"} | ({} if key is None else {"authorization": f"Bearer {key}"})

    def _message(
        self, user: Mapping[str, Any], candidates: Candidates, request_id: str | None, **asked: Any
    ) -> Message:
        """The message; options that are off are left out. An id of the request's own, the same for all its attempts."""
        message = encode(user, candidates, {name: value for name, value in asked.items() if value is not False})
        headers = {**self._headers, **message.headers, "x-request-id": request_id or uuid.uuid4().hex}
        return Message(message.body, headers)

    def _wait_s(self, outcome: Outcome, attempt: int, deadline: float) -> float | None:
        return wait_s(outcome, deadline - time.monotonic()) if attempt < self.retries else None

    def _reply(self, outcome: Outcome, message: Message) -> Reply:
        """The reply, which carries the request's id. Raises: UnreachableError when there is none."""
        request_id = message.headers["x-request-id"]
        if isinstance(outcome, Reply):
            return Reply(outcome.status, {"x-request-id": request_id, **outcome.headers}, outcome.body)
        late = isinstance(outcome, httpx.TimeoutException | TimeoutError)
        why = f"no answer within {self.timeout_s:g} s" if late else f"{outcome or type(outcome).__name__}"
        raise UnreachableError(f"{self.url}: {why} (request {request_id}): see whether the server is up") from outcome


class RankClient(_Client):
    """Asks a ranker, from any thread.

    url: such as http://127.0.0.1:8000. key: an API key, where the server wants one. timeout_s: seconds for a call, its
    retries included; a server that has begun to answer is cut off at its next byte. retries: further attempts.
    Raises: SlimrankError for a URL that is none, or options out of range.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 1.0, retries: int = 1) -> None:
        super().__init__(url, key, timeout_s, retries)
        self._http = httpx.Client(trust_env=False)

    def rank(
        self,
        user: Mapping[str, Any],
        candidates: Candidates,
        k: int = 10,
        explain: bool = False,
        request_id: str | None = None,
    ) -> Ranking:
        """The top k of the candidates for a user.

        candidates: item ids, rows (a dict each), columns (a dict of lists), or a pyarrow Table, which goes as Arrow.
        Raises: RefusedError (naming field and status), UnreachableError, AnswerError; RequestError for a value that
        cannot be sent.
        """
        return ranking(self._ask(RANK, self._message(user, candidates, request_id, k=k, explain=explain)))

    def score(self, user: Mapping[str, Any], candidates: Candidates, request_id: str | None = None) -> Scores:
        """The scores of all candidates, in their order. Arguments and errors as those of `rank`."""
        return scores(self._ask(SCORE, self._message(user, candidates, request_id)))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> RankClient:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        self.close()

    def _ask(self, path: str, message: Message) -> Reply:
        deadline = time.monotonic() + self.timeout_s
        for attempt in range(self.retries + 1):
            outcome = self._once(path, message, deadline)
            wait = self._wait_s(outcome, attempt, deadline)
            if wait is None:
                break
            time.sleep(wait)
        return self._reply(outcome, message)

    def _once(self, path: str, message: Message, deadline: float) -> Outcome:
        left_s = max(deadline - time.monotonic(), 0.001)
        try:
            with self._http.stream(
                "POST", self.url + path, content=message.body, headers=message.headers, timeout=left_s
            ) as response:
                parts = []
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > deadline:
                        return TimeoutError()
                return Reply(response.status_code, response.headers, b"".join(parts))
        except httpx.RequestError as error:
            return error


class AsyncRankClient(_Client):
    """Asks a ranker, from one event loop. Arguments as those of RankClient; timeout_s holds to the moment."""

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 1.0, retries: int = 1) -> None:
        super().__init__(url, key, timeout_s, retries)
        self._http = httpx.AsyncClient(trust_env=False)

    async def rank(
        self,
        user: Mapping[str, Any],
        candidates: Candidates,
        k: int = 10,
        explain: bool = False,
        request_id: str | None = None,
    ) -> Ranking:
        """As RankClient.rank."""
        return ranking(await self._ask(RANK, self._message(user, candidates, request_id, k=k, explain=explain)))

    async def score(self, user: Mapping[str, Any], candidates: Candidates, request_id: str | None = None) -> Scores:
        """As RankClient.score."""
        return scores(await self._ask(SCORE, self._message(user, candidates, request_id)))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncRankClient:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, path: str, message: Message) -> Reply:
        deadline = time.monotonic() + self.timeout_s
        for attempt in range(self.retries + 1):
            outcome = await self._once(path, message, deadline)
            wait = self._wait_s(outcome, attempt, deadline)
            if wait is None:
                break
            await asyncio.sleep(wait)
        return self._reply(outcome, message)

    async def _once(self, path: str, message: Message, deadline: float) -> Outcome:
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                response = await self._http.post(
                    self.url + path, content=message.body, headers=message.headers, timeout=None
                )
            return Reply(response.status_code, response.headers, response.content)
        except (httpx.RequestError, TimeoutError) as error:
            return error
