"""The authority over versions: hears replicas, decides by serve/fleet.py, remembers on disk. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.verified import cache_folder
from serve import fleet as rules
from serve.config import ServeConfig
from serve.fleet import Fleet, Order, Place, Report
from trainer.data.schema import Config
from trainer.errors import SlimrankError
from trainer.files import write_text

ALIVE_S = 6.0  # a replica that said nothing for so long is gone
POLL_S = 1.0  # how long a heartbeat waits for news
TICK_S = 0.1


class Memory(Config):
    """What lies on disk. `run`: which start of the server it belongs to."""

    run: str
    fleet: Fleet


class Refused(SlimrankError):
    """A version that was not taken; `version` is what is known of it."""

    def __init__(self, version: str, reason: str) -> None:
        super().__init__(f"version {version} is refused: {reason}")
        self.version, self.reason = version, reason

    def __reduce__(self) -> tuple[type[Refused], tuple[str, str]]:
        return type(self), (self.version, self.reason)


class Control:
    """Decides which version answers. To be used from one event loop."""

    def __init__(self, fleet: Fleet, config: ServeConfig, file: Path | None = None, run: str = "") -> None:
        self.config, self.file, self.run = config, file, run
        self.fleet = fleet
        self.heard: dict[str, tuple[float, Report]] = {}
        self._news = asyncio.Event()
        self._save()

    def living(self) -> dict[str, Report]:
        """The last report of each replica that is there."""
        since = time.monotonic() - ALIVE_S
        return {name: report for name, (at, report) in self.heard.items() if at >= since}

    async def sync(self, report: Report) -> Order:
        """A replica's heartbeat: answered at once when there is news for it, else after a while."""
        self.heard[report.replica] = (time.monotonic(), report)
        if report.order is not None:
            self._become(rules.adopt(self.fleet, report.order, time.time()))
        self.step()
        if report.order is not None and report.order.generation == self.fleet.generation:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), POLL_S if self.fleet.candidate is None else TICK_S)
        return rules.order_of(self.fleet).model_copy(update={"replicas": max(len(self.living()), 1)})

    def step(self) -> None:
        """Decide what can be decided now."""
        reports, now = self.living(), time.time()
        self.heard = {name: self.heard[name] for name in reports}
        swap = self.config.swap
        self._become(rules.judge(self.fleet, reports, swap, self.config.ready_timeout_s, now))
        self._become(rules.watch(self.fleet, reports, swap, now))

    async def tick(self) -> None:
        """Decide for ever what time alone brings: a candidate that takes too long, a probation that ends."""
        while True:
            await asyncio.sleep(TICK_S)
            self.step()

    async def deploy(self, path: str, override: tuple[str, ...], catalogue: str | None = None) -> dict[str, Any]:
        """Put a version in place of the live one, wherever it agrees with it. Returns what `describe` does.

        Raises: SlimrankError when it is no artifact or cannot be deployed now, Refused when it was tried and refused.
        """
        version = await asyncio.to_thread(version_at, path, catalogue)
        place = Place(version=version, path=path, catalogue=catalogue)
        self._become(rules.propose(self.fleet, place, override, time.time()))
        attempt = self.fleet.generation
        while self.fleet.candidate is not None and self.fleet.candidate.attempt == attempt:
            await asyncio.sleep(TICK_S / 5)
        entry = self.fleet.versions[version]
        if self.fleet.live != version:
            raise Refused(version, entry.reason or "another version is live")
        await self._followed()
        return self.describe()

    async def roll_back(self) -> dict[str, Any]:
        """Make the previous version live. Returns what `describe` does. Raises: FleetError when there is none."""
        self._become(rules.roll_back(self.fleet, time.time()))
        await self._followed()
        return self.describe()

    async def _followed(self) -> None:
        """Until all living replicas answer with the live version, but not for ever."""
        deadline = time.monotonic() + ALIVE_S
        while time.monotonic() < deadline and any(r.live != self.fleet.live for r in self.living().values()):
            await asyncio.sleep(TICK_S / 5)

    def describe(self) -> dict[str, Any]:
        """The versions, newest first, and what each replica has."""
        fleet = self.fleet
        newest = sorted(fleet.versions.values(), key=lambda v: v.deployed_at, reverse=True)
        replicas = [
            {"replica": r.replica, "live": r.live, "loaded": list(r.loaded), "error": r.error}
            for _, r in sorted(self.living().items())
        ]
        return {
            "live": fleet.live,
            "previous": fleet.previous,
            "candidate": fleet.candidate.version if fleet.candidate else None,
            "probation": fleet.probation_since is not None,
            "versions": [v.model_dump(mode="json") for v in newest],
            "replicas": replicas,
        }

    def meters(self) -> Mapping[str, Mapping[str, Any]]:
        """Each living replica's counts."""
        return {name: report.meter for name, report in self.living().items()}

    def _become(self, fleet: Fleet) -> None:
        if fleet is self.fleet:
            return
        news, self._news = self._news, asyncio.Event()
        self.fleet = fleet
        self._save()
        news.set()

    def _save(self) -> None:
        if self.file is not None:
            write_text(self.file, Memory(run=self.run, fleet=self.fleet).model_dump_json(indent=2) + "\n")


def memory_file(config: ServeConfig) -> Path:
    """Where the fleet of the server on a port of this machine is remembered."""
    return cache_folder("serve") / f"fleet-{config.port}.json"


def remembered(file: Path, run: str) -> Fleet | None:
    """The fleet of this run as it was saved; None where there is none, or it cannot be read."""
    try:
        memory = Memory.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None
    return memory.fleet if memory.run == run else None


def version_at(path: str, catalogue: str | None = None) -> str:
    """The version of the artifact in a folder or storage, its manifest and signature checked; with another catalogue.

    Raises: SlimrankError when the path is relative, or there is no artifact that may be trusted.
    """
    from compress.artifact import read_manifest, version_with  # torch comes with it: a start need not wait for it

    for given in filter(None, (path, catalogue)):
        if "://" not in given and not Path(given).is_absolute():
            raise SlimrankError(f"{given[:200]!r}: must be an absolute path or a URI, as the server runs elsewhere")
    own = str(read_manifest(path)["version"])
    return own if catalogue is None else version_with(own, Path(catalogue))
