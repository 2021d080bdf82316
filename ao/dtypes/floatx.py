"""`FloatX`: floats of 3 to 8 bits in blocks, x = q * scale: MXFP4, MXFP6, MXFP8, NVFP4 and FP6 are constants of it.

OCP Microscaling Formats (MX) specification 1.0: blocks of 32 share a power of two, E8M0. NVFP4 (arXiv:2509.25149): blocks of 16
share an e4m3 float, and the tensor a float32. FP6 (arXiv:2401.14112): a row shares a float.
Codes of fewer than 8 bits are packed along the last dim that is a multiple of 8 (bits.py): 6 bits cost 6.
Cost: bits + 8 / 32 = 4.25 bits per element for MXFP4, 4 + 8 / 16 = 4.5 for NVFP4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Elements, PerBlock, QTensor, Spec, dense
from .bits import pack, pack_dim, packed_dim, unpack
from .blocks import amax_abs, blocks_shape, in_blocks, to_blocks
from .e8m0 import E8M0, RULES, Rule, inverse_of, shared_exponent, wide
from .float8 import Float8
from .operand import Element, Operand, minifloat
from .rounding import exponent_of, narrow, random_words, round_to
from .tracing import reads_no_bits

_MANTISSA, _BIAS = 23, 127
"""Of float32."""

_SCALES = ("float32", "bfloat16", "float16", "e8m0", "e4m3")


@dataclass(frozen=True, repr=False)
class FloatX(Spec):
    """Floats of a sign, `exponent` and `mantissa` bits, with a scale per block.

    exponent, mantissa: 2 and 1 (e2m1) to 5 and 2; at most 8 bits with the sign. With bias = 2**(exponent - 1) - 1 a code stands
        for 2**(E - bias) * (1 + M / 2**mantissa), and where E = 0 for 2**(1 - bias) * M / 2**mantissa. No code is an infinity
        or NaN: e4m3 ends at 448 and e5m2 at 57344, as OCP has them, the others at the last code.
    block: elements that share a scale.
    scale: how a scale is stored: "float32", "bfloat16", "float16", "e4m3", or "e8m0", a power of two:

        scale = max|x| / max(format),    q = round(clamp(x / scale, -max, max)), half to even

    scale_rule: "floor", "ceil", "rceil" or "even", how the power of two for e8m0 is found (`shared_exponent`).
    scale_spec: how to quantize the scales again: NVFP4 is a scale in e4m3 with a float32 scale per tensor.
    rounding: "nearest", half to even, or "stochastic", to either neighbour so that the mean is kept (rounding.py): of
        gradients. Where the scale rule lets the largest numbers saturate, their mean is not.
    four_over_six: let each block of an e2m1 format map its maximum to 6 or to 4, whichever has the smaller squared error
        (arXiv:2512.02010).

    A block of zeros keeps its zeros; a NaN in a block makes the block NaN. Raises ValueError for parameters outside these.
    """

    exponent: int = 2
    mantissa: int = 1
    block: tuple[int, ...] = (1, 32)
    scale: Literal["float32", "bfloat16", "float16", "e8m0", "e4m3"] = "e8m0"
    scale_rule: Rule = "floor"
    scale_spec: Spec | None = None
    four_over_six: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if not (2 <= self.exponent <= 5 and self.mantissa >= 0 and self.bits <= 8):
            raise ValueError(
                f"FloatX: exponent must be 2 to 5, and exponent + mantissa at most 7, got {self.exponent} and {self.mantissa}"
            )
        if self.scale not in _SCALES:
            raise ValueError(f"FloatX: scale must be one of {', '.join(_SCALES)}, got {self.scale!r}")
        if self.scale_rule not in RULES:
            raise ValueError(f"FloatX: scale_rule must be floor, ceil, rceil or even, got {self.scale_rule!r}")
        if self.scale_spec is not None and self.scale != "float32":
            raise ValueError(f"FloatX: scale_spec quantizes float32 scales; leave out scale={self.scale!r}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"FloatX: rounding must be 'nearest' or 'stochastic', got {self.rounding!r}")
        if self.four_over_six and ((self.exponent, self.mantissa) != (2, 1) or self.scale == "e8m0"):
            raise ValueError("FloatX: four_over_six is for e2m1 with scales that are no powers of two")

    @property
    def bits(self) -> int:
        """Bits per element."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """Of the exponent."""
        return 2 ** (self.exponent - 1) - 1

    @property
    def emax(self) -> int:
        """The exponent of the largest number."""
        return 2**self.exponent - 1 - self.bias - (self.exponent == 5)

    @property
    def max(self) -> float:
        """The largest number: 6 for e2m1, 7.5 for e2m3, 28 for e3m2, 448 for e4m3."""
        last = 2 if (self.exponent, self.mantissa) == (4, 3) else 1  # e4m3 spends its last code on NaN
        return 2.0**self.emax * (2 - last * 2.0**-self.mantissa)

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale of shape `grid`, as it is stored."""
        largest = amax_abs(x, grid)
        if self.scale == "e8m0":
            return {"scale": shared_exponent(largest, self.scale_rule, self.max, self.emax, self.mantissa)}
        scale = largest * (1 / self.max)
        return self.stored(scale=self._four_or_six(x, scale) if self.four_over_six else scale)

    def stored(self, *, scale: Tensor) -> dict[str, Tensor]:
        """The scale in its dtype; to e8m0 the nearest power of two."""
        scale = scale.float()
        if self.scale_spec is not None:
            return {"scale": self.scale_spec.quantize(scale)}
        if self.scale == "e4m3":
            largest = torch.where(scale.isinf(), torch.nan, scale.clamp(max=448.0))  # an infinity is not hidden
            return {"scale": largest.to(torch.float8_e4m3fn)}
        if self.scale == "e8m0":
            return {"scale": E8M0().quantize(scale)}
        return {"scale": round_to(scale, getattr(torch, self.scale))}

    def _four_or_six(self, x: Tensor, six: Tensor) -> Tensor:
        """Per block, the scale that maps its maximum to 6, or the one to 4 unless it were the largest of all: a second scale
        per tensor is then the same whatever the blocks choose."""
        four = torch.minimum(six * 1.5, amax_abs(six, (1,) * six.dim()))
        both = [dense(t).float() for t in self.stored(scale=torch.stack([six, four]))["scale"].unbind()]
        blocks = to_blocks(x, six.shape)
        inside = list(range(1, blocks.dim(), 2))
        errors = [(self.round(x, scale=s).reshape(blocks.shape) - blocks).square().sum(inside) for s in both]
        return torch.where(errors[1] < errors[0], both[1], both[0])

    def encode(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor | None]:
        """Round `x` (float32) to the format under the given scale."""
        codes = self._codes(x, scale)
        return {"qdata": pack(codes, self.bits, pack_dim(x.shape, self.bits, self)), "scale": scale}

    def round(self, x: Tensor, *, scale: Tensor) -> Tensor:
        """The multiples of the scale that `x` (float32) becomes."""
        values = self.values(to_blocks(self._codes(x, scale), scale.shape)) * in_blocks(wide(scale))
        return values.reshape(x.shape)

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """Codes, uint8 of the shape of `x`: sign, exponent and mantissa from the high bit down."""
        q = to_blocks(x, scale.shape) * in_blocks(inverse_of(scale))
        if reads_no_bits() and self.rounding == "nearest":
            size = q.abs().clamp(max=self.max)
            power = exponent_of(size).clamp(min=1 - self.bias)
            codes = (power + (self.bias - 1)) * 2**self.mantissa + (size * torch.exp2(self.mantissa - power)).round()
            return (codes + torch.where(q < 0, 2.0 ** (self.bits - 1), 0.0)).to(torch.uint8).reshape(x.shape)
        word = None if self.rounding == "nearest" else random_words(to_blocks(x, scale.shape))
        return self._rounded(q, word).to(torch.uint8).reshape(x.shape)

    def _rounded(self, q: Tensor, word: Tensor | None) -> Tensor:
        """The codes (int32) of `q` (float32), rounded by the random bits of `word` if there are any."""
        size = q.abs().clamp(max=self.max)
        cut = _MANTISSA - self.mantissa
        bits = size.view(torch.int32)
        steps = size * 2.0 ** (self.bias - 1 + self.mantissa)  # below the normal numbers, where all steps are alike
        if word is None:
            above, small = (2 ** (cut - 1) - 1) + ((bits >> cut) & 1), steps.round()
        else:
            above, small = word & (2**cut - 1), (steps + (word & 0xFFFF).float() * 2.0**-16).floor()
        normal = ((bits + above) >> cut) - ((_BIAS - self.bias) << self.mantissa)
        codes = torch.where(size < 2.0 ** (1 - self.bias), small.to(torch.int32), normal)
        sign = (q.view(torch.int32) >> 31) & (1 << (self.bits - 1))
        return codes | sign

    def element(self) -> Element | None:
        """None where rounding is at random, a block chooses between two scales, or scales are quantized together."""
        if self.rounding != "nearest" or self.four_over_six or self.scale_spec is not None:
            return None

        def code(x: Tensor, inverse: Tensor) -> Tensor:
            return self._rounded(x * inverse, None)

        return Element(self.bits, lambda scale: (inverse_of(scale),), code, lambda scale: {"scale": scale})

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, float32."""
        return minifloat(codes, self.exponent, self.mantissa)

    def operand(self, q: Any) -> Operand:
        """Small floats, also where a byte is one of torch's: packed codes have no infinity and no NaN."""
        powers = q.scale.qdata if self.scale == "e8m0" else None
        return Operand(q.qdata, q.scale, None, "minifloat", self.bits, exponent=self.exponent, powers=powers)


