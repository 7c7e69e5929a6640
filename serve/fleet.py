"""Which version answers: a state machine of pure functions. What replicas report comes in, what they shall do goes out.

A version is a candidate first: every replica loads it and compares it with the live one. Then it is live, on probation
for a while, with the one before kept loaded; or it is refused, with the reason. Time is seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from serve.agreement import CHECKS, Agreement, disagreements, merged
from serve.config import SwapConfig
from serve.health import Health, speed_quantile, total
from trainer.data.schema import Config
from trainer.errors import SlimrankError

State = Literal["candidate", "live", "previous", "refused", "retired"]
KEPT = 50  # versions that are remembered
LEAST_ERRORS = 5  # failures from which on a version is taken back
LEAST_TIMED = 100  # requests of each version before their speeds are compared


class FleetError(SlimrankError):
    """A deploy or rollback that cannot be done now."""


class Version(Config):
    """What is known of one version."""

    version: str
    path: str
    catalogue: str | None = None
    state: State
    reason: str | None = None
    agreement: Agreement | None = None
    overridden: tuple[str, ...] = ()
    deployed_at: float
    live_at: float | None = None


class Place(Config):
    """A version, and where its artifact lies; `catalogue`: where the one lies that takes the place of its own."""

    version: str
    path: str
    catalogue: str | None = None


class Candidate(Config):
    """The version that replicas are to load and compare. `attempt` tells one deploy from another of the same."""

    version: str
    path: str
    catalogue: str | None = None
    attempt: int
    override: tuple[str, ...] = ()
    since: float


class Order(Config):
    """What replicas shall hold. A later one has a higher generation.

    On `probation`, requests that the live version cannot answer go to the previous one, and count against the live one.
    `replicas`: how many share the traffic.
    """

    generation: int
    live: Place
    previous: Place | None = None
    candidate: Place | None = None
    attempt: int = 0
    probation: bool = False
    replicas: int = 1


class Result(Config):
    """What came of loading a candidate in one replica."""

    attempt: int
    error: str | None = None
    agreement: Agreement | None = None


class Report(Config):
    """What one replica says of itself with every heartbeat. `meter`: its counts for the metrics route."""

    replica: str
    live: str
    loaded: tuple[str, ...] = ()
    order: Order | None = None
    result: Result | None = None
    health: dict[str, Health] = {}
    error: str | None = None
    meter: dict[str, object] = {}


class Fleet(Config):
    """The whole state. `probation_since`: when the live version was taken, while it may yet be taken back."""

    generation: int
    versions: dict[str, Version]
    live: str
    previous: str | None = None
    candidate: Candidate | None = None
    probation_since: float | None = None


# -- beginning -------------------------------------------------------------------------------------------------------


def begin(version: str, path: str, now: float) -> Fleet:
    """A fleet whose first version is live."""
    first = Version(version=version, path=path, state="live", deployed_at=now, live_at=now)
    return Fleet(generation=1, versions={version: first}, live=version)


def adopt(fleet: Fleet, order: Order, now: float) -> Fleet:
    """The fleet that gave an order, as far as it shows: for one that lost its memory, while replicas kept theirs."""
    if order.generation <= fleet.generation:
        return fleet
    versions = dict(fleet.versions)
    for state, place in (("previous", order.previous), ("live", order.live)):
        if place is not None:
            known = versions.get(place.version) or Version(**place.model_dump(), state="live", deployed_at=now)
            versions[place.version] = known.model_copy(update={"state": state})
    for name, version in versions.items():
        if version.state == "live" and name != order.live.version:
            versions[name] = version.model_copy(update={"state": "retired"})
    return fleet.model_copy(
        update={
            "generation": order.generation + 1,
            "versions": versions,
            "live": order.live.version,
            "previous": order.previous.version if order.previous else None,
            "candidate": None,
            "probation_since": now if order.probation and order.previous else None,
        }
    )


def order_of(fleet: Fleet) -> Order:
    """What replicas shall hold."""
    candidate = fleet.candidate
    return Order(
        generation=fleet.generation,
        live=_place(fleet, fleet.live),
        previous=_place(fleet, fleet.previous) if fleet.previous else None,
        candidate=placed(candidate) if candidate else None,
        attempt=candidate.attempt if candidate else 0,
        probation=fleet.probation_since is not None,
    )


def placed(of: Version | Candidate) -> Place:
    """Where a version lies."""
    return Place(version=of.version, path=of.path, catalogue=of.catalogue)


def _place(fleet: Fleet, version: str) -> Place:
    return placed(fleet.versions[version])


# -- a new version ---------------------------------------------------------------------------------------------------


def propose(fleet: Fleet, place: Place, override: Sequence[str], now: float) -> Fleet:
    """Make a version the candidate.

    Raises: FleetError when it is live already, another one is being deployed, or a check is unknown.
    """
    version = place.version
    unknown = sorted(set(override) - set(CHECKS))
    if unknown:
        raise FleetError(f"override {unknown[0][:40]!r}: no such check: {' and '.join(CHECKS)} can be overridden")
    if fleet.candidate is not None:
        raise FleetError(f"version {fleet.candidate.version} is being deployed: wait until it is live or refused")
    if version == fleet.live:
        raise FleetError(f"version {version} is live already")
    # the previous version stays where it was loaded from until what lies at the new place has proved to be the same
    kept = _place(fleet, version) if version == fleet.previous else place
    entry = Version(**kept.model_dump(), state="candidate", deployed_at=now)
    generation = fleet.generation + 1
    candidate = Candidate(**place.model_dump(), attempt=generation, override=tuple(override), since=now)
    return fleet.model_copy(
        update={
            "generation": generation,
            "versions": _recent({**fleet.versions, version: entry}, fleet),
            "candidate": candidate,
        }
    )


def _recent(versions: Mapping[str, Version], fleet: Fleet) -> dict[str, Version]:
    """The newest versions, and those in use."""
    used = {fleet.live, fleet.previous}
    newest = sorted(versions.values(), key=lambda v: v.deployed_at)[-KEPT:]
    keep = {v.version for v in newest} | used
    return {name: v for name, v in versions.items() if name in keep}


def judge(fleet: Fleet, reports: Mapping[str, Report], swap: SwapConfig, timeout_s: float, now: float) -> Fleet:
    """The fleet after what living replicas found of the candidate: unchanged while some still load it."""
    candidate = fleet.candidate
    if candidate is None:
        return fleet
    results = {name: r.result for name, r in reports.items() if r.result and r.result.attempt == candidate.attempt}
    for name, result in results.items():
        if result.error is not None:
            return refuse(fleet, f"{result.error} (replica {name})")
    if not reports or len(results) < len(reports):
        if now - candidate.since <= timeout_s:
            return fleet
        return refuse(fleet, f"{len(results)} of {len(reports)} replicas had it loaded after {timeout_s:.0f} s")
    agreement = merged(r.agreement for r in results.values() if r.agreement is not None)
    problems = disagreements(agreement, swap) if agreement else {}
    standing = [text for check, text in problems.items() if check not in candidate.override]
    overridden = tuple(check for check in problems if check in candidate.override)
    fleet = _changed(fleet, candidate.version, agreement=agreement, overridden=overridden)
    return refuse(fleet, "; ".join(standing)) if standing else take(fleet, now)


def refuse(fleet: Fleet, reason: str) -> Fleet:
    """Without the candidate; the live version goes on."""
    assert fleet.candidate is not None
    version = fleet.candidate.version
    state = "previous" if version == fleet.previous else "refused"
    fleet = _changed(fleet, version, state=state, reason=reason)
    return fleet.model_copy(update={"candidate": None, "generation": fleet.generation + 1})


def take(fleet: Fleet, now: float) -> Fleet:
    """The candidate is live, on probation."""
    candidate = fleet.candidate
    assert candidate is not None
    place = placed(candidate)
    fleet = _changed(fleet, place.version, path=place.path, catalogue=place.catalogue)
    fleet = _swapped(fleet, candidate.version, "previous", now)
    return fleet.model_copy(update={"candidate": None, "probation_since": now})


# -- back to the previous one ----------------------------------------------------------------------------------------


def roll_back(fleet: Fleet, now: float, reason: str | None = None) -> Fleet:
    """The previous version is live again.

    Without a reason the one that was live becomes the previous one, so that another rollback undoes this one; with a
    reason it is refused, and there is none to go back to. A candidate is given up: it was compared with another one.
    Raises: FleetError when there is no previous version.
    """
    if fleet.previous is None:
        raise FleetError(f"there is no version before {fleet.live} to go back to: deploy the one you want")
    if fleet.candidate is not None:
        fleet = refuse(fleet, "given up: the live version was rolled back meanwhile")
    bad, back = fleet.live, fleet.previous
    assert back is not None
    fleet = _swapped(fleet, back, "previous" if reason is None else "refused", now)
    if reason is not None:
        fleet = _changed(fleet, bad, reason=reason).model_copy(update={"previous": None})
    return fleet.model_copy(update={"probation_since": None})


def watch(fleet: Fleet, reports: Mapping[str, Report], swap: SwapConfig, now: float) -> Fleet:
    """The fleet after a look at how the live version does: rolled back, through its probation, or unchanged."""
    if fleet.probation_since is None:
        return fleet
    reason = complaint(fleet, reports, swap)
    if reason is not None and fleet.previous is not None:
        return roll_back(fleet, now, reason)
    if now - fleet.probation_since < swap.probation_s:
        return fleet
    return fleet.model_copy(update={"probation_since": None, "generation": fleet.generation + 1})


def complaint(fleet: Fleet, reports: Mapping[str, Report], swap: SwapConfig) -> str | None:
    """Why the live version should not be; None when there is no reason."""
    live = total(r.health[fleet.live] for r in reports.values() if fleet.live in r.health)
    if live.errors >= LEAST_ERRORS and live.error_share > swap.max_error_share:
        return (
            f"could not answer {live.errors} of {live.requests} requests that the version before it answered, "
            f"at most {swap.max_error_share:.1%} may be (swap.max_error_share)"
        )
    before = total(r.health[fleet.previous] for r in reports.values() if fleet.previous in r.health)
    if min(live.requests, before.requests) < LEAST_TIMED:
        return None
    new, old = speed_quantile(live, 0.95), speed_quantile(before, 0.95)
    if new is not None and old is not None and new > swap.max_slowdown * old:
        return (
            f"p95 of {new * 1e6:.1f} us a candidate, {new / old:.1f} times the {old * 1e6:.1f} of the version before "
            f"it, at most {swap.max_slowdown:g} times may be (swap.max_slowdown)"
        )
    return None


def _swapped(fleet: Fleet, version: str, before: State, now: float) -> Fleet:
    """Another version is live, and what was live is in the state `before`."""
    old, oldest = fleet.live, fleet.previous
    if oldest is not None and oldest != version:
        fleet = _changed(fleet, oldest, state="retired")
    fleet = _changed(fleet, old, state=before)
    fleet = _changed(fleet, version, state="live", live_at=now, reason=None)
    return fleet.model_copy(update={"live": version, "previous": old, "generation": fleet.generation + 1})


def _changed(fleet: Fleet, version: str, **changes: object) -> Fleet:
    entry = fleet.versions[version].model_copy(update=changes)
    return fleet.model_copy(update={"versions": {**fleet.versions, version: entry}})
