"""Features of known users, from the file that `slimrank data users` writes: mapped, found by the hash of the id.

What a request gives wins; what it does not give is filled in; of a user who is not in the file nothing is known.
The values are raw, so they take the same way through the transform as those of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from compress.catalogue import mapped
from compress.checks import check_arrow
from serve.errors import RequestError
from trainer.data.schema import BagFeature, DataConfig, MultiFeature, NumericFeature, columns_of
from trainer.data.transform import as_text, hash_ids, read_arrow
from trainer.data.users import VALUE
from trainer.errors import SlimrankError

REMEDY = "write it with 'slimrank data users' and the run's YAML"


class Users:
    """Raw user-side values by user id, for one schema. Columns that no user-side feature reads are left aside."""

    def __init__(self, stored: pa.Table, schema: DataConfig) -> None:
        features = schema.features
        self.column = str(schema.ids.user)
        self.keys = mapped(stored["key"]).to_numpy()
        self.ids = mapped(stored["id"])
        self.id_is_read = any(self.column in columns_of(f) for f in features)
        self.source_of = {f.name: f.source for f in features} | {c: c for f in features for c in columns_of(f)}
        self.source_of[self.column] = self.column
        wanted = [c for f in features if f.side == "user" for c in columns_of(f)]
        self.values = {c: mapped(stored[VALUE + c]) for c in wanted if VALUE + c in stored.column_names}
        # a bag and its weights are one: half of one from the file and half from the request would not fit
        pairs = [columns_of(f) for f in features if isinstance(f, MultiFeature) and f.weights is not None]
        self.together = {c: set(pair) for pair in pairs for c in pair}

    def __len__(self) -> int:
        return len(self.keys)

    def fill(self, user: Mapping[str, Any]) -> dict[str, Any]:
        """A request's user with what is known of them besides.

        Raises: RequestError when the user's id is a list or an object.
        """
        filled = dict(user)
        asked = next((key for key in user if self.source_of.get(key) == self.column), None)
        if asked is None:
            return filled
        at = self.find(user[asked])
        if not self.id_is_read:
            del filled[asked]
        if at is None:
            return filled
        given = {self.source_of.get(key, key) for key in user}
        given |= {c for key in given for c in self.together.get(key, ())}
        return filled | {c: v for c, v in self.row(at).items() if c not in given}

    def find(self, user: Any) -> int | None:
        """Where a user's id lies in the file. Raises: RequestError when it is a list or an object."""
        if isinstance(user, list | dict):
            raise RequestError(f"user.{self.column}", f"must be one id (text or a number), not {type(user).__name__}")
        if user is None or not len(self.keys):
            return None
        text = user if isinstance(user, str) else str(user).lower() if isinstance(user, bool) else _number(user)
        keys, missing = hash_ids(pa.array([text], pa.string()), self.column)
        at = int(np.searchsorted(self.keys, keys[0]))
        return at if not missing[0] and at < len(self.keys) and self.keys[at] == keys[0] else None

    def row(self, at: int) -> dict[str, Any]:
        """What is known of the user at a place: raw values by column."""
        known = ((name, column[at].as_py()) for name, column in self.values.items())
        return {name: value for name, value in known if value is not None}


def _number(user: float) -> str | None:
    return as_text(pa.array([user], pa.float64()), "id")[0].as_py() if isinstance(user, float) else str(user)


def open_users(path: str | Path, schema: DataConfig) -> Users:
    """Map a file of users' features and check it against the schema of the model that will read them.

    Raises: SlimrankError naming the file, the column and the rule.
    """
    where = Path(path)
    if not where.is_file():
        raise SlimrankError(f"{where}: no such file: {REMEDY}")
    if schema.ids.user is None:
        raise SlimrankError(f"{where}: the model's schema names no user: leave serve.users out")
    check_arrow(where)
    stored = read_arrow(where)
    if stored.column_names[:2] != ["key", "id"] or stored["key"].type != pa.uint64():
        raise SlimrankError(f"{where}: not a file of users' features: {REMEDY}")
    keys = mapped(stored["key"]).to_numpy(zero_copy_only=False)
    if stored["key"].null_count or not (keys[1:] > keys[:-1]).all():
        raise SlimrankError(f"{where}: keys are not sorted hashes of distinct ids: {REMEDY}")
    _check_columns(stored, schema, where)
    users = Users(stored, schema)
    if not users.values:
        raise SlimrankError(f"{where}: holds no column that a user-side feature of this model reads: {REMEDY}")
    return users


def _check_columns(stored: pa.Table, schema: DataConfig, where: Path) -> None:
    expected: dict[str, pa.DataType] = {str(schema.ids.user): pa.string()}
    for feature in schema.features:
        if feature.side != "user":
            continue
        expected |= dict.fromkeys(columns_of(feature), pa.list_(pa.float64()))
        numeric, bag = isinstance(feature, NumericFeature), isinstance(feature, BagFeature)
        expected[feature.source] = pa.float64() if numeric else pa.list_(pa.string()) if bag else pa.string()
    for name, kind in [("id", pa.string()), *((VALUE + c, k) for c, k in expected.items())]:
        if name in stored.column_names and stored[name].type != kind:
            found = str(stored[name].type)[:80]
            raise SlimrankError(f"{where}: column {name!r} is {found}, this model reads {kind}: {REMEDY}")
    for feature in schema.features:
        if feature.side == "user" and isinstance(feature, MultiFeature) and feature.weights is not None:
            _check_weights(stored, VALUE + feature.source, VALUE + feature.weights, where)


def _check_weights(stored: pa.Table, ids: str, weights: str, where: Path) -> None:
    if weights not in stored.column_names:
        return
    if ids not in stored.column_names:
        raise SlimrankError(f"{where}: has {weights!r} without {ids!r}, whose weights they are: {REMEDY}")
    lengths, own = (_lengths(mapped(stored[name])) for name in (ids, weights))
    values = mapped(stored[weights]).flatten().to_numpy(zero_copy_only=False)
    if ((own != lengths) & (own > 0)).any() or (values < 0).any():
        raise SlimrankError(f"{where}: {weights!r} are not one number, 0 or more, for each of {ids!r}: {REMEDY}")


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
