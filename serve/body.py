"""The bytes of a request's body: bounded in size and in time."""

from __future__ import annotations

import asyncio

from fastapi import Request

from serve.errors import RequestError

BODY_S = 10.0  # for a whole body, however slowly it drips: a sender must not hold memory for long


async def read_body(request: Request, limit: int) -> bytes:
    """The body.

    Raises: RequestError 413 when it is longer than `limit` bytes, before it is read where it says so; 408 when it does
    not arrive within BODY_S.
    """
    announced = request.headers.get("content-length", "0")
    size = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    parts: list[bytes] = []
    if size <= limit:
        size = 0
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        break
                    parts.append(part)
        except TimeoutError:
            raise RequestError("body", f"did not arrive within {BODY_S:.0f} s", 408) from None
    if size > limit:
        raise RequestError("body", f"larger than {limit:,} bytes", 413)
    return b"".join(parts)
