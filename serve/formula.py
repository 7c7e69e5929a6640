"""What items are ordered by when a model has several tasks: a formula over their probabilities, such as

    like * 0.7 + log(buy) * 0.3

Task names, numbers, + - * / **, parentheses, unary minus, and log, exp, sqrt, min, max. It is read as a syntax tree and
never run as Python.

Legend: K candidates, T tasks.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from trainer.errors import SlimrankError

MOST_CHARACTERS = 500
MOST_DEPTH = 50
LAST = -float(np.finfo(np.float64).max)  # the score of an item for which the formula has no finite value
RULE = "use task names, numbers, + - * / **, parentheses, log, exp, sqrt, min and max"
PROBES = (0.001, 0.25, 0.5, 0.75, 0.999)  # a formula must have a value somewhere between 0 and 1

Columns = dict[str, np.ndarray]
Node = Callable[[Columns], Any]  # an array (K,), or a number where the part names no task

OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
ONE = {"log": np.log, "exp": np.exp, "sqrt": np.sqrt}
SEVERAL = {"min": np.minimum, "max": np.maximum}


class FormulaError(SlimrankError, ValueError):
    """A formula that cannot be used; the message quotes it."""


@dataclass(frozen=True)
class Formula:
    """A formula that was read: its text, the tasks it names, and how it is computed."""

    text: str
    names: tuple[str, ...]
    node: Node

    def __call__(self, scores_KT: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
        """Values (K,) float64 of probabilities (K, T), all finite: where the formula has no finite value, LAST."""
        columns = {task: scores_KT[:, at] for at, task in enumerate(tasks)}
        with np.errstate(all="ignore"):
            values = self.node(columns)
        return np.where(np.isfinite(values), values, LAST)


def read_formula(text: str) -> Formula:
    """Read a formula; whether its names are tasks shows in `formula_for`.

    Raises: FormulaError quoting the part that is not allowed.
    """
    if len(text) > MOST_CHARACTERS:
        raise FormulaError(f"score: a formula of {len(text):,} characters, at most {MOST_CHARACTERS} may be")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise FormulaError(f"score: {text!r} is not a formula: {RULE}") from None
    names: list[str] = []
    node = _compile(tree, names, 0)
    if not names:
        raise FormulaError(f"score: {text!r} names no task: every item would score the same")
    return Formula(text, tuple(dict.fromkeys(names)), node)


def formula_for(text: str | None, tasks: Sequence[str]) -> Formula | None:
    """The formula of a configuration for a model of these tasks; None where the first task decides.

    Raises: FormulaError when it names no task of the model, or has a finite value nowhere between 0 and 1.
    """
    if text is None:
        return None
    formula = read_formula(text)
    unknown = [name for name in formula.names if name not in tasks]
    if unknown:
        raise FormulaError(f"score: {unknown[0]!r} is no task of this model: its tasks are {', '.join(tasks)}")
    grid = np.stack([np.roll(PROBES, at) for at in range(len(tasks))], axis=1)
    if (formula(grid, tasks) == LAST).all():
        raise FormulaError(f"score: {text!r} has no finite value for any probabilities: correct it")
    return formula


def _compile(tree: ast.AST, names: list[str], depth: int) -> Node:
    """The function of one part of a formula; the names it uses are added to `names`."""
    if depth > MOST_DEPTH:
        raise FormulaError(f"score: nested deeper than {MOST_DEPTH} levels")
    match tree:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _constant(number)
        case ast.Name(id=name):
            names.append(name)
            return lambda columns: columns[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _compile(operand, names, depth + 1)
            return lambda columns: -inner(columns)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            apply = OPERATORS[type(op)]
            a, b = (_compile(side, names, depth + 1) for side in (left, right))
            return lambda columns: apply(a(columns), b(columns))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _call(name, [_compile(arg, names, depth + 1) for arg in args])
    raise FormulaError(f"score: {ast.unparse(tree)[:60]!r} is not allowed in a formula: {RULE}")


def _constant(number: int | float) -> Node:
    try:
        value = np.float64(number)
    except OverflowError:
        value = np.float64("inf")  # a whole number beyond the floats
    if not np.isfinite(value):
        raise FormulaError("score: holds a number that is too large")
    return lambda _columns: value


def _call(name: str, args: list[Node]) -> Node:
    if name in ONE and len(args) == 1:
        one, inner = ONE[name], args[0]
        return lambda columns: one(inner(columns))
    if name in SEVERAL and len(args) >= 2:
        both = SEVERAL[name]
        return lambda columns: reduce(both, [arg(columns) for arg in args])
    rule = "log, exp and sqrt take one value, min and max two or more"
    raise FormulaError(f"score: {name}() of {len(args)} values is not allowed in a formula: {rule}")
