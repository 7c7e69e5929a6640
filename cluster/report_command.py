"""`slimrank report`: reads a search, writes its page, prints the same as text (made in cluster/reports.py)."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.options import FILE, FOLDER, common
from cluster.output import emit


@click.command()
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--out", type=FILE, help="HTML file to write; DIR/report.html by default.")
@common
def report(folder: Path, out: Path | None, as_json: bool, address: str | None, debug: bool) -> None:  # noqa: ARG001
    """What a search found, as one HTML file that opens with no network, and as text.

    DIR is what 'tune --out' wrote. A search that did not end is reported as far as it came.
    """
    from cluster.reports import report_lines
    from compress.search.report import read_report
    from compress.search.report_html import write_report

    found = read_report(folder)
    path = write_report(found, out)
    emit({"report": str(path), **found.summary}, as_json, [*report_lines(found), "", f"page: {path}"])
