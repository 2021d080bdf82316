"""Numbers of float64 that are beyond the range of float32, in which formats compute: a power of two brings them into it.

Codes of a scaled format are those of the numbers times any power of two, so that an activation of 1e60 is quantized as one of 1
is, and what it is multiplied into is as large again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .onnx_mode import exponent_of, reads_no_bits

_EXPONENT = 0x7FF0000000000000
"""Where float64 has its exponent."""

SAFE = 2.0**100
"""Numbers up to this, and from its inverse, need no help: sums of their products with weights are in the range."""


def range_power(x: Tensor, by_row: bool) -> Tensor:
    """The power of two to divide `x` by before a format chooses scales for it: one for each row, or one for all.

    1 where float32 holds the numbers well, and where some are not finite. x: (..., K) float64 -> (..., 1) or (1, ..., 1).
    """
    if x.numel() == 0:
        return x.new_ones([1] * x.dim())
    largest = x.abs().amax(-1 if by_row else tuple(range(x.dim())), keepdim=True)
    if reads_no_bits():
        power = torch.exp2(exponent_of(largest))
    else:
        power = (largest.view(torch.int64) & _EXPONENT).view(torch.float64)
    usual = (power <= SAFE) & (power >= 1 / SAFE)
    return torch.where(usual | (power == 0) | (power == math.inf) | power.isnan(), 1.0, power)
