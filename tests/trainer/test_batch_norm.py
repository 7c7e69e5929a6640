"""BatchNorm of trainer/models/ranker.py: torch's on one process, and the same over any ranks."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing
from batch_norm_ranks import WIDTH, inputs, normalised, on_rank

from trainer.models.ranker import BatchNorm


def test_batch_norm_equals_torchs_on_one_process():
    own, theirs = BatchNorm(WIDTH), torch.nn.BatchNorm1d(WIDTH)
    with torch.no_grad():
        for norm in (own, theirs):
            norm.weight.copy_(torch.linspace(0.5, 1.5, WIDTH))
            norm.bias.copy_(torch.linspace(-1, 1, WIDTH))
    x, times = inputs()
    for step in range(3):
        a, b = (x * (step + 1)).requires_grad_(), (x * (step + 1)).requires_grad_()
        torch.testing.assert_close(own(a), theirs(b), rtol=1e-4, atol=1e-5)
        (own(a) * times).sum().backward()
        (theirs(b) * times).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.running_var, theirs.running_var, rtol=1e-4, atol=1e-5)
    own.eval(), theirs.eval()
    torch.testing.assert_close(own(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(own(x)[:3], own(x[:3])), "a row's score does not depend on the others in evaluation"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, list[dict]]:
    """For 2 and 3 workers: what each rank found."""
    folder = tmp_path_factory.mktemp("batch-norm")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["trainer.models.ranker"])  # imported once
    torch.multiprocessing.start_processes(on_rank, (str(folder),), nprocs=3, start_method="forkserver")
    return {n: [torch.load(folder / f"{n}-{rank}.pt") for rank in range(n)] for n in (2, 3)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_batch_norm_over_ranks_is_that_of_the_whole_batch(ranks, world_size):
    alone, found = normalised(0, 24), ranks[world_size]
    for key in ("out", "x", "eval"):
        torch.testing.assert_close(torch.cat([f[key] for f in found]), alone[key], rtol=1e-4, atol=1e-4, msg=key)
    for key in ("weight", "bias"):  # each rank has its rows' part of a parameter's gradient
        torch.testing.assert_close(sum(f[key] for f in found), alone[key], rtol=1e-4, atol=1e-4, msg=key)
    for key in ("mean", "var"):
        for f in found:
            torch.testing.assert_close(f[key], alone[key], rtol=1e-4, atol=1e-5, msg=key)
            assert torch.equal(f[key], found[0][key]), "every rank holds the same statistics"
