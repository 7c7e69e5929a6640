"""The artifact: data, never code. Open it, whoever wrote it; its golden rows. The format: docs/artifact_format.md.

manifest.json      format version, run, tables, lineage, sizes, metrics, size and sha256 of every other file
manifest.sig       optional Ed25519 signature of the manifest (compress/signing.py)
tables.bin         all packed rows in FBGEMM's layout, each table aligned, mapped read-only by every replica
dense.safetensors  the head;  decoders.safetensors  what widens the rows of low-rank tables
transform.json     schema and fitted numbers;  ids.arrow  raw id -> row
items.arrow        the item catalogue;  golden.arrow  raw rows with the scores they must get

Every step of `load_artifact` rests only on what the steps before it have checked.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from compress.catalogue import Catalogue, read_catalogue
from compress.checks import (
    check_catalogue,
    check_decoders,
    check_file,
    check_head,
    check_ids,
    check_reference,
    check_run,
    check_tables_fit,
    read_golden,
)
from compress.dense import SPEC, TOLERANCE, WEIGHTS, load_runtime, sides_of
from compress.encryption import close_all, decrypted_files
from compress.errors import ArtifactError
from compress.ids import read_ids
from compress.layers import QUANTIZED
from compress.lookup import map_block, pieces_of
from compress.manifest import MANIFEST, MANIFEST_BYTES, SIGNATURE, parse_manifest, read_bounded, seal, stored_tables
from compress.model import CompressedModel, build_model
from compress.onnx_head import ONNX_HEAD, check_onnx, head_of
from compress.signing import check_signature, configured_keys
from compress.verified import cache_folder, checksum, open_regular
from trainer.config import RunConfig, parse_run
from trainer.data.transform import Transform, flat, read_description
from trainer.errors import SlimrankError
from trainer.files import new_directory, sha256
from trainer.models import build_head
from trainer.results import download
from trainer.storage import Location, RemotePath, location, remote_sha256, size_of, why_absent

__all__ = [
    "MANIFEST",
    "Artifact",
    "check_golden",
    "golden_table",
    "is_artifact",
    "load_artifact",
    "read_manifest",
    "seal",
]

DECODERS = "decoders.safetensors"
GOLDEN_ROWS = 64
GOLDEN_TOLERANCE = 1e-4  # log-odds: fp32 sums in another order on another processor move the last digits only
Verify = Literal["full", "known", "none"]
UNREADABLE = (  # what the libraries raise over data that they cannot make sense of
    SlimrankError,
    SafetensorError,
    OSError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    AssertionError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True)
class Artifact:
    """An opened, verified artifact."""

    folder: Path
    manifest: dict[str, Any]
    run: RunConfig
    model: CompressedModel
    catalogue: Catalogue | None
    golden: pa.Table
    catalogue_digest: str | None = None  # of the file that the catalogue was read from, where it is not the artifact's

    @property
    def version(self) -> str:
        """A short name of exactly this artifact, and of the catalogue where that is not its own."""
        own = self.model.version
        return own if self.catalogue_digest is None else joint_version(own, self.catalogue_digest)

    @property
    def sizes(self) -> dict[str, int]:
        """table_bytes (rows, scale, bias, padding, centroids, id map), table_bytes_fp32, artifact_bytes."""
        return self.manifest["sizes"]


def joint_version(version: str, catalogue_digest: str) -> str:
    """The name of an artifact with another catalogue than its own."""
    return f"{version}+{catalogue_digest[:8]}"


def version_with(version: str, catalogue: Path) -> str:
    """The name of an artifact with the catalogue in a file. Raises: ArtifactError when there is no such file."""
    return joint_version(version, checksum(catalogue, full=False))


def is_artifact(path: str | Location) -> bool:
    """Whether a folder looks like an artifact at all."""
    return (location(path) / MANIFEST).is_file()


def read_manifest(folder: str | Location, trusted_keys: Sequence[Path] | None = None) -> dict[str, Any]:
    """The manifest of an artifact, its signature checked where keys are configured (see `load_artifact`).

    Raises: ArtifactError when there is none, no trusted key signed it, or it breaks a rule of the format.
    """
    folder = location(folder)
    keys = configured_keys(trusted_keys)
    if not is_artifact(folder):
        why = why_absent(folder, MANIFEST)
        raise ArtifactError(f"{folder}: not an artifact{why}: give the folder that 'compress' or 'tune' wrote")
    content = read_bounded(folder / MANIFEST, MANIFEST_BYTES)
    if keys:
        check_signature(folder, content, keys)
    return parse_manifest(content, str(folder / MANIFEST))


def verify_files(folder: Path, manifest: Mapping[str, Any], verify: Verify = "full") -> None:
    """Check every file of a manifest: a regular file, of its size, of its checksum (sizes of all come first).

    "known" takes the word of this machine's record for files that it hashed before and that have not changed since;
    "none" looks at sizes only. Raises: ArtifactError naming the first file that differs.
    """
    damaged = "altered or cut short since it was written: restore the file, or compress again"
    for name, expected in manifest["files"].items():
        with open_regular(folder / name):
            if (folder / name).lstat().st_size != expected["bytes"]:
                raise ArtifactError(f"{folder / name}: {damaged}")
    if verify == "none":
        return
    for name, expected in manifest["files"].items():
        if checksum(folder / name, full=verify == "full") != expected["sha256"]:
            raise ArtifactError(f"{folder / name}: {damaged}")


def load_artifact(
    folder: str | Location, *, verify: Verify = "known", trusted_keys: Sequence[Path] | None = None
) -> Artifact:
    """Open an artifact: signature, manifest, checksums, then the model, then its golden scores.

    One in a storage is first fetched into this machine's cache (`local_copy`), from where it is mapped.

    `verify`: "full" hashes every byte, "known" only files that this machine has not hashed before as they are now,
    "none" leaves out checksums and golden scores (bounds are checked all the same). `trusted_keys`: PEM files of
    Ed25519 public keys, those of SLIMRANK_TRUSTED_KEY by default; where there are any, one must have signed.
    Raises: ArtifactError when it is none, is damaged, or does not score as it did when it was written.
    """
    folder = local_copy(location(folder), trusted_keys, fresh=verify == "full")
    manifest = read_manifest(folder, trusted_keys)
    try:
        verify_files(folder, manifest, verify)
        with _plain_files(folder, manifest) as paths:
            artifact = _open(folder, manifest, paths)
        if verify != "none":
            check_golden(artifact)
    except ArtifactError:
        raise
    except UNREADABLE as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:300]
        raise ArtifactError(f"{folder}: cannot be loaded: {type(error).__name__}: {reason}") from None
    return artifact


def local_copy(folder: Location, trusted_keys: Sequence[Path] | None = None, *, fresh: bool = False) -> Path:
    """The folder itself, or of an artifact in a storage the copy in this machine's cache, fetched where there is none.

    A copy is named by the artifact's version, which is a digest of all it holds, and by its signature's. `fresh`: also
    read what lies in the storage now.
    Raises: ArtifactError when it is none, no trusted key signed it, or a file is not what its manifest says.
    """
    if isinstance(folder, Path):
        return folder
    manifest = read_manifest(folder, trusted_keys)
    small = {MANIFEST: read_bounded(folder / MANIFEST, MANIFEST_BYTES)}
    if (folder / SIGNATURE).exists():
        small[SIGNATURE] = read_bounded(folder / SIGNATURE, MANIFEST_BYTES)
    name = f"{manifest['version']}-{hashlib.sha256(b''.join(small.values())).hexdigest()[:12]}"
    copy = cache_folder("artifacts") / name
    if fresh:
        for file, expected in manifest["files"].items():
            if remote_sha256(folder / file) != expected["sha256"]:
                raise ArtifactError(f"{folder / file}: altered or cut short since it was written: upload it again")
    if is_artifact(copy):
        return copy
    try:
        with new_directory(copy) as staging:
            fetch_files(folder, manifest["files"], staging)
            for file, content in small.items():
                (staging / file).write_bytes(content)
    except (OSError, SlimrankError) as error:
        if is_artifact(copy):  # another process was first
            return copy
        if isinstance(error, OSError):
            raise ArtifactError(f"{copy}: {folder} cannot be kept here: {error.strerror}: free space") from None
        raise
    return copy


def fetch_files(folder: RemotePath, files: Mapping[str, Mapping[str, Any]], into: Path) -> None:
    """Copy an artifact's files down; sizes come first, so that nothing larger than promised is fetched.

    Raises: ArtifactError naming the first file that is not what the manifest says.
    """
    for name, expected in files.items():
        if size_of(folder / name) != expected["bytes"]:
            raise ArtifactError(f"{folder / name}: altered or cut short since it was written: upload it again")
    for name, expected in files.items():
        download(folder / name, into / name)
        if sha256(into / name) != expected["sha256"]:
            raise ArtifactError(f"{folder / name}: altered or cut short since it was written: upload it again")


@contextmanager
def _plain_files(folder: Path, manifest: Mapping[str, Any]) -> Iterator[dict[str, Path]]:
    """Where each file can be read as it was before encryption."""
    if manifest.get("encryption") is None:
        yield {name: folder / name for name in manifest["files"]}
        return
    files = decrypted_files(folder, manifest)
    try:
        yield {name: Path(f"/proc/self/fd/{file.fileno()}") for name, file in files.items()}
    finally:
        close_all(files)


def _open(folder: Path, manifest: dict[str, Any], paths: Mapping[str, Path]) -> Artifact:
    for name, path in paths.items():
        check_file(name, path)
    check_run(manifest["run"], str(folder / MANIFEST))
    run = parse_run(manifest["run"], str(folder / MANIFEST))
    infos, numerics, schema = read_description(paths["transform.json"])
    check_tables_fit(infos, manifest, str(folder))
    check_reference(manifest, [t.name for t in schema.tasks], str(folder / MANIFEST))
    tables = stored_tables(manifest)
    rows = {t.name: t.rows for t in tables}
    ids = read_ids(paths["ids.arrow"], infos, tables)
    check_ids(ids, infos, rows, str(folder))
    transform = Transform(schema, infos, ids, numerics)
    size = pieces_of(tables)[1]
    if paths["tables.bin"].stat().st_size != size:
        raise ArtifactError(f"{folder / 'tables.bin'}: not the {size:,} bytes that its tables take: compress again")
    head = _head(run, transform, paths, folder)
    block = map_block(paths["tables.bin"], size)
    decoders = load_file(paths[DECODERS]) if DECODERS in paths else {}
    check_decoders(decoders, tables, str(folder / DECODERS))
    model = build_model(run, transform, tables, block, head, manifest["version"], decoders)
    catalogue = read_catalogue(paths["items.arrow"], transform) if "items.arrow" in paths else None
    if catalogue is not None:
        check_catalogue(catalogue, transform, rows, str(folder / "items.arrow"))
    golden = read_golden(paths["golden.arrow"], len(schema.tasks))
    return Artifact(folder, manifest, run, model, catalogue, golden)


def _head(run: RunConfig, transform: Transform, paths: Mapping[str, Path], folder: Path) -> nn.Module:
    """The dense part: as trained, as a plan made it smaller, or as ONNX from elsewhere."""
    where = str(folder / WEIGHTS)
    if SPEC in paths:
        check_head(run, transform, None, where)
        return load_runtime(paths, build_head(run.model, transform), sides_of(transform))
    dense = load_file(paths[WEIGHTS])
    if set(dense) == {ONNX_HEAD}:
        check_onnx(dense[ONNX_HEAD].numpy().tobytes(), where)
    else:
        check_head(run, transform, {k: v.shape for k, v in dense.items()}, where)
    return head_of(run, transform, dense)


def golden_table(sample: pa.Table, model: CompressedModel) -> pa.Table:
    """Raw rows with the log-odds that this model gives them.

    Dictionaries are decoded, and columns that hold nothing at all left out (they read as missing either way): neither
    may be in an artifact.
    """
    rows = sample.slice(0, GOLDEN_ROWS)
    return golden_rows(rows, model.score_encoded(model.transform.encode(rows)))


def golden_rows(rows: pa.Table, logits: np.ndarray) -> pa.Table:
    """Raw rows beside their log-odds (N, T) float32."""
    columns = {name: flat(rows[name]) for name in rows.column_names if not _is_empty(rows.schema.field(name).type)}
    expected = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
    return pa.table({**columns, "_expected": expected})


def _is_empty(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or (hasattr(kind, "value_type") and pa.types.is_null(kind.value_type))


def golden_distance(artifact: Artifact) -> float:
    """The largest difference between the golden rows' scores and those written beside them, in log-odds."""
    expected = artifact.golden["_expected"].combine_chunks().flatten().to_numpy()
    found = artifact.model.score_encoded(artifact.model.transform.encode(artifact.golden)).ravel()
    return float(np.abs(found - expected).max())


def golden_tolerance(artifact: Artifact) -> float:
    """Log-odds by which golden scores may differ: on another machine a code or a bf16 number may round another way."""
    coarse = any(isinstance(layer, QUANTIZED) for layer in artifact.model.head.modules())
    return TOLERANCE["int8"] if coarse else GOLDEN_TOLERANCE


def check_golden(artifact: Artifact) -> None:
    """Raises: ArtifactError when raw rows no longer get the scores written beside them."""
    worst, allowed = golden_distance(artifact), golden_tolerance(artifact)
    if not worst <= allowed:
        raise ArtifactError(
            f"{artifact.folder}: golden scores differ by {worst:.2g} (allowed {allowed:g}): this machine or "
            f"version does not compute as the one that wrote it"
        )
