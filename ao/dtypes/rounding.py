"""Rounding that comes out the same in eager and in compiled code."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tracing import exporting, is_eager, reads_no_bits

FEW = 2**16
"""Numbers that take a GPU less time in float64 than a launch does."""


def reciprocal(x: Tensor) -> Tensor:
    """1 / x in float32, correctly rounded on every device and by every compiler; 0 where |x| is below the smallest normal.

    Data is then scaled by a product, x * reciprocal(scale), which all backends round alike, and a block of zeros, whose
    scale is 0, stays a block of zeros. Above 2**126, where the result is no normal number, it is as the device has it.

    A GPU's division in float32 is off by up to two units in the last place. Integers find by how much: with m and q the
    significands of x and of a quotient that is too small, 2**47 - m * q says how many units are missing. (Going by way of
    float64 would take a GPU several times as long as all the rest of quantizing.)
    """
    x = x.float()
    tiny, huge = torch.finfo(torch.float32).tiny, 2.0**126
    if (x.device.type == "cpu" or (x.is_cuda and x.numel() <= FEW)) and is_eager(x):
        # A few operators in place of fifty, each a launch on a GPU. 53 bits are enough for the second rounding to be that of the
        # exact number.
        return x.double().reciprocal().float().masked_fill(x.abs() < tiny, 0.0)
    if exporting():
        return torch.where(
            x.abs() < tiny, 0.0, torch.ones((), dtype=torch.float32, device=x.device) / x
        )  # there a division is correctly rounded
    quotient = x.reciprocal()
    bits = x.view(torch.int32)
    m = (bits & 0x7FFFFF) | 0x800000
    base = (253 << 23) - (bits & 0x7F800000)  # of the binade of 1 / |x|, which is in (base, 2 * base]
    q = ((quotient.view(torch.int32) & 0x7FFFFFFF) - base).clamp(0, 2**23) + (2**23 - 2)
    missing = (2 * (2**47 - m.long() * q.long())).to(torch.int32)  # in halves of a unit, times m
    for halves in (1, 3, 5, 7):
        q = q + (missing > halves * m).int()
    exact = ((base + (q - 2**23)) | (bits & -(2**31))).view(torch.float32)
    return torch.where(x.abs() < huge, exact, quotient).masked_fill(x.abs() < tiny, 0.0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a * b in float32 less its last bit, for a sum to follow: no compiler can contract the two into one rounding."""
    if exporting():
        return a.float() * b.float()  # nothing contracts there
    bits = (a.float() * b.float()).view(torch.int32) & -2
    return bits.view(torch.float32)


def uncontracted(product: Tensor) -> Tensor:
    """A finite product in float32, all bits of it, for a sum to follow: a compiler would have to contract across a maximum."""
    return product.clamp(min=torch.finfo(torch.float32).min)


_STEPS = 2.0**16


def stochastic_round(x: Tensor, data: Tensor) -> Tensor:
    """`x` (float32, |x| <= 255) to floor(x) or floor(x) + 1, the latter with probability x - floor(x), in steps of 2**-16.

    Neighbouring integers are met on average, so that an update smaller than a step is not lost.

    data: (of as many elements) what the random bits are a hash of, with the position and with the sum of all of `data`. So
    a copy of the same numbers on another rank rounds alike, whatever the state of its random generator, as does
    recomputation, and eager and compiled code; and numbers of which a single one changed round anew.
    """
    word = random_words(data)
    return (((x * _STEPS).round() + (word & 0xFFFF).view(x.shape).float()) * (1 / _STEPS)).floor()


def random_words(data: Tensor) -> Tensor:
    """32 random bits, int32, for each element of `data` (float32): a hash of it, its position and the sum of all."""
    bits = data.contiguous().view(torch.int32)
    position = torch.arange(bits.numel(), device=bits.device).to(torch.int32).view(bits.shape)
    return _mix(bits ^ _mix(position ^ bits.sum().to(torch.int32)))


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit of the result depends on every bit of the input."""
    for multiplier, shift in ((0x21F0AAAD, 15), (0x735A2D97, 15)):
        word = word ^ ((word >> 16) & 0xFFFF)
        word = word * multiplier
        word = word ^ ((word >> shift) & (2 ** (32 - shift) - 1))
    return word


def power_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two that is no less than x (float32, not negative); 0, infinity and NaN stay."""
    if exporting():
        power = 2.0 ** x.log2().ceil()  # a logarithm may be off to either side of an integer
        power = torch.where(power / 2 >= x, power / 2, torch.where(power < x, power * 2, power))
        return torch.where((x > 0) & (x < torch.inf), power, x)
    bits = (x.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


def exponent_of(x: Tensor) -> Tensor:
    """floor(log2(x)) of numbers that are not negative, in their dtype, without a look at their bits; -infinity of 0."""
    guess = x.log2().floor()  # a logarithm may be off to either side of an integer
    return guess - (torch.exp2(guess) > x).to(x.dtype) + (torch.exp2(guess + 1) <= x).to(x.dtype)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (float32) rounded to float32, bfloat16 or float16, half to even.

    A compiler drops a cast to 16 bits and back, and would go on with the unrounded number; it cannot drop this.
    """
    if dtype == torch.float32:
        return x
    if exporting() or (dtype == torch.bfloat16 and is_eager(x)):
        return x.to(dtype)  # to float16 the way below rounds the smallest numbers twice
    cut = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    bits = x.view(torch.int32)
    bits = (bits + (2 ** (cut - 1) - 1) + ((bits >> cut) & 1)) & -(2**cut)
    # A NaN whose bits are all set would be carried over to 0.
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(dtype)


def by_way_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (float32) cast to bfloat16 or float16 and back. A compiler drops two casts; it cannot drop two complements."""
    return (~(~narrow(x, dtype).view(torch.int16))).view(dtype).float()


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (float32) as `dtype`. A step more than the largest number of float16 is that number, not infinity: less than twice as
    much. What is larger, and an infinity, is infinite, as in any tensor."""
    if dtype == torch.float16:
        top = torch.finfo(dtype).max
        x = torch.where(x.abs() < 2 * top, x.clamp(-top, top), x)
    return x.to(dtype)


_EXPONENT = 0x7FF0000000000000
"""Where float64 has its exponent."""

SAFE = 2.0**100
"""Numbers up to this, and from its inverse, need no help: sums of their products with weights are in the range."""


def range_power(x: Tensor, by_row: bool) -> Tensor:
    """The power of two to divide `x` by before a format, which computes in float32, chooses scales for it: one for each row, or
    one for all. The codes of a scaled format are those of the numbers times any power of two, so that 1e60 is quantized as 1 is.

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
