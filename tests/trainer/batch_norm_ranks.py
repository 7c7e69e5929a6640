"""What each rank of test_batch_norm.py's process groups does: normalise its own rows of one global batch.

Imports neither pytest nor Ray, which would be half of a new process's start.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from trainer.models.ranker import BatchNorm

WIDTH = 5
CUTS = {1: (0, 24), 2: (0, 5, 24), 3: (0, 1, 10, 24)}  # uneven; the first of three ranks has one row


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch (B, W), columns of very different means, and what its outputs are multiplied by."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, WIDTH, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0, 3.0])
    return x + torch.tensor([0.0, 100.0, -5.0, 0.0, 1.0]), torch.randn(24, WIDTH, generator=generator)


def normalised(first: int, last: int) -> dict[str, torch.Tensor]:
    """Output, gradients and running statistics of a rank that holds rows first..last, after two steps."""
    norm = BatchNorm(WIDTH)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, WIDTH))
        norm.bias.copy_(torch.linspace(-1, 1, WIDTH))
    whole, times = inputs()
    norm(whole[first:last] * 2)
    x = whole[first:last].clone().requires_grad_()
    out = norm(x)
    (out * times[first:last]).sum().backward()
    return {
        "out": out.detach(),
        "x": x.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
        "eval": norm.eval()(whole[first:last]).detach(),
    }


def on_rank(rank: int, folder: str) -> None:
    """Among three ranks, then among the first two; what came out goes to FOLDER/WORLD_SIZE-RANK.pt."""
    torch.set_num_threads(1)
    for world_size in (3, 2):
        if rank >= world_size:
            return
        store = f"file://{folder}/store-{world_size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        found = normalised(*CUTS[world_size][rank : rank + 2])
        torch.save(found, Path(folder) / f"{world_size}-{rank}.pt")
        dist.destroy_process_group()
