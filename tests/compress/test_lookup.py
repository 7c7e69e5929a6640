"""compress/lookup.py: the TBE against its plain-torch twin, bounds, and the mapped file."""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

import pytest
import torch
from compress_builders import packed_block, random_bags, random_rows, stored
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from compress.lookup import TABLE_ALIGNMENT, Lookup, StoredTable, map_block, pieces_of, tier_views
from compress.methods.codec import dequantize_rows, row_bytes

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
MIXED = [
    stored("two", 40, 16, 2, ("two_a",)),
    stored("four", 31, 12, 4, ("four_a", "four_b")),
    stored("eight", 1, 4, 8, ("eight_a",)),
    stored("half", 17, 8, 16, ("half_a",)),
    stored("full", 23, 20, 32, ("full_a", "full_b")),
]
TIERED = [
    stored("one", 30, 16, 8, ("one_a", "one_b")),
    stored("two_tiers", (3, 40), 8, (8, 2), ("pair_a",)),
    stored("three", (1, 20, 9), 16, (16, 8, 4), ("three_a", "three_b", "three_c")),
    stored("four_tiers", (5, 6, 1, 50), 16, (32, 8, 4, 2), ("four_t",)),
    stored("all", (2, 2, 3, 4, 5), 8, (32, 16, 8, 4, 2), ("all_a",)),
]
TIERED_FEATURES = ["three_b", "one_a", "all_a", "pair_a", "three_a", "four_t", "one_b", "three_c"]
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
    tables = [stored("t", 5, 8, 8, ("f", "g"))]
    return Lookup(tables, ["f", "g"], set(), packed_block(tables))


@pytest.mark.parametrize(
    ("bits", "dim"), [(2, 8), (2, 64), (4, 4), (4, 12), (8, 4), (8, 64), (16, 4), (16, 20), (32, 4), (32, 64)]
)
@pytest.mark.parametrize("mean", [False, True])
def test_lookup_equals_its_oracle(bits: int, dim: int, mean: bool) -> None:
    tables = [stored("t", 50, dim, bits, ("f",))]
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
        dequantize_rows(tier_views(block, MIXED)[rows[f][0]][0][[i]], rows[f][1].dim, rows[f][1].tiers[0].bits)
        for f, i in zip(MIXED_FEATURES, ids, strict=True)
    ]
    found = lookup(ids_of(ids, [1] * len(ids), MIXED_FEATURES))
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-6, atol=1e-7)


def test_lookup_of_a_shared_table_gives_both_features_the_same_row(small: Lookup) -> None:
    found = small(ids_of([4, 0, 4, 0], [1, 1, 1, 1], ["f", "g"]))
    assert torch.equal(found[:, :8], found[:, 8:])
    assert not torch.equal(found[0], found[1])


