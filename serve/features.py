"""A request's raw values -> encoded rows: the user once, candidates from the catalogue or from the request.

Candidates come as item ids, as objects of raw columns, as columns of JSON values, or as an Arrow table of columns; the
last three are one thing read in three ways.

Legend: K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import pyarrow as pa

from compress.artifact import Artifact
from compress.catalogue import item_transform, join_sides, request_transform
from serve.errors import RequestError
from serve.users import Users
from serve.values import Weights, to_array
from trainer.data.encoded import Encoded, concatenate, concatenate_ragged
from trainer.data.schema import columns_of
from trainer.data.transform import Transform, flat, hash_words, pick
from trainer.errors import DataError

Candidates: TypeAlias = Sequence[Any] | Mapping[str, list[Any]] | pa.Table


@dataclass(frozen=True)
class Sides:
    """What a request's K candidates read: one row of the user's and the context's features, and K rows of the items'.

    Without `request`, `items` has the features of both: candidates that come as columns may have any of them. `found`:
    where catalogue ids lie in the catalogue, -1 for those it does not know.
    """

    request: Encoded | None
    items: Encoded
    found: np.ndarray | None = None


@dataclass(frozen=True)
class Given:
    """Raw columns of K candidates. `has` (K,) says which of them have a value of a column, where not all do."""

    rows: int
    columns: dict[str, pa.Array]
    has: dict[str, np.ndarray]


class FeatureReader:
    """Encodes requests for one artifact with the transform the trainer fitted."""

    def __init__(self, artifact: Artifact) -> None:
        self.whole = artifact.model.transform
        self.of_items = item_transform(self.whole)
        self.of_request = request_transform(self.whole)
        self.catalogue = artifact.catalogue
        schema = self.whole.schema
        self.users: Users | None = None  # what is known of users whose features a request does not give
        self.item_column = schema.ids.item
        self.specs: dict[str, Any] = {c: Weights(f) for f in schema.features for c in columns_of(f)}
        self.specs |= {f.source: f for f in schema.features}
        # a feature may be asked for by its own name where that is no column of the log
        self.columns = {**{f.name: f.source for f in schema.features}, **{c: c for c in self.specs}}
        self.of_user = {c for f in self.of_request.schema.features for c in columns_of(f)}

    def read(self, user: dict[str, Any], candidates: Candidates) -> tuple[Encoded, list[str]]:
        """Encoded rows of K candidates, the user's features beside each, and the keys that no feature reads.

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

    def read_sides(self, user: dict[str, Any], candidates: Candidates) -> tuple[Sides, list[str]]:
        """A request's features as the model wants them, and the keys that no feature reads.

        Raises: RequestError naming the field whose value cannot be read.
        """
        user = user if self.users is None else self.users.fill(user)
        ids = self.ids_of(candidates)
        read_here = self.of_user if ids is not None else set(self.specs)
        ignored = sorted(key for key in user if self.columns.get(key) not in read_here)
        values = {self.columns[key]: value for key, value in user.items() if key not in ignored}
        own = {c: to_array([v], self.specs[c], f"user.{c}") for c, v in values.items()}
        if ids is None:
            given, strange = self._given(candidates)
            return self._of_columns(own, given), ignored + [f"candidates.{name}" for name in strange]
        if self.catalogue is None:
            raise RequestError("candidates", "this model has no item catalogue: give raw columns, not ids")
        return self._of_ids(encode(self.of_request, own, 1, "user"), ids), ignored

    def ids_of(self, candidates: Candidates) -> Sequence[str | int] | None:
        """The candidates' ids where they are to be found in the catalogue, None where they bring their own columns.

        Columns of which the item's id is the only one are ids of the catalogue, where there is one.
        Raises: RequestError when one of those is neither text nor a whole number.
        """
        if isinstance(candidates, Mapping | pa.Table):
            names = list(column_names(candidates))
            if self.catalogue is None or names != [self.item_column]:
                return None
            ids = values_of(candidates, names[0])
            if not all(map(is_id, ids)):
                raise RequestError(f"candidates.{names[0]}", "must hold item ids: text or whole numbers")
            return ids
        return None if isinstance(candidates[0], dict) else candidates

    def _of_ids(self, request: Encoded, ids: Sequence[str | int]) -> Sides:
        assert self.catalogue is not None
        assert self.item_column is not None
        words = [i if isinstance(i, str) else str(i) for i in ids]
        found, known = self.catalogue.find(hash_words(words))
        encoded = self.catalogue.take(found)
        if not known.all():  # unknown items: their id as it encodes, everything else missing
            strange = encode(self.of_items, {self.item_column: pa.array(words)}, len(ids), "candidates")
            encoded = choose(known, encoded, strange)
        return Sides(request, encoded, np.where(known, found, -1))

    # -- columns -----------------------------------------------------------------------------------------------------

    def _given(self, candidates: Candidates) -> tuple[Given, list[str]]:
        """The candidates' columns by the log's names, and the names of columns that no feature reads."""
        if isinstance(candidates, Mapping | pa.Table):
            return self._given_columns(candidates)
        keys = set().union(*candidates)
        wanted = sorted(keys & self.columns.keys())
        own = [{self.columns[k]: v for k, v in row.items() if k in self.columns} for row in candidates]
        columns, has = {}, {}
        for column in sorted({self.columns[k] for k in wanted}):
            having = np.array([column in row for row in own])
            if not having.all():
                has[column] = having
            columns[column] = to_array([row.get(column) for row in own], self.specs[column], f"candidates.{column}")
        return Given(len(own), columns, has), self._strange(keys)

    def _given_columns(self, candidates: Mapping[str, list[Any]] | pa.Table) -> tuple[Given, list[str]]:
        columns: dict[str, pa.Array] = {}
        names = list(column_names(candidates))
        for name in names:
            column = self.columns.get(name)
            if column in columns:
                raise RequestError(f"candidates.{name}", f"the column {column!r} is given twice")
            if column is not None and isinstance(candidates, pa.Table):
                columns[column] = flat(candidates[name])
            elif column is not None:
                columns[column] = to_array(candidates[name], self.specs[column], f"candidates.{name}")
        rows = len(candidates) if isinstance(candidates, pa.Table) else len(candidates[names[0]])
        return Given(rows, columns, {}), self._strange(names)

    def _strange(self, names: Sequence[str] | set[str]) -> list[str]:
        return sorted(name for name in names if name not in self.columns and name != self.item_column)

    def _of_columns(self, own: dict[str, pa.Array], given: Given) -> Sides:
        """The sides of candidates that bring columns: apart where all these are of the item, else side by side."""
        if self.of_user & given.columns.keys():
            return Sides(None, fill(self.whole, own, given))
        user = {c: v for c, v in own.items() if c in self.of_user}
        return Sides(encode(self.of_request, user, 1, "user"), fill(self.of_items, own, given))

    # -- answers -----------------------------------------------------------------------------------------------------

    def describe(
        self, candidates: Candidates, sides: Sides, chosen: Sequence[int]
    ) -> list[tuple[str | int, str | None]]:
        """The id that an answer gives for each chosen candidate, and its title where the catalogue has one."""
        if sides.found is not None:
            assert self.catalogue is not None
            ids = self.ids_of(candidates)
            assert ids is not None
            titles, at = self.catalogue.titles, sides.found[list(chosen)].tolist()
            return [(ids[i], titles[a] if a >= 0 else None) for i, a in zip(chosen, at, strict=True)]
        if isinstance(candidates, Mapping | pa.Table):
            known = self.item_column in column_names(candidates)
            column = values_of(candidates, str(self.item_column)) if known else None
            given = [column[i] if column is not None else None for i in chosen]
        else:
            given = [candidates[i].get(self.item_column) if self.item_column else None for i in chosen]
        return [(g if is_id(g) else i, None) for g, i in zip(given, chosen, strict=True)]


