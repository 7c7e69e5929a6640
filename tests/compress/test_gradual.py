"""compress/methods/gradual.py: cuts that are made little by little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compress_builders import World, quiet

from compress.artifact import load_artifact
from compress.compressor import resolve
from compress.config import CompressionPlan
from compress.methods.gradual import on_the_way
from compress.pipeline import compress_checkpoint
from compress.search.profile import profile_tables

PLANS: dict[str, dict[str, Any]] = {
    "a cut": {"default": {"bits": 4, "keep": 0.2, "centroids": 3}},
    "tiers": {"default": {"tiers": [{"bits": 8, "keep": 0.1, "clip": "minmax"}, {"bits": 4, "keep": 0.4}]}},
    "centroids and forgotten": {
        "default": {"tiers": [{"bits": 4, "keep": 0.2}, {"bits": 0, "keep": 0.5}], "centroids": 4, "unknown": "shared"}
    },
}


@pytest.mark.parametrize("name", PLANS)
def test_cuts_rise_to_those_of_the_plan(world: World, name: str) -> None:
    plan = CompressionPlan.model_validate(PLANS[name])
    profiles = profile_tables(world.checkpoint, world.dataset, quiet, codebooks=[3, 4])
    whole = resolve(plan, profiles)
    ways = [resolve(on_the_way(plan, whole, share), profiles) for share in (0.0, 0.3, 0.7, 1.0)]
    for table, part in whole.items():
        rows = len(part.layout.order)
        kept = [way[table].layout.kept for way in ways]
        gone = [rows - way[table].layout.zone for way in ways]
        assert kept[0] == rows, "nothing is cut at first"
        assert (np.diff(kept) <= 0).all()
        assert (np.diff(gone) >= 0).all()
        assert (kept[-1], gone[-1]) == (part.layout.kept, rows - part.layout.zone)
        assert ways[-1][table].bits == part.bits
        assert ways[-1][table].clips == part.clips
    large = [way["user_id"].layout.kept for way in ways]
    assert large[0] > large[1] > large[2] > large[3], "most goes early: the share that is gone rises as 1 - (1 - t)^3"
    assert large[0] - large[1] > large[2] - large[3]


def test_compress_teaches_the_head_on_the_way(world: World, tmp_path: Path) -> None:
    found = {}
    for rounds in (1, 3):
        plan = tmp_path / f"{rounds}.yaml"
        plan.write_text(
            f"default: {{bits: 4, keep: 0.3}}\ncalibrate: {{steps: 30, batch_size: 128, rounds: {rounds}}}\n"
        )
        out = tmp_path / f"artifact-{rounds}"
        told = compress_checkpoint(world.checkpoint.folder, world.dataset.folder, plan, out, "val", quiet)
        found[rounds] = load_artifact(out)
        assert told["calibration"]["compressed"]["held_loss"] <= told["calibration"]["compressed"]["held_loss_before"]
    first, second = (a.model.lookup.block for a in found.values())
    assert first.equal(second), "the tables are the plan's own"
    heads = [a.model.head.state_dict() for a in found.values()]
    assert any(not value.equal(heads[1][key]) for key, value in heads[0].items())
