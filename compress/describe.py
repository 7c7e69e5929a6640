"""What an artifact holds, whether it is whole, and how two differ: plain values for `slimrank artifact`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.artifact import golden_distance, golden_tolerance, load_artifact, read_manifest
from compress.encryption import encrypt_file, key_from_environment, new_encryption
from compress.errors import ArtifactError
from compress.manifest import MANIFEST, SIGNATURE, seal, stored_tables
from compress.signing import configured_keys, describe_signature, sign_manifest
from trainer.files import new_directory
from trainer.storage import Location, location


def describe_artifact(folder: str | Location) -> dict[str, Any]:
    """What the manifest of an artifact says (signature checked where keys are configured); no other file is read.

    Raises: ArtifactError when there is no such manifest.
    """
    folder = location(folder)
    manifest = read_manifest(folder)
    lineage = dict(manifest["lineage"])
    return {
        "artifact": str(folder),
        "version": manifest["version"],
        "format_version": manifest["format_version"],
        "name": manifest["name"],
        "arch": manifest["run"].get("model", {}).get("arch"),
        "tables": _tables(manifest),
        "sizes": manifest["sizes"],
        "files": {name: file["bytes"] for name, file in manifest["files"].items()},
        "plan": manifest["plan"],
        "lineage": lineage,
        "metrics": manifest["metrics"],
        "signature": describe_signature(folder),
        "encrypted": manifest.get("encryption") is not None,
    }


def _tables(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each table as `show` lists it; `folded_from`: the dim it had before the head took its decoder in, else null."""
    folded = manifest["lineage"].get("folded")
    folded = folded if isinstance(folded, Mapping) else {}
    return [
        {
            "name": t.name,
            "bits": [tier.bits for tier in t.tiers],
            "rows": [tier.rows for tier in t.tiers],
            "centroids": t.centroids,
            "dim": t.dim,
            "width": t.width,
            "folded_from": folded.get(t.name),
            "bytes": t.bytes,
            "features": list(t.features),
        }
        for t in stored_tables(manifest)
    ]


def verify_artifact(folder: str | Location, trusted_keys: Sequence[Path] | None = None) -> dict[str, Any]:
    """Load an artifact with every byte hashed, and say what was checked.

    Raises: ArtifactError naming the first thing that is wrong.
    """
    artifact = load_artifact(folder, verify="full", trusted_keys=trusted_keys)
    files = artifact.manifest["files"]
    present = {p.name for p in artifact.folder.iterdir()} - {MANIFEST, SIGNATURE}
    return {
        "artifact": str(location(folder)),
        "version": artifact.version,
        "ok": True,
        "signature": describe_signature(artifact.folder),
        "signature_checked": bool(configured_keys(trusted_keys)),
        "encrypted": artifact.manifest.get("encryption") is not None,
        "files": len(files),
        "bytes": sum(f["bytes"] for f in files.values()),
        "golden_rows": len(artifact.golden),
        "golden_distance": golden_distance(artifact),
        "golden_tolerance": golden_tolerance(artifact),
        "ignored_files": sorted(present - set(files)),
    }


def diff_artifacts(first: str | Location, second: str | Location) -> dict[str, Any]:
    """What changed from one artifact to another, by the paths of their manifests: {path: [before, after]}.

    A value that one of them lacks is null there. Raises: ArtifactError when one of them is none.
    """
    before, after = describe_artifact(first), describe_artifact(second)
    changes: dict[str, list[Any]] = {}
    for part in ("name", "arch", "tables", "plan", "sizes", "files", "metrics", "lineage", "signature", "encrypted"):
        a, b = _leaves(before[part], part), _leaves(after[part], part)
        changes |= {k: [a.get(k), b.get(k)] for k in [*a, *(k for k in b if k not in a)] if a.get(k) != b.get(k)}
    return {
        "first": before["artifact"],
        "second": after["artifact"],
        "versions": [before["version"], after["version"]],
        "same": before["version"] == after["version"],
        "changes": changes,
    }


def _leaves(value: Any, path: str) -> dict[str, Any]:
    """The leaves of JSON values by dotted path; entries of a list that have names go by them."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _leaves(inner, f"{path}.{key}").items()}
    if isinstance(value, list) and value and all(isinstance(v, Mapping) and "name" in v for v in value):
        return {k: v for inner in value for k, v in _leaves(inner, f"{path}.{inner['name']}").items()}
    return {path: value}


def sign_artifact(folder: Path, private_key: Path) -> dict[str, Any]:
    """Verify an artifact fully, whoever signed it before, then sign it; returns version and key id.

    Raises: ArtifactError when it is not whole; SlimrankError when the key cannot be read.
    """
    artifact = load_artifact(folder, verify="full", trusted_keys=[])
    signed_by = sign_manifest(artifact.folder, private_key)
    return {"artifact": str(artifact.folder), "version": artifact.version, "key_id": signed_by}


def encrypt_artifact(folder: Path, out: Path) -> dict[str, Any]:
    """Write an encrypted copy of an artifact, with the key of the environment; it is unsigned, and has its own version.

    Raises: ArtifactError when it is not whole, is encrypted already, or there is no key.
    """
    key = key_from_environment()
    artifact = load_artifact(folder, verify="full")
    manifest = artifact.manifest
    if manifest.get("encryption") is not None:
        raise ArtifactError(f"{artifact.folder}: encrypted already: encrypt the plain artifact it was made from")
    encryption = new_encryption(key)
    with new_directory(out) as staging:
        for name in manifest["files"]:
            encrypt_file(artifact.folder / name, staging / name, key, encryption)
        kept = {k: v for k, v in manifest.items() if k not in ("files", "version", "format_version")}
        sealed = seal(staging, {**kept, "encryption": encryption})
    written = str(Path(out).absolute())
    return {"artifact": written, "version": sealed["version"], "key_id": encryption["key_id"], **sealed["sizes"]}
