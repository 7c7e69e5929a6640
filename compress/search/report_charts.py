"""The charts of a search's report, as plotly figures; None where there is nothing to draw.

Colours are CSS variables, `var(--name)`: the page (page/report.js) sets them for light and dark. Names from the log
are escaped here, as plotly reads some HTML in labels.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from compress.search import report_words as words
from compress.search.importance import varying
from compress.search.report import Point, Quality, Report, Table
from compress.search.report_axes import (
    SignedLog,
    bytes_ticks,
    escaped,
    hover,
    knob_axis,
    power_of_ten,
    quality_lines,
    tick_percent,
    whiskers,
)

MAX_AXES = 8  # of knobs in parallel coordinates: more cannot be read
ROW_PX = 22
BIT_COLORS = {32: "var(--b16)", 16: "var(--b16)", 8: "var(--b8)", 4: "var(--b4)", 2: "var(--b2)", 0: "var(--centroid)"}
SCALE = [[0.0, "var(--scale-low)"], [0.5, "var(--scale-mid)"], [1.0, "var(--scale-high)"]]


# -- the front --------------------------------------------------------------------------------------------------------


def front_chart(report: Report) -> go.Figure | None:
    """Size against delta NE, coloured by time: trials, the front with its bounds, the peers, the choice, the budget."""
    if not report.front:
        return None
    scale = SignedLog(power_of_ten(report.budget or 1e-3) / 10)
    figure = go.Figure()
    _add_trials(figure, report, scale, "bytes")
    _add_front(figure, report, scale, "bytes")
    _add_peers(figure, report, scale)
    _add_budget(figure, report, scale)
    figure.update_layout(
        height=480,
        xaxis={"title": "tables, bytes as stored (log scale)", "type": "log", **bytes_ticks(_sizes(report))},
        yaxis={"title": "delta NE (signed log scale)", **scale.axis(_losses(report), tick_percent)},
    )
    return figure


def latency_chart(report: Report) -> go.Figure | None:
    """Time of 500 candidates against delta NE, coloured by size."""
    if sum(p.best_ms is not None for p in report.front) < 2:
        return None
    scale = SignedLog(power_of_ten(report.budget or 1e-3) / 10)
    figure = go.Figure()
    _add_trials(figure, report, scale, "ms")
    _add_front(figure, report, scale, "ms")
    _add_budget(figure, report, scale)
    losses = [q.delta_ne for q in (*report.finished, *(p.quality for p in report.front)) if q.delta_ne is not None]
    figure.update_layout(
        height=400,
        xaxis={"title": "500 candidates, ms", "rangemode": "tozero"},
        yaxis={"title": "delta NE (signed log scale)", **scale.axis(losses, tick_percent)},
    )
    return figure


def _sizes(report: Report) -> list[float]:
    """All that the axis of bytes must cover."""
    places = [*(p.table_bytes for p in (*report.front, *report.finished)), *(p.all_bytes for p in report.peers)]
    return [x for x in places if x] or [1.0]


def _losses(report: Report) -> list[float]:
    """All that the axis of delta NE must cover."""
    parts = [*report.finished, *report.peers, *(p.quality for p in report.front)]
    bounds = [p.quality.delta_ne_upper for p in report.front] + [report.budget]
    return [x for x in [*(p.delta_ne for p in parts), *bounds] if x is not None]


def _add_trials(figure: go.Figure, report: Report, scale: SignedLog, across: str) -> None:
    on_front = {p.number for p in report.front}
    rest = [t for t in report.finished if t.number not in on_front]
    for name, stopped, symbol in (("trial", False, "circle"), ("stopped early", True, "x-thin-open")):
        some = [t for t in rest if t.stopped == stopped]
        text = [hover(f"trial {t.number}", words.bytes_of(t.table_bytes), *quality_lines(t)) for t in some]
        figure.add_scatter(
            x=[t.table_bytes if across == "bytes" else t.ms for t in some],
            y=[scale.at(t.delta_ne) for t in some],
            mode="markers",
            name=name,
            visible=bool(some),
            marker={"size": 6, "color": "var(--faint)", "symbol": symbol},
            hovertext=text,
            hoverinfo="text",
        )


def _add_front(figure: go.Figure, report: Report, scale: SignedLog, across: str) -> None:
    """The front, its colour the third objective; a ring around the choice."""
    points = [
        p for p in report.front if p.quality.delta_ne is not None and (across == "bytes" or p.best_ms is not None)
    ]
    places = [p.table_bytes if across == "bytes" else p.best_ms for p in points]
    colors = [p.best_ms if across == "bytes" else (p.table_bytes or 0) / 1e6 for p in points]
    known = all(c is not None for c in colors)
    bar = {"title": {"text": "ms" if across == "bytes" else "MB"}, "thickness": 10, "outlinewidth": 0, "len": 0.6}
    painted = {"color": colors, "colorscale": SCALE, "colorbar": bar} if known else {"color": "var(--accent)"}
    figure.add_scatter(
        x=places,
        y=[scale.at(p.quality.delta_ne) for p in points],
        error_y={**whiskers(scale, [p.quality for p in points]), "color": "var(--muted)", "width": 3},
        mode="lines+markers" if across == "bytes" else "markers",
        name="front",
        line={"color": "var(--muted)", "width": 1},
        marker={"size": 11, "line": {"width": 1, "color": "var(--ink)"}, **painted},
        hovertext=[_front_hover(report, p) for p in points],
        hoverinfo="text",
    )
    chosen = report.chosen
    if chosen in points:
        figure.add_scatter(
            x=[chosen.table_bytes if across == "bytes" else chosen.best_ms],
            y=[scale.at(chosen.quality.delta_ne)],
            mode="markers",
            name="chosen",
            marker={"size": 20, "symbol": "circle-open", "color": "var(--warm)", "line": {"width": 3}},
            hoverinfo="skip",
        )


def _front_hover(report: Report, point: Point) -> str:
    kind = "predicted" if point.measured_ms is None else "measured"
    lines = [f"{words.bytes_of(point.table_bytes)}, {words.of_fp32(report, point.table_bytes)} of fp32"]
    if point.best_ms is not None:
        lines.append(f"{words.milliseconds(point.best_ms)} of 500 candidates, {kind}")
    asked = [f"{escaped(k)} {html.escape(words.knob_value(v), quote=False)}" for k, v in point.params.items()]
    return hover(words.plan_name(point), *lines, *quality_lines(point.quality), *asked)


def _add_peers(figure: go.Figure, report: Report, scale: SignedLog) -> None:
    some = [p for p in report.peers if p.delta_ne is not None]
    if not some:
        return
    sides = ["middle left" if "greedy" in p.name else "middle right" for p in some]
    figure.add_scatter(
        x=[p.all_bytes for p in some],
        y=[scale.at(p.delta_ne) for p in some],
        mode="markers+text",
        name="other libraries",
        text=[escaped(p.name) for p in some],
        textposition=sides,
        textfont={"size": 11, "color": "var(--muted)"},
        cliponaxis=False,
        marker={"size": 10, "symbol": "diamond-open", "color": "var(--peer)", "line": {"width": 2}},
        hovertext=[hover(escaped(p.name), words.bytes_of(p.all_bytes), *quality_lines(p)) for p in some],
        hoverinfo="text",
    )


def _add_budget(figure: go.Figure, report: Report, scale: SignedLog) -> None:
    if report.budget is None:
        return
    line = {"color": "var(--warm)", "width": 1.5, "dash": "dash"}
    text = {"text": f"budget {words.percent(report.budget)}", "font": {"color": "var(--warm)", "size": 11}}
    figure.add_hline(y=scale.at(report.budget), line=line, annotation=text, annotation_position="top right")


# -- the gate ---------------------------------------------------------------------------------------------------------


def gate_chart(report: Report) -> go.Figure | None:
    """Delta NE of the choice and its bound by sample and task, and the bounds of refused plans, against the budget."""
    gate, point = report.gate, report.chosen
    if gate is None or gate.delta_ne is None:
        return None
    rows: list[tuple[str, Quality, str]] = [("gate", gate, "var(--accent)")]
    if len(gate.tasks) > 1:
        rows += [(f"gate, {escaped(task, 18)}", part, "var(--accent)") for task, part in gate.tasks.items()]
    if point is not None:
        rows += [("selection", point.selection, "var(--muted)")] if point.selection else []
        rows += [("search", point, "var(--muted)")]
    for refused in gate.refused:
        known = 0 <= refused.index < len(report.front)
        name = f"{words.plan_name(report.front[refused.index])}, refused" if known else "refused"
        rows.append(
            (name, Quality(delta_ne=refused.delta_ne_upper, delta_ne_upper=refused.delta_ne_upper), "var(--warm)")
        )
    rows = [row for row in rows if row[1].delta_ne is not None][::-1]
    figure = go.Figure(
        go.Scatter(
            x=[100 * (part.delta_ne or 0.0) for _, part, _ in rows],
            y=list(range(len(rows))),
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [100 * ((part.delta_ne_upper or 0.0) - (part.delta_ne or 0.0)) for _, part, _ in rows],
                "arrayminus": [0.0] * len(rows),
                "color": "var(--muted)",
                "width": 6,
            },
            mode="markers",
            marker={"size": 11, "color": [color for *_, color in rows]},
            hovertext=[hover(name, *quality_lines(part)) for name, part, _ in rows],
            hoverinfo="text",
        )
    )
    if gate.budget is not None:
        line = {"color": "var(--warm)", "width": 1.5, "dash": "dash"}
        text = {"text": f"budget {words.percent(gate.budget)}", "font": {"color": "var(--warm)", "size": 11}}
        figure.add_vline(x=100 * gate.budget, line=line, annotation=text, annotation_position="top")
    figure.update_layout(
        height=110 + 30 * len(rows),
        showlegend=False,
        margin={"t": 28},
        xaxis={"title": "delta NE, % of fp32's NE", "ticksuffix": "%", "zeroline": True, "rangemode": "tozero"},
        yaxis={
            "tickvals": list(range(len(rows))),
            "ticktext": [name for name, *_ in rows],
            "showgrid": False,
            "zeroline": False,
        },
    )
    return figure


# -- the tables -------------------------------------------------------------------------------------------------------


def rows_chart(report: Report) -> go.Figure | None:
    """What became of each table's rows: the share at each number of bits, on a centroid, and forgotten."""
    tables = report.tables
    parts = [(f"{bits} bits", BIT_COLORS.get(bits, "var(--b8)"), _rows_at(tables, bits)) for bits in _bits_of(tables)]
    parts.append(("centroid", "var(--centroid)", [t.centroid_rows for _, t in tables]))
    parts.append(("forgotten", "var(--forgotten)", [t.forgotten_rows for _, t in tables]))
    whole = [max(sum(column), 1) for column in zip(*(p[2] for p in parts), strict=True)]
    shares = [
        (name, color, [100 * n / total for n, total in zip(count, whole, strict=True)]) for name, color, count in parts
    ]
    return _bars(report, shares, "rows, % of the table", "%")


