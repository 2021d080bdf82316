"""Rounding that comes out the same in eager and in compiled code."""

from __future__ import annotations

import torch
from torch import Tensor


def reciprocal(x: Tensor) -> Tensor:
    """1 / x in float32, correctly rounded on every device and by every compiler.

    Triton's float32 division is off by up to two units in the last place; by way of float64 it is not. Data is then
    scaled by a product, x * reciprocal(scale), which all backends round alike. Metal has no float64, and divides.
    """
    if x.device.type == "mps":
        return 1 / x.float()
    return (1 / x.double()).float()
