"""`Float8`: 8-bit floating point, x = q * scale (OCP 8-bit floating point specification 1.0; arXiv:2209.05433).

e4m3: 1 sign, 4 exponent, 3 mantissa bits, largest 448, no infinity. e5m2: 1, 5, 2 bits, largest 57344.
Cost: `8 + 32 / block` bits per element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Elements, PerBlock, QTensor, Spec
from .blocks import amax_abs, in_blocks, to_blocks
from .operand import Cast, Element, Operand
from .rounding import narrow, power_of_two_above, reciprocal
from .tracing import exporting

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, repr=False)
class Float8(Spec):
    """8-bit floats with a float32 scale per block.

    format: "e4m3" or "e5m2".
    block: elements that share a scale: (1, -1) per row, (-1, -1) per tensor, (1, 128) or (128, 128) blocks.

        scale = max|x| / max(format),    q = cast(clamp(x / scale, -max, max))

    power_of_two: take the next power of two for the scale, so that multiplying by it loses nothing, also in bfloat16.

    A block of zeros keeps its zeros; a NaN in a block makes the block NaN, it is not hidden.
    """

    format: Literal["e4m3", "e5m2"] = "e4m3"
    block: tuple[int, ...] = (1, -1)
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if self.format not in _DTYPES:
            raise ValueError(f"Float8: format must be 'e4m3' or 'e5m2', got {self.format!r}")

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype of the elements."""
        return _DTYPES[self.format]

    @property
    def max(self) -> float:
        """The largest finite value: 448 or 57344."""
        return torch.finfo(self.dtype).max

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale of shape `grid`, float32."""
        scale = amax_abs(x, grid) * (1 / self.max)
        return {"scale": power_of_two_above(scale) if self.power_of_two else scale}

    def encode(self, x: Tensor, *, scale: Tensor, inverse: Tensor | None = None) -> dict[str, Tensor | None]:
        """Round `x` (float32) to the format under the given scale. inverse: 1 / scale, if it is known."""
        q = (to_blocks(x, scale.shape) * in_blocks(reciprocal(scale) if inverse is None else inverse)).clamp_(
            -self.max, self.max
        )
        if exporting():
            return {"qdata": q.reshape(x.shape).to(self.dtype), "scale": scale}  # onnxruntime reshapes no float8
        return {"qdata": q.to(self.dtype).reshape(x.shape), "scale": scale}

    def element(self) -> Element | None:
        """None for e5m2."""
        if self.format != "e4m3":
            return None

        def code(x: Tensor, inverse: Tensor) -> Tensor:
            return self.codes((x * inverse).clamp(-self.max, self.max))

        return Element(8, lambda scale: (reciprocal(scale),), code, lambda scale: {"scale": scale})

    def operand(self, q: Any) -> Operand:
        """Codes as they are."""
        return Operand(q.qdata, q.scale, None, "float")

    def cast(self) -> Cast:
        """A cast to the format."""
        return Cast(self.dtype, -self.max, self.max, levels=None if self.power_of_two else self.max)

    # The bytes of e4m3 by arithmetic that a compiler makes wide code of on a CPU, where its own conversions branch.

    def numbers(self, codes: Tensor) -> Tensor:
        """What the bytes `codes` (uint8) stand for, float32. Those of NaN are 480: the scale of such a block is no number."""
        code = codes.to(torch.int32)
        size = code & 127
        number = ((size << 20) + (120 << 23)).view(
            torch.float32
        )  # with a leading 1, which subnormal numbers do not have
        number = number - (8 - size).clamp(min=0).float() * 2.0**-10
        return (number.view(torch.int32) | (code & 128) << 24).view(torch.float32)

    def codes(self, x: Tensor) -> Tensor:
        """The bytes (int32) of the numbers next to `x`, float32 and at most 448."""
        size = x.abs()
        bits = size.view(torch.int32)
        normal = (bits + 0x7FFFF + (bits >> 20 & 1) >> 20) - (120 << 3)  # to even
        place = 2.0**14  # where numbers are as far apart as the subnormal ones
        subnormal = (size.clamp(max=2.0**-6) + place).view(torch.int32) - ((127 + 14) << 23)
        code = torch.maximum(normal, subnormal).clamp(max=127)
        return code | (x.view(torch.int32) >> 24 & 128)


class Float8Tensor(QTensor, spec=Float8):
    """x = qdata * scale.

    qdata: (..., K) float8_e4m3fn or float8_e5m2.
    scale: one per block, float32.
    """

    qdata: Elements
    scale: PerBlock

    spec: Float8

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        qdata = self.qdata.float() if exporting() else self.qdata  # onnxruntime reshapes no float8
        values = to_blocks(qdata, self.scale.shape).float() * in_blocks(self.scale)
        return narrow(values, dtype).reshape(self.shape)
