"""`DynamicTree`: codes whose steps grow with the value, for numbers that span many orders of magnitude (arXiv:1511.04561).

The positive values are `bits - 1` decades below 1. Decade i (0 is the smallest) holds `2**i` values, or twice as many in an
unsigned map, evenly spread from 0.1 to 1 times `10**(i - bits + 2)`; add 0 and 1, and the negatives of a signed map. This
is the map of the 8-bit optimizers (arXiv:2110.02861): seven decades in a byte, fine near the largest value of a block.

The nearest value is computed, not looked up: three constants of the decade give the code. Compilers turn that into wide
code on every device, which a search in a table of 256 is not.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Spec
from .bits import pack, pack_dim
from .blocks import amax_abs, in_blocks, to_blocks
from .codebook import CodebookTensor
from .rounding import reciprocal


def _map(bits: int, signed: bool) -> tuple[float, ...]:
    """The 2**bits values in ascending order, each a float32."""
    positive = [0.0, 1.0]
    for i in range(bits - 1):
        count = 2**i if signed else 2 ** (i + 1)
        decade = 10.0 ** (i - bits + 2)
        positive += [decade * (0.1 + 0.9 * (j + 0.5) / count) for j in range(count)]
    negative = [-v for v in positive if v not in (0.0, 1.0)] if signed else []
    values = struct.pack(f"{2**bits}f", *sorted(negative + positive))
    return struct.unpack(f"{2**bits}f", values)


_MAPS = {(bits, signed): _map(bits, signed) for bits in range(2, 9) for signed in (True, False)}


@dataclass(frozen=True, repr=False)
class DynamicTree(Spec):
    """Codes into the dynamic tree map, with a float32 scale per block.

    bits: 2 to 8.
    signed: False is for data without negative values, which then has twice the precision; negative values become 0.
    block: elements that share a scale.

        scale = max|x| over the block,    code = argmin_i |x / scale - map[i]|

    A signed map reaches +1 but not -1: its lowest value is -0.993 at 8 bits. A NaN in a block makes the block NaN.
    Cost: `bits + 32 / block` bits per element.
    """

    bits: int = 8
    signed: bool = True
    block: tuple[int, ...] = (1, 256)

    tensor_type = CodebookTensor

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"DynamicTree: bits must be 2 to 8, got {self.bits!r}")

    @property
    def values(self) -> tuple[float, ...]:
        """The entries of the map."""
        return _MAPS[self.bits, self.signed]

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale of shape `grid`, float32."""
        return {"scale": amax_abs(x, grid)}

    def encode(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor | None]:
        """The nearest entries of the map for `x` (float32) under the given scale."""
        unit = (to_blocks(x, scale.shape) * in_blocks(reciprocal(scale))).reshape(x.shape)
        rank = self._rank(unit.abs() if self.signed else unit)
        if self.signed:
            zero = 2.0 ** (self.bits - 1) - 1.0
            rank = zero + torch.where(unit < 0.0, -rank.clamp(max=zero), rank)
        codes = rank.to(torch.int32).to(torch.uint8)
        table = torch.tensor(self.values, dtype=torch.float32, device=x.device)
        return {
            "qdata": pack(codes, self.bits, pack_dim(x.shape, self.bits, str(self))),
            "scale": scale,
            "table": table,
        }

    def _rank(self, x: Tensor) -> Tensor:
        """The place of the nearest entry among 0 and the positive ones, as float32.

        Within a decade that starts with entry `first`, the entry is first + ceil(slope * x + offset).
        """
        positive = [v for v in self.values if v >= 0]
        # The first decade has one entry in a signed map and two in an unsigned one; the next ones twice as many each.
        unit = 1.0 if self.signed else 2.0
        slope = offset = first = torch.zeros_like(x)
        for i in range(self.bits - 1):
            count = unit * 2**i
            start = 1.0 + unit * (2**i - 1)
            steep, low = count / 0.9 * 10.0 ** (self.bits - 2 - i), start - 1 - count / 9
            above = x > (positive[int(start) - 1] + positive[int(start)]) / 2
            slope = torch.where(above, steep, slope)
            offset = torch.where(above, low, offset)
            first = torch.where(above, start, first)
        # A decade of 2**i * unit entries that starts with 1 + unit * (2**i - 1) ends with 2 * first + unit - 2. Below the
        # first one all three are zero, and so is the result.
        rank = torch.ceil(x * slope + offset).maximum(first).minimum(2.0 * first + (unit - 2.0))
        rank = torch.where(first > 0.0, rank, 0.0)
        return torch.where(x > (positive[-2] + positive[-1]) / 2, float(len(positive) - 1), rank)
