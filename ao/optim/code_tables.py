"""A map of codes as two tables: from a code to its number, and from a number to the next code by one look-up and a comparison.

A GPU computes the entries of a dynamic tree, and the places of numbers among them, in a product, a sum and a maximum per decade:
some forty instructions for the two directions, twice per element of Adam. From shared memory they take a quarter of that.

The second table has a cell for each range of numbers whose bits agree in their upper part. No cell has more than one place where
the code changes. What it holds is such that, added to all bits of a number, it carries into the code from that place on. The
negative numbers of a map have cells of their own, in which codes grow, too. Both tables are made of what the format's own
`values` and `nearest` say, so that codes are theirs for every number.
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
    cells: int32; the code of a number with these `bits` is the upper byte of `(bits << (24 - low)) + cells[c]`, in 32 bits that
        wrap, where its cell c is `(bits >> low) - first`.
    low: how many bits are the lower ones. first: the upper bits of the numbers of the first cell. least: the least number that
        has a cell, which smaller ones are taken for.
    mirror: bits of a negative number that are flipped first, its sign being dropped, so that its cells are others and codes grow
        from cell to cell. 0 for a map without negative numbers.
    """

    values: Tensor
    cells: Tensor
    first: int
    low: int
    least: float
    mirror: int

    def nearest(self, x: Tensor) -> Tensor:
        """`spec.nearest(x)` by the cells, for numbers no larger than the largest entry: what the kernel computes, in PyTorch.

        NaN is taken for the least number: its bits are beyond the cells.
        """
        size = torch.fmax(x.abs() if self.mirror else x, torch.tensor(self.least, dtype=torch.float32, device=x.device))
        bits = size.view(torch.int32)
        if self.mirror:
            bits = bits ^ (x.view(torch.int32) >> 31 & self.mirror)
        cell = self.cells[((bits >> self.low) - self.first).long()]
        return (bits * 2 ** (24 - self.low) + cell) >> 24 & 255


@functools.cache
def code_tables(spec: Mapped, device: torch.device) -> CodeTables:
    """The tables of the map of `spec`, on a device."""
    values = torch.tensor(spec.values, dtype=torch.float32, device="cpu")
    signed = spec.values[0] < 0
    zero = spec.values.index(0.0) if signed else 0
    places = _places(spec, torch.arange(zero + 1, 2**spec.bits, device="cpu"))
    low = next(n for n in range(FRACTION, 0, -1) if (places >> n).unique().numel() == places.numel())
    upper = places >> low
    largest = torch.tensor(1.001 * spec.values[-1], dtype=torch.float32, device="cpu")
    first, top = int(upper[0]) - 1, int(largest.view(torch.int32)) >> low
    cell = torch.arange(first, max(int(upper[-1]), top) + 1, device="cpu")
    before = torch.searchsorted(upper, cell)  # places in the cells before
    within = torch.zeros_like(cell)  # how many of the numbers of a cell are from its place on
    within[upper - first] = 2**low - (places & (2**low - 1))
    start, mirror = (zero + before << low) + within, 0
    if signed:
        flipped = 2 ** (int(cell[0] ^ cell[-1]).bit_length() + 1) - 1
        mirror = (flipped + 1 << low) - 1
        # The same place from the other side: numbers from it on come first, and have a code less.
        least = zero - before << low
        start = torch.cat([start, (least - within).clamp(min=0)])
        cell = torch.cat([cell, cell ^ flipped])
    cells = torch.zeros(int(cell.max() - cell.min()) + 1, dtype=torch.int64, device="cpu")
    cells[cell - cell.min()] = start - (cell << low) << 24 - low
    least_number = float(torch.tensor(first << low, dtype=torch.int32, device="cpu").view(torch.float32))
    return CodeTables(values.to(device), _wrapped(cells).to(device), int(cell.min()), low, least_number, mirror)


def _wrapped(x: Tensor) -> Tensor:
    """The lower 32 bits, as int32."""
    return ((x + 2**31) % 2**32 - 2**31).int()


def _places(spec: Mapped, codes: Tensor) -> Tensor:
    """The bits of the least number, from 0 on, whose code is at least each of `codes`."""
    # No number of a block is larger than the largest entry.
    top = torch.tensor(2 * spec.values[-1], dtype=torch.float32, device="cpu").view(torch.int32)
    low, high = torch.zeros_like(codes), top.to(codes).expand_as(codes)
    while bool((low < high).any()):
        middle = (low + high) // 2
        reached = spec.nearest(middle.int().view(torch.float32)) >= codes
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    return low
