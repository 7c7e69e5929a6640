"""compress/lookup.py: the TBE against its plain-torch twin, bounds, and the mapped file."""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

import pytest
import torch
from compress_builders import packed_block, random_bags
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from compress.lookup import TABLE_ALIGNMENT, Lookup, PackedTable, map_block, table_offsets, table_view
from compress.methods.codec import dequantize_rows, row_bytes

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
MIXED = [
    PackedTable("two", 40, 16, 2, ("two_a",)),
    PackedTable("four", 31, 12, 4, ("four_a", "four_b")),
    PackedTable("eight", 1, 4, 8, ("eight_a",)),
    PackedTable("half", 17, 8, 16, ("half_a",)),
    PackedTable("full", 23, 20, 32, ("full_a", "full_b")),
]
MIXED_FEATURES = ["full_a", "two_a", "four_a", "half_a", "four_b", "eight_a", "full_b"]  # not in the tables' order


def ids_of(values: list[int], lengths: list[int], features: list[str]) -> KeyedJaggedTensor:
    """Bags from plain lists."""
    return KeyedJaggedTensor(
        keys=features,
        values=torch.tensor(values, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        stride=len(lengths) // len(features),
    )


@pytest.fixture
def small() -> Lookup:
    tables = [PackedTable("t", 5, 8, 8, ("f", "g"))]
    return Lookup(tables, ["f", "g"], set(), packed_block(tables))


@pytest.mark.parametrize(
    ("bits", "dim"), [(2, 8), (2, 64), (4, 4), (4, 12), (8, 4), (8, 64), (16, 4), (16, 20), (32, 4), (32, 64)]
)
@pytest.mark.parametrize("mean", [False, True])
def test_lookup_equals_its_oracle(bits: int, dim: int, mean: bool) -> None:
    tables = [PackedTable("t", 50, dim, bits, ("f",))]
    lookup = Lookup(tables, ["f"], {"f"} if mean else set(), packed_block(tables))
    bags = random_bags(tables, ["f"], 33)
    found = lookup(bags)
    assert found.shape == (33, dim)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, lookup.oracle(bags), **TOLERANCE)


@pytest.mark.parametrize("batch", [1, 2, 65])
def test_lookup_of_mixed_tables_equals_its_oracle(batch: int) -> None:
    mean = {"two_a", "four_b", "full_a"}
    lookup = Lookup(MIXED, MIXED_FEATURES, mean, packed_block(MIXED))
    bags = random_bags(MIXED, MIXED_FEATURES, batch, seed=batch)
    found = lookup(bags)
    assert found.shape == (batch, 20 + 16 + 12 + 8 + 12 + 4 + 20)
    torch.testing.assert_close(found, lookup.oracle(bags), **TOLERANCE)


def test_lookup_reads_the_row_that_was_stored() -> None:
    """Not by way of the oracle: each single id gives its own decoded row, in the order of the features."""
    block = packed_block(MIXED)
    lookup = Lookup(MIXED, MIXED_FEATURES, set(), block)
    rows = {f: (i, t) for i, t in enumerate(MIXED) for f in t.features}
    ids = [(7 * place + 3) % rows[f][1].rows for place, f in enumerate(MIXED_FEATURES)]
    expected = [
        dequantize_rows(table_view(block, MIXED, rows[f][0])[[i]], rows[f][1].dim, rows[f][1].bits)
        for f, i in zip(MIXED_FEATURES, ids, strict=True)
    ]
    found = lookup(ids_of(ids, [1] * len(ids), MIXED_FEATURES))
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-6, atol=1e-7)


def test_lookup_of_a_shared_table_gives_both_features_the_same_row(small: Lookup) -> None:
    found = small(ids_of([4, 0, 4, 0], [1, 1, 1, 1], ["f", "g"]))
    assert torch.equal(found[:, :8], found[:, 8:])
    assert not torch.equal(found[0], found[1])


