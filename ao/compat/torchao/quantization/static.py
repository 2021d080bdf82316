"""Static int8 activations with zero points, or one scale per row: what one number per layer does not say."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ao import Intx


class StaticInt8Linear(nn.Linear):
    """An `nn.Linear` with an int8 weight that quantizes its input by qparams which are known.

    act_quant_scale, act_quant_zero_point: one number, or one per row of the input, (M, 1).
    """

    act_quant_scale: Tensor
    act_quant_zero_point: Tensor | None

    @staticmethod
    def of(layer: Any, scale: Tensor, zero_point: Tensor | None) -> None:
        """Make one of a linear layer whose weight is quantized, in place."""
        layer.__class__ = StaticInt8Linear
        layer.register_buffer("act_quant_scale", scale.detach().float().clone())
        layer.register_buffer("act_quant_zero_point", None if zero_point is None else zero_point.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., K)."""
        rows = input.reshape(-1, input.shape[-1])
        scale, zero = self.act_quant_scale.reshape(-1, 1), self.act_quant_zero_point
        known = {"scale": scale}
        if zero is not None:
            known["zero_point"] = zero.reshape(-1, 1).to(torch.int8)
        spec = Intx(8, (-1 if scale.shape[0] == 1 else 1, -1), symmetric=zero is None)
        out = F.linear(spec.quantize(rows, **known), self.weight, self.bias)
        return out.reshape(*input.shape[:-1], -1)
