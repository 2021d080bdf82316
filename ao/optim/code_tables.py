"""A map of codes as two tables: from a code to its number, and from a number to the next code by one look-up and a comparison.

A GPU computes the entries of a dynamic tree, and the places of numbers among them, in a product, a sum and a maximum per decade:
some forty instructions for the two directions, twice per element of Adam. From shared memory they take a quarter of that.

The second table has a cell for each range of numbers whose bits agree in their upper part. No cell has more than one place where
the code changes: it holds the code below that place, and the lower bits of the place. Both tables are made of what the format's
own `values` and `nearest` say, so that codes are theirs for every number.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ao.dtypes import Mapped

FRACTION = 23
"""Bits of the fraction of a float32."""


@dataclass(frozen=True, eq=False)
class CodeTables:
    """The two tables of a map.

    values: float32, the numbers of the codes.
    cells: int32; `code << low + 1 | place`, where a place of `2**low` is in none of the numbers of the cell.
    first: the upper bits of the numbers of the first cell. low: how many bits are the lower ones.
    zero: the code of 0, of a map that has negative numbers: codes in the cells are then counted from it, and `least` is how far
        they go below. None for a map without.
    """

    values: Tensor
    cells: Tensor
    first: int
    low: int
    zero: int | None
    least: int

    def nearest(self, x: Tensor) -> Tensor:
        """`spec.nearest(x)` by the cells, for numbers that are no NaN: what the kernel computes, in PyTorch."""
        size = x.abs() if self.zero is not None else x.clamp(min=0)
        bits = size.view(torch.int32)
        cell = ((bits >> self.low) - self.first).clamp(0, self.cells.numel() - 1)
        entry = self.cells[cell.long()]
        code = (entry >> (self.low + 1)) + ((bits & (2**self.low - 1)) >= (entry & (2 ** (self.low + 1) - 1))).int()
        if self.zero is None:
            return code
        return self.zero + torch.where(x < 0, -code.clamp(max=self.least), code)


@functools.cache
def code_tables(spec: Mapped, device: torch.device) -> CodeTables:
    """The tables of the map of `spec`, on a device."""
    values = torch.tensor(spec.values)
    zero = spec.values.index(0.0) if spec.values[0] < 0 else None
    codes = torch.arange(zero or 0, 2**spec.bits)
    places = _places(spec, codes[1:])
    low = next(n for n in range(FRACTION, 0, -1) if (places >> n).unique().numel() == places.numel())
    upper = places >> low
    first, last = int(upper[0]) - 1, int(upper[-1]) + 1  # the cells at the ends are for all numbers beyond
    size = 1 << (last - first).bit_length()
    below = torch.searchsorted(upper, torch.arange(first, first + size))  # how many places are in cells before
    cells = (below + (codes[0] - (zero or 0))) << (low + 1) | 2**low
    cells[upper - first] = (cells[upper - first] & -(2 ** (low + 1))) | (places & (2**low - 1))
    made = CodeTables(values.to(device), cells.int().to(device), first, low, zero, zero or 0)
    return made


def _places(spec: Mapped, codes: Tensor) -> Tensor:
    """The bits of the least number, from 0 on, whose code is at least each of `codes`."""
    top = torch.tensor(2 * spec.values[-1]).view(torch.int32)  # no number of a block is larger than the largest entry
    low, high = torch.zeros_like(codes), top.to(codes).expand_as(codes)
    while bool((low < high).any()):
        middle = (low + high) // 2
        reached = spec.nearest(middle.int().view(torch.float32)) >= codes
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    return low