def bytes_chart(report: Report) -> go.Figure | None:
    """Bytes of each table: rows and id map."""
    tables = report.tables
    parts = [("rows", "var(--b8)", [float(t.bytes) for _, t in tables])]
    parts.append(("id map", "var(--b2)", [float(t.id_map_bytes) for _, t in tables]))
    figure = _bars(report, parts, "bytes as stored", "B")
    if figure is not None:
        figure.update_xaxes(tickformat="~s")
    return figure


def _bits_of(tables: Sequence[tuple[str, Table]]) -> list[int]:
    return sorted({tier.bits for _, t in tables for tier in t.tiers if tier.bits}, reverse=True)


def _rows_at(tables: Sequence[tuple[str, Table]], bits: int) -> list[int]:
    return [sum(tier.rows for tier in t.tiers if tier.bits == bits) for _, t in tables]


def _table_hover(name: str, table: Table) -> str:
    whole = "" if not table.fp32_bytes else f", {words.share(table.all_bytes / table.fp32_bytes)} of fp32"
    return hover(
        escaped(name, 60),
        f"{table.rows:,} rows, bits {words.bits_words(table)}",
        f"{words.share(table.pruned_share)} pruned: {table.centroid_rows:,} read one of {table.centroids} centroids, "
        f"{table.forgotten_rows:,} forgotten",
        f"{words.bytes_of(table.bytes)} rows + {words.bytes_of(table.id_map_bytes)} id map{whole}",
    )


