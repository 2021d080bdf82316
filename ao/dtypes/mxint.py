"""`MXInt`: integers in blocks that share a power of two, x = q * 2**(2 - bits) * scale; `MXINT8` is OCP's.

OCP Microscaling Formats (MX) specification 1.0, 5.3.4: two's complement with an implied scale of 2**-6, so that 8 bits end at
1 63/64, and blocks of 32 with a scale in E8M0. The implied power is the scales' here, whose bias is 133: x = q * 2**(byte - 133)
has the same bytes. Cost: bits + 8 / 32, 8.25 for MXINT8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Elements, PerBlock, QTensor, Spec
from .bits import pack, pack_dim, packed_dim, unpack
from .blocks import amax_abs, blocks_shape, in_blocks, to_blocks
from .e8m0 import E8M0, RULES, Rule, divided, shared_exponent, wide
from .operand import Operand
from .rounding import narrow


@dataclass(frozen=True, repr=False)
class MXInt(Spec):
    """Integers with a power of two per block.

        q = clamp(round(x / (scale * 2**(2 - bits))), -qmax, qmax),    qmax = 2**(bits - 1) - 1

    half to even. The lowest code stays unused, as the specification allows, so that the range is symmetric.

    bits: 2 to 8.
    block: elements that share a scale.
    scale_rule: "floor", "ceil", "rceil" or "even", how the power of two is found (`shared_exponent`), of a format whose largest
        number is qmax * 2**(2 - bits), of exponent 0 and bits - 2 bits of mantissa.

    Raises ValueError for parameters outside these.
    """

    bits: int = 8
    block: tuple[int, ...] = (1, 32)
    scale_rule: Rule = "floor"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"MXInt: bits must be 2 to 8, got {self.bits}")
        if self.scale_rule not in RULES:
            raise ValueError(f"MXInt: scale_rule must be floor, ceil, rceil or even, got {self.scale_rule!r}")

    @property
    def qmax(self) -> int:
        """The largest code: 127 for 8 bits."""
        return 2 ** (self.bits - 1) - 1

    @property
    def max(self) -> float:
        """The largest number: 127 / 64 for 8 bits."""
        return self.qmax * 2.0 ** (2 - self.bits)

    @property
    def bias(self) -> int:
        """Of the scales, with the power of two of the elements in it: 133 for 8 bits."""
        return 127 + self.bits - 2

    @property
    def _offset(self) -> int:
        """Added to codes that are packed."""
        return 2 ** (self.bits - 1) if self.bits < 8 else 0

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale of shape `grid`, in E8M0."""
        largest = amax_abs(x, grid)
        return {"scale": shared_exponent(largest, self.scale_rule, self.max, 0, self.bits - 2, self.bias)}

    def stored(self, *, scale: Tensor) -> dict[str, Tensor]:
        """The nearest power of two."""
        return {"scale": E8M0(bias=self.bias).quantize(scale.float())}

    def encode(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor | None]:
        """Round `x` (float32) under the given scale."""
        # A block of NaN has NaN for its scale; what its codes are does not matter.
        codes = self._codes(x, scale).nan_to_num_(0).reshape(x.shape).to(torch.int8)
        if self.bits == 8:
            return {"qdata": codes, "scale": scale}
        stored = (codes + self._offset).view(torch.uint8)
        return {"qdata": pack(stored, self.bits, pack_dim(x.shape, self.bits, self)), "scale": scale}

    def round(self, x: Tensor, *, scale: Tensor) -> Tensor:
        """The multiples of the scale that `x` (float32) becomes."""
        return (self._codes(x, scale) * in_blocks(wide(scale))).reshape(x.shape)

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """Integers in float32, in blocks."""
        return divided(to_blocks(x, scale.shape), scale).round_().clamp_(-self.qmax, self.qmax)

    def operand(self, q: Any) -> Operand:
        """Codes with an affine map."""
        return Operand(q.qdata, q.scale, None, "affine", self.bits, self._offset)


class MXIntTensor(QTensor, spec=MXInt):
    """x = q * scale.

    qdata: (..., K) int8 for 8 bits, else (..., K * bits / 8) uint8, of q + 2**(bits - 1).
    scale: one per block, `E8M0Tensor`.
    """

    qdata: Elements
    scale: PerBlock

    spec: MXInt

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = blocks_shape(self.scale.shape, self.shape)
        codes = unpack(self.qdata, self.spec.bits, packed_dim(self.qdata.shape, self.shape), shape)
        values = (codes.float() - self.spec._offset) * in_blocks(wide(self.scale))
        return narrow(values, dtype).reshape(self.shape)


MXINT8 = MXInt()
"""8-bit integers in blocks of 32 that share a power of two (OCP MX): 8.25 bits per element."""
