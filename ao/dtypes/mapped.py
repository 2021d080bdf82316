"""`Mapped`: codes into a map that is computed rather than stored. A subclass is a map: its entries, and the nearest of them.

Cost: `bits + 32 / block` bits per element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Elements, PerBlock, QTensor, Spec
from .bits import pack, pack_dim, packed_dim, unpack
from .blocks import amax_abs, blocks_shape, in_blocks, to_blocks
from .rounding import narrow, reciprocal


@dataclass(frozen=True, repr=False)
class Mapped(Spec):
    """Codes of `bits` bits into a map, with a float32 scale per block.

    bits: of a code. A subclass adds `block`, the elements that share a scale.

        scale = max|x| / max(values) over the block,    code = argmin_i |x / scale - values[i]|

    A NaN in a block makes the block NaN.
    """

    bits: int = 8

    # What a map defines.

    @property
    def values(self) -> tuple[float, ...]:
        """The entries of the map, in ascending order, each a float32. The last one is the largest in magnitude."""
        raise NotImplementedError

    def entries(self, codes: Tensor) -> Tensor:
        """values[codes], float32. codes: uint8 or int32."""
        raise NotImplementedError

    def nearest(self, x: Tensor) -> Tensor:
        """The codes (int32) of the values next to `x` (float32)."""
        raise NotImplementedError

    # What follows.

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale of shape `grid`, float32."""
        return {"scale": self.scale(amax_abs(x, grid))}

    def scale(self, largest: Tensor) -> Tensor:
        """The scales of blocks, given the largest magnitude in each."""
        return largest * (1 / self.values[-1])

    def encode(self, x: Tensor, *, scale: Tensor, inverse: Tensor | None = None) -> dict[str, Tensor | None]:
        """The nearest entries for `x` (float32) under the given scale. inverse: 1 / scale, where it is known."""
        inverse = reciprocal(scale) if inverse is None else inverse
        codes = self.nearest((to_blocks(x, scale.shape) * in_blocks(inverse)).reshape(x.shape)).to(torch.uint8)
        return {"qdata": pack(codes, self.bits, pack_dim(x.shape, self.bits, self)), "scale": scale}


class MappedTensor(QTensor, spec=Mapped):
    """x = values[code] * scale.

    qdata: (..., K * bits / 8) uint8.
    scale: one per block, float32.
    """

    qdata: Elements
    scale: PerBlock

    spec: Mapped

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        blocks = blocks_shape(self.scale.shape, self.shape)
        codes = unpack(self.qdata, self.spec.bits, packed_dim(self.qdata.shape, self.shape), blocks)
        return narrow(self.spec.entries(codes) * in_blocks(self.scale), dtype).reshape(self.shape)
