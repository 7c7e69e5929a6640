"""serve/formula.py: what a formula computes, and which are refused when the server starts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from serve.config import ServeConfig
from serve.formula import LAST, FormulaError, formula_for, read_formula
from serve.ranker import Ranker, round_each
from serve.request import RankRequest, ScoreRequest

TASKS = ["click", "buy"]
SCORES = np.array([[0.5, 0.1], [0.2, 0.9], [0.9, 0.9]])
C, B = SCORES.T


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("click", C),
        ("-click", -C),
        ("click * 0.7 + buy * 0.3", C * 0.7 + B * 0.3),
        ("click - buy / 2", C - B / 2),
        ("(click + buy) ** 2", (C + B) ** 2),
        ("2 ** -click", 2.0**-C),
        ("log(click) + exp(buy) + sqrt(click * buy)", np.log(C) + np.exp(B) + np.sqrt(C * B)),
        ("max(click, buy)", np.maximum(C, B)),
        ("min(click, buy, 0.5)", np.minimum(np.minimum(C, B), 0.5)),
        (" click\n", C),
    ],
)
def test_formula_is_computed_over_probabilities(text: str, expected: np.ndarray) -> None:
    formula = formula_for(text, TASKS)
    assert formula is not None
    np.testing.assert_allclose(formula(SCORES, TASKS), expected)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        *[(t, "is not a formula") for t in ("", "click +", "(click", "click buy", "click; buy", "import os", "a = 1")],
        *[
            (t, "is not allowed in a formula")
            for t in (
                "click.real",
                "click[0]",
                "__import__('os')",
                "(lambda: click)()",
                "click if buy else 1",
                "click and buy",
                "click > buy",
                "click % 2",
                "click // 2",
                "+click",
                "not click",
                "[click]",
                "'click'",
                "True * click",
                "click * 1j",
                "max(click)",
                "log(click, 2)",
                "log()",
                "abs(click)",
                "max(*click)",
                "log(x=click)",
                "(x := click)",
                "f'{click}'",
            )
        ],
        ("1 + 2", "names no task"),
        ("click * 1" + "0" * 400, "too large"),
        ("click * 1e999", "too large"),
        ("click + " * 100 + "1", "characters"),
        ("-" * 200 + "click", "nested"),
    ],
)
def test_formula_that_is_none_is_refused(text: str, rule: str) -> None:
    with pytest.raises(FormulaError, match=rule):
        read_formula(text)
    with pytest.raises(ValidationError, match=rule):
        ServeConfig(score=text)


def test_formula_of_an_unknown_task_names_the_tasks() -> None:
    with pytest.raises(FormulaError, match="'like' is no task of this model: its tasks are click, buy"):
        formula_for("like + buy", TASKS)


@pytest.mark.parametrize("text", ["log(click - 1)", "sqrt(-click)", "1 / (click - click)", "exp(1000 + click)"])
def test_formula_without_any_value_is_refused(text: str) -> None:
    with pytest.raises(FormulaError, match="no finite value"):
        formula_for(text, TASKS)


def test_item_without_a_finite_value_ranks_last() -> None:
    formula = formula_for("log(click - 0.3)", TASKS)
    assert formula is not None
    values = formula(SCORES, TASKS)
    assert values[1] == LAST
    assert values.argmin() == 1
    assert np.isfinite(values).all()
    json.dumps(values.tolist(), allow_nan=False)


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1.0, 1e12, 1e300])
def test_rounding_keeps_the_order_at_any_scale(scale: float) -> None:
    values = np.array([3.0 * scale, scale, 2.0 * scale, LAST])
    assert np.argsort(-round_each(values, 6), kind="stable").tolist() == [0, 2, 1, 3]
    near = np.array([1.0, 1.0 + 1e-9]) * scale
    assert round_each(near, 6)[0] == round_each(near, 6)[1]


def test_ranker_orders_by_the_formula(two_task_ranker: Ranker) -> None:
    ranker = Ranker(two_task_ranker.artifact, "buy ** 2 / click")
    candidates = [{"item_id": f"i{n}", "genres": "War"} for n in range(30)]
    answer = ranker.rank(RankRequest(user={}, candidates=candidates, k=30))
    for item in answer.items:
        assert item.scores is not None
        assert item.score == pytest.approx(item.scores["buy"] ** 2 / item.scores["click"])
    scores = [item.score for item in answer.items]
    assert scores == sorted(scores, reverse=True)
    every = ranker.score(ScoreRequest(user={}, candidates=candidates))
    assert sorted(every.scores, reverse=True) == scores
    assert every.tasks is not None
    assert list(every.tasks) == ["click", "buy"]
    plain = two_task_ranker.rank(RankRequest(user={}, candidates=candidates, k=30))
    assert [i.id for i in plain.items] != [i.id for i in answer.items]


def test_ranker_refuses_a_formula_of_other_tasks(two_task_ranker: Ranker) -> None:
    with pytest.raises(FormulaError, match="its tasks are click, buy"):
        Ranker(two_task_ranker.artifact, "like")
