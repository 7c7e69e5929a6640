"""What `slimrank report` prints for people: the page's content as lines, in as many columns as the terminal has."""

from __future__ import annotations

import textwrap

from cluster.tables import Column, fitted, width
from compress.search import report_words as words
from compress.search.report import Point, Report

BAR = 20  # columns of a bar that is full


def report_lines(report: Report) -> list[str]:
    """All that the page shows, as text."""
    parts = [
        _head(report),
        front_lines(report),
        [] if report.gate is None else [line for text in words.gate_words(report.gate) for line in wrapped(text)],
        task_lines(report),
        table_lines(report),
        loss_lines(report),
        importance_lines(report),
        error_lines(report),
        origin_lines(report),
    ]
    return [line for part in parts if part for line in (*part, "")][:-1]


def wrapped(text: str, indent: str = "") -> list[str]:
    """A sentence as lines of the terminal's width."""
    return textwrap.wrap(text, max(width() - 1, 20), subsequent_indent=indent, break_long_words=True)


def _head(report: Report) -> list[str]:
    told = [f"{words.shown(report.name)}: {words.headline(report)}", report.status, words.course_words(report)]
    told += [words.state_words(report) or ""]
    if report.tune is not None and report.tune.why:
        told.append(f"why: {words.shown(report.tune.why, 600)}")
    return [line for text in told if text for line in wrapped(text)]


def front_lines(report: Report) -> list[str]:
    """The front, and the points of other libraries."""
    if not report.front and not report.peers:
        return []
    refused = {r.index for r in report.gate.refused} if report.gate is not None else set()
    marks = [_mark(report, p, i in refused) for i, p in enumerate(report.front)] + ["  "] * len(report.peers)
    names = [words.plan_name(p) for p in report.front] + [words.shown(p.name, 20) for p in report.peers]
    sizes = [p.table_bytes for p in report.front] + [p.all_bytes for p in report.peers]
    quality = [*(p.quality for p in report.front), *report.peers]
    times = [words.milliseconds(p.best_ms) for p in report.front] + [words.UNKNOWN] * len(report.peers)
    columns = [
        Column(0, "plan", [f"{mark}{name}" for mark, name in zip(marks, names, strict=True)]),
        Column(0, "tables", [words.bytes_of(n) for n in sizes]),
        Column(3, "of fp32", [words.of_fp32(report, n) for n in sizes]),
        Column(1, "delta NE", [words.percent(q.delta_ne) for q in quality]),
        Column(0, "bound", [words.percent(q.delta_ne_upper) for q in quality]),
        Column(4, "delta AUC", [words.points(q.delta_auc) for q in quality]),
        Column(5, "overlap", [words.share(q.overlap) for q in quality]),
        Column(2, "of 500", times),
    ]
    return fitted("front (> chosen, x refused by the gate), other libraries with id maps", columns)


def _mark(report: Report, point: Point, refused: bool) -> str:
    return "> " if point is report.chosen else "x " if refused else "  "


def task_lines(report: Report) -> list[str]:
    """The gate by task, where there are several."""
    tasks = {} if report.gate is None else report.gate.tasks
    if len(tasks) < 2:
        return []
    columns = [
        Column(0, "gate, by task", [words.shown(task, 24) for task in tasks]),
        Column(0, "delta NE", [words.percent(q.delta_ne, 4) for q in tasks.values()]),
        Column(1, "bound", [words.percent(q.delta_ne_upper, 4) for q in tasks.values()]),
        Column(2, "delta AUC", [words.points(q.delta_auc) for q in tasks.values()]),
    ]
    return fitted("", columns)


def table_lines(report: Report) -> list[str]:
    """What became of each table."""
    if not report.tables:
        return []
    tables = [table for _, table in report.tables]
    most = max(t.all_bytes for t in tables) or 1
    columns = [
        Column(0, "table", [words.shown(name, 24) for name, _ in report.tables]),
        Column(3, "rows", [f"{t.rows:,}" for t in tables]),
        Column(0, "bits", [words.bits_words(t) for t in tables]),
        Column(1, "pruned", [words.share(t.pruned_share) for t in tables]),
        Column(0, "bytes", [words.bytes_of(t.all_bytes) for t in tables]),
        Column(4, "of fp32", [words.share(t.all_bytes / t.fp32_bytes) if t.fp32_bytes else "" for t in tables]),
        Column(2, "", [bar(t.all_bytes / most) for t in tables], left=True),
    ]
    return fitted("tables of the chosen plan; bytes with id maps", columns)


def loss_lines(report: Report) -> list[str]:
    """Predicted against measured loss of each table alone."""
    some = [(name, t) for name, t in report.tables if t.predicted is not None and t.measured is not None]
    if not some:
        return []
    some.sort(key=lambda row: -(row[1].predicted or 0.0))
    columns = [
        Column(0, "table", [words.shown(name, 24) for name, _ in some]),
        Column(0, "predicted", [words.micronats(t.predicted) for _, t in some]),
        Column(0, "measured", [words.micronats(t.measured) for _, t in some]),
        Column(1, "+-", [words.micronats(t.error).lstrip("+") for _, t in some]),
    ]
    return fitted("each table alone: millionths of a nat of log loss", columns)


def importance_lines(report: Report) -> list[str]:
    """What set the best trials apart."""
    shares = report.importance
    if not shares:
        return []
    columns = [
        Column(0, "knob", [words.shown(name, 24) for name in shares]),
        Column(0, "share", [f"{value:.0%}" for value in shares.values()]),
        Column(1, "", [bar(value) for value in shares.values()], left=True),
    ]
    return fitted("what mattered: share in what sets the best fifth of the trials apart", columns)


def error_lines(report: Report) -> list[str]:
    """What trials failed of."""
    errors = words.errors_by_words(report)
    lines = [
        line for text, n, first in errors[:5] for line in wrapped(f"{n} failed, first trial {first}: {text}", "  ")
    ]
    return lines + ([f"and {len(errors) - 5} other errors: see trials.jsonl"] if len(errors) > 5 else [])


def origin_lines(report: Report) -> list[str]:
    """The command and the lineage."""
    command = words.shown(report.search.command or "the command is not known: there is no search.json", 2000)
    pairs = [line for key, value in words.provenance(report) for line in wrapped(f"{key}: {value}", "  ")]
    return ["to reproduce:", *wrapped(f"  {command}", "    "), *pairs]


def bar(part: float) -> str:
    """A share of 1 as a bar."""
    return "#" * max(round(BAR * part), 1 if part > 0 else 0)
