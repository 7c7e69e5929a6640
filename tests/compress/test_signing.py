"""compress/signing.py, encryption.py, verified.py: who made it, who may read it, what need not be hashed again."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from compress import verified
from compress.artifact import MANIFEST, Artifact, load_artifact, read_manifest
from compress.describe import describe_artifact, diff_artifacts, encrypt_artifact, sign_artifact, verify_artifact
from compress.encryption import CHUNK_BYTES, KEY, decrypt_file, encrypt_file, new_encryption, plain_bytes
from compress.errors import ArtifactError
from compress.manifest import SIGNATURE, version_of
from compress.signing import TRUSTED_KEY, generate_keys
from compress.verified import cache_folder, checksum
from trainer.errors import SlimrankError
from trainer.files import sha256


@pytest.fixture
def copy(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may change."""
    return Path(shutil.copytree(artifact.folder, tmp_path / "artifact"))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A key pair: private, public."""
    generate_keys(tmp_path / "key.pem", tmp_path / "key.pub")
    return tmp_path / "key.pem", tmp_path / "key.pub"


# -- signature -------------------------------------------------------------------------------------------------------


def test_signed_artifact_is_opened_by_those_who_trust_the_key(copy: Path, keys: tuple[Path, Path]) -> None:
    version = load_artifact(copy).version
    signed = sign_artifact(copy, keys[0])
    assert load_artifact(copy, trusted_keys=[keys[1]]).version == version == signed["version"]
    assert describe_artifact(copy)["signature"] == signed["key_id"]
    assert verify_artifact(copy, [keys[1]])["signature_checked"]
    assert not verify_artifact(copy)["signature_checked"]


def test_unsigned_artifact_is_refused_before_its_manifest_is_parsed(copy: Path, keys: tuple[Path, Path]) -> None:
    (copy / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="unsigned, this machine asks for a signature"):
        load_artifact(copy, trusted_keys=[keys[1]])


def test_environment_makes_every_loader_insist(
    copy: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_keys(tmp_path / "other.pem", tmp_path / "other.pub")
    monkeypatch.setenv(TRUSTED_KEY, f"{tmp_path / 'other.pub'}{os.pathsep}{keys[1]}")
    for opened in (load_artifact, read_manifest, describe_artifact):
        with pytest.raises(ArtifactError, match="unsigned"):
            opened(copy)
    sign_artifact(copy, keys[0])
    assert load_artifact(copy).model.tasks == ["click"]
    monkeypatch.setenv(TRUSTED_KEY, str(tmp_path / "other.pub"))
    with pytest.raises(ArtifactError, match="signed with key '[0-9a-f]{16}', trusted: "):
        load_artifact(copy)
    monkeypatch.setenv(TRUSTED_KEY, str(tmp_path / "no such.pub"))
    with pytest.raises(SlimrankError, match="not a public key"):
        load_artifact(copy)


def test_signature_is_of_exactly_this_manifest(copy: Path, keys: tuple[Path, Path]) -> None:
    sign_artifact(copy, keys[0])
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["metrics"] = {"auc": 0.99}
    manifest["version"] = version_of(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert load_artifact(copy).manifest["metrics"] == {"auc": 0.99}
    with pytest.raises(ArtifactError, match="not of this manifest"):
        load_artifact(copy, trusted_keys=[keys[1]])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"algorithm": "none", "key_id": "KEY", "signature": ""}',
        b'{"algorithm": "Ed25519", "key_id": "KEY", "signature": 7}',
        b'{"algorithm": "Ed25519", "key_id": "KEY", "signature": "!!"}',
        b'{"algorithm": "Ed25519", "key_id": "KEY", "signature": ""}',
        b'{"algorithm": "Ed25519", "key_id": "KEY", "signature": "' + base64.b64encode(bytes(64)) + b'"}',
        b'{"algorithm": "Ed25519", "key_id": ["KEY"], "signature": "AA=="}',
        b"[" * 10_000,
        b" " * 20_000,
    ],
)
def test_signature_of_a_stranger_is_refused(copy: Path, keys: tuple[Path, Path], content: bytes) -> None:
    own = sign_artifact(copy, keys[0])["key_id"]
    (copy / SIGNATURE).write_bytes(content.replace(b"KEY", own.encode()))
    with pytest.raises(ArtifactError):
        load_artifact(copy, trusted_keys=[keys[1]])


def test_damaged_artifact_is_not_signed(copy: Path, keys: tuple[Path, Path]) -> None:
    (copy / "tables.bin").write_bytes(bytes((copy / "tables.bin").stat().st_size))
    with pytest.raises(ArtifactError, match=r"tables\.bin: altered"):
        sign_artifact(copy, keys[0])
    assert not (copy / SIGNATURE).exists()


def test_private_key_is_for_its_owner_and_never_overwritten(keys: tuple[Path, Path], tmp_path: Path) -> None:
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600
    with pytest.raises(SlimrankError, match="already there"):
        generate_keys(keys[0], tmp_path / "new.pub")
    assert not (tmp_path / "new.pub").exists()


def test_key_of_another_kind_is_refused(copy: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    other = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "ec.pem").write_bytes(other)
    with pytest.raises(SlimrankError, match="not an Ed25519 key"):
        sign_artifact(copy, tmp_path / "ec.pem")
    with pytest.raises(SlimrankError, match="not a private key"):
        sign_artifact(copy, keys[1])


# -- encryption ------------------------------------------------------------------------------------------------------


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A key in the environment."""
    monkeypatch.setenv(KEY, base64.b64encode(bytes(range(32))).decode())
    return bytes(range(32))


