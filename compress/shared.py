"""What depends on a request alone is computed once for all its candidates: exact, up to the order of fp32 sums.

In: a head, and which of its inputs are the request's (user and context: one row) or the item's (K rows). A head is
written once, for a batch; here it reads `SplitInput`s, matrices whose columns come in blocks of 1 row or K rows. A
linear layer multiplies each block by its own columns of the weight, so the request's product is made once and enters
as the bias of the candidates'; what knows nothing of blocks sees the whole matrix, so every head is right, and fast
where it is linear first. Every operation of a head must treat rows alike and apart.

Legend: K candidates, W columns, I dense inputs, L sum of the lookups' widths, T tasks, V vectors, P pairs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from trainer.models.deepfm import pair_products
from trainer.models.dlrm import pair_dots


class SplitInput(Tensor):
    """A matrix (K, ...) kept in blocks. `columns` says where each block's columns stand in the whole, None: in order.

    A block has one row where it depends on the request alone, else K. `like` is a tensor of K rows: its length is read
    when it is needed, so that a traced graph serves any K.
    """

    blocks: list[Tensor]
    columns: list[int] | None
    like: Tensor
    origin: tuple[Tensor, int] | None = None  # of a piece: the block it was cut from, and its first column there

    @staticmethod
    def __new__(
        cls: type[SplitInput], blocks: Sequence[Tensor], like: Tensor, columns: list[int] | None = None
    ) -> SplitInput:
        """Blocks (1 or K, ...) side by side in dimension 1; several must be matrices."""
        first = blocks[0]
        shape = list(first.shape)
        shape[0] = int(like.shape[0])
        if len(blocks) > 1:
            shape[1] = sum(int(b.shape[1]) for b in blocks)
        made = torch.Tensor._make_wrapper_subclass(cls, [int(n) for n in shape], dtype=first.dtype, device=first.device)
        made.blocks, made.like, made.columns = list(blocks), like, columns
        return made

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG003
        """Blocks stay blocks where `func` is known to allow it; else it gets whole matrices."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        known = KNOWN.get(func)
        return known(*args, **kwargs) if known else _by_rows(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG003
        """Nothing may get here: a SplitInput has no storage of its own."""
        raise AssertionError(f"{func} was given a SplitInput's storage, which it does not have")

    def whole(self) -> Tensor:
        """The matrix (K, ...) itself."""
        rows = self.like.shape[0]
        blocks = [b.expand(rows, *b.shape[1:]) for b in self.blocks]
        if len(blocks) == 1:
            return blocks[0]
        joined = torch.cat(blocks, dim=1)
        if self.columns is None:
            return joined
        order = sorted(range(len(self.columns)), key=self.columns.__getitem__)
        return joined.index_select(1, torch.tensor(order))

    def sides(self) -> tuple[Tensor | None, list[int], Tensor | None, list[int]]:
        """The request's columns (1, W1) and the candidates' (K, W2), None where there are none, and their places."""
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        places: tuple[list[int], list[int]] = ([], [])
        at = 0
        for block in self.blocks:
            width = int(block.shape[1])
            side = 0 if is_shared(block) else 1
            sides[side].append(block)
            here = range(at, at + width)
            places[side].extend(here if self.columns is None else (self.columns[i] for i in here))
            at += width
        request, items = (torch.cat(side, dim=1) if side else None for side in sides)
        return request, places[0], items, places[1]


def is_shared(block: Tensor) -> bool:
    """Whether a block depends on the request alone (with one candidate it makes no difference)."""
    return int(block.shape[0]) == 1


def _like(values: Any) -> Tensor:
    return next(v.like for v in values if isinstance(v, SplitInput))


def _blocks(x: Tensor) -> list[Tensor]:
    return x.blocks if isinstance(x, SplitInput) else [x]


def _whole(x: Any) -> Any:
    return x.whole() if isinstance(x, SplitInput) else x


def _by_rows(func: Callable, args: Any, kwargs: Any) -> Any:
    """Any other operation: on the one block of its inputs, or on whole matrices."""
    flat, spec = tree_flatten((args, kwargs))
    split = [x for x in flat if isinstance(x, SplitInput)]
    rows = {int(b.shape[0]) for x in split for b in x.blocks}
    others = {int(x.shape[0]) for x in flat if type(x) is Tensor and x.dim() > 1}
    if any(len(x.blocks) > 1 for x in split) or len(rows | others) > 1:
        whole_args, whole_kwargs = tree_unflatten([_whole(x) for x in flat], spec)
        return func(*whole_args, **whole_kwargs)
    like = _like(split)
    block_args, block_kwargs = tree_unflatten([x.blocks[0] if isinstance(x, SplitInput) else x for x in flat], spec)
    return tree_map_only(Tensor, lambda y: SplitInput([y], like), func(*block_args, **block_kwargs))


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Matrices side by side: their blocks, one after the other."""
    if dim not in (1, -1) or any(x.dim() != 2 for x in tensors):
        return torch.cat([_whole(x) for x in tensors], dim=dim)
    columns: list[int] = []
    ordered = True
    for x in tensors:
        own = x.columns if isinstance(x, SplitInput) else None
        ordered &= own is None
        at = len(columns)
        columns.extend(range(at, at + int(x.shape[1])) if own is None else (at + c for c in own))
    return SplitInput([b for x in tensors for b in _blocks(x)], _like(tensors), None if ordered else columns)


def _split(x: SplitInput, sizes: list[int], dim: int = 0) -> Sequence[Tensor]:
    """Columns cut into pieces, each of the blocks that it touches."""
    if dim not in (1, -1) or isinstance(sizes, int) or x.dim() != 2 or x.columns is not None:
        return x.whole().split(sizes, dim=dim)
    pieces: list[list[Tensor]] = [[] for _ in sizes]
    origins: list[tuple[Tensor, int]] = [(x.blocks[0], 0)] * len(sizes)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    at = 0
    for block in x.blocks:
        width = int(block.shape[1])
        for index, end in enumerate(ends):
            first, last = max(end - sizes[index], at), min(end, at + width)
            if first < last:
                pieces[index].append(block[:, first - at : last - at])
                origins[index] = (block, first - at)
        at += width
    cut = tuple(SplitInput(piece or [x.blocks[0][:, :0]], x.like) for piece in pieces)
    for piece, origin in zip(cut, origins, strict=True):
        piece.origin = origin if len(piece.blocks) == 1 else None
    return cut


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The request's product is made once and is the bias of the candidates'."""
    if not isinstance(x, SplitInput) or len(x.blocks) == 1:
        return _by_rows(F.linear, (x, weight, bias), {})
    request, columns, items, item_columns = x.sides()
    if request is None:
        assert items is not None
        return F.linear(items, pick_columns(weight, item_columns), bias)
    once = F.linear(request, pick_columns(weight, columns), bias)
    if items is None:
        return SplitInput([once], x.like)
    return F.linear(items, pick_columns(weight, item_columns), once.squeeze(0))


def pick_columns(weight_OW: Tensor, columns: list[int]) -> Tensor:
    """Columns (O, len(columns)) of a weight, contiguous; a traced graph holds them as a constant."""
    if columns == list(range(weight_OW.shape[1])):
        return weight_OW
    return weight_OW.index_select(1, torch.tensor(columns, dtype=torch.int64)).contiguous()


def _pair_dots(vectors: Sequence[Tensor], pairs_P: Tensor) -> Tensor:
    """Pairs within the request once; within an item, and of an item with the request, once a candidate."""
    blocks = [_only_block(v) for v in vectors]
    count = len(blocks)
    once = [i for i, b in enumerate(blocks) if is_shared(b)]
    each = [i for i, b in enumerate(blocks) if not is_shared(b)]
    if not once or not each:
        return _by_rows(pair_dots, ([SplitInput([b], _like(vectors)) for b in blocks], pairs_P), {})
    request_RW = torch.cat([blocks[i] for i in once], dim=0)
    item_KEW = _stacked([vectors[i] for i in each])
    dots = {
        (True, True): request_RW @ request_RW.t(),
        (False, True): F.linear(item_KEW, request_RW),
        (False, False): torch.bmm(item_KEW, item_KEW.transpose(1, 2)),
    }
    place = {v: i for side in (once, each) for i, v in enumerate(side)}
    found: dict[tuple[bool, bool], list[tuple[int, int]]] = {key: [] for key in dots}
    for at, pair in enumerate(pairs_P.tolist()):
        first, second = sorted(divmod(pair, count), key=lambda v: v in once)  # an item's vector comes first
        kind = (first in once, second in once)
        width = len(once) if kind[1] else len(each)
        found[kind].append((at, place[first] * width + place[second]))
    parts, columns = [], []
    for kind, wanted in found.items():
        if wanted:
            flat = dots[kind].reshape(1, -1) if kind[0] else dots[kind].flatten(1)
            codes = [code for _, code in sorted(wanted, key=lambda pair: pair[1])]
            needs_all = codes == list(range(int(flat.shape[1])))
            parts.append(flat if needs_all else flat.index_select(1, torch.tensor(codes)))
            columns += [at for at, _ in sorted(wanted, key=lambda pair: pair[1])]
    return SplitInput(parts, _like(vectors), columns)


def _stacked(vectors: list[Tensor]) -> Tensor:
    """Vectors (K, W) as (K, E, W): a view where they are neighbouring columns of one block, as lookups give them."""
    blocks = [_only_block(v) for v in vectors]
    width = int(blocks[0].shape[1])
    block, first = getattr(vectors[0], "origin", None) or (None, 0)
    neighbours = [(id(block), first + at * width) for at in range(len(vectors))]
    origins = [getattr(v, "origin", None) or (v, 0) for v in vectors]
    if block is None or [(id(b), at) for b, at in origins] != neighbours:
        return torch.stack(blocks, dim=1)
    return block[:, first : first + len(vectors) * width].unflatten(1, (len(vectors), width))


def _pair_products(vectors: Sequence[Tensor]) -> Tensor:
    """Sums, and sums of squares, of the request's vectors once."""
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    blocks = [_only_block(v) for v in vectors]
    for side in (True, False):
        mine = [b for b in blocks if is_shared(b) == side]
        if mine:
            stacked = torch.stack(mine, dim=1)
            total = stacked.sum(1) + total
            squares = stacked.square().sum(1) + squares
    assert isinstance(total, Tensor)
    return SplitInput([0.5 * (total.square() - squares)], _like(vectors))


def _only_block(x: Tensor) -> Tensor:
    return x.blocks[0] if isinstance(x, SplitInput) and len(x.blocks) == 1 else _whole(x)


KNOWN: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat,
    torch.split: _split,
    Tensor.split: _split,
    F.linear: _linear,
    pair_dots: _pair_dots,
    pair_products: _pair_products,
}


