"""A map of codes as two tables: from a code to its number, and from a number to the next code by one look-up and a comparison.

A GPU computes the entries of a dynamic tree, and the places of numbers among them, in a product, a sum and a maximum per decade:
some forty instructions for the two directions, twice per element of Adam. From shared memory they take a quarter of that.

The second table has a cell for each range of numbers whose bits agree in their upper part. No cell has more than one place where
the code changes. What it holds is such that, added to all bits of a number, it carries into the code from that place on. Both
tables are made of what the format's own `values` and `nearest` say, so that codes are theirs for every number.
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
    cells: int32; the code of a number of cell `c` with these `bits` is `(bits + cells[c]) >> low`, where c is
        `(bits >> low) - first`.
    low: how many bits are the lower ones. first: the upper bits of the numbers of the first cell.
    zero: the code of 0, of a map that has negative numbers: codes of the cells are then counted from it. None for a map without.
    """

    values: Tensor
    cells: Tensor
    first: int
    low: int
    zero: int | None

    @property
    def least(self) -> float:
        """The least number of the first cell, which smaller ones are taken for."""
        return float(torch.tensor(self.first << self.low, dtype=torch.int32).view(torch.float32))

    def nearest(self, x: Tensor) -> Tensor:
        """`spec.nearest(x)` by the cells, for numbers no larger than the largest entry: what the kernel computes, in PyTorch.

        NaN is taken for the least number: its bits are beyond the cells.
        """
        size = torch.fmax(x if self.zero is None else x.abs(), torch.tensor(self.least, device=x.device))
        bits = size.view(torch.int32)
        code = (bits + self.cells[((bits >> self.low) - self.first).long()]) >> self.low
        if self.zero is None:
            return code
        sign = x.view(torch.int32) >> 31  # all bits of a negative number's, so that the code is negated
        return (self.zero + ((code ^ sign) - sign)).clamp(min=0)


@functools.cache
def code_tables(spec: Mapped, device: torch.device) -> CodeTables:
    """The tables of the map of `spec`, on a device."""
    values = torch.tensor(spec.values)
    zero = spec.values.index(0.0) if spec.values[0] < 0 else None
    codes = torch.arange(zero or 0, 2**spec.bits)
    places = _places(spec, codes[1:])
    low = next(n for n in range(FRACTION, 0, -1) if (places >> n).unique().numel() == places.numel())
    upper = places >> low
    top = int(torch.tensor(1.001 * spec.values[-1]).view(torch.int32)) >> low
    first, last = int(upper[0]) - 1, max(int(upper[-1]), top) + 1
    size = 1 << (last - first).bit_length()
    cell = torch.arange(first, first + size)
    cells = (torch.searchsorted(upper, cell) + (codes[0] - (zero or 0))) << low  # places in the cells before
    cells[upper - first] += 2**low - (places & (2**low - 1))
    cells -= cell << low
    return CodeTables(values.to(device), cells.int().to(device), first, low, zero)


def _places(spec: Mapped, codes: Tensor) -> Tensor:
    """The bits of the least number, from 0 on, whose code is at least each of `codes`."""
    top = torch.tensor(2 * spec.values[-1]).view(torch.int32)  # no number of a block is larger than the largest entry
    low, high = torch.zeros_like(codes), top.to(codes).expand_as(codes)
    while bool((low < high).any()):
        middle = (low + high) // 2
        reached = spec.nearest(middle.int().view(torch.float32)) >= codes
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    return low
