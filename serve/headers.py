"""What every answer's headers tell: the request's id and the version that answers. Pure ASGI: it costs microseconds."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any

REQUEST_ID = "x-request-id"
VERSION = "x-slimrank-version"
SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
ID_KEY = "slimrank.request_id"  # of the ASGI scope


def request_id(scope: Any) -> str:
    """The id of the request that a scope is of: its caller's, or one that is made now."""
    if ID_KEY not in scope:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        scope[ID_KEY] = given.decode() if SANE_ID.fullmatch(given) else uuid.uuid4().hex
    return scope[ID_KEY]


class Identified:
    """Middleware: adds `x-request-id` and, where the answer does not say itself, `x-slimrank-version`.

    `named`: what is in front (Ray Serve) adds the id itself.
    """

    def __init__(self, app: Any, version: Callable[[], str], *, named: bool = False) -> None:
        self.app, self.version, self.named = app, version, named

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, and add the headers to what is answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = request_id(scope).encode()

        async def add(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                if not any(key == b"x-slimrank-version" for key, _ in headers):
                    headers.append((b"x-slimrank-version", self.version().encode()))
                if not self.named:
                    headers.append((b"x-request-id", name))
            await send(message)

        await self.app(scope, receive, add)
