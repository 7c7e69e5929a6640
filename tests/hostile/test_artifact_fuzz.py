"""Random damage to each file of an artifact: it loads with the same scores or is refused, and nothing ever crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from compress.artifact import Artifact

FUZZ = """
import json, random, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hostile_builders import forge
from compress.artifact import load_artifact
from compress.errors import ArtifactError
from compress.manifest import MANIFEST

def damage(content, rng):
    content = bytearray(content)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(content[: rng.randrange(len(content))])
    if kind == 1:
        return bytes(content) + rng.randbytes(rng.randrange(1, 64))
    for _ in range(rng.choice((1, 1, 4, 32))):
        at = rng.randrange(len(content))
        content[at] = content[at] ^ (1 << rng.randrange(8)) if kind == 2 else rng.choice((0, 1, 0x7F, 0x80, 0xFF))
    return bytes(content)

valid, folder, seeds = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
whole = load_artifact(valid)
raw = whole.golden.drop_columns(["_expected"])
scores = whole.model.score_encoded(whole.model.transform.encode(raw)).tobytes()
outcomes = {"sealed refused": 0, "sealed same": 0, "forged refused": 0, "forged loaded": 0}
shutil.copytree(valid, folder)
names = sorted(p.name for p in valid.iterdir())
for name, seed in [(n, s) for n in names for s in range(seeds)]:
    if seed == 0:
        shutil.copytree(valid, folder, dirs_exist_ok=True)
    content = damage((valid / name).read_bytes(), random.Random(f"{name} {seed}"))
    print(name, seed, file=sys.stderr, flush=True)
    for kind in ("sealed", "forged"):
        shutil.copyfile(valid / MANIFEST, folder / MANIFEST)
        (folder / name).write_bytes(content)
        if kind == "forged":
            if name == MANIFEST:
                continue
            forge(folder)
        try:
            found = load_artifact(folder, verify="full" if seed % 2 else "known")
        except ArtifactError as error:
            assert "\\n" not in str(error), str(error)
            outcomes[f"{kind} refused"] += 1
            continue
        again = found.model.score_encoded(found.model.transform.encode(raw))
        if kind == "sealed":
            assert again.tobytes() == scores, f"seed {seed}: other scores"
            outcomes["sealed same"] += 1
        else:
            assert again.shape == (len(raw), 1)
            outcomes["forged loaded"] += 1
print(json.dumps(outcomes))
"""
SEEDS = int(os.environ.get("SLIMRANK_FUZZ_SEEDS", "12"))  # 60 a file were run once


def test_damaged_files_never_crash(artifact: Artifact, tmp_path: Path) -> None:
    """SEEDS damages of each file, in a process of its own: as they are, and with checksums that were made to fit."""
    arguments = [str(Path(__file__).parent), str(artifact.folder), str(tmp_path / "artifact"), str(SEEDS)]
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, *arguments], capture_output=True, text=True, timeout=60 + 30 * SEEDS, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode} at {done.stderr[-1500:]}"
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes["sealed refused"] + outcomes["sealed same"] == 7 * SEEDS
    assert outcomes["sealed refused"] > 6 * SEEDS  # damage that sets a byte to what it was changes nothing
    assert outcomes["forged refused"] > SEEDS
