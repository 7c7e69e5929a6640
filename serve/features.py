"""A request's raw values -> encoded rows: the user once, candidates from the catalogue or from the request.

Legend: K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from compress.artifact import Artifact
from compress.catalogue import item_transform, join_sides, request_transform
from serve.errors import RequestError
from serve.request import utf8
from trainer.data.encoded import Encoded, concatenate
from trainer.data.schema import BagFeature, NumericFeature, columns_of
from trainer.data.transform import Transform, as_text, hash_ids
from trainer.errors import DataError


class Weights:
    """Marks a column that holds the weights of a feature's ids."""

    def __init__(self, feature: Any) -> None:
        self.separator: str | None = getattr(feature, "separator", None)


@dataclass(frozen=True)
class Sides:
    """What a request's K candidates read: one row of the user's and the context's features, and K rows of the items'.

    Without `request`, `items` has the features of both: candidates that come as columns may have any of them.
    """

    request: Encoded | None
    items: Encoded


class FeatureReader:
    """Encodes requests for one artifact with the transform the trainer fitted."""

    def __init__(self, artifact: Artifact) -> None:
        self.whole = artifact.model.transform
        self.of_items = item_transform(self.whole)
        self.of_request = request_transform(self.whole)
        self.catalogue = artifact.catalogue
        schema = self.whole.schema
        self.item_column = schema.ids.item
        self.specs: dict[str, Any] = {c: Weights(f) for f in schema.features for c in columns_of(f)}
        self.specs |= {f.source: f for f in schema.features}
        # a feature may be asked for by its own name where that is no column of the log
        self.columns = {**{f.name: f.source for f in schema.features}, **{c: c for c in self.specs}}

    def read(self, user: dict[str, Any], candidates: Sequence[Any]) -> tuple[Encoded, list[str]]:
        """Encoded rows of K candidates, the user's features beside each, and the user's keys that no feature reads.

        Raises: RequestError naming the field whose value cannot be read.
        """
        sides, ignored = self.read_sides(user, candidates)
        return self.joined(sides), ignored

    def joined(self, sides: Sides) -> Encoded:
        """The rows of K candidates with the user's features beside each."""
        if sides.request is None:
            return sides.items
        user = self.of_request, sides.request.repeat(len(sides.items))
        return join_sides(self.whole, [user, (self.of_items, sides.items)])

    def read_sides(self, user: dict[str, Any], candidates: Sequence[Any]) -> tuple[Sides, list[str]]:
        """A request's features as the model wants them, and the user's keys that no feature reads.

        Raises: RequestError naming the field whose value cannot be read.
        """
        ids_only = not isinstance(candidates[0], dict)
        features = (self.of_request if ids_only else self.whole).schema.features
        read_here = {c for f in features for c in columns_of(f)}
        ignored = sorted(key for key in user if self.columns.get(key) not in read_here)
        values = {self.columns[key]: value for key, value in user.items() if key not in ignored}
        own = {c: to_array([v], self.specs[c], f"user.{c}") for c, v in values.items()}
        if not ids_only:
            return Sides(None, self._read_rows(own, candidates)), ignored
        if self.catalogue is None:
            raise RequestError("candidates", "this model has no item catalogue: give objects of raw columns, not ids")
        return Sides(encode(self.of_request, own, 1, "user"), self._items(candidates)), ignored

    def _items(self, ids: Sequence[str | int]) -> Encoded:
        assert self.catalogue is not None
        assert self.item_column is not None
        keys, _ = hash_ids(pa.array([str(i) for i in ids]), self.item_column)
        found, known = self.catalogue.find(keys)
        encoded = self.catalogue.encoded.take(found)
        if not known.all():  # unknown items: their id as it encodes, everything else missing
            ids_only = {self.item_column: pa.array([str(i) for i in ids])}
            strange = encode(self.of_items, ids_only, len(ids), "candidates")
            encoded = choose(known, encoded, strange)
        return encoded

    def _read_rows(self, user: dict[str, pa.Array], candidates: Sequence[dict[str, Any]]) -> Encoded:
        """Candidates as objects: each reads its own columns, and the user's where it has none."""
        rows = len(candidates)
        own = [{self.columns[k]: v for k, v in row.items() if k in self.columns} for row in candidates]
        columns = {}
        for column in sorted({c for row in own for c in row} | set(user)):
            if any(column in row for row in own):
                mine = to_array([row.get(column) for row in own], self.specs[column], f"candidates.{column}")
                if column in user:
                    has = np.array([column in row for row in own])
                    mine = pa.concat_arrays([mine, user[column]]).take(np.where(has, np.arange(rows), rows))
            else:
                mine = user[column].take(np.zeros(rows, dtype=np.int64))
            columns[column] = mine
        return encode(self.whole, columns, rows, "candidates")

    def describe(self, candidates: Sequence[Any], chosen: Sequence[int]) -> list[tuple[str | int, str | None]]:
        """The id that an answer gives for each chosen candidate, and its title where the catalogue has one."""
        picked = [candidates[i] for i in chosen]
        if isinstance(candidates[0], dict):
            given = [row.get(self.item_column) if self.item_column else None for row in picked]
            return [(g if isinstance(g, str | int) else i, None) for g, i in zip(given, chosen, strict=True)]
        assert self.catalogue is not None
        keys, _ = hash_ids(pa.array([str(c) for c in picked]), str(self.item_column))
        found, known = self.catalogue.find(keys)
        titles = [self.catalogue.titles[at] if k else None for at, k in zip(found, known, strict=True)]
        return list(zip(picked, titles, strict=True))


def encode(transform: Transform, columns: dict[str, pa.Array], rows: int, where: str) -> Encoded:
    """Encode raw columns with (part of) a transform; columns it wants and does not get count as missing.

    Raises: RequestError naming the column whose values are not of its feature's kind.
    """
    try:
        return transform.encode(pa.table(columns or {"_": pa.nulls(rows)}))
    except DataError as error:
        raise RequestError(where, str(error)) from None


def to_array(values: list[Any], feature: Any, field: str) -> pa.Array:
    """JSON values of one feature as an Arrow column: numbers, ids as text, or lists of ids as text.

    Raises: RequestError when a value is of the wrong type.
    """
    if isinstance(feature, NumericFeature):
        return pa.array([_number(v, field) for v in values], pa.float64())
    if isinstance(feature, Weights):
        return pa.array([_numbers(v, feature.separator, field) for v in values], pa.list_(pa.float64()))
    if isinstance(feature, BagFeature):
        return pa.array([_bag(v, feature, field) for v in values], pa.list_(pa.string()))
    return pa.array([_id(v, field, "one id (text or a number)") for v in values], pa.string())


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


def choose(first: np.ndarray, yes: Encoded, no: Encoded) -> Encoded:
    """Row by row from one of two encodings of the same features."""
    rows = np.arange(len(first))
    return concatenate([yes, no]).take(np.where(first, rows, rows + len(first)))