def test_lookup_pools_sum_and_mean_over_a_bag() -> None:
    tables = [stored("t", 5, 8, 32, ("f", "g"))]
    block = packed_block(tables)
    rows = dequantize_rows(tier_views(block, tables)[0][0], 8, 32)
    found = Lookup(tables, ["f", "g"], {"g"}, block)(ids_of([1, 2, 2, 1, 2, 2], [3, 3], ["f", "g"]))
    total = rows[1] + 2 * rows[2]
    torch.testing.assert_close(found, torch.cat([total, total / 3])[None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean", [set(), {"f"}, {"f", "g"}])
def test_lookup_of_empty_bags_is_zero(mean: set[str]) -> None:
    tables = [stored("t", 5, 8, 8, ("f",)), stored("u", 5, 8, 2, ("g",))]
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
    tables = [stored("t", 5, 8, 8, ("f", "g"))]
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


def test_pieces_are_aligned_and_do_not_overlap() -> None:
    tables = [*MIXED, *TIERED]
    pieces, size = pieces_of(tables)
    assert [(p.table, p.tier) for p in pieces] == [
        (t, k) for t, table in enumerate(tables) for k in range(len(table.tiers))
    ]
    ends = [*(p.first_byte for p in pieces[1:]), size]
    assert pieces[0].first_byte == 0
    for piece, end in zip(pieces, ends, strict=True):
        table = tables[piece.table]
        tier = table.tiers[piece.tier]
        assert piece.first_byte % TABLE_ALIGNMENT == 0
        assert piece.bytes == tier.rows * row_bytes(table.width, tier.bits)
        assert piece.bytes <= end - piece.first_byte < piece.bytes + TABLE_ALIGNMENT
    for index, table in enumerate(tables):
        assert table.bytes == sum(p.bytes for p in pieces if p.table == index)


def test_tier_views_write_into_the_block() -> None:
    tables = [*MIXED, *TIERED]
    pieces, size = pieces_of(tables)
    block = torch.zeros(size, dtype=torch.uint8)
    for number, view in enumerate(v for views in tier_views(block, tables) for v in views):
        view.fill_(number + 1)
    for number, piece in enumerate(pieces):
        assert int((block == number + 1).sum()) == piece.bytes


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


# -- tiers -----------------------------------------------------------------------------------------------------------


def single(feature: str, row: int, features: list[str]) -> KeyedJaggedTensor:
    """One id for one feature, empty bags for the others."""
    return ids_of([row], [int(f == feature) for f in features], features)


def decoded(tables: list[StoredTable], block: torch.Tensor, index: int) -> torch.Tensor:
    """All rows (N, width) of a table, tier by tier in plain torch."""
    table = tables[index]
    views = tier_views(block, tables)[index]
    return torch.cat([dequantize_rows(v, table.width, t.bits) for v, t in zip(views, table.tiers, strict=True)])


@pytest.mark.parametrize("mean", [set(), {"three_b", "four_t", "one_a"}, set(TIERED_FEATURES)], ids=len)
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_lookup_of_tiers_equals_its_oracle(mean: set[str], batch: int) -> None:
    lookup = Lookup(TIERED, TIERED_FEATURES, mean, packed_block(TIERED))
    bags = random_bags(TIERED, TIERED_FEATURES, batch, seed=batch, longest=9)
    found = lookup(bags)
    assert found.shape == (batch, 16 * 3 + 16 + 8 + 8 + 16 + 16)
    torch.testing.assert_close(found, lookup.oracle(bags), **TOLERANCE)


@pytest.mark.parametrize("bits", [(32, 2), (16, 8), (8, 4), (8, 8), (4, 2), (32, 16, 8, 4), (16, 8, 4, 2)])
def test_lookup_of_like_tiers_equals_its_oracle(bits: tuple[int, ...]) -> None:
    """All tables of one width and number of tiers, which are summed at once."""
    tables = [stored(n, range(3, 3 + len(bits)), 24, bits, (n, f"{n}2")) for n in ("a", "b")]
    lookup = Lookup(tables, ["b", "a2", "a", "b2"], {"a", "b"}, packed_block(tables))
    bags = random_bags(tables, lookup.names, 41, longest=6)
    torch.testing.assert_close(lookup(bags), lookup.oracle(bags), **TOLERANCE)


def test_lookup_of_tiers_reads_each_row_that_was_stored() -> None:
    """Not by way of the oracle: every row of every tier, through every feature, alone in its batch."""
    block = packed_block(TIERED)
    lookup = Lookup(TIERED, TIERED_FEATURES, set(), block)
    widths = {f: t.dim for t in TIERED for f in t.features}
    for index, table in enumerate(TIERED):
        rows = decoded(TIERED, block, index)
        for feature in table.features:
            at = sum(widths[f] for f in TIERED_FEATURES[: TIERED_FEATURES.index(feature)])
            for row in range(table.rows):
                expected = torch.zeros(1, sum(widths[f] for f in TIERED_FEATURES))
                expected[0, at : at + table.dim] = rows[row]
                found = lookup(single(feature, row, TIERED_FEATURES))
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_lookup_of_a_mean_over_tiers_divides_by_the_whole_bag() -> None:
    """Trap 16: a mean by tier would divide by the ids that each of them holds."""
    tables = [stored("t", (2, 3), 8, (32, 32), ("f", "g"))]
    block = packed_block(tables)
    rows = decoded(tables, block, 0)
    bags = ids_of([0, 3, 4, 4, 0, 3, 4, 4], [4, 4], ["f", "g"])
    found = Lookup(tables, ["f", "g"], {"f"}, block)(bags)
    total = rows[0] + rows[3] + 2 * rows[4]
    torch.testing.assert_close(found, torch.cat([total / 4, total])[None], rtol=1e-6, atol=1e-6)


def test_lookup_of_a_tiered_table_gives_its_features_the_same_row() -> None:
    """Trap 1: a remap inside the TBE is taken by physical table, and features of one table read outside it."""
    tables = [stored("t", (2, 3), 8, (8, 4), ("f", "g")), stored("u", 4, 8, 4, ("h",))]
    lookup = Lookup(tables, ["f", "h", "g"], set(), packed_block(tables))
    for row in range(5):
        found = lookup(ids_of([row, 1, row], [1, 1, 1], ["f", "h", "g"]))
        assert torch.equal(found[:, :8], found[:, 16:])
        assert found.abs().max() > 0


@pytest.mark.parametrize("mean", [set(), set(TIERED_FEATURES)], ids=len)
def test_lookup_of_weighted_bags_over_tiers_equals_its_oracle(mean: set[str]) -> None:
    """Weights that ids bring count as they are, also where bags would be pooled by mean."""
    lookup = Lookup(TIERED, TIERED_FEATURES, mean, packed_block(TIERED))
    plain = random_bags(TIERED, TIERED_FEATURES, 23, longest=6)
    weights = torch.randn(len(plain.values()), generator=torch.Generator().manual_seed(1))
    bags = KeyedJaggedTensor(TIERED_FEATURES, plain.values(), weights, plain.lengths(), stride=23)
    torch.testing.assert_close(lookup(bags), lookup.oracle(bags), rtol=1e-4, atol=1e-4)
    ones = KeyedJaggedTensor(TIERED_FEATURES, plain.values(), torch.ones_like(weights), plain.lengths(), stride=23)
    summed = Lookup(TIERED, TIERED_FEATURES, set(), lookup.block)(plain)
    torch.testing.assert_close(lookup(ones), summed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean", [set(), set(TIERED_FEATURES)], ids=len)
def test_lookup_of_empty_bags_over_tiers_is_zero(mean: set[str]) -> None:
    lookup = Lookup(TIERED, TIERED_FEATURES, mean, packed_block(TIERED))
    empty = ids_of([], [0] * 16, TIERED_FEATURES)
    assert torch.equal(lookup(empty), torch.zeros(2, 112))
    assert torch.equal(lookup.oracle(empty), torch.zeros(2, 112))


@pytest.mark.parametrize("feature", TIERED_FEATURES)
@pytest.mark.parametrize("beyond", [0, 1, 1000, 2**31 - 200, -200_000, 2**32])
@pytest.mark.parametrize("mean", [set(), set(TIERED_FEATURES)], ids=len)
def test_lookup_refuses_ids_outside_every_tier(feature: str, beyond: int, mean: set[str]) -> None:
    """The TBE would skip them as ids of another tier, and the bag would be a zero."""
    lookup = Lookup(TIERED, TIERED_FEATURES, mean, packed_block(TIERED))
    rows = {f: t.rows for t in TIERED for f in t.features}
    with pytest.raises(RuntimeError, match="not"):
        lookup(single(feature, rows[feature] + beyond, TIERED_FEATURES))


def test_lookup_of_tiers_leaves_ids_as_they_were() -> None:
    lookup = Lookup(TIERED, TIERED_FEATURES, set(), packed_block(TIERED))
    bags = random_bags(TIERED, TIERED_FEATURES, 9)
    before = bags.values().clone()
    lookup(bags)
    assert torch.equal(bags.values(), before)


def test_lookup_of_a_tier_that_nothing_touches_is_the_same_to_the_digit() -> None:
    """What lets trials leave such tiers out: here the third of five."""
    bits = (32, 16, 8, 4, 2)
    whole = [stored("t", (9, 9, 9, 9, 9), 24, bits, ("f",)), stored("u", (9,), 24, (8,), ("g",))]
    block = packed_block(whole)
    without = [stored("t", (9, 9, 9, 9), 24, (32, 16, 4, 2), ("f",)), whole[1]]
    less = torch.zeros(pieces_of(without)[1], dtype=torch.uint8)
    views = tier_views(block, whole)
    for part, view in zip(tier_views(less, without)[0], [v for i, v in enumerate(views[0]) if i != 2], strict=True):
        part[:] = view
    tier_views(less, without)[1][0][:] = views[1][0]
    bags = random_bags(without, ["f", "g"], 200, longest=12)
    moved = torch.where(bags.values() >= 18, bags.values() + 9, bags.values())
    moved[int(bags["f"].lengths().sum()) :] = bags["g"].values()
    shifted = KeyedJaggedTensor(["f", "g"], moved, lengths=bags.lengths(), stride=200)
    assert torch.equal(Lookup(whole, ["f", "g"], set(), block)(shifted), Lookup(without, ["f", "g"], set(), less)(bags))


# -- decoders --------------------------------------------------------------------------------------------------------


def narrow_tables() -> tuple[list[StoredTable], dict[str, torch.Tensor]]:
    """Tables stored narrower, in one tier and in several, beside plain ones; and what widens them."""
    tables = [
        stored("plain", 20, 16, 8, ("p",)),
        stored("narrow", 30, 16, 4, ("n", "m"), width=8),
        stored("both", (4, 30), 24, (8, 2), ("b", "c"), width=8),
        stored("tiers", (4, 9), 12, (8, 4), ("t",)),
    ]
    return tables, {"narrow": random_rows(8, 16, 3), "both": random_rows(8, 24, 4)}


@pytest.mark.parametrize("mean", [set(), {"n", "c", "t"}], ids=len)
def test_lookup_with_decoders_equals_its_oracle_and_widened_rows(mean: set[str]) -> None:
    tables, decoders = narrow_tables()
    block = packed_block(tables)
    features = ["b", "n", "t", "p", "c", "m"]
    lookup = Lookup(tables, features, mean, block, decoders)
    bags = random_bags(tables, features, 31, longest=5)
    found = lookup(bags)
    assert found.shape == (31, 24 + 16 + 12 + 16 + 24 + 16)
    torch.testing.assert_close(found, lookup.oracle(bags), rtol=1e-4, atol=1e-3)
    wide = decoded(tables, block, 2) @ decoders["both"]
    for row in range(34):
        torch.testing.assert_close(lookup(single("b", row, features))[0, :24], wide[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [None, (16, 8), (8, 12)])
def test_lookup_refuses_narrow_rows_without_what_widens_them(shape: tuple[int, int] | None) -> None:
    tables, decoders = narrow_tables()
    del decoders["narrow"]
    if shape:
        decoders["narrow"] = torch.zeros(shape)
    with pytest.raises(AssertionError, match="narrow: no decoder from 8 to 16"):
        Lookup(tables, ["n"], set(), packed_block(tables), decoders)


@pytest.mark.parametrize("name", ["plain", "narrow", "both", "tiers"])
def test_decoded_rows_are_those_that_single_ids_read(name: str) -> None:
    tables, decoders = narrow_tables()
    features = ["p", "n", "b", "t"]
    lookup = Lookup(tables, features, set(), packed_block(tables), decoders)
    index = [t.name for t in tables].index(name)
    wanted = torch.tensor([tables[index].rows - 1, 0, 3, 3])
    at = sum(t.dim for t in tables[:index])
    expected = [lookup(single(features[index], int(r), features))[0, at : at + tables[index].dim] for r in wanted]
    torch.testing.assert_close(lookup.decoded(index, wanted), torch.stack(expected), rtol=1e-5, atol=1e-4)


# -- squared weights -------------------------------------------------------------------------------------------------


def test_squared_weights_are_the_sums_of_squares_of_each_bag() -> None:
    tables = [stored("t", (2, 3), 8, (8, 4), ("f", "g"))]
    lookup = Lookup(tables, ["f", "g"], {"g"}, packed_block(tables))
    bags = ids_of([0, 1, 4, 2, 2, 1, 0], [2, 0, 1, 4], ["f", "g"])  # f: 2 ids, none; g: 1 id, 4 ids
    torch.testing.assert_close(lookup.squared_weights(bags), torch.tensor([[2.0, 0.0], [1.0, 0.25]]))
    plain = Lookup(tables, ["f", "g"], set(), lookup.block)
    assert plain.squared_weights(bags).tolist() == [[2.0, 0.0], [1.0, 4.0]]
    weights = torch.tensor([0.5, 2.0, 3.0, 1.0, -1.0, 0.0, 2.0])
    weighted = KeyedJaggedTensor(["f", "g"], bags.values(), weights, bags.lengths(), stride=2)
    torch.testing.assert_close(lookup.squared_weights(weighted), torch.tensor([[4.25, 0.0], [9.0, 6.0]]))
