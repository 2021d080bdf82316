"""`PositiveSteps`: even steps up to the largest number of a block, and no zero.

For what is divided by, such as the root of a second moment: rounded to zero it would make the quotient explode
(arXiv:2309.01507).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .mapped import Mapped


@dataclass(frozen=True, repr=False)
class PositiveSteps(Mapped):
    """x = (code + 1) * scale, with scale = max|x| / 2**bits over the block.

    bits: 2 to 8. Numbers below 1.5 * scale, negative ones included, become scale.
    """

    bits: int = 4
    block: tuple[int, ...] = (1, 128)

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"PositiveSteps: bits must be 2 to 8, got {self.bits!r}")

    @property
    def values(self) -> tuple[float, ...]:
        """1, 2, ..., 2**bits."""
        return tuple(float(i + 1) for i in range(2**self.bits))

    def entries(self, codes: Tensor) -> Tensor:
        """values[codes], float32."""
        return codes.float() + 1.0

    def nearest(self, x: Tensor) -> Tensor:
        """The codes (int32) of the values next to `x` (float32)."""
        return (x - 0.5).to(torch.int32).clamp(0, 2**self.bits - 1)
