"""`slimrank artifact ...`: each parses, calls, and prints. What is printed is made in cluster/artifacts.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.options import FILE, FOLDER, PLACE, Group, common
from cluster.output import emit

if TYPE_CHECKING:  # pyarrow is a third of a second that --help has not
    from trainer.storage import Location


@click.group(cls=Group)
def artifact() -> None:
    """Look into artifacts, check, compare, sign and encrypt them."""


@artifact.command("show")
@click.argument("folder", metavar="DIR", type=PLACE)
@common
def artifact_show(folder: Location, as_json: bool, address: str | None, debug: bool) -> None:  # noqa: ARG001
    """What an artifact holds, by its manifest."""
    from cluster.artifacts import show_lines
    from compress.describe import describe_artifact

    result = describe_artifact(folder)
    emit(result, as_json, show_lines(result))


@artifact.command("verify")
@click.argument("folder", metavar="DIR", type=PLACE)
@click.option(
    "--trusted-key", multiple=True, type=FILE, help="Public key (PEM) that must have signed; SLIMRANK_TRUSTED_KEY else."
)
@common
def artifact_verify(
    folder: Location,
    trusted_key: tuple[Path, ...],
    as_json: bool,
    address: str | None,  # noqa: ARG001
    debug: bool,  # noqa: ARG001
) -> None:
    """Check every byte, the signature and the golden scores; exit 2 where something is wrong."""
    from cluster.artifacts import verify_lines
    from compress.describe import verify_artifact

    result = verify_artifact(folder, trusted_key or None)
    emit(result, as_json, verify_lines(result))


@artifact.command("diff")
@click.argument("first", metavar="A", type=PLACE)
@click.argument("second", metavar="B", type=PLACE)
@common
def artifact_diff(first: Location, second: Location, as_json: bool, address: str | None, debug: bool) -> None:  # noqa: ARG001
    """What changed from artifact A to B: plan, tables, sizes, metrics, lineage."""
    from cluster.artifacts import diff_lines
    from compress.describe import diff_artifacts

    result = diff_artifacts(first, second)
    emit(result, as_json, diff_lines(result))


@artifact.command("sign")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--key", type=FILE, required=True, help="Ed25519 private key (PEM), as 'artifact keygen' writes it.")
@common
def artifact_sign(folder: Path, key: Path, as_json: bool, address: str | None, debug: bool) -> None:  # noqa: ARG001
    """Verify an artifact, then sign its manifest, which holds the checksum of every file."""
    from compress.describe import sign_artifact

    result = sign_artifact(folder, key)
    emit(result, as_json, [f"{result['version']} signed with key {result['key_id']}"])


@artifact.command("keygen")
@click.option("--private", type=FILE, required=True, help="File to write the private key to; keep it secret.")
@click.option("--public", type=FILE, required=True, help="File to write the public key to, for SLIMRANK_TRUSTED_KEY.")
@common
def artifact_keygen(private: Path, public: Path, as_json: bool, address: str | None, debug: bool) -> None:  # noqa: ARG001
    """Make a key pair to sign artifacts with."""

    from compress.signing import generate_keys

    key_id = generate_keys(private, public)
    result = {"private": str(private), "public": str(public), "key_id": key_id}
    emit(result, as_json, [f"key {key_id}: {private} (secret), {public}"])


@artifact.command("encrypt")
@click.argument("folder", metavar="DIR", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder to write the encrypted artifact to.")
@common
def artifact_encrypt(folder: Path, out: Path, as_json: bool, address: str | None, debug: bool) -> None:  # noqa: ARG001
    """Write an encrypted copy; the key is SLIMRANK_ARTIFACT_KEY (32 bytes in base64)."""
    from compress.describe import encrypt_artifact

    result = encrypt_artifact(folder, out)
    emit(result, as_json, [f"{result['artifact']}: version {result['version']}, key {result['key_id']}; sign it anew"])
