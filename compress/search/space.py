"""What a search varies, as values: settings, their names in results, where the closed form begins, a grid of them.

A setting is a mapping from knob to value; `params` of a result hold the same as scalars that a sampler and a chart can
handle: numbers as they are, choices by their label.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from compress.config import Bits, Choice, Range, Space
from compress.errors import PlanError
from compress.methods.codec import row_bytes
from compress.methods.dense import DensePlan

Params = dict[str, float | str]


def knobs(space: Space) -> dict[str, Range | Choice]:
    """The knobs of a space by name, in the order of the schema."""
    return {name: getattr(space, name) for name in Space.model_fields}


def label(value: Any) -> str:
    """How a choice is called in results: "2,4,8", "int8", "keep_neurons=0.5 dtype=int8", "0.02"."""
    if isinstance(value, DensePlan):
        own = value.model_dump(mode="json", exclude_defaults=True)
        return own["dtype"] if list(own) == ["dtype"] else " ".join(f"{k}={v}" for k, v in own.items()) or "fp32"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if float(f"{value:g}") == value else str(value)


def choices(knob: Choice) -> dict[str, Any]:
    """The values of a choice by label."""
    return {label(value): value for value in knob.choice}


def setting(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every knob. Raises: PlanError for params of another space."""
    found = {}
    for name, knob in knobs(space).items():
        value = params.get(name)
        if isinstance(knob, Range):
            inside = isinstance(value, int | float) and knob.low <= value <= knob.high
            found[name] = value
        else:
            inside = value in choices(knob)
            found[name] = choices(knob).get(value)  # type: ignore[arg-type]
        if not inside:
            raise PlanError(f"{name} {value!r}: not in the search space: search anew, into another folder")
    return found


def points(knob: Range | Choice, count: int) -> list[float | str]:
    """`count` numbers spread over a range, both ends included; or all labels of a choice."""
    if isinstance(knob, Choice):
        return list(choices(knob))
    spread = np.geomspace if knob.log else np.linspace
    return [min(max(float(x), knob.low), knob.high) for x in spread(knob.low, knob.high, count)]


def first_of(knob: Range | Choice) -> float | str:
    """Where a search begins: the first choice; the lower end of a range, which is the closed form as it is."""
    return knob.low if isinstance(knob, Range) else label(knob.choice[0])


def start_points(space: Space, count: int) -> list[Params]:
    """The closed form as it is, at budgets from the largest to the smallest; each of its choices of heads in turn."""
    usual = {name: first_of(knob) for name, knob in knobs(space).items()}
    budgets = points(space.budget, max(count, 2))
    by_size = sorted(budgets, key=float, reverse=True)[:count]
    heads = itertools.cycle(choices(space.dense))
    return [{**usual, "budget": _number(budget, space), "dense": next(heads)} for budget in by_size]


def _number(value: float | str, space: Space) -> float | str:
    return value if isinstance(space.budget, Range) else label(float(value))


def grid(space: Space, count: int, seed: int) -> list[Params]:
    """`count` points of the grid that the knobs span, drawn without order; all of them where there are no more."""
    spans = {name: points(knob, knob.points if isinstance(knob, Range) else 0) for name, knob in knobs(space).items()}
    total = math.prod(len(values) for values in spans.values())
    chosen = random.Random(seed).sample(range(total), min(count, total))
    sizes = [len(values) for values in spans.values()]
    places = [np.unravel_index(index, sizes) for index in chosen]
    return [
        {name: values[int(at)] for (name, values), at in zip(spans.items(), place, strict=True)} for place in places
    ]


def packable(dim: int, bits: Bits) -> Bits:
    """The fewest bits, from `bits` up, at which rows of this dim fill whole bytes."""
    for more in (b for b in (2, 4, 8, 16) if b >= bits):
        try:
            row_bytes(dim, more)
        except PlanError:
            continue
        return more
    return 32
