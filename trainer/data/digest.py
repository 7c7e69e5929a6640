"""Hashes of row numbers: what proves that an epoch gave each sample exactly once.

The digest of some rows is the sum of their hashes modulo 2**64. It does not depend on their order, and digests of
disjoint parts (ranks, batches, the runs before and after a restart) add up to the digest of the whole.
"""

from __future__ import annotations

import numpy as np

DIGEST_ROWS = 1 << 20  # hashed at once


def splitmix64(values: np.ndarray, salt: int = 0) -> np.ndarray:
    """SplitMix64 of integers (N,) under a salt: uniform 64-bit words (N,) uint64."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64((salt * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def row_digest(index: np.ndarray, epoch: int) -> int:
    """The digest, in [0, 2**64), of rows (N,) int64 of a split in one epoch."""
    words = splitmix64(splitmix64(index), epoch + 1)  # twice: index and epoch must not trade places
    return int(words.sum(dtype=np.uint64))


def epoch_digest(rows: int, epoch: int) -> int:
    """The digest of rows 0..rows-1: what a whole epoch adds up to."""
    starts = range(0, rows, DIGEST_ROWS)
    return sum(row_digest(np.arange(at, min(at + DIGEST_ROWS, rows)), epoch) for at in starts) % 2**64
