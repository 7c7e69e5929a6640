"""Artifacts of one world that differ: more bits, other weights, other features."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from compress_builders import World, save_random_checkpoint, two_tasks_in, world_in

from compress.artifact import Artifact


@functools.cache
def finer(base: Path) -> Artifact:
    """The same weights at 8 bits: ranks as the mixed plan's artifact, nearly."""
    world = world_in(base)
    return world.artifact(world.uniform(8))


@functools.cache
def stranger(base: Path) -> Artifact:
    """The same features, weights that have nothing to do with the others'."""
    world = world_in(base)
    checkpoint = save_random_checkpoint(world.run, world.dataset, base / "stranger", 77)
    other = World(world.folder, world.raw, world.run, world.dataset, checkpoint)
    return other.artifact(other.uniform(8))


@functools.cache
def without_catalogue(base: Path) -> Artifact:
    """Loads and scores, and cannot read a request of item ids."""
    world = two_tasks_in(base)
    return world.artifact(world.uniform(8))


def damaged(artifact: Artifact, folder: Path) -> Path:
    """A copy with one bit of its tables turned over."""
    shutil.copytree(artifact.folder, folder)
    content = bytearray((folder / "tables.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "tables.bin").write_bytes(content)
    return folder
