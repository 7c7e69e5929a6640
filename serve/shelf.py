"""The versions that one replica holds: one is live, others are ready to be. A version changes by one assignment.

Whoever answers a request takes `live` once, so that no answer mixes two versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from compress.artifact import load_artifact
from serve.ranker import Ranker


@dataclass(frozen=True)
class Served:
    """A loaded version, ready to answer."""

    version: str
    path: str
    ranker: Ranker


class Shelf:
    """Loaded versions by name."""

    def __init__(self, live: Served) -> None:
        self.live = live
        self.loaded = {live.version: live}

    def add(self, served: Served) -> None:
        """Keep a version ready."""
        self.loaded[served.version] = served

    def flip(self, version: str) -> None:
        """Answer with another loaded version from now on. Raises: KeyError when it is not loaded."""
        self.live = self.loaded[version]

    def drop(self, keep: set[str]) -> None:
        """Forget what is neither live nor in `keep`."""
        live = self.live
        self.loaded = {name: s for name, s in self.loaded.items() if name in keep or s is live}


def load(path: str) -> Served:
    """Open and verify an artifact, bring its tables into memory, and answer once.

    Raises: ArtifactError when it is none, is damaged, or is not signed by a trusted key.
    """
    artifact = load_artifact(Path(path))
    ranker = Ranker(artifact)
    touch(artifact.model.lookup.block)
    return Served(artifact.version, path, ranker)


def touch(block: torch.Tensor) -> None:
    """Read one byte of each page of the tables, so that no request waits for the disk."""
    if block.numel():
        block.view(torch.uint8).reshape(-1)[::4096].sum()
