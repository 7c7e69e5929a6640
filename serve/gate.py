"""What turns requests away before anything of them is read: an ASGI layer in front of the routes.

A server that is offered several times what it can answer must refuse most of it, so refusing must cost next to nothing:
no routing, no body, no exception.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from serve.errors import RequestError
from serve.headers import request_id

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Admits(Protocol):
    """What says whether there is room (serve.engine.Engine)."""

    def admit(self) -> None:
        """Raises: RequestError when there is none."""


class Gate:
    """Passes on what there is room for. Only `guarded` paths ask for room: health and pages are always answered."""

    def __init__(self, app: App, engine: Admits, guarded: frozenset[str]) -> None:
        self.app, self.engine, self.guarded = app, engine, guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "http" and scope["path"] in self.guarded and scope["method"] == "POST":
            try:
                self.engine.admit()
            except RequestError as error:
                await refuse(error, request_id(scope), send)
                return
        await self.app(scope, receive, send)


async def refuse(error: RequestError, name: str, send: Send) -> None:
    """The answer of a refused request, as the routes give it (serve.api.refusal); `name` is the request's id."""
    content = {"error": error.message, "field": error.field, "request_id": name}
    body = json.dumps(content, separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", error.retry_after.encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
