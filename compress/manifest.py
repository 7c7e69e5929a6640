"""The manifest of an artifact: what a stranger may have written is read as bounded, strict JSON, and nothing else.

In: bytes of manifest.json. Out: a dict whose every part that steers the loader was validated. Opens no other file.
The format is written down in docs/artifact_format.md; to allow one more file in it, add a line to FILES.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import ArtifactError, PlanError
from compress.lookup import INT32_MAX, StoredTable, Tier, pieces_of
from compress.methods.codebook import MAX_CENTROIDS
from compress.methods.codec import row_bytes
from compress.score_reference import ScoreReference
from compress.verified import open_regular, written_checksum
from trainer.config import describe
from trainer.data.transform import RESERVED_ROWS
from trainer.files import write_text
from trainer.storage import Location, reading

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
MANIFEST_BYTES = 8 << 20  # 40,000 tables need less
JSON_DEPTH = 32
JSON_VALUES = 1_000_000  # 8 MiB of empty lists would take a gigabyte, and the collector minutes
JSON_DIGITS = 20  # the longest 64-bit number
_OPENING, _CLOSING, _PARTING = (list(marks) for marks in (b"[{", b"]}", b"[{,"))
NO_VERSION = "0" * 12


class FileRule(NamedTuple):
    """What a file of an artifact must satisfy before it is opened."""

    required: bool
    most_bytes: int


FILES: dict[str, FileRule] = {
    "tables.bin": FileRule(True, 1 << 42),
    "dense.safetensors": FileRule(True, 1 << 34),
    "dense.json": FileRule(False, 8 << 20),
    "dense.onnx": FileRule(False, 1 << 31),  # protobuf's own limit
    "decoders.safetensors": FileRule(False, 1 << 34),
    "transform.json": FileRule(True, 32 << 20),
    "ids.arrow": FileRule(True, 1 << 40),
    "items.arrow": FileRule(False, 1 << 38),
    "golden.arrow": FileRule(True, 64 << 20),
}


# -- bounded, strict JSON --------------------------------------------------------------------------------------------


def read_bounded(path: Location, most: int) -> bytes:
    """All bytes of a small file. Raises: ArtifactError when it is no regular file or longer than `most` bytes."""
    with reading(path), open_regular(path) if isinstance(path, Path) else path.open() as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ArtifactError(f"{path}: longer than {most:,} bytes, the most this format allows")
    return content


def parse_json(content: bytes, where: str) -> Any:
    """Parse JSON of a stranger: no nesting without end, no key twice, finite numbers of at most 64 bits.

    Raises: ArtifactError naming the rule.
    """
    outside = np.frombuffer(re.sub(rb'"(?:[^"\\]|\\.)*+"?', b"", content, flags=re.DOTALL), dtype=np.uint8)
    opened = np.isin(outside, _OPENING).astype(np.int32) - np.isin(outside, _CLOSING)
    if np.cumsum(opened, dtype=np.int32).max(initial=0) > JSON_DEPTH:
        raise ArtifactError(f"{where}: nested more than {JSON_DEPTH} deep: not written by slimrank")
    if np.isin(outside, _PARTING).sum() > JSON_VALUES:
        raise ArtifactError(f"{where}: holds more than {JSON_VALUES:,} values: not written by slimrank")
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_short,
        )
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not an artifact's JSON: {str(error).splitlines()[0][:200]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:30]} is no finite number")
    return number


def _short(text: str) -> int:
    if len(text) > JSON_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


# -- what a manifest says --------------------------------------------------------------------------------------------


class Strict(BaseModel):
    """A part of a manifest: exact types, no unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.#@-]{0,254}$")]
Rows = Annotated[int, Field(ge=1, le=INT32_MAX)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]


class StoredFile(Strict):
    """A file as it lies on disk (encrypted, where the artifact is)."""

    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TierEntry(Strict):
    """Rows of a table that follow each other at one number of bits a value."""

    rows: Rows
    bits: Literal[2, 4, 8, 16, 32]


class TableEntry(Strict):
    """One table of tables.bin, in the order of the file; compress/lookup.py says what its numbers mean."""

    name: Name
    dim: int = Field(ge=1, le=1 << 16)
    width: int = Field(ge=1, le=1 << 16)
    tiers: list[TierEntry] = Field(min_length=1, max_length=16)
    features: list[Name] = Field(min_length=1, max_length=4096)
    centroids: int = Field(ge=0, le=MAX_CENTROIDS)
    segments: int = Field(ge=1, le=16)


class Encryption(Strict):
    """How all files but the manifest are encrypted (compress/encryption.py)."""

    algorithm: Literal["AES-256-GCM"]
    chunk_bytes: int = Field(ge=4096, le=1 << 26)
    key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    salt: str = Field(pattern=r"^[0-9a-f]{32}$")


class Sizes(Strict):
    """Bytes, everything counted."""

    table_bytes: Count
    table_bytes_fp32: Count
    artifact_bytes: Count


