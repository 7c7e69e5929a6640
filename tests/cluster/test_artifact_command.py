"""`slimrank artifact`: what each subcommand prints, and how it ends."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))  # its builders; the package `compress` stays itself

from compress_builders import artifact_in  # noqa: E402

from cluster.cli import main  # noqa: E402


@pytest.fixture
def copy(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """An artifact of its own."""
    return Path(shutil.copytree(artifact_in(tmp_path_factory.getbasetemp()).folder, tmp_path / "a"))


def run(*words: str | Path) -> Result:
    """The command's result; anything but a clean exit is a defect."""
    result = CliRunner().invoke(main, ["artifact", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_show_lists_tables_and_sizes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = run("show", copy).stdout
    assert "user_id" in shown
    assert "whole artifact" in shown
    assert all(len(line) <= 60 for line in shown.splitlines() if "user_id" in line)
    result = json.loads(run("show", copy, "--json").stdout.splitlines()[-1])
    assert [t["bits"] for t in result["tables"] if t["name"] == "item_id"] == [[8, 2]]
    assert result["lineage"]["samples"] > 0


def test_show_keeps_control_characters_from_the_terminal(copy: Path) -> None:
    from compress.manifest import MANIFEST, version_of

    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["lineage"] = {"\x1b[2Jaway": "\x1b]0;title\x07"}
    manifest["version"] = version_of(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    result = run("show", copy)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout


def test_keygen_sign_verify_and_the_key_of_another(copy: Path, tmp_path: Path) -> None:
    for name in ("mine", "other"):
        assert run("keygen", "--private", tmp_path / f"{name}.pem", "--public", tmp_path / f"{name}.pub").exit_code == 0
    assert run("sign", copy, "--key", tmp_path / "mine.pem").exit_code == 0
    result = run("verify", copy, "--trusted-key", tmp_path / "mine.pub", "--json")
    assert json.loads(result.stdout.splitlines()[-1])["signature_checked"] is True
    refused = run("verify", copy, "--trusted-key", tmp_path / "other.pub")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1


def test_verify_ends_with_2_on_a_damaged_file(copy: Path) -> None:
    assert run("verify", copy).exit_code == 0
    (copy / "ids.arrow").write_bytes(b"nothing")
    result = run("verify", copy)
    assert result.exit_code == 2
    assert "ids.arrow: altered or cut short" in result.stderr


def test_verify_names_files_that_do_not_belong(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert "never read: notes.txt" in run("verify", copy).stdout


def test_diff_of_an_artifact_and_itself(copy: Path, tmp_path: Path) -> None:
    assert run("diff", copy, copy).stdout.startswith("the same artifact")
    assert run("diff", copy, tmp_path).exit_code == 2


def test_encrypt_needs_a_key_and_then_verifies(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMRANK_ARTIFACT_KEY", raising=False)
    assert "SLIMRANK_ARTIFACT_KEY is not set" in run("encrypt", copy, "--out", tmp_path / "e").stderr
    monkeypatch.setenv("SLIMRANK_ARTIFACT_KEY", base64.b64encode(bytes(32)).decode())
    assert run("encrypt", copy, "--out", tmp_path / "e").exit_code == 0
    assert "encrypted" in run("verify", tmp_path / "e").stdout
    assert json.loads(run("diff", copy, tmp_path / "e", "--json").stdout)["changes"]["encrypted"] == [False, True]
