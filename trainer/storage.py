"""Where data lies: folders of this machine, and any storage that pyarrow's filesystems reach (s3://, gs://, hdfs://).

`location` makes a Path or a RemotePath of what a user gave. Both answer `/`, name, exists, is_file, read_text and str,
so whoever only reads need not know which it is; what differs (Parquet, mapped files, sizes) has one function here.
Retries, connections and credentials are pyarrow's own. Results are written through trainer/results.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from trainer.errors import SlimrankError, StorageError

Item = TypeVar("Item")

IN_FLIGHT = 16  # requests at a time; pyarrow's S3 client keeps 25 connections
PIECE_BYTES = 4 << 20  # of one request: IN_FLIGHT of them are the most that reading holds beside its result
QUEUED = 1024

ADVICE = (  # what the libraries' messages hold, and the next step
    (("credential", "access_denied", "access denied", "forbidden", "signature", "invalid_access", "unauthorized"),
     "give credentials that may do this in the environment (S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"),
    (("no_such_bucket", "bucket does not exist", "bucket not found"), "make the bucket, or correct its name"),
    (("curlcode", "connect", "network", "resolve", "timeout"), "check the address, endpoint_override and the network"),
)  # fmt: skip


@dataclass(frozen=True)
class RemotePath:
    """A place in a storage: `path` is the filesystem's own, `uri` what a user gives; two of one URI are equal.

    It travels to other processes as its URI; credentials never do.
    """

    uri: str
    path: str = field(compare=False)
    filesystem: pafs.FileSystem = field(compare=False, repr=False)

    def __truediv__(self, name: str | Path) -> RemotePath:
        before, mark, query = self.uri.partition("?")
        inner = Path(name).as_posix()
        uri = f"{before.rstrip('/')}/{quote(inner)}{mark}{query}"
        return replace(self, uri=uri, path=f"{self.path.rstrip('/')}/{inner}")

    def __str__(self) -> str:
        return self.uri

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return location, (self.uri,)

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rpartition("/")[2]

    @property
    def info(self) -> pafs.FileInfo:
        """Kind and size, as the storage tells them."""
        with storage_step(self, "cannot be looked up"):
            return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        """Whether anything is there."""
        return self.info.type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        """Whether a file is there."""
        return self.info.type == pafs.FileType.File

    def open(self) -> pa.NativeFile:
        """Open for reading at any place. Raises: StorageError when it cannot be."""
        with storage_step(self, "cannot be opened"):
            return self.filesystem.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        """The whole of a small file. Raises: StorageError when it cannot be read."""
        with storage_step(self, "cannot be read"), self.open() as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole of a small file as text. Raises: StorageError when it cannot be read."""
        return self.read_bytes().decode(encoding)

    def files(self) -> dict[str, int]:
        """Size in bytes of each file below, by its path relative to this one."""
        with storage_step(self, "cannot be listed"):
            found = self.filesystem.get_file_info(pafs.FileSelector(self.path, allow_not_found=True, recursive=True))
        base = len(self.path.strip("/")) + 1
        return {i.path.lstrip("/")[base:]: i.size for i in found if i.type == pafs.FileType.File}


Location = Path | RemotePath


def location(place: str | Path | RemotePath) -> Location:
    """What a user gave as a place: an absolute Path for a plain path or file://, a RemotePath for any other URI.

    Raises: StorageError for a URI that pyarrow cannot resolve, or that carries a secret.
    """
    if isinstance(place, RemotePath):
        return place
    text = str(place)
    if isinstance(place, Path) or not is_uri(text):
        return Path(place).absolute()
    parts = urlsplit(text)
    if parts.scheme == "file":
        return Path(unquote(parts.path)).absolute()
    if parts.password:
        shown = f"{parts.scheme}://...@{parts.hostname}{parts.path}"
        raise StorageError(f"{shown}: holds a secret, which records would keep: give it in the environment")
    before, mark, query = text.partition("?")
    text = before.rstrip("/") + mark + query
    with storage_step(text, "cannot be resolved"):
        filesystem, path = _filesystem(text)
    return RemotePath(text, path.rstrip("/"), filesystem)


def is_uri(text: str) -> bool:
    """Whether a text names a storage, not a path."""
    return "://" in text


@functools.lru_cache(maxsize=256)
def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    return pafs.FileSystem.from_uri(uri)


