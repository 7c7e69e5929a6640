"""Who made an artifact: an Ed25519 signature over its manifest, which holds the checksum of every other file.

    manifest.sig    {"algorithm": "Ed25519", "key_id": first 16 hex digits of SHA-256(public key), "signature": base64}

A loader that is given public keys (or SLIMRANK_TRUSTED_KEY: paths of PEM files, separated as in PATH) insists on one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from compress.errors import ArtifactError
from compress.manifest import MANIFEST, MANIFEST_BYTES, SIGNATURE, parse_json, read_bounded
from trainer.errors import SlimrankError
from trainer.files import write_json
from trainer.storage import Location

TRUSTED_KEY = "SLIMRANK_TRUSTED_KEY"
CONTEXT = b"slimrank artifact manifest v1\0"  # a signature of something else is none of a manifest
SMALL_FILE = 16 << 10


def generate_keys(private: Path, public: Path) -> str:
    """Write a new key pair as PEM, the private half readable by its owner only; returns the key id.

    Raises: SlimrankError when one of the files exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    shown = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for path in (private, public):
        if path.exists():
            raise SlimrankError(f"{path}: already there: choose another name, a key is never overwritten")
    try:
        for path, content, mode in ((private, secret, 0o600), (public, shown, 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
    except OSError as error:
        raise SlimrankError(f"{error.filename}: cannot be written: {error.strerror}") from None
    return key_id(key.public_key())


def key_id(key: Ed25519PublicKey) -> str:
    """A short name of a public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """An unencrypted Ed25519 private key in PEM. Raises: SlimrankError when the file holds none."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SlimrankError(f"{path}: not a private key in PEM without a passphrase ({type(error).__name__})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SlimrankError(f"{path}: not an Ed25519 key: make one with 'slimrank artifact keygen'")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """An Ed25519 public key in PEM. Raises: SlimrankError when the file holds none."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SlimrankError(f"{path}: not a public key in PEM ({type(error).__name__}): check {TRUSTED_KEY}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SlimrankError(f"{path}: not an Ed25519 key: make one with 'slimrank artifact keygen'")
    return key


def configured_keys(given: Sequence[Path] | None) -> list[Ed25519PublicKey]:
    """The keys a loader trusts: those given, else those that the environment names; none means unsigned is fine.

    Raises: SlimrankError when a configured key cannot be read, so that a typing error never turns checking off.
    """
    paths = [Path(p) for p in os.environ.get(TRUSTED_KEY, "").split(os.pathsep) if p] if given is None else given
    return [read_public_key(path) for path in paths]


def sign_manifest(folder: Path, private: Path) -> str:
    """Write manifest.sig beside a manifest; returns the key id. The artifact should have been verified before."""
    key = read_private_key(private)
    signature = key.sign(CONTEXT + read_bounded(folder / MANIFEST, MANIFEST_BYTES))
    own = key_id(key.public_key())
    text = base64.b64encode(signature).decode()
    write_json(folder / SIGNATURE, {"algorithm": "Ed25519", "key_id": own, "signature": text})
    return own


def read_signature(folder: Location) -> tuple[str, bytes]:
    """Key id and signature of manifest.sig. Raises: ArtifactError when there is none or it is damaged."""
    path = folder / SIGNATURE
    stored = parse_json(read_bounded(path, SMALL_FILE), str(path))
    try:
        if set(stored) != {"algorithm", "key_id", "signature"} or stored["algorithm"] != "Ed25519":
            raise ValueError
        return str(stored["key_id"]), base64.b64decode(stored["signature"], validate=True)
    except (ValueError, TypeError, binascii.Error):
        raise ArtifactError(f"{path}: not a signature of this format: sign the artifact again") from None


def check_signature(folder: Location, manifest: bytes, keys: Sequence[Ed25519PublicKey]) -> str:
    """The id of the trusted key that signed these bytes of a manifest.

    Raises: ArtifactError when no trusted key did.
    """
    if not (folder / SIGNATURE).exists():
        raise ArtifactError(
            f"{folder}: unsigned, this machine asks for a signature: 'slimrank artifact sign' makes one"
        )
    named, signature = read_signature(folder)
    trusted = {key_id(key): key for key in keys}
    if named not in trusted:
        raise ArtifactError(f"{folder}: signed with key {named[:16]!r}, trusted: {', '.join(trusted)}: do not use it")
    try:
        trusted[named].verify(signature, CONTEXT + manifest)
    except InvalidSignature:
        raise ArtifactError(f"{folder}: its signature is not of this manifest: it was altered: do not use it") from None
    return named


def describe_signature(folder: Location) -> str | None:
    """The key id that a manifest.sig claims, unchecked; None for an unsigned artifact."""
    try:
        return json.dumps(read_signature(folder)[0])[1:-1] if (folder / SIGNATURE).exists() else None
    except ArtifactError:
        return "unreadable"