def test_encrypted_artifact_scores_the_same(
    artifact: Artifact, tmp_path: Path, key: bytes, keys: tuple[Path, Path]
) -> None:
    written = encrypt_artifact(artifact.folder, tmp_path / "secret")
    assert written["version"] != artifact.version
    sign_artifact(tmp_path / "secret", keys[0])
    found = load_artifact(tmp_path / "secret", trusted_keys=[keys[1]])
    encoded = artifact.model.transform.encode(artifact.golden)
    assert np.array_equal(found.model.score_encoded(encoded), artifact.model.score_encoded(encoded))
    assert found.catalogue is not None
    assert describe_artifact(tmp_path / "secret")["encrypted"]
    for name in artifact.manifest["files"]:
        plain, stored = (folder / name for folder in (artifact.folder, tmp_path / "secret"))
        assert plain.read_bytes()[:64] not in stored.read_bytes()
        assert plain_bytes(stored.stat().st_size, CHUNK_BYTES) == plain.stat().st_size


def test_encrypted_artifact_needs_its_key(
    artifact: Artifact, tmp_path: Path, key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypt_artifact(artifact.folder, tmp_path / "secret")
    with pytest.raises(ArtifactError, match="encrypted already"):
        encrypt_artifact(tmp_path / "secret", tmp_path / "twice")
    monkeypatch.setenv(KEY, base64.b64encode(bytes(32)).decode())
    with pytest.raises(ArtifactError, match=rf"encrypted with key [0-9a-f]{{16}}, {KEY} holds"):
        load_artifact(tmp_path / "secret")
    for text in ("", "short", base64.b64encode(bytes(16)).decode()):
        monkeypatch.setenv(KEY, text)
        with pytest.raises(ArtifactError, match=f"{KEY}"):
            load_artifact(tmp_path / "secret")
        with pytest.raises(ArtifactError, match=f"{KEY}"):
            encrypt_artifact(artifact.folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 20_000])
