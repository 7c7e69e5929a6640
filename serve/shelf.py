"""The versions that one replica holds: one is live, others are ready to be. A version changes by one assignment.

Whoever answers a request takes `live` once, so that no answer mixes two versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from compress.artifact import load_artifact
from compress.item_file import with_catalogue
from serve.logs import log_version
from serve.ranker import Ranker
from serve.users import open_users


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
        self.fallback: Served | None = None  # answers what the live version cannot, while that is on probation
        self.loaded = {live.version: live}

    def add(self, served: Served) -> None:
        """Keep a version ready."""
        self.loaded[served.version] = served

    def flip(self, version: str) -> None:
        """Answer with another loaded version from now on. Raises: KeyError when it is not loaded."""
        previous, self.live = self.live.version, self.loaded[version]
        log_version(version, previous)

    def drop(self, keep: set[str]) -> None:
        """Forget what is neither live nor in `keep`."""
        live = self.live
        self.loaded = {name: s for name, s in self.loaded.items() if name in keep or s is live}


def load(path: str, score: str | None = None, users: str | Path | None = None, catalogue: str | None = None) -> Served:
    """Open and verify an artifact, bring its tables into memory, and answer once.

    `score`: the formula that items are ordered by; `users`: a file of users' features; `catalogue`: one that takes the
    place of the artifact's own.
    Raises: ArtifactError when it is none, is damaged, or is not signed by a trusted key; SlimrankError when the formula
    or one of the files is not for this artifact.
    """
    artifact = load_artifact(path)
    if catalogue is not None:
        artifact = with_catalogue(artifact, Path(catalogue))
    ranker = Ranker(artifact, score)
    if users is not None:
        ranker.reader.users = open_users(users, artifact.model.transform.schema)
    touch(artifact.model.lookup.block)
    return Served(artifact.version, path, ranker)


def touch(block: torch.Tensor) -> None:
    """Read one byte of each page of the tables, so that no request waits for the disk."""
    if block.numel():
        block.view(torch.uint8).reshape(-1)[::4096].sum()
