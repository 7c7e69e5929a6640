"""The artifact: data, never code. Write, read, verify.

manifest.json      format version, run, tables, lineage, sizes, metrics, sha256 of every other file
tables.bin         all packed rows in FBGEMM's layout, each table aligned, mapped read-only by every replica
dense.safetensors  the head;  decoders.safetensors  what widens the rows of low-rank tables
transform.json     schema and fitted numbers;  ids.arrow  raw id -> row
items.arrow        the item catalogue;  golden.arrow  raw rows with the scores they must get
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.torch import load_file

from compress.catalogue import Catalogue, read_catalogue
from compress.errors import ArtifactError
from compress.ids import read_ids
from compress.lookup import StoredTable, Tier, map_block
from compress.model import CompressedModel, build_model
from trainer.config import RunConfig, parse_run
from trainer.data.transform import Transform, read_arrow, read_description
from trainer.errors import SlimrankError
from trainer.files import sha256, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FILES = {"tables.bin", "dense.safetensors", "transform.json", "ids.arrow", "golden.arrow"}
DECODERS = "decoders.safetensors"
SIZES = {"table_bytes", "table_bytes_fp32", "artifact_bytes"}
GOLDEN_ROWS = 64
GOLDEN_TOLERANCE = 1e-4  # log-odds: fp32 sums in another order on another processor move the last digits only


@dataclass(frozen=True)
class Artifact:
    """An opened, verified artifact."""

    folder: Path
    manifest: dict[str, Any]
    run: RunConfig
    model: CompressedModel
    catalogue: Catalogue | None

    @property
    def version(self) -> str:
        """A short name of exactly these bytes."""
        return self.model.version

    @property
    def sizes(self) -> dict[str, int]:
        """table_bytes (rows, scale, bias, padding, centroids, id map), table_bytes_fp32, artifact_bytes."""
        return self.manifest["sizes"]


def version_of(files: Mapping[str, str]) -> str:
    """The name of a set of files: a digest of their checksums."""
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()[:12]


def seal(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Add checksums and the whole size to a manifest and write it: the last step of writing an artifact."""
    files = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST}
    sealed = {**manifest, "format_version": FORMAT_VERSION, "version": version_of(files), "files": files}
    others = sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    sealed["sizes"] = {**sealed["sizes"], "artifact_bytes": others}
    own = 0
    while True:  # the manifest counts itself; its own length settles in a round or two
        sealed["sizes"]["artifact_bytes"] = others + own
        length = len((json.dumps(sealed, indent=2) + "\n").encode())
        if length == own:
            break
        own = length
    write_json(folder / MANIFEST, sealed)
    return sealed


def is_artifact(path: Path) -> bool:
    """Whether a folder looks like an artifact at all."""
    return (Path(path) / MANIFEST).exists()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact. Raises: ArtifactError when there is none or it is of another format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ArtifactError(f"{folder}: not an artifact: give the folder that 'compress' or 'tune' wrote") from None
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{folder}: artifact format {version}, this version reads {FORMAT_VERSION}: compress again")
    files, sizes = manifest.get("files"), manifest.get("sizes")
    whole = isinstance(files, dict) and set(files) >= FILES and isinstance(sizes, dict) and set(sizes) >= SIZES
    if not whole or manifest.get("version") != version_of(files):
        raise ArtifactError(f"{folder / MANIFEST}: altered since it was written: restore the file")
    return manifest


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises: ArtifactError naming the first file that is absent, cut short or altered."""
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing from the artifact: compress again, or restore the file")
        if sha256(path) != expected:
            raise ArtifactError(
                f"{path}: altered or cut short since it was written: restore the file, or compress again"
            )


def load_artifact(folder: Path, *, verify: bool = True) -> Artifact:
    """Open an artifact: checksums, then the model, then its golden scores.

    Raises: ArtifactError when it is none, is damaged, or does not score as it did when it was written.
    """
    folder = Path(folder).absolute()
    manifest = read_manifest(folder)
    try:
        if verify:
            verify_files(folder, manifest)
        infos, numerics, schema = read_description(folder / "transform.json")
        tables = [stored_table(t) for t in manifest["tables"]]
        ids = read_ids(folder / "ids.arrow", infos, tables)
        transform = Transform(schema, infos, ids, numerics)
        block = map_block(folder / "tables.bin", (folder / "tables.bin").stat().st_size)
        dense = load_file(folder / "dense.safetensors")
        run = parse_run(manifest["run"], str(folder / MANIFEST))
        decoders = load_file(folder / DECODERS) if DECODERS in manifest["files"] else {}
        model = build_model(run, transform, tables, block, dense, manifest["version"], decoders)
        items = folder / "items.arrow"
        catalogue = read_catalogue(items, transform) if items.exists() else None
        artifact = Artifact(folder, manifest, run, model, catalogue)
        if verify:
            check_golden(artifact)
    except ArtifactError:
        raise
    except (
        SlimrankError,
        SafetensorError,
        OSError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
        AssertionError,
    ) as e:
        reason = (str(e).splitlines() or ["no reason given"])[0]
        raise ArtifactError(f"{folder}: cannot be loaded: {type(e).__name__}: {reason}") from None
    return artifact


def stored_table(described: Mapping[str, Any]) -> StoredTable:
    """A table as the manifest describes it."""
    tiers = tuple(Tier(**tier) for tier in described["tiers"])
    return StoredTable(**{**described, "tiers": tiers, "features": tuple(described["features"])})


def golden_table(sample: pa.Table, model: CompressedModel) -> pa.Table:
    """Raw rows with the log-odds that this model gives them."""
    rows = sample.slice(0, GOLDEN_ROWS)
    logits = model.score_encoded(model.transform.encode(rows))
    expected = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
    return rows.append_column("_expected", expected)


def check_golden(artifact: Artifact) -> None:
    """Raises: ArtifactError when raw rows no longer get the scores written beside them."""
    golden = read_arrow(artifact.folder / "golden.arrow")
    expected = golden["_expected"].combine_chunks().flatten().to_numpy()
    found = artifact.model.score_encoded(artifact.model.transform.encode(golden)).ravel()
    worst = float(np.abs(found - expected).max()) if len(expected) else 0.0
    if not worst <= GOLDEN_TOLERANCE:
        raise ArtifactError(
            f"{artifact.folder}: golden scores differ by {worst:.2g} (allowed {GOLDEN_TOLERANCE:g}): this machine or "
            f"version does not compute as the one that wrote it"
        )
