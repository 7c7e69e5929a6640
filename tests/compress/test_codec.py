"""compress/methods/codec.py: bytes against the plain-torch twin, round trips, layout, refusals.

Legend: N rows, D embedding dim, W bytes of a row.
"""

from __future__ import annotations

import pytest
import torch
from compress_builders import random_rows, stored
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from compress.errors import PlanError
from compress.lookup import Lookup, pieces_of, tier_views
from compress.methods import codec
from compress.methods.codec import Clip, dequantize_rows, quantize_rows, quantize_rows_oracle, row_bytes
from compress.peers import greedy_rows

CLIPS: tuple[Clip, Clip] = ("search", "minmax")

PACKABLE = [
    (bits, dim)
    for bits, dims in {
        2: (8, 16, 24, 64),
        4: (4, 8, 12, 20, 64),
        8: (4, 6, 16, 64),
        16: (4, 5, 64),
        32: (4, 7, 64),
    }.items()
    for dim in dims
]
QUANTIZED = [(bits, dim) for bits, dim in PACKABLE if bits <= 8]


def special_rows(dim: int) -> dict[str, torch.Tensor]:
    """Rows that break careless codecs, each (1, D)."""
    line = torch.linspace(-1, 1, dim)[None]
    spike = torch.zeros(1, dim)
    spike[0, dim // 2] = 3.0
    return {
        "zero": torch.zeros(1, dim),
        "constant": torch.full((1, dim), 0.37),
        "negative constant": torch.full((1, dim), -2.5),
        "negative": line - 5.0,
        "huge": line * 6.5e4,
        "small": line * 1e-5,
        "tiny": line * 1e-8,
        "spike": spike,
        "offset": line * 1e-3 + 100.0,
    }


def allowed_error(coded_NW: torch.Tensor, rows_ND: torch.Tensor) -> torch.Tensor:
    """Half of each row's stored step, and the last digit of fp32."""
    scale = coded_NW[:, :2].contiguous().view(torch.float16).double()[:, 0]
    return 0.5 * scale + rows_ND.double().abs().amax(1) * 2.0**-22


@pytest.mark.parametrize(("bits", "dim"), PACKABLE)
def test_codec_bytes_equal_the_oracle(bits: int, dim: int) -> None:
    rows = random_rows(300, dim, seed=dim)
    assert torch.equal(quantize_rows(rows, bits), quantize_rows_oracle(rows, bits))


@pytest.mark.parametrize(("bits", "dim"), PACKABLE)
def test_codec_special_rows_decode_as_the_oracle(bits: int, dim: int) -> None:
    for name, row in special_rows(dim).items():
        found = dequantize_rows(quantize_rows(row, bits), dim, bits)
        expected = dequantize_rows(quantize_rows_oracle(row, bits), dim, bits)
        assert torch.isfinite(found).all(), name
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(("bits", "dim"), QUANTIZED)
def test_codec_minmax_is_within_half_the_stored_step_whatever_the_size(bits: int, dim: int) -> None:
    rows = torch.cat([random_rows(300, dim, seed=1), *special_rows(dim).values()])
    coded = quantize_rows(rows, bits)
    error = (dequantize_rows(coded, dim, bits) - rows).double().abs().amax(1)
    assert (error <= allowed_error(coded, rows)).all()


@pytest.mark.parametrize("sigma", [1e-8, 1e-7, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("clip", ["minmax", "search"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codec_small_rows_keep_their_values(bits: int, clip: Clip, sigma: float) -> None:
    """FBGEMM's own quantizer is off by 257% at 8 bits and sigma 1e-6, where the fp16 scale underflows."""
    rows = torch.randn((200, 64), generator=torch.Generator().manual_seed(0)) * sigma
    error = (dequantize_rows(quantize_rows(rows, bits, clip), 64, bits) - rows).abs().amax(1)
    step = (rows.amax(1) - rows.amin(1)) / (2**bits - 1)
    if clip == "minmax":
        assert (error <= 0.5 * step * (1 + 2.0**-9) + 2.0**-24).all()
    assert float(error.max()) < max(4 * sigma, 2.0**-24)


def test_codec_rows_far_from_zero_keep_their_differences() -> None:
    rows = torch.rand((50, 16), generator=torch.Generator().manual_seed(0)) * 1e-3 + 100.0
    error = (dequantize_rows(quantize_rows(rows, 8), 16, 8) - rows).abs().max()
    assert float(error) < 0.07 / 255  # fp16 numbers about 100 are .0625 apart


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codec_minmax_costs_next_to_nothing_against_the_fbgemm_quantizer(bits: int) -> None:
    rows = random_rows(500, 32, seed=5)
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, bits)
    theirs = torch.cat([fused[:, -4:], fused[:, :-4]], dim=1)
    ours = quantize_rows(rows, bits)
    assert theirs.shape == ours.shape
    error_ours, error_theirs = (float((dequantize_rows(c, 32, bits) - rows).norm()) for c in (ours, theirs))
    assert error_ours <= error_theirs * (1.005 if bits == 8 else 1.001)


# -- the search ------------------------------------------------------------------------------------------------------


def drawn(shape: tuple[int, int], law: str) -> torch.Tensor:
    """Gaussian or Laplace rows."""
    generator = torch.Generator().manual_seed(3)
    if law == "gaussian":
        return torch.randn(shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return torch.empty(shape).exponential_(generator=generator) * sign


def relative_rmse(rows_ND: torch.Tensor, bits: int, coded_NW: torch.Tensor) -> float:
    """Root of the squared error's share of the squared norm."""
    return float((dequantize_rows(coded_NW, rows_ND.shape[1], bits) - rows_ND).norm() / rows_ND.norm())


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
@pytest.mark.parametrize(("bits", "dim"), [(2, 16), (4, 16), (8, 16), (2, 64), (4, 64)])
def test_codec_search_comes_within_a_hundredth_of_the_full_grid(bits: int, dim: int, law: str) -> None:
    rows = drawn((24, dim), law)
    found = relative_rmse(rows, bits, quantize_rows(rows, bits, "search"))
    grid = relative_rmse(rows, bits, quantize_rows_oracle(rows, bits, "search"))
    assert found <= grid * (1.1 if bits == 8 else 1.01)


@pytest.mark.parametrize(("bits", "mark"), [(2, 0.320), (4, 0.0815)])
def test_codec_search_reaches_its_mark_on_gaussian_rows(bits: int, mark: float) -> None:
    rows = drawn((4000, 64), "gaussian")
    assert relative_rmse(rows, bits, quantize_rows(rows, bits, "search")) < mark
    assert relative_rmse(rows, bits, quantize_rows(rows, bits)) > 1.09 * mark


@pytest.mark.parametrize(("bits", "dim"), QUANTIZED)
def test_codec_search_is_never_worse_than_minmax_for_any_row(bits: int, dim: int) -> None:
    rows = torch.cat([random_rows(700, dim, seed=4), *special_rows(dim).values()])
    found, plain = (dequantize_rows(quantize_rows(rows, bits, c), dim, bits).double() - rows for c in CLIPS)
    assert torch.isfinite(found).all()
    assert (found.square().sum(1) <= plain.square().sum(1)).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_codec_search_weighs_columns(bits: int) -> None:
    rows = drawn((500, 16), "laplace")
    weight = torch.cat([torch.full((4,), 20.0), torch.ones(12)])
    weighted, even = (quantize_rows(rows, bits, "search", w) for w in (weight, None))

    def error(coded: torch.Tensor) -> torch.Tensor:
        return ((dequantize_rows(coded, 16, bits) - rows).square() * weight).sum(1)

    assert float(error(weighted).sum()) < 0.9 * float(error(even).sum())
    assert (error(weighted) <= error(quantize_rows(rows, bits)) * (1 + 1e-5)).all()
    assert torch.equal(quantize_rows(rows, bits, "search", torch.full((16,), 7.0)), even)
    assert torch.equal(quantize_rows(rows, bits, "search", torch.zeros(16)), even)


@pytest.mark.parametrize("weight", [torch.ones(15), torch.full((16,), -1.0), torch.full((16,), float("nan"))])
def test_codec_refuses_column_weights_that_are_none(weight: torch.Tensor) -> None:
    with pytest.raises(PlanError, match="column weights"):
        quantize_rows(random_rows(3, 16), 4, "search", weight)


# -- what cannot be coded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_codec_refuses_rows_that_are_not_finite(bits: int, value: float) -> None:
    rows = random_rows(9000, 8)
    rows[5000, 3] = value
    with pytest.raises(PlanError, match="row 5000 holds NaN or infinity"):
        quantize_rows(rows, bits)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("value", [65505.0, -1e5, 1e30])
def test_codec_refuses_values_beyond_fp16(bits: int, value: float) -> None:
    rows = random_rows(50, 8)
    rows[20, 1] = value
    with pytest.raises(PlanError, match="row 20 .* use 32 bits"):
        quantize_rows(rows, bits)
    assert torch.equal(dequantize_rows(quantize_rows(rows, 32), 8, 32), rows)


@pytest.mark.parametrize("clip", ["minmax", "search"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codec_takes_the_whole_range_of_fp16(bits: int, clip: Clip) -> None:
    rows = torch.tensor([[-65504.0, 65504.0] * 4, [65504.0] * 8, [-65504.0] * 8, [65503.9, 65480.0] * 4])
    coded = quantize_rows(rows, bits, clip)
    error = (dequantize_rows(coded, 8, bits) - rows).abs().amax(1)
    assert (error <= 0.51 * torch.tensor([131008, 0, 0, 32]) / (2**bits - 1)).all()


def test_codec_refuses_an_unknown_clip() -> None:
    with pytest.raises(PlanError, match="clip 'greedy'"):
        quantize_rows(random_rows(2, 8), 4, "greedy")  # type: ignore[arg-type]


# -- decoding by the TBE that serves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["minmax", "search"])
@pytest.mark.parametrize(("bits", "dim"), [(2, 8), (2, 24), (4, 12), (8, 16), (16, 16)])
def test_codec_rows_read_by_the_tbe_are_those_decoded_here(bits: int, dim: int, clip: Clip) -> None:
    small = [random_rows(20, dim, seed=6) * 10.0**-power for power in range(2, 9)]
    rows = torch.cat([random_rows(100, dim, seed=6), *special_rows(dim).values(), *small])
    coded = quantize_rows(rows, bits, clip)
    table = stored("t", len(rows), dim, bits, ("f",))
    block = torch.zeros(pieces_of([table])[1], dtype=torch.uint8)
    tier_views(block, [table])[0][0][:] = coded
    ids = KeyedJaggedTensor(keys=["f"], values=torch.arange(len(rows)), lengths=torch.ones(len(rows)).int())
    found = Lookup([table], ["f"], set(), block)(ids)
    expected = dequantize_rows(coded, dim, bits)
    # the TBE may fuse the product and the sum: one rounding of the largest term apart
    assert ((found - expected).abs() <= 2.0**-22 * expected.abs().amax(1, keepdim=True)).all()
    assert torch.equal(found != 0, expected != 0)


# -- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codec_reaches_half_a_step(bits: int) -> None:
    """The bound above is not slack: the worst value is off by about half a step."""
    rows = torch.rand((200, 64), generator=torch.Generator().manual_seed(0))
    error = (dequantize_rows(quantize_rows(rows, bits), 64, bits) - rows).abs().amax()
    step = 1.0 / (2**bits - 1)
    assert 0.45 * step < error < 0.56 * step + 1e-3


def test_codec_fp32_is_lossless_and_fp16_is_a_cast() -> None:
    rows = random_rows(50, 12)
    assert torch.equal(dequantize_rows(quantize_rows(rows, 32), 12, 32), rows)
    assert torch.equal(dequantize_rows(quantize_rows(rows, 16), 12, 16), rows.half().float())


def test_codec_more_bits_mean_less_error() -> None:
    rows = random_rows(200, 16)
    errors = [float((dequantize_rows(quantize_rows(rows, b), 16, b) - rows).norm()) for b in (2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0 == errors[-1]


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_codec_one_row_and_no_row(bits: int) -> None:
    row = random_rows(1, 16)
    assert torch.equal(quantize_rows(row, bits), quantize_rows_oracle(row, bits))
    none = quantize_rows(row[:0], bits)
    assert none.shape == (0, row_bytes(16, bits))
    assert none.dtype == torch.uint8


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codec_puts_scale_and_bias_first(bits: int) -> None:
    levels = 2**bits - 1
    row = torch.zeros(1, 16)
    row[0, 3] = levels * 0.5  # so that the step is .5
    row -= 2.0  # and the bias -2
    coded = quantize_rows(row, bits)
    assert coded[:, :4].view(torch.float16).tolist() == [[0.5, -2.0]]
    place = 3 * bits
    codes = torch.zeros(16 * bits // 8, dtype=torch.uint8)
    codes[place // 8] = levels << (place % 8)
    assert torch.equal(coded[0, 4:], codes)


@pytest.mark.parametrize(
    ("dim", "bits", "expected"), [(16, 2, 8), (16, 4, 12), (16, 8, 20), (16, 16, 32), (16, 32, 64), (12, 4, 10)]
)
def test_row_bytes_counts_scale_and_bias(dim: int, bits: int, expected: int) -> None:
    assert row_bytes(dim, bits) == expected
    assert quantize_rows(random_rows(3, dim), bits).shape == (3, expected)


@pytest.mark.parametrize(("bits", "dim"), [(2, 4), (2, 12), (4, 6), (4, 10), (8, 5)])
def test_codec_refuses_dims_that_do_not_pack(bits: int, dim: int) -> None:
    with pytest.raises(PlanError, match=rf"embedding_dim {dim} .*INT{bits}"):
        row_bytes(dim, bits)
    with pytest.raises(PlanError, match=rf"embedding_dim {dim} .*INT{bits}"):
        quantize_rows(random_rows(2, dim), bits)


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 7, 64])
def test_codec_refuses_unknown_bits(bits: int) -> None:
    with pytest.raises(PlanError, match=f"bits {bits}"):
        quantize_rows(random_rows(2, 16), bits)


@pytest.mark.parametrize("clip", ["minmax", "search"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_codec_in_chunks_equals_whole(bits: int, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(1001, 16)
    whole = quantize_rows(rows, bits, clip)
    monkeypatch.setattr(codec, "CHUNK_ROWS", 70)
    assert torch.equal(quantize_rows(rows, bits, clip), whole)


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_codec_leaves_its_input_alone_and_takes_strides(bits: int) -> None:
    wide = random_rows(20, 32)
    before = wide.clone()
    view = wide[::2, ::2]
    coded = quantize_rows(view, bits)
    assert torch.equal(coded, quantize_rows(view.clone(), bits))
    coded.fill_(0)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("clip", ["minmax", "search"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codec_rows_depend_on_themselves_alone(bits: int, clip: Clip) -> None:
    rows = random_rows(3000, 16)
    some = torch.randperm(3000, generator=torch.Generator().manual_seed(1))[:77]
    assert torch.equal(quantize_rows(rows, bits, clip)[some], quantize_rows(rows[some], bits, clip))


# -- the peer of the benchmarks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_greedy_rows_decode_as_torch_decodes_them(bits: int) -> None:
    rows = drawn((50, 16), "laplace")
    coded = greedy_rows(rows, bits)
    name = f"embedding_bag_{bits}bit"
    theirs = getattr(torch.ops.quantized, f"{name}_prepack")(rows, optimized_qparams=True)
    expected = getattr(torch.ops.quantized, f"{name}_unpack")(theirs)
    assert torch.allclose(dequantize_rows(coded, 16, bits), expected, atol=1e-6)
    assert relative_rmse(rows, bits, coded) < relative_rmse(rows, bits, quantize_rows(rows, bits))
