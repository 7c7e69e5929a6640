"""Who may ask, and how much: the keys of a file that is read again when it changes, and a token bucket for each limit.

Time is an argument everywhere: seconds of a steady clock.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from pathlib import Path

from serve.errors import RequestError
from serve.keys import Key, KeyFile, digest_of, read_keys
from trainer.errors import SlimrankError

BURST_S = 1.0  # of a limit that may be used at once after a pause
LONGEST = 256  # characters of a key that are looked at
LOOK_EVERY_S = 1.0


class TokenBucket:
    """A limit of `rate` a second, of which BURST_S may be used at once. Time is an argument."""

    __slots__ = ("_at", "_left", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._left: float | None = None  # None: full
        self._at = 0.0

    def take(self, amount: float, now: float, share: float = 1.0) -> float:
        """Take an amount, and return 0; or take nothing, and return the seconds after which it is worth asking again.

        share: of the rate that this replica grants. An amount above the burst is granted when the bucket is full,
        and the bucket then owes it: over time no more than the rate is granted.
        """
        rate = self.rate * share
        burst = max(rate * BURST_S, 1.0)
        left = burst if self._left is None else min(burst, self._left + (now - self._at) * rate)
        self._at = now
        needed = min(amount, burst)
        if left < needed - 1e-9:
            self._left = left
            return (needed - left) / rate
        self._left = left - amount
        return 0.0


class Grant:
    """A key, and what it may still ask of this replica."""

    __slots__ = ("candidates", "key", "requests")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.requests = None if key.requests_per_s is None else TokenBucket(key.requests_per_s)
        self.candidates = None if key.candidates_per_s is None else TokenBucket(key.candidates_per_s)

    def ask(self, amount: int, now: float, share: float, *, candidates: bool) -> None:
        """Take requests or candidates from the limit. Raises: RequestError 429 with when to try again."""
        bucket = self.candidates if candidates else self.requests
        wait_s = 0.0 if bucket is None else bucket.take(amount, now, share)
        if bucket is not None and wait_s > 0:
            what = "candidates" if candidates else "requests"
            raise RequestError(
                "key", f"{self.key.name} may ask {bucket.rate:g} {what} a second: try again", 429, retry_after_s=wait_s
            )


class KeyRing:
    """The keys of a file, read again when it changes; it is looked at once a second at most.

    A file that can no longer be read leaves the keys as they were: `problem` says why, and `on_problem` hears it once.
    """

    def __init__(self, path: Path, on_problem: Callable[[str], None] = lambda _: None) -> None:
        """Raises: SlimrankError when the file is not one of keys."""
        self.path, self.on_problem = path, on_problem
        self.problem: str | None = None
        self._grants: dict[str, Grant] = {}
        self._stamp = self._stamped()
        self._looked = -1.0
        self._take(read_keys(path))

    def find(self, key: str | None, now: float) -> Grant:
        """The grant of a key. Raises: RequestError 401 without a known key, 403 for a revoked one."""
        self.refresh(now)
        if not key:
            raise RequestError("key", "is required: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'", 401)
        # found by the hash of what was sent: how long that takes tells nothing of the keys that there are
        digest = digest_of(key[:LONGEST])
        grant = self._grants.get(digest)
        if grant is None or not hmac.compare_digest(grant.key.sha256, digest):
            raise RequestError("key", "is not known: ask whoever runs this server for one", 401)
        if grant.key.revoked is not None:
            raise RequestError("key", f"{grant.key.name} is revoked since {grant.key.revoked}", 403)
        return grant

    def refresh(self, now: float) -> None:
        """Read the file again when a second has passed and it has changed. now: seconds of a steady clock."""
        if 0 <= now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        stamp = self._stamped()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(read_keys(self.path))
            self.problem = None
        except SlimrankError as error:
            self.problem = str(error)
            self.on_problem(self.problem)

    def _take(self, keys: KeyFile) -> None:
        """Take keys over; those that are as they were keep what they have used of their limits."""
        before = self._grants
        found = {}
        for key in keys.keys:
            known = before.get(key.sha256)
            found[key.sha256] = known if known is not None and known.key == key else Grant(key)
        self._grants = found

    def _stamped(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_ino, status.st_ctime_ns, status.st_size


def sent_key(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The key in a request's headers (of ASGI: names in lower case), None where there is none."""
    for name, value in headers:
        if name == b"x-api-key":
            return value.decode("latin-1").strip()
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].decode("latin-1").strip()
    return None
