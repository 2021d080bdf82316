"""`MXInt`: 8-bit integers in blocks that share a power of two, x = q / 64 * scale; `MXINT8` is OCP's.

OCP Microscaling Formats (MX) specification 1.0, 5.3.4: two's complement with an implied scale of 2**-6, so that the largest
number is 1 63/64, and blocks of 32 with a scale in E8M0. Cost: 8 + 8 / 32 = 8.25 bits per element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Elements, PerBlock, QTensor, Spec
from .blocks import amax_abs, in_blocks, to_blocks
from .e8m0 import E8M0, RULES, Rule, divided, shared_exponent, wide
from .operand import Operand
from .rounding import narrow


@dataclass(frozen=True, repr=False)
class MXInt(Spec):
    """8-bit integers with a power of two per block.

        q = clamp(round(64 * x / scale), -127, 127)

    half to even. Code -128 stays unused, as the specification allows, so that the range is symmetric.

    block: elements that share a scale.
    scale_rule: "floor", "ceil", "rceil" or "even", how the power of two is found (`shared_exponent`), for numbers of 6 bits of
        mantissa up to 127 / 64.

    Raises ValueError for another rule.
    """

    block: tuple[int, ...] = (1, 32)
    scale_rule: Rule = "floor"

    def __post_init__(self) -> None:
        if self.scale_rule not in RULES:
            raise ValueError(f"MXInt: scale_rule must be floor, ceil, rceil or even, got {self.scale_rule!r}")

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale of shape `grid`, in E8M0."""
        return {"scale": shared_exponent(amax_abs(x, grid), self.scale_rule, 127 / 64, 0, 6)}

    def stored(self, *, scale: Tensor) -> dict[str, Tensor]:
        """The nearest power of two."""
        return {"scale": E8M0().quantize(scale.float())}

    def encode(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor | None]:
        """Round `x` (float32) under the given scale."""
        # A block of NaN has NaN for its scale; what its codes are does not matter.
        codes = self._codes(x, scale).nan_to_num(0).to(torch.int8)
        return {"qdata": codes.reshape(x.shape), "scale": scale}

    def round(self, x: Tensor, *, scale: Tensor) -> Tensor:
        """The multiples of the scale that `x` (float32) becomes."""
        return (self._codes(x, scale) * 2**-6 * in_blocks(wide(scale))).reshape(x.shape)

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """Integers in float32, in blocks."""
        return (divided(to_blocks(x, scale.shape), scale) * 64).round().clamp(-127, 127)

    def operand(self, q: Any) -> Operand:
        """Fixed-point numbers with one bit before the point."""
        return Operand(q.qdata, q.scale, None, "fixed", 8, exponent=1, powers=q.scale.qdata)


class MXIntTensor(QTensor, spec=MXInt):
    """x = q / 64 * scale.

    qdata: (..., K) int8.
    scale: one per block, `E8M0Tensor`.
    """

    qdata: Elements
    scale: PerBlock

    spec: MXInt

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = to_blocks(self.qdata, self.scale.shape).float() * 2**-6 * in_blocks(wide(self.scale))
        return narrow(values, dtype).reshape(self.shape)


MXINT8 = MXInt().called("MXINT8")
"""8-bit integers in blocks of 32 that share a power of two (OCP MX): 8.25 bits per element."""
