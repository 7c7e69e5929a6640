"""The page of a search: every shape is drawn, nothing is fetched, and no name of a log becomes HTML or a script."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from search_builders import HOSTILE, write_old_search, write_search

from compress.search import report_charts as charts
from compress.search.report import Report, read_report
from compress.search.report_axes import SignedLog, bytes_ticks, knob_axis, power_of_ten
from compress.search.report_html import CHARTS, cards, page, write_report
from trainer.errors import SlimrankError

NAMES = (HOSTILE, "javascript:alert(1)", '<a href="http://evil.example">x</a>', "{{ 7 * 7 }}", "%{customdata}")
SHAPES: dict[str, dict[str, Any]] = {
    "big": {"trials": 200, "tables": 39, "errors": 4},
    "small": {"trials": 3, "tables": 1},
    "several tasks": {"tasks": ("click", "like", "share")},
    "gate failed": {"passed": False},
    "interrupted": {"interrupted": True, "passed": False},
    "all but one failed": {"trials": 10, "errors": 9},
    "no peers": {"with_peers": False},
    "not ended": {"ended": False},
    "hostile": {"trials": 20, "names": NAMES, "tasks": (HOSTILE, "b"), "errors": 2, "error": HOSTILE},
}


class Page(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.at = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.at = tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.at, data))

    def attributes(self, name: str) -> list[str | None]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    def script(self, index: int) -> str:
        return [text for tag, text in self.text if tag == "script" and text.strip()][index]


def built(folder: Path, shape: str) -> tuple[Report, Page]:
    report = read_report(write_search(folder, **SHAPES[shape]))
    return report, Page(page(report))


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [s for inner in value.values() for s in strings(inner)]
    if isinstance(value, list):
        return [s for inner in value for s in strings(inner)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_a_page_that_fetches_nothing(tmp_path: Path, shape: str) -> None:
    report, html = built(tmp_path, shape)
    assert {tag for tag, _ in html.tags} & {"link", "img", "iframe", "object", "embed", "form", "a", "base"} == set()
    assert [tag for tag, _ in html.tags].count("script") == 3
    for name in ("src", "href", "action", "srcset", "data", "poster"):
        assert html.attributes(name) == []
    assert not any(name.startswith("on") for _, attrs in html.tags for name in attrs)
    style = "".join(text for tag, text in html.text if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    drawn = json.loads(html.script(0))
    assert set(drawn) == {name for name, chart in CHARTS.items() if chart(report) is not None}
    assert set(drawn) == {i for i in html.attributes("id") if i in CHARTS}


def test_the_policy_lets_only_the_pages_own_scripts_run(tmp_path: Path) -> None:
    _, html = built(tmp_path, "small")
    (policy,) = [content or "" for content in html.attributes("content") if "default-src" in (content or "")]
    packed = gzip.decompress(base64.b64decode(html.script(1)))
    assert packed.decode() == get_plotlyjs()
    own = html.script(2).encode()
    for script in (packed, own):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_hostile_names_are_only_ever_text(tmp_path: Path) -> None:
    _, html = built(tmp_path, "hostile")
    shown = [text for tag, text in html.text if tag not in ("script", "style")]
    assert any('<script>alert("x")</script>' in text for text in shown)
    assert not any("\x1b" in text for text in shown)
    figures = json.loads(html.script(0))
    labels = strings(figures)
    assert any("&lt;script&gt;" in label for label in labels)
    assert {tag for label in labels for tag in re.findall(r"<[^>]*>?", label)} <= {"<b>", "</b>", "<br>"}
    assert "{{ 7 * 7 }}" in json.dumps(labels)


def test_a_page_shows_what_the_search_found(tmp_path: Path) -> None:
    report, html = built(tmp_path, "several tasks")
    text = " ".join(text for tag, text in html.text if tag not in ("script", "style"))
    assert report.chosen is not None
    for words in (f"trial {report.chosen.number}", "gate passed", "torchrec INT8", "click", "share", "t_cat_07"):
        assert words in text
    assert "slimrank tune --checkpoint runs/criteo" in text
    assert "4be19a0d77" in text


def test_an_unended_and_an_old_search_say_so(tmp_path: Path) -> None:
    _, html = built(tmp_path / "new", "not ended")
    assert any("did not end" in text for _, text in html.text)
    old = Page(page(read_report(write_old_search(tmp_path / "old"))))
    assert any("command is not known" in text for _, text in old.text)
    assert "No other library's figures" in " ".join(text for _, text in old.text)


def test_a_page_is_small_and_written_the_same_twice(tmp_path: Path) -> None:
    path = write_report(read_report(write_search(tmp_path, 200, 39)))
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 2.5e6
    other = write_report(read_report(tmp_path), tmp_path / "other.html")
    assert other.read_bytes() == path.read_bytes()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    report = read_report(write_search(tmp_path, 3))
    with pytest.raises(SlimrankError, match="no such folder"):
        write_report(report, tmp_path / "none" / "r.html")


def test_cards_tell_the_gate_with_its_bounds_and_leave_out_what_is_not_known(tmp_path: Path) -> None:
    report = read_report(write_search(tmp_path / "new", 20))
    gate = report.gate
    assert gate is not None
    by_name = {what: (figure, beside) for what, figure, beside in cards(report)}
    assert by_name["Delta NE"] == (f"{gate.delta_ne:+.3%}", f"bound {gate.delta_ne_upper:+.3%}")
    assert by_name["Delta AUC"][1] == f"bound {gate.delta_auc_lower:+.5f}"
    assert next(beside for what, (_, beside) in by_name.items() if what.startswith("Time")) == "of 500; fp32 6.40 ms"
    old = {what: beside for what, _, beside in cards(read_report(write_old_search(tmp_path / "old")))}
    assert old["Artifact"] == ""
    assert not any(what.startswith("Time") for what in old)


# -- charts -----------------------------------------------------------------------------------------------------------


def test_rows_of_a_table_add_up_to_all(tmp_path: Path) -> None:
    report = read_report(write_search(tmp_path, 10, 39))
    figure = charts.rows_chart(report)
    assert figure is not None
    for index in range(39):
        assert sum(bar.x[index] for bar in figure.data) == pytest.approx(100)
    assert [bar.name for bar in figure.data] == ["8 bits", "4 bits", "2 bits", "centroid", "forgotten"]


def test_the_front_ends_its_whiskers_at_the_bounds(tmp_path: Path) -> None:
    report = read_report(write_search(tmp_path))
    figure = charts.front_chart(report)
    assert figure is not None
    (front,) = [trace for trace in figure.data if trace.name == "front"]
    scale = SignedLog(power_of_ten(report.budget or 1) / 10)
    for y, reach, point in zip(front.y, front.error_y.array, report.front, strict=True):
        assert y + reach == pytest.approx(scale.at(point.quality.delta_ne_upper))
    (peers,) = [trace for trace in figure.data if trace.name == "other libraries"]
    assert list(peers.x) == [p.all_bytes for p in report.peers]


def test_signed_log_is_odd_and_its_ticks_cover_the_values() -> None:
    scale = SignedLog(1e-4)
    assert scale.at(0.0) == 0
    assert scale.at(-0.01) == pytest.approx(-(scale.at(0.01) or 0))
    assert scale.at(None) is None
    assert scale.ticks([-2e-4, 0.02]) == pytest.approx([-1e-4, 0, 1e-4, 1e-3, 1e-2])
    low, high = scale.axis([-2e-4, 0.02], str)["range"]
    assert low < (scale.at(-2e-4) or 0)
    assert high > (scale.at(0.02) or 0)
    assert scale.axis([], str)["range"][0] < 0 < scale.axis([], str)["range"][1]


@pytest.mark.parametrize(("value", "power"), [(0.001, 0.001), (0.0099, 0.001), (7.0, 1.0), (10.0, 10.0)])
def test_power_of_ten(value: float, power: float) -> None:
    assert power_of_ten(value) == pytest.approx(power)


def test_marks_of_bytes_have_units() -> None:
    ticks = bytes_ticks([2e6, 4e7])
    assert dict(zip(ticks["tickvals"], ticks["ticktext"], strict=True))[3_000_000] == "3 MB"


def test_axes_of_knobs() -> None:
    assert knob_axis("bits", ["8", "2,4", "8"])["ticktext"] == ["2,4", "8"]
    assert knob_axis("centroids", [256, 4, 16])["values"] == [2, 0, 1]
    wide = knob_axis("lr", [10 ** (-n / 3) for n in range(12)])
    assert wide["values"][3] == pytest.approx(-1)
    plain = [n / 20 for n in range(1, 20)]
    assert knob_axis("smoothing", plain)["values"] == plain