def _bars(report: Report, parts: Sequence[tuple[str, str, list[float]]], title: str, suffix: str) -> go.Figure | None:
    """A stacked bar a table, the largest table on top."""
    tables = report.tables
    if not tables:
        return None
    places = list(range(len(tables)))[::-1]
    text = [_table_hover(name, table) for name, table in tables]
    figure = go.Figure()
    for name, color, values in parts:
        if any(values):
            figure.add_bar(
                x=values,
                y=places,
                orientation="h",
                name=name,
                marker={"color": color},
                hovertext=text,
                hoverinfo="text",
            )
    figure.update_layout(
        barmode="stack",
        bargap=0.25,
        height=120 + ROW_PX * max(len(tables), 2),
        legend={"traceorder": "normal"},
        margin={"t": 72},
        xaxis={"title": title, "ticksuffix": suffix, "nticks": 5},
        yaxis={
            "tickvals": places,
            "ticktext": [escaped(name, 20) for name, _ in tables],
            "showgrid": False,
            "zeroline": False,
            "range": [-0.6, len(tables) - 0.4],
        },
    )
    return figure


def losses_chart(report: Report) -> go.Figure | None:
    """Predicted against measured loss of each table compressed alone, both in millionths of a nat."""
    known = [(n, t.predicted, t.measured, t.error) for n, t in report.tables]
    some = [(n, 1e6 * p, 1e6 * m, 1e6 * (e or 0.0)) for n, p, m, e in known if p is not None and m is not None]
    if not some:
        return None
    sizes = sorted(abs(v) for _, p, m, _ in some for v in (p, m) if v)
    scale = SignedLog(power_of_ten(max(sizes[len(sizes) // 4], sizes[-1] / 1e4)) if sizes else 1.0)
    reach = [v for _, p, m, _ in some for v in (p, m)]
    axis = scale.axis(reach, lambda tick: f"{tick:g}")
    figure = go.Figure()
    figure.add_scatter(
        x=axis["range"], y=axis["range"], mode="lines", line={"color": "var(--faint)", "dash": "dot"}, hoverinfo="skip"
    )
    figure.add_scatter(
        x=[scale.at(p) for _, p, _, _ in some],
        y=[scale.at(m) for _, _, m, _ in some],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [(scale.at(m + e) or 0.0) - (scale.at(m) or 0.0) for _, _, m, e in some],
            "arrayminus": [(scale.at(m) or 0.0) - (scale.at(m - e) or 0.0) for _, _, m, e in some],
            "color": "var(--muted)",
            "thickness": 1,
            "width": 0,
        },
        mode="markers",
        marker={"size": 9, "color": "var(--accent)"},
        hovertext=[
            hover(escaped(n, 60), f"predicted {p:+,.2f}", f"measured {m:+,.2f} ± {e:,.2f}", "millionths of a nat")
            for n, p, m, e in some
        ],
        hoverinfo="text",
    )
    figure.update_layout(
        height=440,
        showlegend=False,
        xaxis={"title": "predicted, millionths of a nat", **axis},
        yaxis={"title": "measured", **axis},
    )
    return figure


# -- what mattered ----------------------------------------------------------------------------------------------------


def importance_chart(report: Report) -> go.Figure | None:
    """A bar a knob: its share in what set the best trials apart."""
    rows = list(report.importance.items())[::-1]
    if not rows:
        return None
    figure = go.Figure(
        go.Bar(
            x=[100 * v for _, v in rows],
            y=list(range(len(rows))),
            orientation="h",
            marker={"color": "var(--accent)"},
            text=[f"{v:.0%}" for _, v in rows],
            textposition="outside",
            cliponaxis=False,
            hoverinfo="skip",
        )
    )
    figure.update_layout(
        height=80 + 28 * len(rows),
        showlegend=False,
        margin={"r": 40},
        xaxis={"visible": False},
        yaxis={
            "tickvals": list(range(len(rows))),
            "ticktext": [escaped(k) for k, _ in rows],
            "showgrid": False,
            "zeroline": False,
        },
    )
    return figure


def parallel_chart(report: Report) -> go.Figure | None:
    """A line a trial through its knobs and objectives, coloured by delta NE; the knobs that mattered most first."""
    trials = report.finished
    asked = [t.params for t in trials]
    knobs = [k for k in varying(asked) if all(k in params for params in asked)]
    knobs = sorted(knobs, key=lambda knob: -report.importance.get(knob, 0.0))[:MAX_AXES]
    if len(trials) < 2 or not knobs:
        return None
    scale = SignedLog(power_of_ten(report.budget or 1e-3) / 10)
    losses = [t.delta_ne or 0.0 for t in trials]
    axis = scale.axis(losses, tick_percent)
    dimensions = [knob_axis(knob, [params[knob] for params in asked]) for knob in knobs]
    dimensions.append(knob_axis("tables, MB", [(t.table_bytes or 0.0) / 1e6 for t in trials]))
    if all(t.ms is not None for t in trials):
        dimensions.append(knob_axis("ms", [t.ms for t in trials]))
    placed = [scale.at(v) for v in losses]
    dimensions.append({"label": "delta NE", "values": placed, **axis})
    line = {"color": placed, "colorscale": SCALE, "showscale": False}
    figure = go.Figure(
        go.Parcoords(dimensions=dimensions, line=line, labelangle=-20, unselected={"line": {"opacity": 0.08}})
    )
    figure.update_layout(height=430, margin={"t": 90, "l": 60, "r": 60, "b": 24})
    return figure
