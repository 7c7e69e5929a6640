"""How many replicas there should be, from how busy those are that run. Pure; Ray Serve's controller asks `BusyPolicy`.

Up: at once when requests are refused or wait, and when the replicas together are busier than the target for a moment.
Down: Ray Serve itself waits `downscale_delay_s`, through which every answer must say the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

BUSY, CANDIDATES, WAITING, SHED = "busy", "candidates_per_s", "waiting_ms", "shed_per_s"
SPARE = 0.8  # a replica goes only when the others then stay below this share of the target: none comes right back
SETTLE_S = 1.0  # what was measured until so long after a replica joined tells of the time before it


class Counts(Protocol):
    """What an engine counts (serve.engine.Engine)."""

    answered: int
    shed: int

    @property
    def busy_s(self) -> float:
        """Seconds spent answering."""

    @property
    def wait_s(self) -> float:
        """Seconds that a request would wait now."""


class Load:
    """A replica's own measure of its load: what was counted since it was last asked, as rates."""

    def __init__(self, counts: Counts, now: float) -> None:
        self._counts = counts
        self._last = (now, counts.busy_s, counts.answered, counts.shed)

    def since_last(self, now: float) -> dict[str, float]:
        """busy: share of one thread; candidates_per_s; shed_per_s: requests refused; waiting_ms: as it is now."""
        counts = self._counts
        before, self._last = self._last, (now, counts.busy_s, counts.answered, counts.shed)
        passed_s = max(now - before[0], 1e-3)
        return {
            BUSY: min(1.0, max(0.0, self._last[1] - before[1]) / passed_s),
            CANDIDATES: (self._last[2] - before[2]) / passed_s,
            SHED: (self._last[3] - before[3]) / passed_s,
            WAITING: counts.wait_s * 1000,
        }


@dataclass(frozen=True)
class Seen:
    """What is known of the running replicas. busy: the sum of their shares; pressed: requests are refused or wait."""

    running: int
    target: int
    busy: float
    pressed: bool


def replicas_for(seen: Seen, target_busy: float) -> int:
    """How many replicas the load wants, not bounded yet.

    While one that was asked for has not come, being pressed asks for no more.
    """
    needed = math.ceil(seen.busy / target_busy - 1e-9)
    if seen.pressed:
        return max(needed, seen.running + 1, seen.target)
    if needed < seen.running:
        return max(1, needed, math.ceil(seen.busy / (target_busy * SPARE) - 1e-9))
    return max(1, needed)


class Point(Protocol):
    """A measured value, as Ray Serve keeps it."""

    timestamp: float
    value: float


Series = Mapping[str, Mapping[Any, Sequence[Point]]]


def see(metrics: Series, replicas: Sequence[Any], target: int, since: float, waiting_ms: float) -> Seen:
    """What the replicas' own measurements tell; only those after `since` count as pressed."""

    def values(name: str, replica: Any, after: float = -math.inf) -> list[float]:
        return [p.value for p in metrics.get(name, {}).get(replica, ()) if p.timestamp > after]

    busy = 0.0
    pressed = False
    for replica in replicas:
        shares = values(BUSY, replica)
        busy += sum(shares) / len(shares) if shares else 0.0
        waits = values(WAITING, replica, since)
        refused = sum(values(SHED, replica, since)) > 0
        pressed = pressed or refused or (len(waits) > 1 and min(waits) > waiting_ms)
    return Seen(len(replicas), target, busy, pressed)


class BusyPolicy:
    """The policy that Ray Serve's controller makes once and asks ten times a second.

    target_busy: share of its thread that a replica should be busy; upscale_delay_s: how long it must be busier for one
    more; waiting_ms: when this long is waited for seconds, that is too long.
    """

    def __init__(self, target_busy: float, upscale_delay_s: float, waiting_ms: float) -> None:
        self.target_busy, self.upscale_delay_s, self.waiting_ms = target_busy, upscale_delay_s, waiting_ms
        self._running = 0
        self._since = -math.inf  # since when so many run
        self._wanted_since: float | None = None  # since when more are wanted

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """What Ray Serve calls: an AutoscalingContext -> (replicas, no state of ours)."""
        now = float(context.current_time)
        replicas = list(context.running_replicas)
        if len(replicas) != self._running:
            grew = len(replicas) > self._running
            self._running = len(replicas)
            self._since = now + SETTLE_S if grew else now
        target = int(context.target_num_replicas)
        seen = see(context.raw_metrics or {}, replicas, target, self._since, self.waiting_ms)
        return self.decide(seen, now), {}

    def decide(self, seen: Seen, now: float) -> int:
        """More only after `upscale_delay_s` of wanting more, except when pressed."""
        if not seen.running:  # those that start have not told anything yet
            return seen.target
        wanted = replicas_for(seen, self.target_busy)
        if wanted <= seen.target or seen.pressed:
            self._wanted_since = None
            return wanted
        self._wanted_since = now if self._wanted_since is None else self._wanted_since
        return wanted if now - self._wanted_since >= self.upscale_delay_s else seen.target
