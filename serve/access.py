"""The middleware before all routes: lets in whoever has a key, follows each request, and counts and logs it when over.

Plain ASGI: a request pays for two wrapped functions (about 2 us, tests/serve/test_access.py prints it).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from serve.config import ServeConfig
from serve.errors import RequestError
from serve.headers import request_id
from serve.key_ring import Grant, KeyRing, sent_key
from serve.logs import log_problem, log_request
from serve.meter import CLIENT_LEFT, Meter
from serve.trace import Trace, follow

OPEN = frozenset(
    {"/", "/page.css", "/page.js", "/docs", "/openapi.json", "/healthz", "/readyz"}
)  # answer without a key
COUNTED = "/v1/"


class Served(Protocol):
    """What the middleware needs of a Service."""

    config: ServeConfig
    meter: Meter
    replicas: int


class Access:
    """ASGI middleware. `ring`: who may ask; everybody where there is none."""

    def __init__(
        self, app: Any, service: Served, ring: KeyRing | None, refuse: Callable[[RequestError], Response]
    ) -> None:
        self.app, self.service, self.ring, self.refuse = app, service, ring, refuse
        self.log_all = service.config.access_log

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        trace = Trace(read=time.monotonic())
        follow(trace)

        async def received() -> Any:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                trace.read = time.monotonic()
            return message

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                trace.answered, trace.status = time.monotonic(), message["status"]
            await send(message)

        failure: BaseException | None = None
        try:
            await self._enter(scope, received, sent, trace)
        except BaseException as error:
            failure = error
            raise
        finally:
            self._leave(scope, trace, failure)
        return None

    async def _enter(self, scope: dict[str, Any], receive: Any, send: Any, trace: Trace) -> None:
        if self.ring is not None and scope["path"] not in OPEN:
            try:
                self._let_in(self.ring, scope, trace)
            except RequestError as error:
                answer = self.refuse(error)
                if error.status == 401:
                    answer.headers["www-authenticate"] = "Bearer"
                return await answer(scope, receive, send)
        return await self.app(scope, receive, send)

    def _let_in(self, ring: KeyRing, scope: dict[str, Any], trace: Trace) -> None:
        """Raises: RequestError 401, 403, or 429 at the key's limit of requests."""
        now = time.monotonic()
        grant = ring.find(sent_key(scope["headers"]), now)
        trace.key = grant.key.name
        charge(grant, trace, 1, now, 1 / self.service.replicas, candidates=False)
        if grant.candidates is not None:
            trace.charge = lambda count: charge(
                grant, trace, count, time.monotonic(), 1 / self.service.replicas, candidates=True
            )

    def _leave(self, scope: dict[str, Any], trace: Trace, failure: BaseException | None) -> None:
        if not trace.status:  # nothing was sent: it failed, or nobody was there to send it to
            failed = isinstance(failure, Exception) and not isinstance(failure, ClientDisconnect)
            trace.status = 500 if failed else CLIENT_LEFT
            trace.answered = time.monotonic()
        if scope["path"].startswith(COUNTED):
            self.service.meter.record(trace)
        if self.log_all or trace.status >= 500:
            trace.request_id = request_id(scope)
            log_request(scope["method"], scope["path"], trace, failure if trace.status >= 500 else None)


def open_ring(config: ServeConfig) -> KeyRing | None:
    """The keys of serve.keys. Raises: SlimrankError when that is no file of keys."""
    return None if config.keys is None else KeyRing(config.keys, log_problem)


def charge(grant: Grant, trace: Trace, amount: int, now: float, share: float, *, candidates: bool) -> None:
    """Take from what a key may ask. Raises: RequestError 429, and notes in the trace that it was for the limit."""
    try:
        grant.ask(amount, now, share, candidates=candidates)
    except RequestError:
        trace.limited = True
        raise
