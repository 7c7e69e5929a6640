"""The report's page in a real browser: all charts are drawn by the page's own script, and names run nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))  # its builders; the package `compress` stays itself

from search_builders import HOSTILE, write_search  # noqa: E402

from compress.search.report import read_report  # noqa: E402
from compress.search.report_html import CHARTS, write_report  # noqa: E402

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=30000"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
def test_a_browser_draws_every_chart_and_runs_no_name(tmp_path: Path) -> None:
    shape = {"names": (HOSTILE, "b"), "tasks": (HOSTILE, "c"), "errors": 1, "error": HOSTILE}
    path = write_report(read_report(write_search(tmp_path / "search", 200, 8, **shape)))
    asked = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=240, check=True)
    assert f'data-drawn="{len(CHARTS)}"' in done.stdout
    drawn = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)
    assert "could not be drawn" not in drawn
    assert drawn.count('class="main-svg"') >= len(CHARTS) - 1  # parallel coordinates need WebGL
    assert "<img" not in drawn
    assert 'href="http' not in drawn
    assert "&lt;script&gt;alert" in drawn
