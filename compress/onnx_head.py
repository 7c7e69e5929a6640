"""A dense part that was exported as ONNX: data, run by ONNX Runtime, where a model's head is none of ours.

In a checkpoint and an artifact it is one tensor of bytes under the name ONNX_HEAD, beside no other.

Legend: B batch, I dense inputs, L sum of the lookups' widths, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from compress.errors import ArtifactError
from trainer.config import RunConfig
from trainer.data.transform import Transform
from trainer.models import build_head

ONNX_HEAD = "onnx"
STEP = 1e-2  # of the numeric derivative: of the size of a looked-up value, so that fp32 keeps about four digits


class OnnxHead(nn.Module):
    """(dense (B, I), looked up (B, L)) -> logits (B, T), by an ONNX model whose inputs come in that order.

    Its derivative in the looked-up embeddings is taken numerically (2 L passes), which is enough for sensitivities.
    Raises: ArtifactError when the bytes are no such model, or name weights that lie outside of them.
    """

    def __init__(self, content: Tensor) -> None:
        super().__init__()
        self.register_buffer(ONNX_HEAD, content)
        data = content.numpy().tobytes()
        check_onnx(data, "head")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no other base
            reason = str(error).splitlines()[0][:200]
            raise ArtifactError(f"head: not a model that ONNX Runtime reads: {reason}") from None
        self.inputs = [i.name for i in self.session.get_inputs()]
        if len(self.inputs) != 2 or len(self.session.get_outputs()) != 1:
            raise ArtifactError(
                f"head: takes {self.inputs}: export it with inputs (dense, looked up) and output logits"
            )

    def forward(self, dense_BI: Tensor, looked_up_BL: Tensor) -> Tensor:
        """Logits (B, T) float32."""
        return _Logits.apply(dense_BI, looked_up_BL, self)

    def run(self, dense_BI: Tensor, looked_up_BL: Tensor) -> Tensor:
        """The same without a derivative. Raises: ArtifactError when the result is not (B, T) float32."""
        values = [t.detach().contiguous().numpy() for t in (dense_BI, looked_up_BL)]
        try:
            logits = self.session.run(None, dict(zip(self.inputs, values, strict=True)))[0]
        except Exception as error:  # as above
            raise ArtifactError(f"head: ONNX Runtime cannot run it: {str(error).splitlines()[0][:200]}") from None
        if logits.ndim != 2 or len(logits) != len(dense_BI) or logits.dtype != np.float32:
            raise ArtifactError(f"head: gives {logits.dtype} {logits.shape}: export it with logits (B, T) float32")
        return torch.from_numpy(logits)


class _Logits(torch.autograd.Function):
    """An OnnxHead's logits, and central differences as their derivative."""

    @staticmethod
    def forward(ctx: Any, dense_BI: Tensor, looked_up_BL: Tensor, head: OnnxHead) -> Tensor:
        ctx.head = head
        ctx.save_for_backward(dense_BI, looked_up_BL)
        return head.run(dense_BI, looked_up_BL)

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[None, Tensor, None]:
        dense_BI, looked_up_BL = ctx.saved_tensors
        gradient_BL = torch.empty_like(looked_up_BL)
        step = float(STEP * looked_up_BL.abs().mean().clamp(min=1e-6))
        for column in range(looked_up_BL.shape[1]):
            up_BL, down_BL = looked_up_BL.clone(), looked_up_BL.clone()
            up_BL[:, column] += step
            down_BL[:, column] -= step
            change_BT = ctx.head.run(dense_BI, up_BL) - ctx.head.run(dense_BI, down_BL)
            gradient_BL[:, column] = (change_BT / (2 * step) * grad_BT).sum(dim=1)
        return None, gradient_BL, None


def check_onnx(content: bytes, where: str) -> None:
    """Raises: ArtifactError when a model could read files of this machine: its weights must lie within it.

    External data is named by the key `location` (onnx.proto, TensorProto.external_data); that word is refused wherever
    it stands, which needs no parser that could differ from ONNX Runtime's.
    """
    if b"location" in content:
        raise ArtifactError(f"{where}: may hold weights outside of itself ('location'): export it as one file")


def head_of(run: RunConfig, transform: Transform, dense: Mapping[str, Tensor]) -> nn.Module:
    """The head of a model with these weights, ready to score.

    Raises: ArtifactError or RuntimeError when they do not fit.
    """
    if set(dense) == {ONNX_HEAD}:
        return OnnxHead(dense[ONNX_HEAD])
    head = build_head(run.model, transform)
    head.load_state_dict(dict(dense))
    return head.eval()