class Metrics(Strict):
    """What it scored, for people; but the server compares its scores with those of `score_reference`, by task."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    score_reference: dict[Name, ScoreReference] | None = None


class Manifest(Strict):
    """manifest.json. `plan`, `lineage` and `metrics` but for `score_reference` are for people, not for the loader."""

    format_version: Literal[1]
    version: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: Name
    run: dict[str, Any]
    plan: dict[str, Any]
    tables: list[TableEntry] = Field(min_length=1, max_length=1 << 15)
    sizes: Sizes
    lineage: dict[str, Any]
    metrics: Metrics
    files: dict[str, StoredFile]
    encryption: Encryption | None = None


def version_of(manifest: Mapping[str, Any]) -> str:
    """The name of exactly this manifest, and so of the files whose checksums it holds."""
    content = {k: v for k, v in manifest.items() if k != "version"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def validate_manifest(manifest: Any, where: str) -> None:
    """Check types, ranges, names and sums of a parsed manifest. Raises: ArtifactError naming the key and the rule."""
    try:
        checked = Manifest.model_validate(manifest)
    except ValidationError as error:
        raise ArtifactError(_one_line(describe(error, where))) from None
    check_names(checked.files, where)
    packed_bytes = check_tables(checked, where)
    if checked.encryption is None and checked.files["tables.bin"].bytes != packed_bytes:
        raise ArtifactError(
            f"{where}: tables.bin has {checked.files['tables.bin'].bytes:,} bytes, its tables take {packed_bytes:,}"
        )


def check_names(files: Mapping[str, StoredFile], where: str) -> None:
    """Raises: ArtifactError unless all files are known ones of allowed sizes, and none that is needed lacks."""
    for name, file in files.items():
        if name not in FILES:
            raise ArtifactError(f"{where}: names the file {name[:80]!r}, an artifact holds only {', '.join(FILES)}")
        if file.bytes > FILES[name].most_bytes:
            raise ArtifactError(f"{where}: {name} of {file.bytes:,} bytes, at most {FILES[name].most_bytes:,} may be")
    missing = [name for name, rule in FILES.items() if rule.required and name not in files]
    if missing:
        raise ArtifactError(f"{where}: does not name {missing[0]}: restore the manifest, or compress again")


def check_tables(manifest: Manifest, where: str) -> int:
    """Check the tables and their tiers; returns the bytes that they take in tables.bin.

    Raises: ArtifactError for a name twice, a feature of two tables, a width that its bits cannot pack, too many rows.
    """
    names = [t.name for t in manifest.tables]
    readers = [f for t in manifest.tables for f in t.features]
    for what, words in (("table", names), ("feature", readers)):
        if len(set(words)) != len(words):
            twice = next(w for w in words if words.count(w) > 1)
            raise ArtifactError(f"{where}: {what} {twice!r} is named twice in tables")
    for table in manifest.tables:
        try:
            for tier in table.tiers:
                row_bytes(table.width, tier.bits)
        except PlanError as error:
            raise ArtifactError(f"{where}: table {table.name}: {error}") from None
        rows = sum(tier.rows for tier in table.tiers)
        if not RESERVED_ROWS + table.centroids <= rows <= INT32_MAX or table.width > table.dim:
            raise ArtifactError(
                f"{where}: table {table.name}: {rows:,} rows of width {table.width}, of them {table.centroids} "
                f"centroids, for a dim of {table.dim}: restore the manifest"
            )
    return pieces_of(stored_tables(manifest.model_dump()))[1]


def stored_tables(manifest: Mapping[str, Any]) -> list[StoredTable]:
    """The tables of a manifest."""
    return [
        StoredTable(**{**t, "tiers": tuple(Tier(**tier) for tier in t["tiers"]), "features": tuple(t["features"])})
        for t in manifest["tables"]
    ]


def parse_manifest(content: bytes, where: str) -> dict[str, Any]:
    """The manifest in some bytes, validated. Raises: ArtifactError with one line."""
    manifest = parse_json(content, where)
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise ArtifactError(f"{where}: not an artifact's manifest")
    found = manifest["format_version"]
    if type(found) is not int or found != FORMAT_VERSION:
        shown = repr(found)[:40]
        raise ArtifactError(f"{where}: artifact format {shown}, this version reads {FORMAT_VERSION}: compress again")
    validate_manifest(manifest, where)
    if manifest["version"] != version_of(manifest):
        raise ArtifactError(f"{where}: altered since it was written: restore the file")
    return manifest


def printable(text: str) -> str:
    """A stranger's text as a terminal may show it: no control characters, no half of a surrogate pair."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _one_line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= 500 else f"{line[:500]} ..."


# -- writing ---------------------------------------------------------------------------------------------------------


def seal(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Add checksums, the whole size and the version to a manifest, and write it: the last step of an artifact.

    Figures that are not finite become null. This machine then knows the checksums of large files
    (compress/verified.py). Raises: ArtifactError when a loader would refuse the result.
    """
    paths = sorted(p for p in folder.iterdir() if p.name not in (MANIFEST, SIGNATURE))
    files = {p.name: {"bytes": p.stat().st_size, "sha256": written_checksum(p)} for p in paths}
    sealed = {**finite(manifest), "format_version": FORMAT_VERSION, "version": NO_VERSION, "files": files}
    others = sum(p.stat().st_size for p in paths)
    own = 0
    while True:  # the manifest counts itself; its own length settles in a round or two
        sealed["sizes"] = {**sealed["sizes"], "artifact_bytes": others + own}
        length = len((json.dumps(sealed, indent=2) + "\n").encode())
        if length == own:
            break
        own = length
    sealed["version"] = version_of(sealed)
    text = json.dumps(sealed, indent=2) + "\n"
    parse_manifest(text.encode(), str(folder / MANIFEST))
    write_text(folder / MANIFEST, text)
    return sealed


def finite(value: Any) -> Any:
    """JSON values with null in place of numbers that JSON has no word for; tuples become lists."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
