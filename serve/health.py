"""How a version does: requests, failures, and how fast it scores. Plain counts, which add up over replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import Field

from trainer.data.schema import Config

STEPS = 8  # buckets a doubling: a quantile is known to 9%


class Health(Config):
    """Counts of one version. `speed`: by bucket, how many requests were scored in that time a candidate.

    A request's fixed cost is counted as candidates, so that neither the mix of requests nor the queue shows in it.
    """

    requests: int = Field(default=0, ge=0)
    errors: int = Field(default=0, ge=0)
    speed: dict[int, int] = {}

    @property
    def error_share(self) -> float:
        """Failures among all requests; 0 without any."""
        return self.errors / self.requests if self.requests else 0.0


@dataclass
class Counter:
    """The counts of a version while they grow. Written by one thread; others take a `snapshot`."""

    requests: int = 0
    errors: int = 0
    speed: dict[int, int] = field(default_factory=dict)

    def count(self, requests: int, errors: int, s_per_candidate: float) -> None:
        """A group of requests was answered."""
        self.requests += requests
        self.errors += errors
        bucket = bucket_of(s_per_candidate)
        self.speed[bucket] = self.speed.get(bucket, 0) + requests

    def snapshot(self) -> Health:
        """The counts now."""
        return Health(requests=self.requests, errors=min(self.errors, self.requests), speed=self.speed.copy())


def bucket_of(seconds: float) -> int:
    """The bucket of a time: whole steps of a logarithmic scale, 1 microsecond at 0."""
    return math.floor(STEPS * math.log2(max(seconds, 1e-9) * 1e6))


def total(parts: Iterable[Health]) -> Health:
    """The counts of several replicas together."""
    requests = errors = 0
    speed: dict[int, int] = {}
    for part in parts:
        requests, errors = requests + part.requests, errors + part.errors
        for bucket, count in part.speed.items():
            speed[bucket] = speed.get(bucket, 0) + count
    return Health(requests=requests, errors=errors, speed=speed)


def speed_quantile(health: Health, q: float) -> float | None:
    """Seconds a candidate within which the share `q` of the requests was scored; None without requests."""
    left = q * sum(health.speed.values())
    for bucket in sorted(health.speed):
        left -= health.speed[bucket]
        if left <= 0:
            return 2 ** ((bucket + 0.5) / STEPS) * 1e-6
    return None