def test_chunks_cannot_be_cut_moved_or_renamed(tmp_path: Path, key: bytes, size: int) -> None:
    encryption = {**new_encryption(key), "chunk_bytes": 4096}
    plain = np.random.default_rng(size).bytes(size)
    for folder in ("plain", "stored"):
        (tmp_path / folder).mkdir()
    (tmp_path / "plain" / "tables.bin").write_bytes(plain)
    stored = tmp_path / "stored" / "tables.bin"
    encrypt_file(tmp_path / "plain" / "tables.bin", stored, key, encryption)
    content = stored.read_bytes()
    assert decrypted(stored, key, encryption) == plain
    assert plain_bytes(len(content), 4096) == size
    wide = 4096 + 28
    altered = [content[:-1], content + b"x", bytes([content[20 % len(content)] ^ 1]).join([content[:20], content[21:]])]
    altered += [content[:wide], content[wide : 2 * wide] + content[:wide] + content[2 * wide :]] if size > 8192 else []
    for wrong in altered:
        stored.write_bytes(wrong)
        with pytest.raises(ArtifactError, match="cannot be decrypted"):
            decrypted(stored, key, encryption)
    (tmp_path / "stored" / "ids.arrow").write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be decrypted"):
        decrypted(tmp_path / "stored" / "ids.arrow", key, encryption)
    with pytest.raises(ArtifactError, match="cannot be decrypted"):
        decrypted(tmp_path / "stored" / "ids.arrow", key, {**encryption, "salt": "0" * 32})


def decrypted(path: Path, key: bytes, encryption: dict) -> bytes:
    """The plain bytes of a file."""
    out = path.with_suffix(".out")
    with out.open("wb") as file:
        decrypt_file(path, key, encryption, file)
    return out.read_bytes()


# -- what need not be hashed again -----------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A cache of its own, and a record of what was really hashed; every file counts as settled."""
    monkeypatch.setenv("SLIMRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "SETTLED_S", -1.0)
    seen: list[str] = []
    digest = verified.hashlib.file_digest

    def watched(file, kind):
        seen.append(
            Path(file.name if isinstance(file.name, str) else os.readlink(f"/proc/self/fd/{file.fileno()}")).name
        )
        return digest(file, kind)

    monkeypatch.setattr(verified.hashlib, "file_digest", watched)
    return seen


def test_second_load_hashes_nothing_and_full_hashes_all(copy: Path, hashed: list[str]) -> None:
    load_artifact(copy)
    first = list(hashed)
    load_artifact(copy)
    assert hashed == first
    load_artifact(copy, verify="full")
    assert len(hashed) == 2 * len(first) == 12


@pytest.mark.parametrize("times", ["as they come", "set back"])
def test_altered_file_is_hashed_again(copy: Path, hashed: list[str], times: str) -> None:
    load_artifact(copy)
    path = copy / "tables.bin"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(bytes([path.read_bytes()[0] ^ 1]))
    if times == "set back":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match=r"tables\.bin: altered"):
        load_artifact(copy)


def test_file_that_just_changed_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMRANK_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "file"
    path.write_bytes(b"now")
    assert checksum(path, full=False) == sha256(path)
    assert not cache_folder().exists()
    monkeypatch.setattr(time, "time", lambda: path.stat().st_ctime + 60)
    checksum(path, full=False)
    assert len(list(cache_folder().iterdir())) == 1


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_record_that_others_may_write_is_not_believed(copy: Path, hashed: list[str], mode: int) -> None:
    path = copy / "tables.bin"
    right = checksum(path, full=False)
    (record,) = cache_folder().iterdir()
    record.write_text(record.read_text().replace(right, "0" * 64))
    assert checksum(path, full=False) == "0" * 64
    record.chmod(mode)
    assert checksum(path, full=False) == right


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"identity": []}', "[" * 5000])
def test_record_that_is_damaged_is_not_believed(copy: Path, hashed: list[str], content: str) -> None:
    path = copy / "tables.bin"
    right = checksum(path, full=False)
    (record,) = cache_folder().iterdir()
    record.write_text(content)
    assert checksum(path, full=False) == right


# -- differences -----------------------------------------------------------------------------------------------------


def test_diff_names_what_changed(artifact: Artifact, copy: Path) -> None:
    assert diff_artifacts(artifact.folder, copy)["same"]
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["metrics"]["auc"], manifest["plan"]["default"]["bits"] = 0.5, 16
    manifest["version"] = version_of(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    found = diff_artifacts(artifact.folder, copy)
    assert not found["same"]
    assert found["changes"] == {"plan.default.bits": [8, 16], "metrics.auc": [None, 0.5]}
