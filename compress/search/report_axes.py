"""Scales, ticks and labels of the charts of a search's report: plain values for plotly."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from compress.search import report_words as words
from compress.search.importance import is_choice, numeric, spread_out
from compress.search.report import Quality


class SignedLog:
    """A scale that is linear up to `knee` on both sides of 0 and logarithmic beyond: for losses that may be negative.

    Values become sign * log10(1 + |value| / knee).
    """

    def __init__(self, knee: float) -> None:
        self.knee = knee

    def at(self, value: float | None) -> float | None:
        """Where a value lies on the axis."""
        return None if value is None else math.copysign(math.log10(1 + abs(value) / self.knee), value)

    def ticks(self, values: Sequence[float]) -> list[float]:
        """Values to mark: 0, and powers of ten from the knee on that reach beyond all `values`."""
        found = [0.0]
        for sign in (-1, 1):
            reach = max((sign * v for v in values), default=0.0)
            step = self.knee
            while reach > step / 3:
                found.append(sign * step)
                step *= 10
        return sorted(found)

    def axis(self, values: Sequence[float], text: Any) -> dict[str, Any]:
        """Ticks of a plotly axis that covers the values."""
        ticks = self.ticks(values)
        room = [min([*ticks, *values]), max([*ticks, *values])]
        low, high = (self.at(v) or 0.0 for v in room)
        margin = 0.06 * (high - low or 1.0)
        return {
            "tickvals": [self.at(t) for t in ticks],
            "ticktext": [text(t) for t in ticks],
            "range": [low - margin, high + margin],
        }


def power_of_ten(value: float) -> float:
    """The largest power of ten that is not above a positive value."""
    return 10.0 ** math.floor(math.log10(value) + 1e-9)


def escaped(text: str, width: int = 28) -> str:
    """A stranger's name as a label of plotly: shortened, nothing of it read as HTML."""
    return html.escape(words.shown(text, width), quote=False)  # plotly knows &lt; but not &quot;


def tick_percent(value: float) -> str:
    """A tick of delta NE: +0.1%."""
    return "0" if value == 0 else f"{100 * value:+g}%"


def hover(title: str, *lines: str) -> str:
    """The box beside a point."""
    return "<br>".join([f"<b>{title}</b>", *lines])


def quality_lines(quality: Quality) -> list[str]:
    """Quality in the box beside a point."""
    lines = [f"delta NE {words.percent(quality.delta_ne, 4)}, bound {words.percent(quality.delta_ne_upper, 4)}"]
    return [*lines, f"delta AUC {words.points(quality.delta_auc)}, overlap {words.share(quality.overlap)}"]


def whiskers(scale: SignedLog, parts: Sequence[Quality]) -> dict[str, Any]:
    """Error bars from delta NE up to its bound."""
    reach = []
    for part in parts:
        low, high = scale.at(part.delta_ne), scale.at(part.delta_ne_upper)
        reach.append(0.0 if low is None or high is None else max(high - low, 0.0))
    return {"type": "data", "symmetric": False, "array": reach, "arrayminus": [0.0] * len(reach), "thickness": 1.2}


def bytes_ticks(sizes: Sequence[float]) -> dict[str, Any]:
    """Marks of a logarithmic axis of bytes at 1 and 3 times a power of ten, with their units."""
    low, high = min(sizes), max(sizes)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10**e for e in powers for m in (1, 3)]
    return {"tickvals": marks, "ticktext": [words.bytes_of(m).replace(".0", "") for m in marks]}


def knob_axis(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """One axis of parallel coordinates: choices as steps, other numbers as they are or by their logarithms."""
    label = escaped(name, 18)
    if is_choice(values):
        steps = sorted(set(values)) if numeric(values) else sorted({str(v) for v in values})
        places = [steps.index(v if numeric(values) else str(v)) for v in values]
        text = [escaped(words.knob_value(step), 14) for step in steps]
        return {"label": label, "values": places, "tickvals": list(range(len(steps))), "ticktext": text}
    if not spread_out(values):
        return {"label": label, "values": list(values)}
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = sorted({low, high, *(m * 10.0**e for e in powers for m in (1, 3) if 1.2 * low < m * 10.0**e < high / 1.2)})
    ticks = {"tickvals": [math.log10(m) for m in marks], "ticktext": [f"{m:.3g}" for m in marks]}
    return {"label": label, "values": [math.log10(v) for v in values], **ticks}
