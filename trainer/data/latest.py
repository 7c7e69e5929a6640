"""What a log says last of a thing: the time of its rows, and the latest row of each key.

Legend: N rows.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from trainer.data.schema import DataConfig
from trainer.data.transform import as_numbers, flat
from trainer.errors import DataError


def timestamps(raw: pa.Table, data: DataConfig) -> np.ndarray:
    """The time of each row as float64, in the column's own unit. Raises: DataError for a missing or unreadable time."""
    name = str(data.timestamp)
    column = flat(raw[name])
    try:
        times = as_numbers(column, name)
    except DataError:
        parsed = pd.to_datetime(pd.Series(column.to_pylist()), utc=True, format="ISO8601", errors="coerce")
        times = np.where(parsed.isna(), np.nan, parsed.dt.as_unit("us").astype("int64").to_numpy(np.float64))
    if np.isnan(times).any():
        bad = column[int(np.isnan(times).argmax())].as_py()
        raise DataError(f"column {name!r}: holds {bad!r}, which is no time: use numbers, timestamps or ISO 8601 text")
    return times


def last_seen(rows: pa.Table) -> pa.Table:
    """The latest row, by `_when`, of each `_key`, in key order; of rows of one time the last."""
    key, when = rows["_key"].to_numpy(), rows["_when"].to_numpy()
    order = np.lexsort((when, key))
    last = np.flatnonzero(np.append(key[order][1:] != key[order][:-1], True)) if len(order) else order
    return rows.take(pa.array(order[last]))
