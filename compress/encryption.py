"""Encryption at rest: AES-256-GCM over chunks of every file but the manifest, with a key from the environment.

A file is cut into chunks of `chunk_bytes`; each is stored as nonce (12), ciphertext, tag (16). The artifact's salt, the
file's name, the chunk's index and the number of chunks are authenticated with it, so nothing can be cut off, moved or
brought from another artifact. A loader decrypts into anonymous memory: plain bytes touch no disk (but swap), and
each process holds a copy of its own.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from compress.errors import ArtifactError
from compress.verified import open_regular

KEY = "SLIMRANK_ARTIFACT_KEY"
ALGORITHM = "AES-256-GCM"
CHUNK_BYTES = 1 << 20
NONCE_BYTES = 12
EXTRA_BYTES = NONCE_BYTES + 16  # a chunk's nonce and tag


def key_from_environment() -> bytes:
    """The 32 bytes of SLIMRANK_ARTIFACT_KEY. Raises: ArtifactError when it is not set or not such a key."""
    text = os.environ.get(KEY)
    if not text:
        raise ArtifactError(f"{KEY} is not set: an encrypted artifact needs its key (32 bytes in base64)")
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise ArtifactError(f"{KEY}: not 32 bytes in base64: 'openssl rand -base64 32' makes such a key")
    return key


def key_id(key: bytes) -> str:
    """A short name of a key that does not give it away."""
    return hashlib.sha256(b"slimrank artifact key\0" + key).hexdigest()[:16]


def new_encryption(key: bytes) -> dict[str, Any]:
    """The manifest's `encryption` section of a new artifact."""
    return {
        "algorithm": ALGORITHM,
        "chunk_bytes": CHUNK_BYTES,
        "key_id": key_id(key),
        "salt": secrets.token_hex(16),
    }


def plain_bytes(stored_bytes: int, chunk_bytes: int) -> int:
    """The size of a file before it was encrypted."""
    return stored_bytes - EXTRA_BYTES * max(-(-stored_bytes // (chunk_bytes + EXTRA_BYTES)), 1)


def encrypt_file(source: Path, target: Path, key: bytes, encryption: Mapping[str, Any]) -> None:
    """Write `target`, the encrypted form of an artifact's file of the same name."""
    cipher, size = AESGCM(key), encryption["chunk_bytes"]
    chunks = max(-(-source.stat().st_size // size), 1)
    with source.open("rb") as plain, target.open("xb") as out:
        for index in range(chunks):
            nonce = secrets.token_bytes(NONCE_BYTES)
            bound = _bound(encryption, source.name, index, chunks)
            out.write(nonce + cipher.encrypt(nonce, plain.read(size), bound))


def decrypt_file(path: Path, key: bytes, encryption: Mapping[str, Any], out: BinaryIO) -> None:
    """Write the plain bytes of an encrypted file. Raises: ArtifactError when key and file do not belong together."""
    cipher, size = AESGCM(key), encryption["chunk_bytes"] + EXTRA_BYTES
    with open_regular(path) as file:
        chunks = max(-(-os.fstat(file.fileno()).st_size // size), 1)
        for index in range(chunks):
            stored = file.read(size)
            bound = _bound(encryption, path.name, index, chunks)
            try:
                out.write(cipher.decrypt(stored[:NONCE_BYTES], stored[NONCE_BYTES:], bound))
            except (InvalidTag, ValueError):
                raise ArtifactError(f"{path}: cannot be decrypted: another key, or the file was altered") from None


def decrypted_files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, BinaryIO]:
    """All files of an encrypted artifact as anonymous memory of this process, open for reading; close them after use.

    Raises: ArtifactError when the key is absent, another one, or a file was altered.
    """
    key, encryption = key_from_environment(), manifest["encryption"]
    if key_id(key) != encryption["key_id"]:
        raise ArtifactError(f"{folder}: encrypted with key {encryption['key_id']}, {KEY} holds {key_id(key)}")
    files: dict[str, BinaryIO] = {}
    try:
        for name in manifest["files"]:
            memory = os.fdopen(os.memfd_create(f"slimrank-{name}"), "w+b")
            files[name] = memory
            decrypt_file(folder / name, key, encryption, memory)
            memory.flush()
    except BaseException:
        close_all(files)
        raise
    return files


def close_all(files: Mapping[str, BinaryIO]) -> None:
    """Let go of what `decrypted_files` opened; what was mapped from it stays mapped."""
    for file in files.values():
        file.close()


def _bound(encryption: Mapping[str, Any], name: str, index: int, chunks: int) -> bytes:
    return f"{encryption['salt']}/{name}/{index}/{chunks}".encode()
