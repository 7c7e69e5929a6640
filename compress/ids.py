"""The id map of an artifact on disk: what takes a raw id to a row of the packed tables, and its bytes.

A vocabulary is stored as the leading bytes of its ids' hashes in row order (pruned ids behind the kept ones), so the
row number itself takes no byte. A hash or bucket table stores the remap of its rows when it is pruned; unpruned it
keeps its order, which costs nothing. One Arrow file holds all tables: name, key width, keys, remap.

Legend: N training rows, K kept rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.transform import OOV_ROW, RESERVED_ROWS, IdMap, TableInfo, read_arrow, write_arrow

FALSE_KNOWN = 1e-4  # share of unknown ids that a shortened hash may take for a known one, at most
MIN_KEY_BYTES = 3


def key_bytes(keys: np.ndarray) -> int:
    """The fewest leading bytes of sorted 64-bit hashes that tell them apart and keep unknown ids unknown."""
    for width in range(MIN_KEY_BYTES, 8):
        if len(keys) / 2.0 ** (8 * width) <= FALSE_KNOWN:
            short = keys >> np.uint64(64 - 8 * width)
            if not (short[1:] == short[:-1]).any():
                return width
    return 8


def id_map_bytes(trained: IdMap, num_embeddings: int, cut: int) -> int:
    """Bytes of one table's id map as `write_ids` stores it, Arrow's framing not counted."""
    if trained.keys is not None:
        return len(trained.keys) * key_bytes(np.asarray(trained.keys))
    return num_embeddings * 4 if cut < num_embeddings else 0


def artifact_rows(trained: IdMap, order: np.ndarray, cut: int) -> np.ndarray:
    """The artifact's row (N,) int32 of each training row; pruned ones share row `cut`, the centroid."""
    if trained.keys is None and cut == len(order):
        return np.arange(len(order), dtype=np.int32)
    rows = np.empty(len(order), dtype=np.int32)
    rows[order] = np.minimum(np.arange(len(order)), cut)
    return rows


def write_ids(
    path: Path, trained: Mapping[str, IdMap], orders: Mapping[str, np.ndarray], cuts: Mapping[str, int]
) -> None:
    """Write the id maps of all tables; `orders` are training rows by rank."""
    columns: dict[str, list] = {"table": [], "key_bytes": [], "keys": [], "remap": []}
    for name, id_map in trained.items():
        columns["table"].append(name)
        order, cut = orders[name], cuts[name]
        if id_map.keys is None:
            pruned = cut < len(order)
            columns["key_bytes"].append(0)
            columns["keys"].append(b"")
            columns["remap"].append(artifact_rows(id_map, order, cut).tobytes() if pruned else b"")
            continue
        width = key_bytes(np.asarray(id_map.keys))
        by_rank = id_map.keys_by_row()[order[RESERVED_ROWS:] - RESERVED_ROWS]
        leading = by_rank.astype(">u8").view(np.uint8).reshape(-1, 8)[:, :width]
        columns["key_bytes"].append(width)
        columns["keys"].append(np.ascontiguousarray(leading).tobytes())
        columns["remap"].append(b"")
    binary = pa.large_binary()
    write_arrow(
        pa.table(
            {
                "table": pa.array(columns["table"]),
                "key_bytes": pa.array(columns["key_bytes"], pa.int8()),
                "keys": pa.array(columns["keys"], binary),
                "remap": pa.array(columns["remap"], binary),
            }
        ),
        path,
    )


def read_ids(path: Path, tables: Mapping[str, TableInfo], cuts: Mapping[str, int]) -> dict[str, IdMap]:
    """The id maps that `write_ids` wrote, ready to look up."""
    stored = read_arrow(path)
    maps = {}
    for index, name in enumerate(stored["table"].to_pylist()):
        size = tables[name].num_embeddings - RESERVED_ROWS
        width = stored["key_bytes"][index].as_py()
        remap = np.frombuffer(stored["remap"][index].as_buffer(), dtype=np.int32)
        if not width:
            maps[name] = IdMap(size, remap=remap if len(remap) else None)
            continue
        leading = np.frombuffer(stored["keys"][index].as_buffer(), dtype=np.uint8).reshape(-1, width)
        padded = np.zeros((len(leading), 8), dtype=np.uint8)
        padded[:, 8 - width :] = leading
        by_rank = padded.view(">u8").ravel().astype(np.uint64)
        sort = np.argsort(by_rank, kind="stable")
        rows = np.minimum(np.arange(RESERVED_ROWS, RESERVED_ROWS + len(sort)), cuts[name])[sort]
        reserved = np.arange(OOV_ROW, RESERVED_ROWS)
        remap = np.concatenate([reserved, rows]).astype(np.int32)
        maps[name] = IdMap(size, by_rank[sort], 64 - 8 * width, remap)
    return maps
