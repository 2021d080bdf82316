"""`E8M0`: powers of two in a byte, what the MX formats (OCP Microscaling 1.0) have for scales, and how a block chooses one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .base import Elements, QTensor, Spec, dense
from .blocks import in_blocks
from .operand import look_up
from .rounding import exponent_of, reciprocal
from .tracing import reads_no_bits

_MANTISSA = 23
"""Of float32."""

Rule = Literal["floor", "ceil", "rceil", "even"]
"""How the power of two of a block is found: `shared_exponent`."""

RULES: tuple[str, ...] = get_args(Rule)


@dataclass(frozen=True, repr=False)
class E8M0(Spec):
    """Powers of two, 2**(byte - 127), the nearest to x. Byte 255 is NaN. There is no sign and no zero."""

    block: tuple[int, ...] = (1,)

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """None: a power of two stands for itself."""
        return {}

    def encode(self, x: Tensor) -> dict[str, Tensor | None]:
        """The bytes of `x` (float32)."""
        bits = x.view(torch.int32)
        half = torch.where(bits < 1 << _MANTISSA, 1 << (_MANTISSA - 2), 1 << (_MANTISSA - 1))
        return {"qdata": _byte((bits + half) >> _MANTISSA, x)}


class E8M0Tensor(QTensor, spec=E8M0):
    """x = 2**(qdata - 127).

    qdata: uint8.
    """

    qdata: Elements

    spec: E8M0

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if reads_no_bits():
            powers = [*(2.0 ** (byte - 127) for byte in range(255)), math.nan]
            return look_up(torch.tensor(powers, dtype=torch.float32, device=self.qdata.device), self.qdata).to(dtype)
        byte = self.qdata.to(torch.int32)
        # Byte 0 is no normal number of float32.
        bits = torch.where(byte == 0, 1 << (_MANTISSA - 1), byte << _MANTISSA) | (byte == 255)
        return bits.view(torch.float32).to(dtype)


def shared_exponent(largest: Tensor, rule: str, maximum: float, emax: int, mantissa: int) -> QTensor:
    """The power of two of blocks, in E8M0.

    largest: m, the largest magnitude of each block, float32.
    maximum: the largest number of the elements' format; emax: its exponent; mantissa: bits of its mantissa.
    rule: "floor"  2**(floor(log2 m) - emax), the text of OCP; the largest numbers of a block may saturate
        "ceil"   2**(ceil(log2 m) - emax)
        "rceil"  the next power of two from m / maximum up; nothing saturates
        "even"   as "floor", of m rounded to the mantissa of the format

    Where m is not finite the scale is NaN, and so is the block.
    """
    if reads_no_bits():
        m = largest / maximum if rule == "rceil" else largest
        power = exponent_of(m)
        least = {"floor": 2.0, "even": 2 - 2.0 ** -(mantissa + 1)}.get(rule)  # of 1 to 2, what goes to the next one
        up = m > torch.exp2(power) if least is None else m >= torch.exp2(power) * least
        byte = _byte(power + up.to(m.dtype) + (127 - (0 if rule == "rceil" else emax)), largest)
    elif rule == "rceil":
        ratio = largest / maximum
        bits = ratio.view(torch.int32)
        above = torch.where(bits < 1 << _MANTISSA, 1 << (_MANTISSA - 1), 0)  # below 2**-126 a half is e8m0's 0
        byte = _byte((bits + (2**_MANTISSA - 1) - above) >> _MANTISSA, largest)
    else:
        more = {"floor": 0, "ceil": 2**_MANTISSA - 1, "even": 1 << (_MANTISSA - 1 - mantissa)}[rule]
        byte = _byte(((largest.view(torch.int32) + more) >> _MANTISSA) - emax, largest)
    return E8M0().wrap({"qdata": byte}, torch.float32, byte.shape)


def wide(scale: Tensor) -> Tensor:
    """A stored scale as float32."""
    return dense(scale).float()


def divided(blocks: Tensor, scale: Tensor) -> Tensor:
    """x / scale. blocks: x (float32) as `to_blocks` views it; scale: as it is stored."""
    return blocks * in_blocks(inverse_of(scale))


def inverse_of(scale: Tensor) -> Tensor:
    """1 / scale, float32, of a scale as it is stored."""
    if not isinstance(scale, E8M0Tensor):
        return reciprocal(dense(scale))
    if reads_no_bits():
        return 1 / wide(scale)
    exponent = 254 - scale.qdata.to(torch.int32)
    # In bits, which a CPU goes through ten times as fast as through truths: 2**-127 is half of what has the exponent 1, and what
    # is below 0 is NaN.
    bits = (exponent << _MANTISSA).clamp(min=1 << (_MANTISSA - 1)) | (exponent >> 31)
    return bits.view(torch.float32)


def _byte(exponent: Tensor, number: Tensor) -> Tensor:
    """The byte of 2**(exponent - 127), or NaN where `number` is not finite."""
    if exponent.is_floating_point():
        return torch.where(number.isfinite(), exponent.clamp(0, 254), 255).to(torch.uint8)
    beyond = (0x7F7FFFFF - (number.view(torch.int32) & 0x7FFFFFFF)) >> 31  # all bits where it is not finite
    return (exponent.clamp(0, 254) | (beyond & 255)).to(torch.uint8)
