"""Whether what is being traced becomes an ONNX model, and what that model may hold.

ONNX's operators see numbers, not bits: nothing there reads a float32 as an integer, and none of a compiler's own operators has
a translation. So code that does either asks here, and writes plain arithmetic instead.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

packs_int4 = ContextVar("packs_int4", default=False)
"""Whether whoever exports makes 4-bit initializers of `ao::Int4`, as `ao.integrations.onnx` does, and the opset has blocks."""


def exporting() -> bool:
    """Whether `torch.onnx.export(..., dynamo=True)` is tracing."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def reads_no_bits() -> bool:
    """Whether a graph is traced that cannot take the bits of an integer for a float: for ONNX, or by torch.jit.trace."""
    return exporting() or torch._C._get_tracing_state() is not None


def shift(x: Tensor, by: Tensor, direction: Literal["LEFT", "RIGHT"] = "RIGHT") -> Tensor:
    """`x >> by` or `x << by` of uint8: PyTorch's own translation is for signed integers, and wrong for these."""
    shape = torch.broadcast_shapes(x.shape, by.shape)
    return torch.onnx.ops.symbolic("BitShift", (x, by), {"direction": direction}, dtype=torch.uint8, shape=shape)


def shifted_right(x: Tensor, by: int) -> Tensor:
    """`x >> by` of uint8."""
    return shift(x, torch.tensor(by, dtype=torch.uint8, device=x.device)) if exporting() else x >> by


def exponent_of(x: Tensor) -> Tensor:
    """floor(log2(x)) of numbers that are not negative, in their dtype, without a look at their bits; -infinity of 0."""
    guess = x.log2().floor()  # a logarithm may be off to either side of an integer
    return guess - (torch.exp2(guess) > x).to(x.dtype) + (torch.exp2(guess + 1) <= x).to(x.dtype)