@contextlib.contextmanager
def storage_step(place: object, step: str) -> Iterator[None]:
    """Turn what a filesystem raises into a StorageError of one line: the place, the step, the cause, what to do."""
    try:
        yield
    except FileNotFoundError:
        raise StorageError(f"{place}: {step}: it is not there: check the name, and that it was uploaded") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, SlimrankError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        advice = next((a for words, a in ADVICE if any(w in reason.lower() for w in words)), "check the URI")
        raise StorageError(f"{place}: {step}: {reason}: {advice}") from None


def reading(place: object) -> contextlib.AbstractContextManager[None]:
    """`storage_step` for a storage; on this machine errors keep their kind, which the caller knows best."""
    return storage_step(place, "cannot be read") if isinstance(place, RemotePath) else contextlib.nullcontext()


def why_absent(place: Location, manifest: str) -> str:
    """Why a folder without its manifest is none, as the end of a message: no bucket, nothing there, a part only."""
    if isinstance(place, Path):
        return ""
    bucket = place.path.strip("/").partition("/")[0]
    with storage_step(place, "cannot be looked up"):
        if place.filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
            return f" (no bucket {bucket!r}, or none that these credentials may see)"
    if not place.exists():
        return " (nothing is there)"
    return f" (it has no {manifest}: an upload that did not finish, or another kind of folder)"


def size_of(place: Location) -> int:
    """Bytes of a file. Raises: OSError or StorageError when there is none."""
    if isinstance(place, Path):
        return place.stat().st_size
    with place.open() as file:
        return int(file.size())


def first_missing(places: Sequence[Location]) -> Location | None:
    """The first of some files that is not there; a storage is asked for all at once."""
    remote = [p for p in places if isinstance(p, RemotePath)]
    if not remote:
        return next((p for p in places if not p.exists()), None)
    with storage_step(remote[0], "cannot be looked up"):
        found = remote[0].filesystem.get_file_info([p.path for p in remote])
    return next((p for p, i in zip(remote, found, strict=True) if i.type == pafs.FileType.NotFound), None)


def open_parquet(place: Location | str) -> pq.ParquetFile:
    """A Parquet file, of which only what is asked for is read. Raises: OSError, ArrowInvalid or StorageError."""
    if not isinstance(place, RemotePath):
        return pq.ParquetFile(place)
    with reading(place):
        return pq.ParquetFile(place.path, filesystem=place.filesystem, pre_buffer=True)


def read_ipc(place: Location) -> pa.Table:
    """An Arrow IPC file: mapped where it lies on this machine, else read. Raises: OSError or ArrowInvalid."""
    if isinstance(place, Path):
        with pa.memory_map(str(place)) as source:
            return pa.ipc.open_file(source).read_all()
    with reading(place), place.open() as source:
        return pa.ipc.open_file(source).read_all()


def in_parallel(work: Callable[[Item], Any], items: Sequence[Item]) -> None:
    """Run `work` on each item, IN_FLIGHT at a time; the first error ends it, and what has not begun is left."""
    if len(items) <= 1:
        for item in items:
            work(item)
        return
    executor = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="slimrank-storage")
    try:
        for first in range(0, len(items), QUEUED):
            for _ in executor.map(work, items[first : first + QUEUED]):
                pass
    finally:
        executor.shutdown(cancel_futures=True)


def chunks_of_file(place: RemotePath) -> Iterator[bytes]:
    """A file's bytes in order, PIECE_BYTES at a time, the next few being fetched meanwhile."""
    with place.open() as file, ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="slimrank-storage") as executor:

        def read(at: int) -> bytes:
            with storage_step(place, "cannot be read"):
                return file.read_at(PIECE_BYTES, at)

        starts = iter(range(0, file.size(), PIECE_BYTES))
        ahead = [executor.submit(read, at) for _, at in zip(range(IN_FLIGHT), starts, strict=False)]
        while ahead:
            yield ahead.pop(0).result()
            ahead += [executor.submit(read, at) for _, at in zip(range(1), starts, strict=False)]


def remote_sha256(place: RemotePath) -> str:
    """The hex SHA-256 of a file, streamed. Raises: StorageError when it cannot be read."""
    digest = hashlib.sha256()
    for chunk in chunks_of_file(place):
        digest.update(chunk)
    return digest.hexdigest()
