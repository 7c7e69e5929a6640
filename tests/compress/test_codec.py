"""compress/methods/codec.py: bytes against the plain-torch twin, round trips, layout, refusals.

Legend: N rows, D embedding dim, W bytes of a row.
"""

from __future__ import annotations

import pytest
import torch
from compress_builders import random_rows

from compress.errors import PlanError
from compress.methods import codec
from compress.methods.codec import dequantize_rows, quantize_rows, quantize_rows_oracle, row_bytes

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
        "huge": line * 6e4,
        "small": line * 1e-5,
        "tiny": line * 1e-8,
        "spike": spike,
        "offset": line * 1e-3 + 100.0,
    }


def allowed_error(rows_ND: torch.Tensor, bits: int) -> torch.Tensor:  # noqa: N803
    """What a row's values may be off by: half a step, and what rounding scale and bias to fp16 can add."""
    rows = rows_ND.double()
    low, levels = rows.amin(1), 2**bits - 1
    step = (rows.amax(1) - low) / levels

    def fp16(x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x.abs() * 2.0**-11, min=2.0**-25)  # half a last digit, normal or subnormal

    bias = fp16(low)
    scale = fp16(step + bias / levels)
    return 0.5 * (step + scale) + levels * scale + 2 * bias + rows.abs().amax(1) * 2.0**-22


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
def test_codec_round_trip_is_within_half_a_step(bits: int, dim: int) -> None:
    rows = torch.cat([random_rows(300, dim, seed=1), *special_rows(dim).values()])
    error = (dequantize_rows(quantize_rows(rows, bits), dim, bits) - rows).double().abs().amax(1)
    assert (error <= allowed_error(rows, bits)).all()


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


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_codec_in_chunks_equals_whole(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(101, 16)
    whole = quantize_rows(rows, bits)
    monkeypatch.setattr(codec, "CHUNK_ROWS", 7)
    assert torch.equal(quantize_rows(rows, bits), whole)


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_codec_leaves_its_input_alone_and_takes_strides(bits: int) -> None:
    wide = random_rows(20, 32)
    before = wide.clone()
    view = wide[::2, ::2]
    coded = quantize_rows(view, bits)
    assert torch.equal(coded, quantize_rows(view.clone(), bits))
    coded.fill_(0)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codec_rows_depend_on_themselves_alone(bits: int) -> None:
    rows = random_rows(40, 16)
    some = torch.tensor([3, 17, 31])
    assert torch.equal(quantize_rows(rows, bits)[some], quantize_rows(rows[some], bits))
