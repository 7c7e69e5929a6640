"""A small world with what the first one lacks: attention over a sequence, weighted bags, two poolings on one table."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from compress_builders import World, prepare_here, save_random_checkpoint, write_log

from trainer.config import RunConfig

WORDS = ("red", "green", "blue", "grey", "pink")
FEATURES: tuple[dict[str, Any], ...] = (
    {"name": "user_id", "kind": "categorical", "side": "user", "dim": 8},
    {"name": "item_id", "kind": "categorical", "side": "item", "dim": 8},
    {
        "name": "seen",
        "kind": "sequence",
        "side": "user",
        "table": "item_id",
        "pooling": "attention",
        "max_length": 4,
    },
    {
        "name": "bought",
        "kind": "sequence",
        "side": "user",
        "table": "item_id",
        "pooling": "mean",
        "separator": " ",
        "max_length": 3,
    },
    {"name": "likes", "kind": "multi", "side": "user", "weights": "like_how", "pooling": "mean", "dim": 4},
    {
        "name": "words",
        "kind": "multi",
        "side": "item",
        "table": "likes",
        "weights": "word_how",
        "pooling": "sum",
        "separator": "|",
        "max_length": 3,
    },
    {"name": "age", "kind": "numeric", "side": "user"},
)


def rich_log(rows: int, seed: int) -> pa.Table:
    """A log in time order; words and their weights are functions of the item."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 30, rows), rng.integers(0, 40, rows)

    def history(longest: int) -> list[list[str] | None]:
        return [None if n == longest else [f"i{x}" for x in rng.integers(0, 44, n)] for n in rng.integers(0, 8, rows)]

    words = ["|".join(WORDS[(i + j) % 5] for j in range(i % 5)) for i in range(40)]
    how = ["|".join(f"{(i * 7 + j * 3) % 9 / 4:g}" for j in range(i % 5)) for i in range(40)]
    likes = [[*rng.choice(WORDS, n)] for n in rng.integers(0, 4, rows)]
    weights = [np.round(rng.random(len(b)) * 2, 2).tolist() for b in likes]
    return pa.table(
        {
            "user_id": pa.array([f"u{u}" for u in users]),
            "item_id": pa.array([f"i{i}" for i in items]),
            "seen": pa.array(history(7), pa.list_(pa.string())),
            "bought": pa.array([None if h is None else " ".join(h) for h in history(6)]),
            "likes": pa.array(likes, pa.list_(pa.string())),
            "like_how": pa.array(weights, pa.list_(pa.float64())),
            "words": pa.array([words[i] for i in items]),
            "word_how": pa.array([how[i] for i in items]),
            "age": pa.array(np.round(rng.normal(40, 12, rows), 1)),
            "when": pa.array(np.arange(rows)),
            "click": pa.array((rng.random(rows) < 0.4).astype(np.int8)),
        }
    )


def rich_run(log: Path, arch: str) -> RunConfig:
    """The run of `rich_log`."""
    return RunConfig.model_validate(
        {
            "name": "rich",
            "data": {
                "input": str(log / "*.parquet"),
                "split": {"by": "timestamp", "fractions": [0.7, 0.2, 0.1]},
                "timestamp": "when",
                "ids": {"user": "user_id", "item": "item_id"},
                "tasks": [{"name": "click", "column": "click"}],
                "features": list(FEATURES),
            },
            "model": {"arch": arch, "embedding_dim": 8, "top_mlp": [16, 8], "tower_mlp": [8], "bottom_mlp": [8]},
        }
    )


def build_rich_world(folder: Path, arch: str, rows: int = 600, seed: int = 3) -> World:
    """The log, its prepared data and a checkpoint of random weights."""
    raw = rich_log(rows, seed)
    write_log(raw, folder / "log")
    run = rich_run(folder / "log", arch)
    dataset = prepare_here(run, raw, folder / "prepared").sized(run.data, run.model.embedding_dim)
    return World(folder, raw, run, dataset, save_random_checkpoint(run, dataset, folder / "checkpoint", seed + 1))


@functools.cache
def rich_world_in(base: Path, arch: str) -> World:
    """The world of a test session, for each architecture."""
    return build_rich_world(base / f"rich-{arch}", arch)
