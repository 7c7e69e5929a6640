"""How precisely the dense part multiplies in training: fp32, fp32 through bf16 products ("medium"), or bf16 autocast.

Scores that anyone reads (validation, evaluate, serving) are always fp32. The faster forms need hardware for bf16, and
are taken only after their error was measured on this machine, with the run's own layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, Protocol, cast

import torch
from torch import nn

from trainer.models.ranker import Head, Ranker
from trainer.ranks import from_first

Precision = Literal["highest", "medium", "bf16"]
MAX_ERROR = 0.03  # of the spread of the log-odds (root mean square); bf16 keeps 8 bits, so a layer is off by .4%
CHECK_ROWS = 512


class OnDevice(Protocol):
    """What this file needs to know of a Place."""

    @property
    def device(self) -> torch.device: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...


def choose_precision(asked: str, head: Head, num_dense: int, width: int, place: OnDevice) -> Precision:
    """The precision asked for, or with "auto" the fastest whose error passes; all ranks take rank 0's choice.

    `width` is what the head takes of looked-up embeddings.
    """
    choice = asked
    if asked == "auto":
        wanted = [p for p in ("bf16", "medium") if has_bf16(place.device)]
        errors = precision_errors(head, num_dense, width, wanted, place.device)
        choice = next((p for p in wanted if errors[p] <= MAX_ERROR), "highest")
    return cast(Precision, from_first(choice, place.world_size))


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.no_grad()
def precision_errors(
    head: Head, num_dense: int, width: int, precisions: list[str], device: torch.device
) -> dict[str, float]:
    """Root mean square error of the log-odds over their spread, on random inputs, for each precision."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(CHECK_ROWS, num_dense, generator=generator).to(device)
    looked_up = torch.randn(CHECK_ROWS, width, generator=generator).to(device)
    training = head.training
    head.eval()
    before = torch.get_float32_matmul_precision(), head.autocast
    try:
        _apply("highest", head)
        exact = head(dense, looked_up)
        errors = {}
        for precision in precisions:
            _apply(precision, head)
            error = head(dense, looked_up) - exact
            errors[precision] = float(error.square().mean().sqrt() / exact.std(0).clamp(min=1e-6).mean())
        return errors
    finally:
        torch.set_float32_matmul_precision(before[0])
        head.autocast = before[1]
        head.train(training)


def use_precision(precision: str, model: Ranker) -> None:
    """Train a ranker's dense part so from here on."""
    _apply(precision, model.head)


def _apply(precision: str, head: Head) -> None:
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    head.autocast = torch.bfloat16 if precision == "bf16" else None


@contextlib.contextmanager
def fp32(model: nn.Module) -> Iterator[None]:
    """Score in fp32 within the block."""
    head = model.head
    assert isinstance(head, Head)
    before = torch.get_float32_matmul_precision(), head.autocast
    _apply("highest", head)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        head.autocast = before[1]
