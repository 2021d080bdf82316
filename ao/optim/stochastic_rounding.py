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
    return stochastic_bf16(x, seed, index).to(torch.bfloat16)


def stochastic_bf16(x: Tensor, seed: Tensor | int, index: Tensor) -> Tensor:
    """`stochastic_round`, still float32."""
    noise = _mix(_mix(index) ^ seed) & 0xFFFF
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)  # an infinity stays: its last bits are 0
    return rounded.masked_fill(x.isnan(), torch.nan)


def stochastic_round_e4m3(q: Tensor) -> Tensor:
    """`q` (float32, at most 448) rounded to one of its two neighbours in e4m3, at random and unbiased; still float32.

    For a slow running mean. A second moment moves by a thousandth of itself in a step, far less than a step of a format with 3
    bits of mantissa, and rounding to nearest would lose that at every step again. The random bits are a hash of the number,
    whose last bits the gradients change: no seed is needed. Numbers that e4m3 has stay as they are, as does NaN; what is not 0
    stays at least 2**-9, since a second moment that becomes 0 makes the next step explode.
    """
    size = q.abs()
    shift = _shift(size)
    bits = (size + shift).view(torch.int32)
    noise = (bits >> 6) * -0x61C88647 >> 12 & 0xFFFFF  # the last bits differ between compiled and eager code
    rounded = (((bits + noise) & -0x100000).view(torch.float32) - shift).clamp(min=2.0**-9)
    return torch.where((size > 0) & (size <= 448), rounded, size).copysign(q)


def stochastic_bytes_e4m3(q: Tensor) -> Tensor:
    """The bytes (int32) of `stochastic_round_e4m3(q)`, from the sum that rounds it. Larger numbers than 448 are taken for it."""
    size = q.abs().clamp(max=448)
    shift = _shift(size)
    bits = (size + shift).view(torch.int32)
    noise = (bits >> 6) * -0x61C88647 >> 12 & 0xFFFFF
    bias = (shift.view(torch.int32) >> 20).clamp(min=120 << 3)  # of the exponent, or the binade of the shift
    code = ((bits + noise) >> 20) - bias
    least = size.view(torch.int32).clamp(max=1)  # 0 for 0 alone
    return torch.maximum(code, least).clamp(max=127) | (q.view(torch.int32) >> 24 & 128)


def _shift(size: Tensor) -> Tensor:
    """What is added to sizes: the steps of subnormal numbers are those of the next binade."""
    return torch.where(size < 2.0**-6, torch.scalar_tensor(2.0**-6, dtype=torch.float32, device=size.device), 0.0)


def _mix(word: Tensor) -> Tensor:
    """A bijection of int32 in which every bit of the result depends on every bit of the input. Products wrap around."""
    word = (word ^ (word >> 16 & 0xFFFF)) * 0x21F0AAAD
    word = (word ^ (word >> 15 & 0x1FFFF)) * 0x735A2D97
    return word ^ (word >> 15 & 0x1FFFF)
