"""The file of API keys: their hashes, and what each may ask a second. serve/key_ring.py goes by it.

A key is 256 random bits, so one round of SHA-256 is enough to keep at rest: nobody guesses what it is the hash of. The
file is JSON: {"format_version": 1, "keys": [{"name", "sha256", "created", "revoked", "requests_per_s",
"candidates_per_s"}]}; `slimrank key` writes it (cluster/key_commands.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.config import describe
from trainer.errors import SlimrankError

PREFIX = "slim_"  # so that a key found in a log or a repository is known for what it is
KEY_BYTES = 32
FILE_BYTES = 16 << 20  # some 50,000 keys

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
Rate = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]


class Key(BaseModel):
    """One key at rest. `created`, `revoked`: UTC, ISO 8601. Limits are a second, over all replicas together."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str = Field(max_length=40)
    revoked: str | None = Field(default=None, max_length=40)
    requests_per_s: Rate | None = None
    candidates_per_s: Rate | None = None


class KeyFile(BaseModel):
    """All keys; names and hashes are unique."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format_version: Annotated[int, Field(ge=1, le=1)] = 1
    keys: list[Key] = Field(default=[], max_length=100_000)

    @model_validator(mode="after")
    def _unique(self) -> KeyFile:
        for what in ("name", "sha256"):
            seen: set[str] = set()
            for key in self.keys:
                if getattr(key, what) in seen:
                    raise ValueError(f"{what} {getattr(key, what)!r} is there twice")
                seen.add(getattr(key, what))
        return self


def read_keys(path: Path) -> KeyFile:
    """The keys in a file. Raises: SlimrankError when it is missing, no key file, or writable by others."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(FILE_BYTES + 1)
    except FileNotFoundError:
        raise SlimrankError(f"{path}: no such file: 'slimrank key new' makes one") from None
    except OSError as error:
        raise SlimrankError(f"{path}: cannot be read: {error.strerror}") from None
    if mode & 0o022:
        raise SlimrankError(f"{path}: others may write it (mode {mode & 0o777:03o}): chmod 600 {path}")
    if len(content) > FILE_BYTES:
        raise SlimrankError(f"{path}: longer than {FILE_BYTES:,} bytes, the most a key file may have")
    try:
        return KeyFile.model_validate_json(content)
    except ValidationError as error:
        raise SlimrankError(" ".join(describe(error, str(path)).split())[:500]) from None


def write_keys(path: Path, keys: KeyFile) -> None:
    """Write the file for its owner's eyes only, beside and then renamed: a reader sees the old one or the new one."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.unlink(missing_ok=True)
    try:
        handle = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(keys.model_dump_json(indent=2) + "\n")
        staging.replace(path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise SlimrankError(f"{path}: cannot be written: {error.strerror}") from None


def checked(path: Path | None) -> Path | None:
    """The absolute path of a file of keys, where one is given. Raises: SlimrankError as `read_keys`."""
    if path is None:
        return None
    read_keys(path)
    return path.absolute()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One change of a file at a time: two commands at once lose no key."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise SlimrankError(f"{path}: its folder cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def digest_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(path: Path, name: str, requests_per_s: float | None = None, candidates_per_s: float | None = None) -> str:
    """Add a key to a file, which is made where there is none, and return the key: it is kept nowhere.

    Raises: SlimrankError when the name is taken or no name, a limit is not above 0, or the file is bad.
    """
    with _alone(path):
        keys = read_keys(path) if path.exists() else KeyFile()
        if any(key.name == name for key in keys.keys):
            raise SlimrankError(f"{path}: has a key {name!r} already: choose another name, or revoke it and do so")
        secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
        try:
            added = Key(
                name=name,
                sha256=digest_of(secret),
                created=_now(),
                requests_per_s=requests_per_s,
                candidates_per_s=candidates_per_s,
            )
        except ValidationError as error:
            raise SlimrankError(" ".join(describe(error, "key").split())) from None
        write_keys(path, KeyFile(keys=[*keys.keys, added]))
    return secret


def revoke_key(path: Path, name: str) -> Key:
    """Refuse a key from now on; its name stays taken. Raises: SlimrankError when there is no such key."""
    with _alone(path):
        keys = read_keys(path)
        found = next((key for key in keys.keys if key.name == name), None)
        if found is None:
            raise SlimrankError(
                f"{path}: has no key {name!r}, it has: {', '.join(k.name for k in keys.keys[:20]) or 'none'}"
            )
        revoked = found.model_copy(update={"revoked": found.revoked or _now()})
        write_keys(path, KeyFile(keys=[revoked if key is found else key for key in keys.keys]))
    return revoked


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
