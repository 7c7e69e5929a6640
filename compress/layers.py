"""Linear layers of fewer bits: what runs, and beside it what it should compute.

    Int8Linear     per-channel int8 weights, one fixed scale for the inputs; products in oneDNN
    RowInt8Linear  the same weights, a scale for each input row
    Bf16Linear     bf16 weights and inputs

None takes a scale over a batch, so a score does not depend on what it was batched with. Each reads a plain tensor or a
`SplitInput`; with fixed scales the request's columns are multiplied once, exactly. While a graph is exported to ONNX,
and under `oracle`, an Int8Linear rounds its inputs and multiplies in fp32: the slow twin, which ONNX Runtime fuses.

Legend: B batch, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.shared import SplitInput, pick_columns

CODE_MAX = 127
INPUT_MAX = 255


@torch.jit.script  # a trace cannot record the empty list of the operator's arguments
def onednn_linear(
    codes_BI: Tensor,
    scale: float,
    zero: int,
    packed: Tensor,
    scale_O: Tensor,
    zeros_O: Tensor,
    bias_O: Tensor,
    out_scale: float,
    out_zero: int,
    out_type: int | None,
    after: str,
) -> Tensor:
    """oneDNN's product of uint8 inputs and int8 weights; bias, ReLU and rounding of the result in the same pass."""
    nothing = torch.jit.annotate(list[int | float | complex | None], [])
    return torch.ops.onednn.qlinear_pointwise(
        codes_BI, scale, zero, packed, scale_O, zeros_O, bias_O, out_scale, out_zero, out_type, after, nothing, ""
    )


