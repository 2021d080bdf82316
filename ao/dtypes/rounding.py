"""Rounding that comes out the same in eager and in compiled code."""

from __future__ import annotations

import torch
from torch import Tensor


def reciprocal(x: Tensor) -> Tensor:
    """1 / x in float32, correctly rounded on every device and by every compiler; 0 where |x| is below the smallest normal.

    Triton's float32 division is off by up to two units in the last place; by way of float64 it is not. Data is then
    scaled by a product, x * reciprocal(scale), which all backends round alike, and a block of zeros, whose scale is 0,
    stays a block of zeros. Metal has no float64, and divides.
    """
    x = x.float()
    inverse = x.reciprocal() if x.device.type == "mps" else x.double().reciprocal().float()
    return inverse.masked_fill(x.abs() < torch.finfo(torch.float32).tiny, 0.0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a * b in float32 less its last bit, for a sum to follow: no compiler can contract the two into one rounding."""
    bits = (a.float() * b.float()).view(torch.int32) & -2
    return bits.view(torch.float32)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (float32) rounded to float32, bfloat16 or float16, half to even.

    A compiler drops a cast to 16 bits and back, and would go on with the unrounded number; it cannot drop this.
    """
    if dtype == torch.float32:
        return x
    cut = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    bits = x.view(torch.int32)
    bits = (bits + (2 ** (cut - 1) - 1) + ((bits >> cut) & 1)) & -(2**cut)
    return bits.view(torch.float32).to(dtype)
