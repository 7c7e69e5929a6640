"""A request's raw values -> encoded rows: the user once, candidates from the catalogue or from the request.

Legend: K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from compress.artifact import Artifact
from compress.catalogue import item_transform, join_sides, request_transform
from serve.errors import RequestError
from trainer.data.encoded import Encoded, concatenate
from trainer.data.schema import MultiFeature, NumericFeature
from trainer.data.transform import Transform, hash_ids
from trainer.errors import DataError


class FeatureReader:
    """Encodes requests for one artifact with the transform the trainer fitted."""

    def __init__(self, artifact: Artifact) -> None:
        self.whole = artifact.model.transform
        self.of_items = item_transform(self.whole)
        self.of_request = request_transform(self.whole)
        self.catalogue = artifact.catalogue
        schema = self.whole.schema
        self.item_column = schema.ids.item
        self.specs = {f.source: f for f in schema.features}
        # a feature may be asked for by its own name where that is no column of the log
        self.columns = {**{f.name: f.source for f in schema.features}, **{c: c for c in self.specs}}

    def read(self, user: dict[str, Any], candidates: Sequence[Any]) -> tuple[Encoded, list[str]]:
        """Encoded rows of K candidates, and the user's keys that no feature reads.

        Raises: RequestError naming the field whose value cannot be read.
        """
        ignored = sorted(set(user) - set(self.columns))
        values = {self.columns[key]: value for key, value in user.items() if key in self.columns}
        if isinstance(candidates[0], dict):
            return self._read_rows(values, candidates), ignored
        if self.catalogue is None:
            raise RequestError("candidates", "this model has no item catalogue: give objects of raw columns, not ids")
        own = encode(self.of_request, {c: [v] for c, v in values.items()}, self.specs, "user")
        return join_sides(
            self.whole, [(self.of_request, own.repeat(len(candidates))), self._items(candidates)]
        ), ignored

    def _items(self, ids: Sequence[str | int]) -> tuple[Transform, Encoded]:
        assert self.catalogue is not None
        assert self.item_column is not None
        keys, _ = hash_ids(pa.array([str(i) for i in ids]), self.item_column)
        found, known = self.catalogue.find(keys)
        encoded = self.catalogue.encoded.take(found)
        if not known.all():  # unknown items: their id as it encodes, everything else missing
            strange = encode(self.of_items, {self.item_column: [str(i) for i in ids]}, self.specs, "candidates")
            encoded = choose(known, encoded, strange)
        return self.of_items, encoded

    def _read_rows(self, user: dict[str, Any], candidates: Sequence[dict[str, Any]]) -> Encoded:
        rows: dict[str, list[Any]] = {}
        for key in {key for row in candidates for key in row}:
            if key in self.columns:
                column = self.columns[key]
                rows[column] = [row.get(key, user.get(column)) for row in candidates]
        for column, value in user.items():
            rows.setdefault(column, [value] * len(candidates))
        return encode(self.whole, rows, self.specs, "candidates", len(candidates))

    def describe(self, candidates: Sequence[Any], index: int) -> tuple[str | int, str | None]:
        """The id that an answer gives for a candidate, and its title where the catalogue has one."""
        candidate = candidates[index]
        if isinstance(candidate, dict):
            given = candidate.get(self.item_column) if self.item_column else None
            return (given if isinstance(given, str | int) else index), None
        assert self.catalogue is not None
        keys, _ = hash_ids(pa.array([str(candidate)]), str(self.item_column))
        found, known = self.catalogue.find(keys)
        return candidate, self.catalogue.titles[found[0]] if known[0] else None


def encode(
    transform: Transform, values: dict[str, list[Any]], specs: dict[str, Any], where: str, rows: int = 0
) -> Encoded:
    """Encode columns of raw JSON values with (part of) a transform.

    Raises: RequestError naming the column whose values are not of its feature's kind.
    """
    rows = rows or len(next(iter(values.values()), [None]))
    wanted = {f.source for f in transform.schema.features}
    columns = {c: to_array(v, specs[c], f"{where}.{c}") for c, v in values.items() if c in wanted}
    columns = columns or {"_": pa.nulls(rows)}
    try:
        return transform.encode(pa.table(columns))
    except DataError as error:
        raise RequestError(where, str(error)) from None


def to_array(values: list[Any], feature: Any, field: str) -> pa.Array:
    """JSON values of one feature as an Arrow column. Raises: RequestError when one is of the wrong type."""
    for value in values:
        if value is None:
            continue
        if isinstance(feature, MultiFeature):
            members = value if isinstance(value, list) else [value]
            good = all(isinstance(m, str | int | float) or m is None for m in members)
            rule = "a list of ids, or text"
        elif isinstance(feature, NumericFeature):
            good = isinstance(value, int | float | str)
            rule = "a number"
        else:
            good = isinstance(value, str | int | float)
            rule = "one id (text or a number)"
        if not good:
            raise RequestError(field, f"must be {rule}, not {type(value).__name__}")
    if isinstance(feature, NumericFeature):
        try:
            return pa.array([None if v in (None, "") else float(v) for v in values], pa.float64())
        except ValueError:
            bad = next(v for v in values if isinstance(v, str))
            raise RequestError(field, f"must be a number, not {bad[:40]!r}") from None
        except OverflowError:
            raise RequestError(field, "the number is too large") from None
    if isinstance(feature, MultiFeature) and any(isinstance(v, list) for v in values):
        bags = [v if isinstance(v, list) or v is None else [v] for v in values]
        return pa.array([None if b is None else [_text(m) for m in b] for b in bags], pa.list_(pa.string()))
    return pa.array([_text(v) for v in values], pa.string())


def _text(value: Any) -> str | None:
    """An id as the transform reads it: 7, 7.0 and "7" are one id."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def choose(first: np.ndarray, yes: Encoded, no: Encoded) -> Encoded:
    """Row by row from one of two encodings of the same features."""
    rows = np.arange(len(first))
    return concatenate([yes, no]).take(np.where(first, rows, rows + len(first)))
