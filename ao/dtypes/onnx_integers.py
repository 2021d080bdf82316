"""Integers of fewer than 32 bits in an ONNX model, whose operators do not take all that PyTorch's take."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from .tracing import exporting

packs_int4 = ContextVar("packs_int4", default=False)
"""Whether whoever exports makes 4-bit initializers of `ao::Int4`, as `ao.integrations.onnx` does, and the opset has blocks."""


def shift(x: Tensor, by: Tensor, direction: Literal["LEFT", "RIGHT"] = "RIGHT") -> Tensor:
    """`x >> by` or `x << by` of uint8: PyTorch's own translation is for signed integers, and wrong for these."""
    shape = torch.broadcast_shapes(x.shape, by.shape)
    return torch.onnx.ops.symbolic("BitShift", (x, by), {"direction": direction}, dtype=torch.uint8, shape=shape)


def shifted_right(x: Tensor, by: int) -> Tensor:
    """`x >> by` of uint8."""
    return shift(x, torch.tensor(by, dtype=torch.uint8, device=x.device)) if exporting() else x >> by
