"""`DynamicTree`: codes whose steps grow with the value, for numbers that span many orders of magnitude (arXiv:1511.04561).

The positive values are `bits - 1` decades below 1. Decade i (0 is the smallest) holds `2**i` values, or twice as many in an
unsigned map, evenly spread from 0.1 to 1 times `10**(i - bits + 2)`; add 0 and 1, and the negatives of a signed map. This
is the map of the 8-bit optimizers (arXiv:2110.02861): seven decades in a byte, fine near the largest value of a block.

Number the positive values so that decade i starts at the power of two c that is its length: j = rank, and rank + 1 if
unsigned. Over the decades the map is then a convex chain of straight lines, and its inverse a concave one:

    20 * c / 2**i * 10**(bits - 2) * value(j) = max over the decades of 5**i * (18 * j - 16 * c + 9)

so that both directions are a product, a sum and a maximum or minimum per decade: wide code on every device, where a search
in a table of 256, or a table itself, is not. The entries are kept in the units of the left side. There they are integers, and
the arithmetic that finds them is exact in float32: a table, fused and separate products give the same bits.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .mapped import Mapped
from .operand import look_up
from .tracing import is_eager, reads_no_bits


def _bits(x: float) -> int:
    """The bits of a float32. Those of positive numbers are ordered as the numbers are, and integers have a minimum and a
    maximum that need not care for NaN."""
    return int(struct.unpack("i", struct.pack("f", x))[0])


@dataclass(frozen=True)
class _Map:
    """A map and its lines, each (slope, value at 0).

    entries: in ascending order, each a float32.
    zero: the code of 0, from which ranks are counted.
    center: ranks less this number are what `forward` takes; products and constants are exact then.
    forward: entry = max(0, max over the lines), at most the largest entry, `top` in bits.
    inverse: of the entry; its integer part is j. `floor`, in bits: its value at 0.
    last: the line by which j passes from the last entry of the last decade to that of the largest entry.
    end: j of the largest entry, in bits. Numbers beyond the map take its ends. past: half more, in bits.
    """

    entries: tuple[float, ...]
    zero: int
    center: int
    forward: tuple[tuple[float, float], ...]
    inverse: tuple[tuple[float, float], ...]
    last: tuple[float, float]
    top: int
    floor: int
    end: int
    past: int


def _map(bits: int, signed: bool) -> _Map:
    more = 0 if signed else 1  # j - rank
    starts = [2 ** (i + more) for i in range(bits - 1)]  # of the decades
    end = 2 * starts[-1]  # the j of the largest entry
    top = 20.0 * 2**more * 10.0 ** (bits - 2)
    positive = [5.0**i * (18 * j - 16 * c + 9) for i, c in enumerate(starts) for j in range(c, 2 * c)] + [top]
    negative = [-v for v in positive[-2::-1]] if signed else []
    entries = [*negative, 0.0, *positive]

    center = starts[-1] * 4 // 3 + 1 - more
    forward = [(18.0 * 5**i, 5.0**i * (18 * (center + more) - 16 * c + 9)) for i, c in enumerate(starts)]
    inverse = [(1 / (18 * 5**i), c * 8 / 9) for i, c in enumerate(starts)]
    first = positive[0]
    if signed:
        # One value in the first decade: a line from 0 to it, and back from halfway between them.
        forward[0] = (first, first * center)
        inverse[0] = ((1.2 - 8 / 9) / (first / 2), 8 / 9)
    else:
        # Two: from halfway between 0 and the first to halfway between it and the second.
        slope = 0.8 / ((positive[1] - 0.0) / 2)
        inverse[0] = (slope, 2.2 - first / 2 * slope)
    middle = (positive[-2] + top) / 2
    steep = 0.6 / (top - middle)
    return _Map(
        struct.unpack(f"{2**bits}f", struct.pack(f"{2**bits}f", *entries)),
        len(negative),
        center,
        tuple(forward),
        tuple(inverse),
        (steep, end + 0.2 - steep * middle),
        _bits(top),
        _bits(inverse[0][1]),
        _bits(end),
        _bits(end + 0.5),
    )


_MAPS = {(bits, signed): _map(bits, signed) for bits in range(2, 9) for signed in (True, False)}


@dataclass(frozen=True, repr=False)
class DynamicTree(Mapped):
    """Codes into the dynamic tree map, with a float32 scale per block.

    bits: 2 to 8.
    signed: False is for data without negative values, which then has twice the precision; negative values become 0.
    block: elements that share a scale.

    A signed map reaches its largest value but not the negative of it: its lowest value is -0.993 of that at 8 bits.
    """

    bits: int = 8
    signed: bool = True
    block: tuple[int, ...] = (1, 256)

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"DynamicTree: bits must be 2 to 8, got {self.bits!r}")

    @property
    def values(self) -> tuple[float, ...]:
        """The entries of the map, in ascending order: the published values times the largest entry."""
        return _MAPS[self.bits, self.signed].entries

    def entries(self, codes: Tensor) -> Tensor:
        """values[codes], float32: looked up in eager code, computed in compiled code."""
        if is_eager(codes, or_recorded=False):
            return _table(self.bits, self.signed, codes.device)[codes.int()]
        if reads_no_bits():
            return look_up(torch.tensor(self.values, dtype=torch.float32, device=codes.device), codes)
        form = _MAPS[self.bits, self.signed]
        rank = codes.float() - form.zero if self.signed else codes.float()
        r = rank.abs() - form.center if self.signed else rank - form.center
        entry = _outermost(torch.maximum, r, form.forward)
        if self.signed:
            entry = entry.clamp(max=form.top) | (rank.view(torch.int32) & -(2**31))
        else:
            entry = entry.clamp(0, form.top)
        return entry.view(torch.float32)

    def nearest(self, x: Tensor) -> Tensor:
        """The codes (int32) of the values next to `x` (float32)."""
        form = _MAPS[self.bits, self.signed]
        size = x.abs() if self.signed else x
        place = _outermost(torch.minimum, size, form.inverse)  # j and a fraction
        if self.signed:
            place = place.clamp(max=form.end - 1)  # the maximum has no negative
        place = torch.maximum(place, (x * form.last[0] + form.last[1]).view(torch.int32))
        place = place.clamp(None if self.signed else form.floor, form.past)
        # Between the last entry of a decade and the first of the next, whose steps are five times as wide, the middle is a
        # fifth of a step beyond the decade: where the place less 0.2 falls below a power of two, the entry below is nearer.
        # So the place is at most the last number below the power of two that comes after the place less 0.2.
        place = torch.minimum(place, (place.view(torch.float32) - 0.2).view(torch.int32) | 0x7FFFFF)
        if self.signed:
            place = place | (x.view(torch.int32) & -(2**31))
        return place.view(torch.float32).to(torch.int32) + (form.zero if self.signed else -1)


def _outermost(choose: Callable[[Tensor, Tensor], Tensor], x: Tensor, lines: Sequence[tuple[float, float]]) -> Tensor:
    """The least or the greatest of the lines at `x`, as the bits of a float32. In pairs: no long chain of operators waits."""
    values = [(x * slope + at_zero).view(torch.int32) for slope, at_zero in lines]
    while len(values) > 1:
        values = [choose(*pair) for pair in zip(values[::2], values[1::2])] + values[len(values) // 2 * 2 :]
    return values[0]


@functools.lru_cache(maxsize=64)
def _table(bits: int, signed: bool, device: torch.device) -> Tensor:
    """The entries on a device."""
    return torch.tensor(_MAPS[bits, signed].entries, dtype=torch.float32, device=device)
