"""A checkpoint does not depend on the plan: {TW, CW, RW, DP} x {1, 2, 3 workers} x {Adagrad, row-wise Adagrad}.

All pairs of these load into each other with weights and optimizer state equal to the bit, and train on alike. Row-wise
Adagrad under column-wise sharding keeps one state a column shard, which makes it another optimizer: it is refused.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "trainer")]

from matrix_ranks import OPTIMIZERS, TYPES, WORLDS, cases, on_rank
from trainer_builders import make_dataset, make_run

from trainer.checkpoint import open_checkpoint

DEADLINE_S = 180
SAME_STEP = 2e-6  # a step's sums run in another order on another number of workers


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("matrix")
    dataset = make_dataset(folder / "data", 120, row_group_rows=16)
    run = make_run({"embedding_dim": 12}, {"batch_size": 24, "oov_rate": 0.0})
    contexts = [
        torch.multiprocessing.spawn(
            on_rank, (world_size, str(folder), run, str(dataset.folder)), nprocs=world_size, join=False
        )
        for world_size in WORLDS
    ]
    deadline = time.monotonic() + DEADLINE_S
    waiting = list(contexts)
    try:
        while waiting:  # join raises what a rank raised
            waiting = [context for context in waiting if not context.join(timeout=0.2)]
            assert time.monotonic() < deadline, "ranks hang"
    finally:
        for process in (p for context in contexts for p in context.processes):
            process.kill()
    merged: dict[str, list[str]] = {}
    for path in folder.glob("found-*.pt"):
        for name, wrong in torch.load(path).items():
            merged.setdefault(name, []).extend(wrong)
    return folder, merged


def test_every_case_was_run(found: tuple[Path, dict[str, list[str]]]) -> None:
    loads = [name for name in found[1] if "->" in name]
    # row-wise Adagrad: 3 types x 3 worlds into the same 9; Adagrad: 4 x 3 into 12
    assert len(loads) == 9 * 9 + 12 * 12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", TYPES)
def test_saved_state_is_the_live_state(found: tuple[Path, dict[str, list[str]]], kind: str, optimizer: str) -> None:
    for world_size in WORLDS:
        if (kind, optimizer) in set(cases()):
            assert found[1][f"saved {optimizer}-{kind}-{world_size}"] == []


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", TYPES)
def test_loads_under_every_plan_with_state_equal(
    found: tuple[Path, dict[str, list[str]]], kind: str, optimizer: str, world_size: int
) -> None:
    if (kind, optimizer) not in set(cases()):
        assert found[1]["refused"] == []
        return
    wrong = {
        name: keys for name, keys in found[1].items() if name.endswith(f"-> {kind} x{world_size}") and optimizer in name
    }
    named = {name: keys for name, keys in wrong.items() if name.startswith(f"{optimizer}-")}
    assert named
    assert {name: keys for name, keys in named.items() if keys} == {}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_alike_under_every_plan(found: tuple[Path, dict[str, list[str]]], optimizer: str) -> None:
    folder = found[0]
    reference = open_checkpoint(folder / f"next-{optimizer}-table_wise-1")
    moved = open_checkpoint(folder / f"{optimizer}-table_wise-1")
    assert not torch.equal(reference.read("tables/user/weight"), moved.read("tables/user/weight"))
    for kind, own in cases():
        for world_size in WORLDS:
            if own == optimizer:
                other = open_checkpoint(folder / f"next-{optimizer}-{kind}-{world_size}")
                for key in reference.keys():  # noqa: SIM118
                    torch.testing.assert_close(
                        other.read(key),
                        reference.read(key),
                        rtol=1e-5,
                        atol=SAME_STEP,
                        msg=f"{kind} x{world_size} {key}",
                    )
