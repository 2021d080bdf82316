"""`Shifted`: integers whose scales, and what is taken off, may be quantized themselves, x = q * scale - shift.

The super-blocks of GGUF (llama.cpp's k-quants) are of this form: Q4_K is `Shifted(4, (1, 32), scale_spec=S, shift_spec=S)` with
S = Intx(6, (1, 8)), unsigned, in float16. So are the integers of optimum-quanto, with scales and shifts in floating point.
Codes are packed along the last dim that is a multiple of 8 (bits.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Elements, PerBlock, QTensor, Spec, dense
from .bits import pack, pack_dim, packed_dim, unpack
from .blocks import amax_abs, amin_amax, blocks_shape, in_blocks, to_blocks
from .operand import Operand
from .rounding import narrow, reciprocal, round_to


@dataclass(frozen=True, repr=False)
class Shifted(Spec):
    """Integers times a scale, less a shift, both per block.

    bits: 1 to 8.
    block: elements that share a scale and a shift.
    symmetric: no shift, and codes count from the middle: x = (q - 2**(bits - 1)) * scale, with
        scale = max|x| / 2**(bits - 1).
    centered: codes count from the middle, and there is a shift all the same: x = (q - 2**(bits - 1)) * scale - shift, as in
        PyTorch's own int4 products. Then shift = -(lo + 2**(bits - 1) * scale), of either sign.
    scale_dtype: of scale and shift: "float32", "bfloat16" or "float16".
    scale_spec, shift_spec: how to quantize them instead; neither is ever negative.

    Unless symmetric, with lo = min(x, 0), hi = max(x, 0):

        scale = (hi - lo) / (2**bits - 1),    shift = -lo,    q = clamp(round((x + shift) / scale), 0, 2**bits - 1)

    Codes are chosen for the scale and the shift as they are stored. Raises ValueError for parameters outside these.
    """

    bits: int = 4
    block: tuple[int, ...] = (1, 32)
    symmetric: bool = False
    centered: bool = False
    scale_dtype: str = "float32"
    scale_spec: Spec | None = None
    shift_spec: Spec | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"Shifted: bits must be 1 to 8, got {self.bits}")
        if self.scale_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"Shifted: scale_dtype must be float32, bfloat16 or float16, got {self.scale_dtype!r}")
        if self.symmetric and (self.centered or self.shift_spec is not None):
            raise ValueError("Shifted: shift_spec and centered are for symmetric=False")
        if self.centered and self.shift_spec is not None:
            raise ValueError("Shifted: shift_spec is for centered=False")

    @property
    def middle(self) -> int:
        """The code from which codes count."""
        return 2 ** (self.bits - 1) if self.symmetric or self.centered else 0

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale and, unless symmetric, shift, of shape `grid`, as they are stored."""
        if self.symmetric:
            return self.stored(scale=amax_abs(x, grid) * (1 / 2 ** (self.bits - 1)))
        lo, hi = amin_amax(x, grid)
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        scale = (hi - lo) * (1 / (2**self.bits - 1))
        return self.stored(scale=scale, shift=-lo - self.middle * scale)

    def stored(self, *, scale: Tensor, shift: Tensor | None = None) -> dict[str, Tensor]:
        """Both in their dtype, or quantized."""
        found = {"scale": self._stored(scale, self.scale_spec)}
        if shift is not None:
            found["shift"] = self._stored(shift, self.shift_spec)
        return found

    def _stored(self, t: Tensor, spec: Spec | None) -> Tensor:
        t = t.float()
        return round_to(t, getattr(torch, self.scale_dtype)) if spec is None else spec.quantize(t)

    def encode(self, x: Tensor, *, scale: Tensor, shift: Tensor | None = None) -> dict[str, Tensor | None]:
        """Codes for `x` (float32) under the given scale and shift."""
        codes = self._codes(x, scale, shift).reshape(x.shape).to(torch.uint8)
        return {
            "qdata": pack(codes, self.bits, pack_dim(x.shape, self.bits, self)),
            "scale": scale,
            "shift": shift,
        }

    def round(self, x: Tensor, *, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        """What `x` (float32) becomes."""
        return self.values(self._codes(x, scale, shift), scale, shift).reshape(x.shape)

    def operand(self, q: Any) -> Operand:
        """Codes, and what is taken off after the scale, both of which may be quantized."""
        return Operand(q.qdata, q.scale, q.shift, "shifted", self.bits, self.middle)

    def _codes(self, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """Codes in float32 and in blocks."""
        steps = in_blocks(reciprocal(dense(scale)))
        blocks = to_blocks(x, scale.shape)
        if shift is not None:
            blocks = blocks + in_blocks(dense(shift).float())
        return (blocks * steps).round_().add_(self.middle).clamp_(0, 2**self.bits - 1)

    def values(self, codes: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """What codes (float32, in blocks) stand for."""
        steps = in_blocks(dense(scale).float())
        values = (codes - self.middle) * steps
        # Exact where the scale has few bits, as in GGUF: no compiler's contraction of the two changes anything there.
        return values if shift is None else values - in_blocks(dense(shift).float())


class ShiftedTensor(QTensor, spec=Shifted):
    """x = q * scale - shift.

    qdata: (..., K * bits / 8) uint8.
    scale: one per block, float32, bfloat16, float16, or a QTensor that dequantizes to it.
    shift: like scale; None if symmetric.
    """

    qdata: Elements
    scale: PerBlock
    shift: PerBlock | None

    spec: Shifted

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = blocks_shape(self.scale.shape, self.shape)
        codes = unpack(self.qdata, self.spec.bits, packed_dim(self.qdata.shape, self.shape), shape)
        return narrow(self.spec.values(codes.float(), self.scale, self.shift), dtype).reshape(self.shape)
