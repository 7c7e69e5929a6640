"""What ranks tell each other in plain Python objects; one rank alone needs no process group."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_all(value: T, world_size: int) -> list[T]:
    """Every rank's value, in rank order; all ranks call it together."""
    values: list[Any] = [value]
    if world_size > 1:
        values = [None] * world_size
        dist.all_gather_object(values, value)
    return values


def from_first(value: T, world_size: int, **where: Any) -> T:
    """Rank 0's value on every rank; all ranks call it together. `where`: as torch's broadcast_object_list takes it."""
    told = [value]
    if world_size > 1:
        dist.broadcast_object_list(told, src=0, **where)
    return told[0]
