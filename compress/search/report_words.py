"""Figures and sentences of a search's report, for the page and for a terminal. Plain text: nothing is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from compress.config import SearchConfig
from compress.manifest import printable
from compress.search.report import Gate, Peer, Point, Report, Table
from trainer.progress import size

UNKNOWN = "-"


def percent(value: float | None, digits: int = 3) -> str:
    """A change relative to fp32, in percent: +0.012%."""
    return UNKNOWN if value is None else f"{value:+.{digits}%}"


def share(value: float | None) -> str:
    """A part of a whole, in percent: 12.4%, 2.1%, 0.043%."""
    return UNKNOWN if value is None else f"{value:.1%}" if abs(value) >= 0.1 else f"{100 * value:.2g}%"


def points(value: float | None) -> str:
    """A change of AUC: +0.00012."""
    return UNKNOWN if value is None else f"{value:+.5f}"


def bytes_of(value: float | None) -> str:
    """Bytes in units of 1000."""
    return UNKNOWN if value is None else size(value)


def milliseconds(value: float | None) -> str:
    """A time of 500 candidates: 2.31 ms."""
    return UNKNOWN if value is None else f"{value:.2f} ms"


def micronats(value: float | None) -> str:
    """A change of mean log loss in millionths of a nat."""
    return UNKNOWN if value is None else f"{1e6 * value:+,.2f}"


def of_fp32(report: Report, value: float | None) -> str:
    """Bytes as a share of the fp32 tables."""
    return share(None if value is None or not report.fp32_bytes else value / report.fp32_bytes)


def shown(text: str, width: int = 40) -> str:
    """A name that a stranger gave: no control characters, and not longer than `width`."""
    clean = printable(" ".join(str(text).split()))
    return clean if len(clean) <= width else f"{clean[: width - 1]}…"


def knob_value(value: Any) -> str:
    """What a knob was set to."""
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def bits_words(table: Table) -> str:
    """Bits of a table's own rows, the most looked up first: 8/4/2."""
    return "/".join(str(tier.bits) for tier in table.tiers) or "none"


def plan_name(point: Point) -> str:
    """How the report calls a plan."""
    return f"trial {point.number}"


def peer_words(peer: Peer) -> str:
    """A peer's figures in a line."""
    bound = f"{percent(peer.delta_ne)} (bound {percent(peer.delta_ne_upper)})"
    return f"{shown(peer.name)}: {size(peer.all_bytes)} with id maps, delta NE {bound}"


def headline(report: Report) -> str:
    """What came out, in a line."""
    point = report.chosen
    if point is None:
        return f"{len(report.front)} plans on the front so far" if report.front else "No plan could be compared"
    part = of_fp32(report, point.table_bytes)
    return f"Tables in {bytes_of(point.table_bytes)}" + ("" if part == UNKNOWN else f", {part} of fp32")


def gate_words(gate: Gate) -> list[str]:
    """The gate: what it found, and what would help where it did not let the plan pass."""
    rows = "" if gate.rows is None else f" on {gate.rows:,.0f} rows that the search never saw"
    level = f"{gate.confidence:.0%} bound" if gate.confidence is not None else "bound"
    figures = f"delta NE {percent(gate.delta_ne, 4)}, {level} {percent(gate.delta_ne_upper, 4)}"
    budget = "" if gate.budget is None else f", budget {percent(gate.budget, 4)}"
    lines = [f"The gate {'passed' if gate.passed else 'did NOT pass'}{rows}: {figures}{budget}."]
    if gate.passed and gate.refused:
        lines.append("The next smaller plan was tried after it, and refused.")
    if gate.ms is not None and gate.max_ms is not None and gate.ms > gate.max_ms:
        lines.append(f"500 candidates take {gate.ms:.3g} ms, allowed are {gate.max_ms:g}: allow more.")
    elif not gate.passed and gate.rows_to_resolve and gate.rows_to_resolve > (gate.rows or 0):
        lines.append(f"The data cannot resolve this budget: about {gate.rows_to_resolve:,.0f} rows would.")
    elif not gate.passed:
        lines.append("No plan tried holds this budget: allow more bits, or a larger --max-delta-ne.")
    return lines


def course_words(report: Report) -> str:
    """How the search went: trials, failures, what was stopped early."""
    stopped = sum(t.stopped for t in report.trials)
    words = [f"{len(report.trials)} trials", f"{stopped} stopped early", f"{len(report.failed)} failed"]
    if report.tune is not None and report.tune.seconds is not None:
        words.append(f"{report.tune.seconds:,.0f} s")
    if report.unreadable:
        words.append(f"{report.unreadable} lines of trials.jsonl cannot be read")
    return ", ".join(words)


def state_words(report: Report) -> str | None:
    """What the reader must know of a search that did not end as it should; None where it did."""
    if report.tune is None:
        return (
            "The search did not end: there is no tune.json. The front is that of the trials so far, on the search "
            "sample; nothing was chosen and no gate was asked. Go on with 'slimrank tune --resume'."
        )
    if report.tune.interrupted:
        return "The search was interrupted: this is what it had found. Go on with 'slimrank tune --resume'."
    return None


def errors_by_words(report: Report) -> list[tuple[str, int, int]]:
    """What trials failed of: (message, how many trials, the first one's number), the most frequent first."""
    found: dict[str, list[int]] = {}
    for trial in report.failed:
        found.setdefault(shown(trial.error or "its figures are not finite", 300), []).append(trial.number)
    return sorted(((error, len(n), n[0]) for error, n in found.items()), key=lambda row: -row[1])


def leaves(value: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted path, value) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(inner, Mapping):
            pairs += leaves(inner, name)
        else:
            pairs.append((shown(name, 80), shown(str(inner), 300)))
    return pairs


def changed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a search's configuration says that is not the default; all of one that this version does not know."""
    try:
        return SearchConfig.model_validate(config).model_dump(mode="json", exclude_defaults=True)
    except ValidationError:
        return config


def provenance(report: Report) -> list[tuple[str, str]]:
    """All that says where the result came from, as (name, value): enough to run the search again."""
    search = report.search
    found: dict[str, Any] = {"started": search.started} if search.started else {}
    found |= {"checkpoint": search.checkpoint, "data": search.data, "samples": search.samples}
    found |= {"lineage": report.tune.lineage if report.tune else {}}
    found |= {"artifact": report.tune.artifact if report.tune else None, "config": changed(search.config)}
    found |= {"hardware": search.hardware, "versions": search.versions}
    return leaves({key: value for key, value in found.items() if value not in (None, {})})