class FloatXTensor(QTensor, spec=FloatX):
    """x = q * scale.

    qdata: (..., K * bits / 8) uint8.
    scale: one per block: float32, bfloat16, float16, float8_e4m3fn, or a QTensor that dequantizes to it: `E8M0Tensor`, or of
        scale_spec.
    """

    qdata: Elements
    scale: PerBlock

    spec: FloatX

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = blocks_shape(self.scale.shape, self.shape)
        codes = unpack(self.qdata, self.spec.bits, packed_dim(self.qdata.shape, self.shape), shape)
        return narrow(self.spec.values(codes) * in_blocks(wide(self.scale)), dtype).reshape(self.shape)


MXFP4 = FloatX(2, 1).called("MXFP4")
"""4-bit floats in blocks of 32 that share a power of two (OCP MX): 4.25 bits per element."""

MXFP6 = FloatX(2, 3).called("MXFP6")
"""6-bit floats of 3 mantissa bits in blocks of 32 (OCP MX): 6.25 bits."""

MXFP8 = FloatX(4, 3).called("MXFP8")
"""e4m3 in blocks of 32 (OCP MX): 8.25 bits."""

NVFP4 = FloatX(2, 1, (1, 16), "float32", scale_spec=Float8(block=(-1, -1))).called("NVFP4")
"""4-bit floats in blocks of 16 with e4m3 scales, and a float32 scale per tensor: 4.5 bits."""

FP6 = FloatX(3, 2, (1, -1), "float32").called("FP6")
"""6-bit floats with a scale per row (FP6-LLM)."""
