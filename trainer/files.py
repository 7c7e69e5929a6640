"""Files that are whole or absent: write beside, then rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import SlimrankError


def check_new(out: Path) -> Path:
    """Refuse an output folder that already holds something; called before any long work.

    Raises: SlimrankError naming the folder.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SlimrankError(f"{out}: already there and not empty: choose another --out, or remove it first")
    return out


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` by one rename when the block ends well, and is removed when it fails.

    Raises: SlimrankError when `out` holds something already.
    """
    out = check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A path to write to that becomes `out`, in place of what is there, when the block ends well.

    Raises: SlimrankError when `out` is a folder.
    """
    out = Path(out).absolute()
    if out.is_dir():
        raise SlimrankError(f"{out}: is a folder: give the name of a file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        yield staging
        staging.replace(out)
    finally:
        staging.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old one or the new one, never half of it."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(path)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
