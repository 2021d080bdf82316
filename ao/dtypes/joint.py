"""`Joint`: a scale and a zero point in the 16 bits of one bfloat16, for codes of few bits, beside which they would weigh much.

The scale is the magnitude of the bfloat16, which has the range of float32. The zero point, a number of 5 bits, is its sign and
the last four bits of its mantissa: of the scales that bfloat16 has, one with the right last bits is taken. So the scale is read
as it is, and is at most a sixteenth of itself from the one that was asked for; a search for the best scale (algorithm="clip")
knows that. Integers of `bits` bits then have zero points in steps of 2**(bits - 5): a half for 4 bits, an eighth for 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Elements, QTensor, Spec
from .tracing import reads_no_bits

PLACES = 32
"""Zero points, from 0 to less than 2**bits."""

_LOW = 15
"""The bits of a place that the mantissa holds; the sign holds the one above."""


def join(scale: Tensor, place: Tensor) -> Tensor:
    """The scale next to `scale` (float32, not negative) whose last bits, as a bfloat16, are those of `place` (int32, 0 to 31).

    What is not finite stays so."""
    low = (place & _LOW) << 16
    nearest = ((scale.view(torch.int32) - low + (1 << 19)) >> 20).clamp(min=0)
    return torch.where(scale.isfinite(), ((nearest << 20) + low).view(torch.float32), scale)


def words_of(scale: Tensor, place: Tensor) -> Tensor:
    """The words (bfloat16) of what `join` gave for `place`."""
    return scale.float().copysign((_LOW + 0.5) - place).to(torch.bfloat16)


@dataclass(frozen=True, repr=False)
class Joint(Spec):
    """Scales that hold the zero points of codes of `bits` bits as well."""

    bits: int = 4
    block: tuple[int, ...] = (1,)

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """None: a zero point is given, or 0."""
        return {}

    def encode(self, x: Tensor, *, place: Tensor | None = None) -> dict[str, Tensor | None]:
        """`x` (float32, not negative) with zero points place / 2**(5 - bits)."""
        place = torch.zeros(x.shape, dtype=torch.int32, device=x.device) if place is None else place
        return {"words": words_of(join(x, place), place)}


class JointTensor(QTensor, spec=Joint):
    """x = |words|.

    words: bfloat16.
    """

    words: Elements

    spec: Joint

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.words.abs().to(dtype)

    @property
    def zero_point(self) -> JointZeroTensor:
        """The zero points, of codes that are not negative."""
        # One object for all who ask, guards of compiled code among them, which tell tensors apart by where they are.
        recorded = torch._C._is_tracing() or torch._C._len_torch_dispatch_stack()
        traced = torch.compiler.is_dynamo_compiling() or recorded
        kept: Any = None if traced else self.__dict__.get("kept_zero_point")
        if kept is None or kept.words is not self.words:
            kept = JointZero(bits=self.spec.bits).wrap({"words": self.words}, torch.float32, self.shape)
            if not traced:
                self.kept_zero_point = kept
        return kept


@dataclass(frozen=True, repr=False)
class JointZero(Joint):
    """The zero points of a `JointTensor`, over the same words. Nothing is quantized by it."""


class JointZeroTensor(QTensor, spec=JointZero):
    """x = place / 2**(5 - bits), the place being the sign and the last four bits of `words`.

    words: bfloat16.
    """

    words: Elements

    spec: JointZero

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        words = self.words.float()
        if reads_no_bits():
            place = _last_bits(words.abs()) + torch.where(words < 0, PLACES / 2, 0.0)
        else:
            bits = words.view(torch.int32)
            place = (((bits >> 16) & _LOW) | ((bits >> 27) & (PLACES // 2))).float()
        return (place * 2.0 ** (self.spec.bits - 5)).to(dtype)


def _last_bits(x: Tensor) -> Tensor:
    """The last four bits of the mantissas of bfloat16 numbers that are not negative, by arithmetic."""
    power = 2.0 ** x.log2().floor()  # a logarithm may be off to either side of an integer
    mantissa = x / power
    mantissa = torch.where(mantissa < 1, mantissa * 2, torch.where(mantissa >= 2, mantissa / 2, mantissa))
    last = (mantissa * 128) - (mantissa * (128 / 16)).floor() * 16
    return torch.where(x > 0, last, 0.0)
