"""JSON values of one feature -> an Arrow column as the trainer's transform reads it.

Legend: K candidates.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from serve.errors import RequestError
from serve.request import utf8
from trainer.data.schema import BagFeature, NumericFeature
from trainer.data.transform import as_text

PLAIN: dict[Any, set[type]] = {  # values that need no look at each of them
    pa.float64(): {int, float, type(None)},
    pa.string(): {str, type(None)},
}


class Weights:
    """Marks a column that holds the weights of a feature's ids."""

    def __init__(self, feature: Any) -> None:
        self.separator: str | None = getattr(feature, "separator", None)


def to_array(values: list[Any], feature: Any, field: str) -> pa.Array:
    """JSON values (K,) of one feature as an Arrow column: numbers, ids as text, or lists of ids as text.

    Raises: RequestError when a value is of the wrong type.
    """
    if isinstance(feature, NumericFeature):
        plain = _plain(values, pa.float64())
        return pa.array([_number(v, field) for v in values], pa.float64()) if plain is None else plain
    if isinstance(feature, Weights):
        return pa.array([_numbers(v, feature.separator, field) for v in values], pa.list_(pa.float64()))
    if isinstance(feature, BagFeature):
        return pa.array([_bag(v, feature, field) for v in values], pa.list_(pa.string()))
    plain = _plain(values, pa.string())
    rule = "one id (text or a number)"
    return pa.array([_id(v, field, rule) for v in values], pa.string()) if plain is None else plain


def _plain(values: list[Any], kind: pa.DataType) -> pa.Array | None:
    """The column at once where all values are of the kind as they are, else None."""
    if not set(map(type, values)) <= PLAIN[kind]:
        return None
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, UnicodeEncodeError, OverflowError):  # whole numbers beyond 2**53; text that is no Unicode
        return None


def _number(value: Any, field: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, int | float) or (isinstance(value, str) and "_" not in value):
        try:
            return float(value)
        except (ValueError, OverflowError):
            raise RequestError(field, f"must be a number, not {str(value)[:40]!r}") from None
    raise RequestError(field, f"must be a number, not {type(value).__name__}")


def _numbers(value: Any, separator: str | None, field: str) -> list[float | None] | None:
    if value is None:
        return None
    if isinstance(value, str) and separator:
        value = utf8(value, field).split(separator)
    return [_number(member, field) for member in (value if isinstance(value, list) else [value])]


def _bag(value: Any, feature: BagFeature, field: str) -> list[str | None] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return list(utf8(value, field).split(feature.separator)) if feature.separator else [_id(value, field, "an id")]
    members = value if isinstance(value, list) else [value]
    return [_id(member, field, "a list of ids, or text") for member in members]


def _id(value: Any, field: str, rule: str) -> str | None:
    """An id as the transform reads it: 7, 7.0 and "7" are one id, and NaN is missing."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return utf8(value, field)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return as_text(pa.array([value]), field)[0].as_py()
    raise RequestError(field, f"must be {rule}, not {type(value).__name__}")