class RequestHead(nn.Module):
    """A head for one request and K candidates: (1, I1), (1, L1), (K, I2), (K, L2) -> logits (K, T).

    `dense_of_item` says of each dense input, and `lookups` (width, is the item's) of each lookup, whose it is; the
    columns of each side come in the order of the whole.
    """

    def __init__(self, head: nn.Module, dense_of_item: Sequence[bool], lookups: Sequence[tuple[int, bool]]) -> None:
        super().__init__()
        self.head = head
        self.dense = [(1, item) for item in dense_of_item]
        self.lookups = list(lookups)

    def forward(
        self,
        request_dense: Tensor,
        request_looked_up: Tensor,
        item_dense: Tensor,
        item_looked_up: Tensor,
    ) -> Tensor:
        """Logits (K, T) float32, those of `head` on the whole inputs up to the order of fp32 sums."""
        dense = interleave(request_dense, item_dense, self.dense, item_looked_up)
        looked_up = interleave(request_looked_up, item_looked_up, self.lookups, item_looked_up)
        return _whole(self.head(dense, looked_up))


def interleave(request: Tensor, items: Tensor, widths: Sequence[tuple[int, bool]], like: Tensor) -> Tensor:
    """Columns of both sides in the order of the whole; neighbours of one side make one block."""
    runs: list[tuple[int, bool]] = []
    for width, item in widths:
        if runs and runs[-1][1] == item:
            runs[-1] = (runs[-1][0] + width, item)
        else:
            runs.append((width, item))
    at = {True: 0, False: 0}
    blocks = []
    for width, item in runs:
        source = items if item else request
        blocks.append(source[:, at[item] : at[item] + width])
        at[item] += width
    return SplitInput(blocks or [request], like)
