"""Results in a storage: written into a folder of this machine, copied up so that a part never looks whole.

What is in a folder first goes up, its manifest (checkpoint.json, manifest.json, ...) after it, and the manifest of the
folder that holds it last; what is taken away goes in the opposite order. So whoever opens a folder in a storage sees it
whole or is told that it is none, whenever a copy was cut short.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from trainer.errors import SlimrankError, StorageError
from trainer.files import check_new
from trainer.storage import Location, RemotePath, in_parallel, storage_step

MANIFESTS = ("manifest.json", "checkpoint.json", "dataset.json", "train.json", "tune.json")
SYNC_S = 30.0
SCRATCH = "SLIMRANK_SCRATCH"
OBJECT_STORES = ("s3", "gcs", "abfs")  # they have no folders to make
LOCAL = pafs.LocalFileSystem()

logger = logging.getLogger(__name__)


def upload_steps(names: Iterable[str]) -> list[list[str]]:
    """Files in the order to copy them up: all that are no manifest, then manifests, those of inner folders first."""
    content: list[str] = []
    manifests: list[str] = []
    for name in sorted(names):
        (manifests if name.rpartition("/")[2] in MANIFESTS else content).append(name)
    by_depth = {depth: [m for m in manifests if m.count("/") == depth] for depth in {m.count("/") for m in manifests}}
    return [step for step in (content, *(by_depth[d] for d in sorted(by_depth, reverse=True))) if step]


class Mirror:
    """A folder of this machine and its copy in a storage; remembers what it copied, so that each file goes up once."""

    def __init__(self, folder: Path, place: RemotePath) -> None:
        self.folder = folder
        self.place = place
        self._known: dict[str, tuple[int, int]] = {}
        self._turn = threading.Lock()

    def sync(self) -> None:
        """Copy up what is new or changed, and take away what is gone here; hidden files stay here.

        Raises: StorageError when the storage cannot be written.
        """
        with self._turn:
            now = visible_files(self.folder)
            gone = [name for name in self._known if name not in now]
            for step in reversed(upload_steps(gone)):
                in_parallel(self._remove, step)
            changed = {name for name, state in now.items() if self._known.get(name) != state}
            with contextlib.suppress(_Vanished):  # the next turn sees the folder as it is then
                for step in upload_steps(changed):
                    in_parallel(lambda name: self._upload(name, now[name]), step)

    def fetch(self) -> int:
        """Copy down all that is in the storage; returns the number of files. Raises: StorageError when it cannot."""
        with self._turn:
            names = self.place.files()
            for step in upload_steps(names):
                in_parallel(self._download, step)
            self._known = visible_files(self.folder)
        return len(names)

    def _upload(self, name: str, state: tuple[int, int]) -> None:
        source = self.folder / name
        try:
            file = source.open("rb")
        except FileNotFoundError:
            raise _Vanished from None
        with file:
            write_remote(self.place / name, file)
        self._known[name] = state

    def _download(self, name: str) -> None:
        target = self.folder / name
        if not target.resolve().is_relative_to(self.folder.resolve()):
            raise StorageError(f"{self.place / name}: leads out of its folder: remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        download(self.place / name, target)

    def _remove(self, name: str) -> None:
        with storage_step(self.place / name, "cannot be removed"), contextlib.suppress(FileNotFoundError):
            self.place.filesystem.delete_file((self.place / name).path)
        del self._known[name]


class _Vanished(Exception):
    """A file was removed while it was being copied."""


def visible_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and mtime (ns) of each file below a folder, by relative path; hidden files and folders are left out."""
    found = {}
    for base, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            path = Path(base) / file
            if not file.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found


def write_remote(place: RemotePath, source: Any) -> None:
    """Copy an open file up; an object store shows it once it is whole. Raises: StorageError when it cannot."""
    with storage_step(place, "cannot be written"):
        if place.filesystem.type_name not in OBJECT_STORES:
            place.filesystem.create_dir(place.path.rpartition("/")[0], recursive=True)
        with place.filesystem.open_output_stream(place.path) as sink:
            shutil.copyfileobj(source, sink, 8 << 20)


def download(place: RemotePath, target: Path) -> None:
    """Copy a file down; it has its name once it is whole. Raises: StorageError when it cannot be read."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with storage_step(place, "cannot be fetched"):
            pafs.copy_files(place.path, str(partial), source_filesystem=place.filesystem, destination_filesystem=LOCAL)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def check_new_place(out: Location) -> None:
    """Refuse an output that holds something already. Raises: SlimrankError or StorageError naming it."""
    if isinstance(out, Path):
        check_new(out)
    elif out.is_file() or out.files():
        raise SlimrankError(f"{out}: already there and not empty: choose another --out, or remove it first")


@contextlib.contextmanager
def results_at(
    out: Location, *, resume: bool = False, every_s: float | None = None, note: Any = logger.warning
) -> Iterator[Path]:
    """A folder to write results into, which are in `out` when the block ends.

    A Path is itself that folder. For a storage it is a scratch folder (below SLIMRANK_SCRATCH, else the system's),
    copied up when the block ends well. With `every_s` seconds it is copied up meanwhile too, and when the block fails,
    so that what was finished can be resumed from; `resume` begins with what is there.

    Raises: SlimrankError when `out` holds something and not `resume`; StorageError when it cannot be written (what was
    written stays in the scratch folder then, which is named).
    """
    if isinstance(out, Path):
        yield out
        return
    if not resume:
        check_new_place(out)
    base = Path(tempfile.mkdtemp(prefix="slimrank-out-", dir=os.environ.get(SCRATCH)))
    mirror, keep = Mirror(base / (out.name or "results"), out), False
    try:
        if resume:
            mirror.fetch()
        try:
            with _synced(mirror, every_s, note):
                yield mirror.folder
        except BaseException:
            if every_s is not None:
                keep = _unsynced(mirror, note)
            raise
        try:
            mirror.sync()
        except StorageError as error:
            keep = True
            raise StorageError(f"{error}; the results are whole in {mirror.folder}: copy them up") from None
    finally:
        if not keep:
            shutil.rmtree(base, ignore_errors=True)


def _unsynced(mirror: Mirror, note: Any) -> bool:
    """Copy up what a failed block finished; whether that failed too."""
    try:
        mirror.sync()
    except StorageError as error:
        note(f"{error}; what was finished is in {mirror.folder}")
        return True
    return False


@contextlib.contextmanager
def _synced(mirror: Mirror, every_s: float | None, note: Any) -> Iterator[None]:
    """Sync now and then while the block runs; a failure is noted, since the last sync decides."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            try:
                mirror.sync()
            except (StorageError, OSError) as error:
                note(str(error))

    thread = None if every_s is None else threading.Thread(target=run, daemon=True, name="slimrank-sync")
    if thread is not None:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread is not None:
            thread.join()


def moved(value: Any, folder: Path, out: Location) -> Any:
    """JSON values in which paths below a scratch folder become places below `out`."""
    if isinstance(value, dict):
        return {k: moved(v, folder, out) for k, v in value.items()}
    if isinstance(value, list):
        return [moved(v, folder, out) for v in value]
    if isinstance(value, str) and value == str(folder):
        return str(out)
    if isinstance(value, str) and value.startswith(f"{folder}/"):
        return str(out / value[len(str(folder)) + 1 :])
    return value
