"""What an attacker does who knows the format: alter a file or the manifest, and make every checksum fit again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.manifest import MANIFEST, version_of
from trainer.files import sha256

FILES = Path(__file__).parent / "files"
Change = Callable[[dict[str, Any]], dict[str, Any]]


def forge(folder: Path, change: Change = lambda m: m, *, files: bool = True) -> None:
    """Rewrite the manifest by `change`, its checksums and version made to fit what lies in the folder."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if files:
        for name in manifest["files"]:
            path = folder / name
            manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = change(manifest)
    manifest["version"] = version_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