def is_id(value: Any) -> TypeGuard[str | int]:
    """Whether a value can name an item: text or a whole number."""
    return type(value) in (str, int)


def column_names(candidates: Mapping[str, list[Any]] | pa.Table) -> Sequence[str]:
    """Names of the columns of candidates."""
    return candidates.column_names if isinstance(candidates, pa.Table) else list(candidates)


def values_of(candidates: Mapping[str, list[Any]] | pa.Table, name: str) -> list[Any]:
    """The values (K,) of one column of candidates."""
    values = candidates[name]
    return values if isinstance(values, list) else values.to_pylist()


def fill(transform: Transform, own: dict[str, pa.Array], given: Given) -> Encoded:
    """Features (K rows) of a transform: each candidate's own, and the user's (1 row) where it has none.

    A feature is a candidate's own when it brings any of the feature's columns. What comes from the user is encoded
    once, before it stands beside each candidate, so that a long list of theirs is not read K times.
    """
    theirs = encode(transform, given.columns, given.rows, "candidates")
    if not own:
        return theirs
    users = encode(transform, own, 1, "user")
    rows = np.arange(given.rows)
    index: dict[str, np.ndarray] = {}  # by feature: the candidate's row, or the user's, which comes after them
    for feature in transform.schema.features:
        has = np.zeros(given.rows, dtype=bool)
        for column in columns_of(feature):
            if column in given.columns:
                has |= given.has.get(column, True)
        index[feature.name] = np.where(has, rows, given.rows)
    sparse = {n: concatenate_ragged([r, users.sparse[n]]).take(index[n]) for n, r in theirs.sparse.items()}
    both = np.concatenate([theirs.dense, users.dense])
    by_column = [index[name.removesuffix(".missing")] for name in transform.dense_names]
    dense = np.stack([both[at, i] for i, at in enumerate(by_column)], axis=1) if by_column else theirs.dense
    return Encoded(sparse, dense)


def encode(transform: Transform, columns: dict[str, pa.Array], rows: int, where: str) -> Encoded:
    """Encode raw columns with (part of) a transform; columns it wants and does not get count as missing.

    Raises: RequestError naming the column whose values are not of its feature's kind.
    """
    table = pa.table(columns or {"_": pa.nulls(rows)})
    try:
        return transform.encode(table)
    except DataError as error:
        raise RequestError(_at_fault(transform, table, where), str(error)) from None


def _at_fault(transform: Transform, table: pa.Table, where: str) -> str:
    """The field whose values cannot be encoded."""
    for feature in transform.schema.features:
        try:
            pick(transform, [feature]).encode(table)
        except DataError:
            return f"{where}.{feature.source}"
    return where


def choose(first: np.ndarray, yes: Encoded, no: Encoded) -> Encoded:
    """Row by row from one of two encodings of the same features."""
    rows = np.arange(len(first))
    return concatenate([yes, no]).take(np.where(first, rows, rows + len(first)))
