"""Checksums of files, and this machine's memory of those it has taken before.

Hashing 10 GB takes seconds, which a replica that starts has not. A file that this user hashed here before, and that has
the same device, inode, size, mtime and ctime since, is the same file: its ctime changes with every write and cannot be
set back by a program. The record lies outside the artifact, in the user's cache folder; without one, or with `full`,
every byte is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from io import BufferedReader
from pathlib import Path

from compress.errors import ArtifactError
from trainer.files import write_text

SETTLED_S = 2.0  # a file changed more recently could change again within the clock's resolution: not recorded
RECORD_BYTES = 4096
LARGE_BYTES = 64 << 20  # worth waiting for: hashing so much takes a load 40 ms (1.6 GB/s on a Zen 5 core)


def open_regular(path: Path) -> BufferedReader:
    """Open a file that is a file: no link, device, pipe or folder, and nothing that opening could block on.

    Raises: ArtifactError naming it.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtifactError(f"{path}: not a regular file: an artifact holds no links, folders or devices")
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing from the artifact: compress again, or restore the file") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be opened: {error.strerror}") from None
    return os.fdopen(file, "rb")


def cache_folder(part: str = "verified") -> Path:
    """Where a part of the cache lies: below SLIMRANK_CACHE, else XDG_CACHE_HOME/slimrank, else ~/.cache/slimrank."""
    asked = os.environ.get("SLIMRANK_CACHE")
    if asked:
        return Path(asked) / part
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimrank" / part


def checksum(path: Path, *, full: bool) -> str:
    """The hex SHA-256 of a file: from the record of this machine where it still holds, unless `full`.

    Raises: ArtifactError when the path is no regular file.
    """
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        known = None if full else _recorded(before)
        if known is not None:
            return known
        settled = time.time() - max(before.st_mtime, before.st_ctime) > SETTLED_S
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if settled and _identity(before) == _identity(os.fstat(file.fileno())):
            _record(before, digest)
    return digest


def written_checksum(path: Path) -> str:
    """The hex SHA-256 of a file that is now whole; of a large one it is recorded, so that no load here takes it again.

    Waits until a large file has not changed for SETTLED_S.
    Raises: ArtifactError when the path is no regular file.
    """
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
    if status.st_size >= LARGE_BYTES:
        unsettled_s = SETTLED_S - (time.time() - max(status.st_mtime, status.st_ctime))
        time.sleep(min(max(unsettled_s + 0.1, 0.0), SETTLED_S + 0.1))
    return checksum(path, full=True)


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _record_path(status: os.stat_result) -> Path:
    return cache_folder() / f"{status.st_dev}-{status.st_ino}.json"


def _recorded(status: os.stat_result) -> str | None:
    """The recorded checksum, if nobody else could have written it and the file is unchanged."""
    path = _record_path(status)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        for owned in (path.parent.stat(), path.stat()):
            if owned.st_uid != os.geteuid() or owned.st_mode & 0o022:
                return None
        with path.open("rb") as file:
            record = json.loads(file.read(RECORD_BYTES))
        if record["identity"] == _identity(status):
            return str(record["sha256"])
    return None


def _record(status: os.stat_result, digest: str) -> None:
    path = _record_path(status)
    with contextlib.suppress(OSError):  # a read-only home costs the next start its speed, no more
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(path, json.dumps({"identity": _identity(status), "sha256": digest}))
        path.chmod(0o600)
