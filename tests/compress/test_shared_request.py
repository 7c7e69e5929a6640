"""One request and K candidates against the plain batch: every head, any order of sides, any K."""

from __future__ import annotations

import pytest
import torch

from compress.dense import Sides, traced
from compress.shared import RequestHead, SplitInput
from trainer.config import ModelConfig
from trainer.models import HEADS
from trainer.models.attention import SequenceHead
from trainer.models.ranker import Head, HeadShape

SIDES = {"alternating": "uiuiui", "grouped": "uuuiii", "all the item's": "iiiiii", "all the user's": "uuuuuu"}


def make_head(arch: str, sequence: bool = False, batch_norm: bool = False) -> tuple[Head, HeadShape]:
    """A head of random weights over six features of unequal dims; the fourth is a sequence that attends to the last."""
    torch.manual_seed(5)
    positions = (None, None, None, 3 if sequence else None, None, None)
    shape = HeadShape(
        num_dense=4,
        dims=(8, 4, 8, 8, 8, 8),
        num_tasks=2,
        features=("a", "b", "c", "d", "e", "f"),
        positions=positions,
        targets=tuple(None if count is None else 5 for count in positions),
    )
    config = ModelConfig(
        arch=arch,
        top_mlp=[24, 16],
        bottom_mlp=[16],
        tower_mlp=[8],
        cross_rank=4,
        experts=3,
        batch_norm=batch_norm,
        dropout=0.1 if batch_norm else 0.0,
    )
    head = HEADS[arch](config, shape)
    head = SequenceHead(head, shape) if sequence else head
    for parameter in head.parameters():  # biases start at zero, which would hide a bias added twice
        torch.nn.init.normal_(parameter, std=0.2)
    return head.eval(), shape


def one_request(shape: HeadShape, sides: str, dense_of_item: list[bool], candidates: int) -> tuple[torch.Tensor, ...]:
    """Whole inputs (K, I), (K, L) and their four parts by side."""
    torch.manual_seed(9)
    widths = [dim * (count or 1) for dim, count in zip(shape.dims, shape.positions, strict=True)]
    item = torch.tensor([s == "i" for s, w in zip(sides, widths, strict=True) for _ in range(w)])
    item_dense = torch.tensor(dense_of_item)
    looked_up = torch.randn(candidates, sum(widths))
    looked_up[:, ~item] = looked_up[:1, ~item]
    dense = torch.randn(candidates, len(dense_of_item))
    dense[:, ~item_dense] = dense[:1, ~item_dense]
    return (
        dense,
        looked_up,
        dense[:1, ~item_dense],
        looked_up[:1, ~item],
        dense[:, item_dense],
        looked_up[:, item],
    )


def lookups(shape: HeadShape, sides: str) -> list[tuple[int, bool]]:
    """Width and side of each feature."""
    counted = zip(shape.dims, shape.positions, sides, strict=True)
    return [(dim * (count or 1), side == "i") for dim, count, side in counted]


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES.keys())
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("arch", sorted(HEADS))
def test_request_head_equals_plain_batch(arch, sequence, sides):
    head, shape = make_head(arch, sequence, batch_norm=sides == SIDES["grouped"])
    for dense_of_item in ([False] * 4, [True, False, False, True], [True] * 4):
        shared = RequestHead(head, dense_of_item, lookups(shape, sides))
        for candidates in (7, 1):
            dense, looked_up, *parts = one_request(shape, sides, dense_of_item, candidates)
            with torch.inference_mode():
                torch.testing.assert_close(shared(*parts), head(dense, looked_up), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", sorted(HEADS))
def test_request_products_are_made_once(arch):
    """The first layers see the request's columns in one row, never in K."""
    head, shape = make_head(arch)
    shared = RequestHead(head, [False] * 4, lookups(shape, SIDES["grouped"]))
    _, _, *parts = one_request(shape, SIDES["grouped"], [False] * 4, 50)
    width = shape.total_dim + shape.num_dense
    with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as profile:
        shared(*parts)
    products = [e.input_shapes for e in profile.events() if e.name in ("aten::addmm", "aten::mm")]
    wide = [shapes for shapes in products for s in shapes if len(s) == 2 and s[0] == 50 and s[1] >= width]
    once = [shapes for shapes in products for s in shapes if len(s) == 2 and s[0] == 1 and s[1] > 4]
    assert once, products
    assert arch == "dcn" or not wide, wide


def test_split_input_knows_its_whole():
    like = torch.zeros(3, 1)
    once, each = torch.randn(1, 2), torch.randn(3, 2)
    x = torch.cat([SplitInput([once], like), SplitInput([each], like)], dim=1)
    assert isinstance(x, SplitInput)
    assert x.shape == (3, 4)
    torch.testing.assert_close(x.whole(), torch.cat([once.expand(3, -1), each], dim=1))
    torch.testing.assert_close(x * 2, x.whole() * 2)  # an operation that knows nothing of blocks
    left, right = x.split([1, 3], dim=1)
    torch.testing.assert_close(torch.cat([left, right], dim=1).whole(), x.whole())
    moved = SplitInput([once, each], like, [3, 0, 1, 2])
    torch.testing.assert_close(moved.whole()[:, 3], once[:, 0].expand(3))


def test_traced_graph_serves_any_number_of_candidates():
    head, shape = make_head("dlrm", sequence=True)
    sides = SIDES["alternating"]
    whose = Sides((False, True, False, True), tuple(lookups(shape, sides)))
    with torch.inference_mode():
        flat = traced(head, whose)
        for candidates in (1, 2, 33):
            dense, looked_up, *parts = one_request(shape, sides, [False, True, False, True], candidates)
            torch.testing.assert_close(flat(*parts), head(dense, looked_up), rtol=0, atol=1e-5)
