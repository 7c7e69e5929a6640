"""compress/config.py and compress/search/space.py: what a search varies, its names, its start, its grid."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from compress.config import Choice, Range, SearchConfig, Space
from compress.errors import PlanError
from compress.methods.dense import DensePlan
from compress.search.space import choices, first_of, grid, knobs, label, points, setting, start_points
from trainer.config import describe

INT8 = DensePlan(dtype="int8")
SMALL = Space(
    budget=Choice(choice=(0.02, 0.3)),
    bits=Choice(choice=((2, 4), (8,))),
    centroids=Choice(choice=(16, 1)),
    trust=Choice(choice=(0.0, 1.0)),
    tier_price=Range(low=1e-4, high=1e-2, log=True, points=3),
    dense=Choice(choice=(DensePlan(), INT8)),
)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"budget": {"low": 0.3, "high": 0.01}}, "space.budget.*low 0.3 is below high 0.01.*swap them"),
        ({"budget": {"low": 0.1, "high": 0.1}}, "space.budget.*low 0.1 is below high 0.1"),
        ({"budget": {"low": 0.01, "high": float("inf")}}, "both finite"),
        ({"budget": {"low": float("nan"), "high": 1}}, "both finite"),
        ({"budget": {"low": 0, "high": 0.5}}, r"budget \[0.0, 0.5\]"),
        ({"budget": {"low": 0.1, "high": 1.5}}, r"budget \[0.1, 1.5\]: from 0 to 1"),
        ({"budget": {"choice": [0.1, 1.5]}}, r"budget \[0.1, 1.5\]"),
        ({"budget": {"choice": [float("nan")]}}, r"budget \[nan\]"),
        ({"budget": {"choice": []}}, "space.budget"),
        ({"budget": 0.1}, "space.budget"),
        ({"tier_price": {"low": 0, "high": 1, "log": True}}, "log needs low above 0, it is 0"),
        ({"tier_price": {"low": -1, "high": 1}}, r"tier_price \[-1.0, 1.0\]"),
        ({"tier_price": {"low": 1, "high": 2, "points": 1}}, "space.tier_price.*points"),
        ({"trust": {"low": 0, "high": 2}}, r"trust \[0.0, 2.0\]: from 0 to 1"),
        ({"trust": {"choice": [0.5, 0.5]}}, "a value is there twice"),
        ({"bits": {"choice": [[2, 3]]}}, "space.bits.*2, 4, 8 or 16"),
        ({"bits": {"choice": [[]]}}, "each choice is a list with at least one of"),
        ({"bits": {"choice": [[8], [8]]}}, "a value is there twice"),
        ({"bits": {"low": 2, "high": 8}}, "space.bits"),
        ({"centroids": {"choice": [0]}}, r"centroids \[0\]: from 1 to 256"),
        ({"centroids": {"choice": [257]}}, r"centroids \[257\]: from 1 to 256"),
        ({"dense": {"choice": [{"dtype": "int3"}]}}, "space.dense.*dtype"),
        ({"dense": {"choice": [{}, {"dtype": "fp32"}]}}, "a value is there twice"),
        ({"learning_rate": {"low": 0, "high": 1}}, "space.learning_rate"),
    ],
)
def test_space_names_the_rule_that_is_broken(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SearchConfig.model_validate({"space": space})
    told = describe(caught.value, "tune")
    assert "\n" not in told
    assert re.search(message, told), told


def test_space_is_written_and_read_again() -> None:
    for space in (Space(), SMALL):
        assert Space.model_validate(space.model_dump(mode="json")) == space
        assert Space.model_validate_json(space.model_dump_json()) == space


def test_knobs_are_those_of_the_schema_in_order() -> None:
    assert list(knobs(SMALL)) == ["budget", "bits", "centroids", "trust", "tier_price", "dense"]
    assert knobs(SMALL)["bits"] == SMALL.bits


# -- labels and params -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (DensePlan(), "fp32"),
        (INT8, "int8"),
        (DensePlan(keep_neurons=0.5), "keep_neurons=0.5"),
        (DensePlan(dtype="int8", rank=0.9), "dtype=int8 rank=0.9"),
        ((2, 4, 8), "2,4,8"),
        ((8,), "8"),
        (16, "16"),
        (0.02, "0.02"),
        (1.0, "1"),
    ],
)
def test_labels_are_short(value: object, text: str) -> None:
    assert label(value) == text


def test_labels_of_a_choice_tell_its_values_apart_and_lead_back() -> None:
    close = Choice[float](choice=(0.1234567, 0.12345678, 0.1, 1e-7))
    for knob in (*knobs(Space()).values(), *knobs(SMALL).values(), close):
        if isinstance(knob, Choice):
            found = choices(knob)
            assert len(found) == len(knob.choice)
            assert [found[label(v)] for v in knob.choice] == list(knob.choice)


def test_params_become_a_setting_and_every_setting_has_params() -> None:
    names = list(knobs(SMALL))
    spans = [points(knob, 3) for knob in knobs(SMALL).values()]
    seen = []
    for values in itertools.product(*spans):
        params = dict(zip(names, values, strict=True))
        found = setting(SMALL, params)
        again = {n: v if isinstance(v, float) and n == "tier_price" else label(v) for n, v in found.items()}
        assert again == params
        seen.append(found)
    assert len({str(s) for s in seen}) == len(seen) == 2**5 * 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tier_price": 0.1}, "tier_price 0.1: not in the search space"),
        ({"tier_price": 1e-5}, "tier_price"),
        ({"tier_price": "0.001"}, "tier_price '0.001'"),
        ({"tier_price": float("nan")}, "tier_price nan"),
        ({"bits": "4"}, "bits '4'"),
        ({"dense": "bf16"}, "dense 'bf16'.*search anew, into another folder"),
        ({"centroids": 16}, "centroids 16"),
        ({"trust": None}, "trust None"),
    ],
)
def test_params_of_another_space_are_refused(changed: dict[str, Any], message: str) -> None:
    params = {**start_points(SMALL, 1)[0], **changed}
    with pytest.raises(PlanError, match=message):
        setting(SMALL, params)
    with pytest.raises(PlanError, match=f"{next(iter(changed))} None"):
        setting(SMALL, {k: v for k, v in params.items() if k not in changed})


# -- points, start, grid -----------------------------------------------------------------------------------------------


def test_points_of_a_range_are_even_and_inside() -> None:
    even = points(Range(low=0.1, high=0.9), 5)
    np.testing.assert_allclose(np.diff(even), 0.2)
    ratio = points(Range(low=0.003, high=0.3, log=True), 9)
    np.testing.assert_allclose(np.diff(np.log(ratio)), np.log(100) / 8)
    for low, high in ((0.1, 0.9), (0.003, 0.3), (1e-9, 1 / 3)):
        for log in (False, True):
            spread = points(Range(low=low, high=high, log=log), 7)
            assert spread[0] == low
            assert spread[-1] == high
            assert all(low <= p <= high for p in spread)


def test_start_is_the_closed_form_from_the_largest_budget_to_the_smallest() -> None:
    found = start_points(Space(), 8)
    budgets = [p["budget"] for p in found]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (0.6, 0.003)
    assert len(set(budgets)) == 8
    usual = {"bits": "2,4,8,16", "centroids": "256", "trust": 0.0, "tier_price": 1e-5}
    assert all({k: p[k] for k in usual} == usual for p in found)
    assert [p["dense"] for p in found] == ["fp32", "int8"] * 4
    for params in found:
        setting(Space(), params)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_start_has_as_many_points_as_asked_where_there_are_so_many(count: int) -> None:
    assert len(start_points(Space(), count)) == count
    found = start_points(SMALL, count)
    assert [p["budget"] for p in found] == ["0.3", "0.02"][:count]
    for params in found:
        setting(SMALL, params)


def test_first_of_a_knob_is_its_least_or_first() -> None:
    assert first_of(SMALL.tier_price) == 1e-4
    assert first_of(SMALL.dense) == "fp32"
    assert first_of(SMALL.budget) == "0.02"


def key(params: dict[str, Any]) -> tuple:
    return tuple(sorted(params.items()))


def test_grid_is_every_point_once_when_there_are_no_more() -> None:
    spans = {n: points(k, k.points if isinstance(k, Range) else 0) for n, k in knobs(SMALL).items()}
    expected = {key(dict(zip(spans, values, strict=True))) for values in itertools.product(*spans.values())}
    for count in (96, 97, 5000):
        found = grid(SMALL, count, 0)
        assert len(found) == 96
        assert {key(p) for p in found} == expected


def test_grid_of_many_points_is_drawn_without_repeats_and_again_alike() -> None:
    found = grid(Space(), 300, 3)
    assert len({key(p) for p in found}) == len(found) == 300
    assert found == grid(Space(), 300, 3) != grid(Space(), 300, 4)
    assert all(len({p[name] for p in found}) > 1 for name in knobs(Space()))
    for params in found:
        setting(Space(), params)


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rungs", [(), (0.5,), (0.3, 0.1, 1.0), (0.1, 0.1, 1.0), (0.0, 1.0), (-0.1, 1.0), (0.5, 1.0, 2.0)]
)
def test_rungs_rise_to_the_whole_sample(rungs: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="rising shares of the sample, the last one is 1"):
        SearchConfig(rungs=rungs)
    assert SearchConfig(rungs=(1.0,)).rungs == (1.0,)


@pytest.mark.parametrize("field", ["trials", "minutes", "max_delta_ne", "max_ms", "sample_rows", "start", "finalists"])
def test_amounts_are_positive(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        SearchConfig(**{field: 0})


def test_search_is_written_and_read_again() -> None:
    search = SearchConfig(space=SMALL, minutes=3, max_table_bytes="2%", calibrate=None, algorithm="nsga2")
    assert SearchConfig.model_validate(search.model_dump(mode="json")) == search
    assert search.model_dump(mode="json") == SearchConfig.model_validate_json(search.model_dump_json()).model_dump(
        mode="json"
    )
