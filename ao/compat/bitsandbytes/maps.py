"""Tables of 256 or 16 values, by code: what codes of bitsandbytes stand for."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ...dtypes import Codebook

# By code: a sign, two bits of exponent, one of mantissa, over the largest. 0 stands for zero, and so does 8.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_CODES = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
"""The code of each entry of ao's table, which is in order."""


def codes_of_ranks(quant_type: str) -> Tensor:
    """uint8 (16,): the code of bitsandbytes for each entry of ao's table. Raises ValueError for another type."""
    if quant_type not in _CODES:
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    return torch.tensor(_CODES[quant_type], dtype=torch.uint8)


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """float32 (16,): the values of "nf4", "fp4" or "int4" by code. Raises NotImplementedError for another."""
    if typename == "nf4":
        values = list(Codebook("nf4").values)
    elif typename == "fp4":
        values = [sign * v / 12 for sign in (1, -1) for v in _FP4]
    elif typename == "int4":
        values = [v / 7 for v in (*range(7, -1, -1), *range(0, -8, -1))]
    else:
        raise NotImplementedError(f"ao has no 4-bit type {typename!r}; use 'nf4' or 'fp4'")
    return torch.tensor(values, dtype=torch.float32, device=device)


def _padded(values: list[float]) -> Tensor:
    return torch.tensor(sorted([*values, *[0.0] * (256 - len(values))]), dtype=torch.float32)


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """float32 (256,), in order: decades of values whose number doubles with each (arXiv:1511.04561), 0 and 1.

    Decade i of `max_exponent_bits` has the middles of n even steps from 0.1 to 1, times 10**(i + 1 - max_exponent_bits), with
    n = 2**(i + total_bits - 1 - max_exponent_bits), twice that if unsigned.
    """
    spare = total_bits - 1 - max_exponent_bits
    values = [0.0, 1.0]
    more = [(max_exponent_bits - 1, 2**spare - 1)] if spare > 0 else []
    decades = [(i, int(2 ** (i + spare) * (1 if signed else 2))) for i in range(max_exponent_bits)]
    for i, n in decades + more:
        ends = torch.linspace(0.1, 1, n + 1, dtype=torch.float32)
        middles = ((ends[:-1] + ends[1:]) / 2 * 10 ** (i + 1 - max_exponent_bits)).tolist()
        values += [*middles, *[-v for v in middles]] if signed else middles
    return _padded(values)


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """float32 (256,), in order: even steps from -1, or 0, to 1."""
    lost = signed and (add_zero or total_bits < 8)  # one value, so that the middle one is 0
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, 2**total_bits - lost, dtype=torch.float32).tolist()
    half = len(values) // 2
    return torch.tensor([*values[:half], *[0.0] * (256 - len(values)), *values[half:]], dtype=torch.float32)


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """float32 (256,), in order: the floats of so many bits, over the largest. Raises ValueError where the bits do not add up."""
    if exponent_bits + precision_bits + signed != total_bits:
        raise ValueError("total_bits must be exponent_bits + precision_bits, and 1 if signed")
    bias = 2 ** (exponent_bits - 1)
    values: list[float] = []
    for exponent, mantissa in itertools.product(range(2**exponent_bits), range(2**precision_bits)):
        fraction = mantissa / 2**precision_bits
        value = fraction * 2.0**-bias if exponent == 0 else (1 + fraction) * 2.0 ** (bias + 1 - exponent)
        values += [value, -value] if signed else [value]
    found = _padded(values)
    return found / found.max()


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """float32 (256,), in order: quantiles of a normal distribution between 1 - offset and offset, over the largest, and 0."""
    ends = 9 if use_extra_value else 8
    above = torch.special.ndtri(torch.linspace(offset, 0.5, ends, dtype=torch.float32)[:-1])
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float32)[:-1])
    found = _padded([*above.tolist(), *below.tolist()])
    return found / found.max()
