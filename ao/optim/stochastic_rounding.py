"""Stochastic rounding to bfloat16: up or down at random, so that the expected value is the number itself.

A bfloat16 weight has 8 significant bits: an update below 1/512 of the weight is lost by rounding to nearest, at every
step again. Rounded stochastically it arrives on average. The random bits are a hash of a seed and the position, written
in integer arithmetic: part of the same kernel, and the same in eager code, in compiled code and on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic_round(x: Tensor, seed: Tensor | int, index: Tensor | None = None) -> Tensor:
    """`x` (float32) rounded to one of its two neighbours in bfloat16, with probabilities that make it unbiased.

    seed: an integer below 2**31, or an int32 scalar on the device of x. Another seed for every tensor and every step.
    index: int32 of the shape of x, another number for every element; by default they are counted from 0.

    Numbers that bfloat16 has stay as they are, as do infinities and NaN.
    """
    if index is None:
        index = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    noise = _mix(_mix(index) ^ seed) & 0xFFFF
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _mix(word: Tensor) -> Tensor:
    """A bijection of int32 in which every bit of the result depends on every bit of the input. Products wrap around."""
    word = (word ^ (word >> 16 & 0xFFFF)) * 0x21F0AAAD
    word = (word ^ (word >> 15 & 0x1FFFF)) * 0x735A2D97
    return word ^ (word >> 15 & 0x1FFFF)