def test_lookup_pools_sum_and_mean_over_a_bag() -> None:
    tables = [PackedTable("t", 5, 8, 32, ("f", "g"))]
    block = packed_block(tables)
    rows = dequantize_rows(table_view(block, tables, 0), 8, 32)
    found = Lookup(tables, ["f", "g"], {"g"}, block)(ids_of([1, 2, 2, 1, 2, 2], [3, 3], ["f", "g"]))
    total = rows[1] + 2 * rows[2]
    torch.testing.assert_close(found, torch.cat([total, total / 3])[None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean", [set(), {"f"}, {"f", "g"}])
def test_lookup_of_empty_bags_is_zero(mean: set[str]) -> None:
    tables = [PackedTable("t", 5, 8, 8, ("f",)), PackedTable("u", 5, 8, 2, ("g",))]
    lookup = Lookup(tables, ["f", "g"], mean, packed_block(tables))
    empty = ids_of([], [0, 0, 0, 0], ["f", "g"])
    assert torch.equal(lookup(empty), torch.zeros(2, 16))
    assert torch.equal(lookup.oracle(empty), torch.zeros(2, 16))
    some = ids_of([1, 2, 3], [0, 2, 1, 0], ["f", "g"])  # f: [], [1, 2]; g: [3], []
    found = lookup(some)
    assert torch.equal(found[0, :8], torch.zeros(8))
    assert torch.equal(found[1, 8:], torch.zeros(8))
    assert found[1, :8].abs().max() > 0
    torch.testing.assert_close(found, lookup.oracle(some), **TOLERANCE)


@pytest.mark.parametrize("bad", [5, 6, 1000, 2**31 - 1, -2, -1000])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("mean", [set(), {"f", "g"}])
def test_lookup_refuses_ids_outside_and_leaves_them_as_they_were(bad: int, dtype: torch.dtype, mean: set[str]) -> None:
    tables = [PackedTable("t", 5, 8, 8, ("f", "g"))]
    lookup = Lookup(tables, ["f", "g"], mean, packed_block(tables))
    values = torch.tensor([1, bad, 3, 0], dtype=dtype)
    before = values.clone()
    bags = KeyedJaggedTensor(keys=["f", "g"], values=values, lengths=torch.tensor([2, 0, 1, 1]), stride=2)
    with pytest.raises(RuntimeError):
        lookup(bags)
    assert torch.equal(values, before)


def test_lookup_refuses_minus_one(small: Lookup) -> None:
    with pytest.raises(RuntimeError):
        small(ids_of([-1, 0], [1, 1], ["f", "g"]))


def test_lookup_refuses_ids_beyond_32_bits(small: Lookup) -> None:
    with pytest.raises(RuntimeError):
        small(ids_of([2**32 + 3, 0], [1, 1], ["f", "g"]))


def test_lookup_leaves_good_ids_as_they_were(small: Lookup) -> None:
    bags = random_bags(small.tables, ["f", "g"], 9)
    before = bags.values().clone()
    small(bags)
    assert torch.equal(bags.values(), before)


def test_lookup_refuses_a_block_of_another_size() -> None:
    block = packed_block(MIXED)
    with pytest.raises(AssertionError, match=f"block of {block.numel() - 1} bytes, tables need {block.numel()}"):
        Lookup(MIXED, MIXED_FEATURES, set(), block[:-1])


def test_table_offsets_are_aligned_and_do_not_overlap() -> None:
    offsets, size = table_offsets(MIXED)
    ends = [*offsets[1:], size]
    assert offsets[0] == 0
    for table, first, end in zip(MIXED, offsets, ends, strict=True):
        assert first % TABLE_ALIGNMENT == 0
        assert table.bytes == table.rows * row_bytes(table.dim, table.bits)
        assert table.bytes <= end - first < table.bytes + TABLE_ALIGNMENT


def test_table_view_writes_into_the_block() -> None:
    block = torch.zeros(table_offsets(MIXED)[1], dtype=torch.uint8)
    for index in range(len(MIXED)):
        table_view(block, MIXED, index).fill_(index + 1)
    for index, table in enumerate(MIXED):
        assert int((block == index + 1).sum()) == table.bytes


def test_lookup_of_a_mapped_file_equals_that_of_memory(tmp_path: Path) -> None:
    block = packed_block(MIXED)
    path = tmp_path / "tables.bin"
    path.write_bytes(block.numpy().tobytes())
    mapped = map_block(path, block.numel())
    assert torch.equal(mapped, block)
    bags = random_bags(MIXED, MIXED_FEATURES, 20)
    mean = {"two_a", "full_b"}
    from_file = Lookup(MIXED, MIXED_FEATURES, mean, mapped)(bags)
    assert torch.equal(from_file, Lookup(MIXED, MIXED_FEATURES, mean, block)(bags))
    path.chmod(0o444)
    assert torch.equal(map_block(path, block.numel()), block)  # a file that nobody may write is enough


def test_mapped_block_cannot_be_written(tmp_path: Path) -> None:
    """A child writes into the mapping: the system ends it, or the file stays as it was."""
    path = tmp_path / "tables.bin"
    path.write_bytes(bytes(range(256)))
    mapped = map_block(path, 256)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            mapped.numpy()[0] = 77
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    refused = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)
    assert path.read_bytes() == bytes(range(256))
    assert refused or int(mapped[0]) == 0


def test_map_block_needs_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "tables.bin"
    path.write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="mmap length is greater"):
        map_block(path, 200)