class Int8Weights(nn.Module):
    """Weights (O, I) int8 with a scale for each output, and a bias."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        self.register_buffer("codes", torch.zeros(n_out, n_in, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(n_out))
        self.register_buffer("bias", torch.zeros(n_out))


class Int8Linear(Int8Weights):
    """y = relu?(x W' + b) with W int8 by output and x uint8 by one calibrated scale.

    `emit` holds the scale and zero point of the layer that reads this one: it then gives codes (B, O) uint8.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("in_scale", torch.ones(()))
        self.register_buffer("in_zero", torch.zeros((), dtype=torch.int32))
        self.relu = False
        self.emit: tuple[float, int] | None = None
        self.oracle = False
        self.packed: dict[tuple[int, ...] | None, str] = {}  # columns -> the buffer that holds them packed
        self.register_buffer("zeros", torch.zeros(n_out, dtype=torch.int64), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """All but what is packed, which belongs to a process: it is packed again where it is used."""
        packed = set(self.packed.values())
        buffers = {name: b for name, b in self._buffers.items() if name not in packed}
        passing = self._non_persistent_buffers_set - packed
        return {**self.__dict__, "packed": {}, "_buffers": buffers, "_non_persistent_buffers_set": passing}

    @property
    def rounding(self) -> tuple[float, int]:
        """Scale and zero point of the inputs."""
        return float(self.in_scale), int(self.in_zero)

    @property
    def weight(self) -> Tensor:
        """The weight (O, I) fp32 that the codes stand for."""
        return self.codes * self.scale.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) fp32 or codes uint8 -> (..., O) fp32, or codes uint8 where `emit` is set."""
        if not isinstance(x, SplitInput):
            return self._last(x, None, self.bias)
        if len(x.blocks) == 1:
            return SplitInput([self._last(x.blocks[0], None, self.bias)], x.like)
        request, columns, items, item_columns = x.sides()
        bias = self.bias
        if request is not None and items is not None:
            bias = self._product(request, columns, bias, last=False).squeeze(0)
        one_side = items if items is not None else request
        assert one_side is not None
        wanted = item_columns if items is not None else columns
        return SplitInput([self._last(one_side, wanted, bias)], x.like)

    def _last(self, x: Tensor, columns: list[int] | None, bias: Tensor) -> Tensor:
        flat = x.flatten(0, -2) if x.dim() > 2 else x
        y = self._product(flat, columns, bias, last=True)
        return y.view(*x.shape[:-1], self.out_features) if x.dim() > 2 else y

    def _product(self, x: Tensor, columns: list[int] | None, bias: Tensor, last: bool) -> Tensor:
        if self.oracle or torch.onnx.is_in_onnx_export():
            return self._rounded_product(x, columns, bias, last)
        scale, zero = self.rounding
        codes = x if x.dtype == torch.uint8 else to_codes(x, scale, zero)
        emit = self.emit if last else None
        out_scale, out_zero = emit or (1.0, 0)
        packed = self._pack(columns)
        kind = torch.float32 if emit is None else torch.uint8
        after = "relu" if self.relu and last else "none"
        return onednn_linear(codes, scale, zero, packed, self.scale, self.zeros, bias, out_scale, out_zero, kind, after)

    def _pack(self, columns: list[int] | None) -> Tensor:
        """The codes of some columns in oneDNN's layout. A buffer, for a traced graph holds no such constant."""
        key = None if columns is None else tuple(columns)
        if key not in self.packed:
            codes = self.codes if columns is None else pick_columns(self.codes, columns)
            self.packed[key] = f"packed_{len(self.packed)}"
            self.register_buffer(self.packed[key], torch.ops.onednn.qlinear_prepack(codes, None), persistent=False)
        return self.get_buffer(self.packed[key])

    def _rounded_product(self, x: Tensor, columns: list[int] | None, bias: Tensor, last: bool) -> Tensor:
        """The slow twin. Written so that ONNX Runtime makes one integer product of it."""
        x = torch.fake_quantize_per_tensor_affine(x, *self.rounding, 0, INPUT_MAX)
        weight = self.weight if columns is None else pick_columns(self.weight, columns)
        zeros = torch.zeros(self.out_features, dtype=torch.int32)
        if self.emit is not None and bias is self.bias:
            y = F.linear(x, torch.fake_quantize_per_channel_affine(weight, self.scale, zeros, 0, -128, 127), bias)
        else:  # the pattern that becomes MatMulIntegerToFloat
            turned = weight.t().contiguous()
            y = torch.matmul(x, torch.fake_quantize_per_channel_affine(turned, self.scale, zeros, 1, -128, 127)) + bias
        return y.relu() if self.relu and last else y


def to_codes(x: Tensor, scale: float, zero: int) -> Tensor:
    """Codes uint8 of inputs, rounded half to even as oneDNN and ONNX do."""
    return x.mul(1.0 / scale).round_().add_(zero).clamp_(0, INPUT_MAX).to(torch.uint8)


class RowInt8Linear(Int8Weights):
    """y = x W' + b with W int8 by output, and x int8 by a scale of its own row."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) fp32. A row's scale spans all its columns, so nothing of it is shared."""
        if isinstance(x, SplitInput):
            return self(x.whole()) if len(x.blocks) > 1 else SplitInput([self(x.blocks[0])], x.like)
        flat = x.reshape(-1, self.in_features)
        scale_B1 = (flat.abs().amax(1, keepdim=True) / CODE_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (flat / scale_B1).round_().to(torch.int8)
        sums = torch._int_mm(codes, self.codes.t()).float()
        return torch.addcmul(self.bias, sums.mul_(scale_B1), self.scale).view(*x.shape[:-1], self.out_features)


class Bf16Linear(nn.Module):
    """y = x W' + b in bf16, sums in fp32, the result rounded to bf16 and given as fp32."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        self.register_buffer("weight", torch.zeros(n_out, n_in, dtype=torch.bfloat16))
        self.register_buffer("bias", torch.zeros(n_out, dtype=torch.bfloat16) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) fp32. The rounded sum spans all columns, so nothing of it is shared."""
        if isinstance(x, SplitInput):
            return self(x.whole()) if len(x.blocks) > 1 else SplitInput([self(x.blocks[0])], x.like)
        return F.linear(x.to(torch.bfloat16), self.weight, self.bias).float()


QUANTIZED = (Int8Linear, RowInt8Linear, Bf16Linear)


def fuse_chains(head: nn.Module) -> None:
    """Let each Int8Linear of a Sequential take the ReLU that follows it, and hand codes to the int8 layer after that.

    In place; parameters and their names stay.
    """
    for sequence in [m for m in head.modules() if isinstance(m, nn.Sequential)]:
        names = [name for name, m in sequence.named_children() if not isinstance(m, nn.Identity)]
        layers = [getattr(sequence, name) for name in names]
        for at, layer in enumerate(layers[:-1]):
            if isinstance(layer, Int8Linear) and isinstance(layers[at + 1], nn.ReLU):
                layer.relu = True
                setattr(sequence, names[at + 1], nn.Identity())
                after = layers[at + 2] if at + 2 < len(layers) else None
                layer.emit = after.rounding if isinstance(after, Int8Linear) else None
