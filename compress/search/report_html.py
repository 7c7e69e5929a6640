"""A Report as one HTML file that opens with no network.

The page is page/report.html (jinja2, which escapes all it is given), page/report.css and page/report.js. It holds
plotly's own script, packed (2.0 MB in place of 4.8; the browser unpacks it), and says by its Content-Security-Policy
that nothing may be fetched and no script but those two may run, whatever the names in a log hold; 'unsafe-eval' is for
plotly, which compiles its WebGL calls for parallel coordinates.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from compress.search import report_charts as charts
from compress.search import report_words as words
from compress.search.report import PAGE, Point, Quality, Report
from trainer.errors import SlimrankError
from trainer.files import write_text

PAGE_FILES = Path(__file__).with_name("page")
CHARTS = {
    "front": charts.front_chart,
    "latency": charts.latency_chart,
    "gate": charts.gate_chart,
    "rows": charts.rows_chart,
    "bytes": charts.bytes_chart,
    "losses": charts.losses_chart,
    "importance": charts.importance_chart,
    "parallel": charts.parallel_chart,
}


def write_report(report: Report, out: Path | None = None) -> Path:
    """Write the page to `out`, or as report.html into the search's folder; an older one is replaced. Returns its path.

    Raises: SlimrankError when the folder of `out` is none, or cannot be written.
    """
    path = Path(out).absolute() if out is not None else report.folder / PAGE
    if not path.parent.is_dir():
        raise SlimrankError(f"{path.parent}: no such folder: make it first, or choose another --out")
    try:
        write_text(path, page(report))
    except OSError as error:
        raise SlimrankError(f"{path}: cannot be written ({error.strerror}): choose another --out") from None
    return path


def page(report: Report) -> str:
    """The whole page."""
    script = (PAGE_FILES / "report.js").read_text(encoding="utf-8")
    packed, plotly_hash = _plotly()
    figures = {name: chart(report) for name, chart in CHARTS.items()}
    drawn = {name: figure.to_plotly_json() for name, figure in figures.items() if figure is not None}
    for figure in drawn.values():
        figure["layout"].pop("template", None)  # page/report.js has the theme
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"w": words}
    template = environment.from_string((PAGE_FILES / "report.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        cards=cards(report),
        front=front_rows(report),
        peers=report.peers,
        drawn=set(drawn),
        figures=Markup(to_json_plotly(drawn)),  # < > / are escaped in it: noqa: S704
        style=Markup((PAGE_FILES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        plotly=Markup(packed),
        allowed=f"'sha256-{_hash(script)}' 'sha256-{plotly_hash}'",
    )


@functools.cache
def _plotly() -> tuple[str, str]:
    """plotly's script, gzipped, in base64; and its hash."""
    script = get_plotlyjs()
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode(), _hash(script)


def _hash(script: str) -> str:
    """As a Content-Security-Policy names a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def cards(report: Report) -> list[tuple[str, str, str]]:
    """The figures at the head of the page: (what, figure, what it compares with); the gate's where it was asked."""
    point = report.chosen
    if point is None:
        return []
    quality: Quality = report.gate if report.gate is not None else point.quality
    fp32 = report.search.fp32
    bound, lower = quality.delta_ne_upper, quality.delta_auc_lower
    timed = "predicted" if point.measured_ms is None else "measured"
    found: list[tuple[str, str, str, float | None]] = [
        (
            "Tables",
            words.bytes_of(point.table_bytes),
            f"of {words.bytes_of(report.fp32_bytes)} in fp32",
            report.fp32_bytes,
        ),
        ("Delta NE", words.percent(quality.delta_ne), f"bound {words.percent(bound)}", bound),
        ("Delta AUC", words.points(quality.delta_auc), f"bound {words.points(lower)}", lower),
    ]
    if point.best_ms is not None:
        beside = f"of 500; fp32 {words.milliseconds(fp32.ms)}"
        found.append((f"Time, {timed}", words.milliseconds(point.best_ms), beside, fp32.ms))
    if point.artifact_bytes is not None:
        beside = f"fp32 {words.bytes_of(fp32.artifact_bytes)}"
        found.append(("Artifact", words.bytes_of(point.artifact_bytes), beside, fp32.artifact_bytes))
    if quality.overlap is not None:
        found.append(("Top-k overlap", words.share(quality.overlap), "with fp32's ranking", quality.overlap))
    return [(what, figure, "" if known is None else beside) for what, figure, beside, known in found]


def front_rows(report: Report) -> list[dict[str, Any]]:
    """The rows of the table of the front."""
    refused = {r.index for r in report.gate.refused} if report.gate is not None else set()
    return [
        {"point": point, "chosen": point is report.chosen, "refused": index in refused, "knobs": knobs(point)}
        for index, point in enumerate(report.front)
    ]


def knobs(point: Point) -> list[tuple[str, str]]:
    """What a plan was asked, as words."""
    return [(words.shown(name), words.knob_value(value)) for name, value in point.params.items()]
