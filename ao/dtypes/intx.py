"""`Intx`: integers of 1 to 8 bits, signed or unsigned, x = (q - zero_point) * scale.

Signed codes of fewer than 8 bits are stored with an offset, as q + 2**(bits - 1), and packed along the last dim that is a
multiple of 8 (bits.py); 8-bit codes are plain int8 or uint8. Cost: `bits + (32 + 8) / block` bits per element with a
float32 scale and an integer zero point, `bits + 32 / block` without a zero point, and `bits + 16 / block` with both in 16 bits
(joint.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Elements, PerBlock, QTensor, Spec, dense
from .bits import pack, pack_dim, packed_dim, unpack
from .blocks import amax_abs, amin_amax, blocks_shape, in_blocks, mean_abs, to_blocks
from .joint import PLACES, Joint, JointTensor, join, words_of
from .operand import Cast, Element, Operand
from .rounding import narrow, product, reciprocal, round_to, stochastic_round


@dataclass(frozen=True, repr=False)
class Intx(Spec):
    """Affine integers.

    bits: 1 to 8.
    block: elements that share a scale, per dim: (1, -1) per row, (1, g) per group, (-1, -1) per tensor, (b, b) 2-D.
    signed: range [-2**(bits-1), 2**(bits-1) - 1], else [0, 2**bits - 1].
    symmetric: no zero point. With m = max|x| over the block, n = 2**bits - 1,

        scale = m / (n / 2),        q = clamp(round(x / scale))

        so that +m clips by half a step. Below 3 bits a maximum would leave most codes unused: 2 bits take
        scale = mean|x| (arXiv:2402.17764), 1 bit stands for the two values +-mean|x| (arXiv:1603.05279). Unsigned and
        symmetric is for data that is never negative: scale = m / n. Asymmetric, with lo = min(x, 0), hi = max(x, 0):

        scale = (hi - lo) / n,      q = clamp(round(x / scale) + zero_point)

        None, the default, is symmetric for 8 bits and asymmetric below, where the zero point earns its place.
    clip: False widens a symmetric scale to max(min(x) / qmin, max(x) / qmax), so that nothing clips.
    zero_point: "int" is qmin - round(lo / scale), so that 0 is exact; "float" keeps the fraction, and lo = min(x),
        hi = max(x) need not include 0. "joint" is for at most 4 bits: scale and zero point share the 16 bits of a bfloat16
        (joint.py). The scale is the nearest that there is, and the zero point is rounded to a 32nd of the range of codes.
    narrow: leave out the lowest code, so that the range is symmetric, [-127, 127] for 8 bits, and scale = m / qmax; 2 bits
        are then BitNet's ternary numbers -1, 0 and 1 times mean|x|.
    scale_dtype: "float32", "bfloat16" or "float16", also of a float zero point. bfloat16 has the range of float32; `quantize_`
        refuses a weight whose scales float16 does not hold.
    rounding: "nearest", half to even, or "stochastic", up or down so that the mean is kept (rounding.py): for weights that
        are trained, whose updates are smaller than a step.

    Raises ValueError for parameters outside these.
    """

    bits: int = 8
    block: tuple[int, ...] = (1, -1)
    signed: bool = True
    symmetric: bool | None = None
    clip: bool = True
    zero_point: Literal["int", "float", "joint"] = "int"
    narrow: bool = False
    scale_dtype: str = "float32"
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", self.bits == 8)
        if not 1 <= self.bits <= 8:
            raise ValueError(f"Intx: bits must be 1 to 8, got {self.bits}")
        if self.zero_point not in ("int", "float", "joint"):
            raise ValueError(f"Intx: zero_point must be 'int', 'float' or 'joint', got {self.zero_point!r}")
        if self.zero_point == "joint" and (self.bits > 4 or self.symmetric or self.scale_dtype != "float32"):
            raise ValueError(
                "Intx: zero_point='joint' is for at most 4 bits with symmetric=False, and has 16 bits for both: leave out "
                f"scale_dtype; got bits={self.bits}, symmetric={self.symmetric}, scale_dtype={self.scale_dtype!r}"
            )
        if self.scale_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"Intx: scale_dtype must be float32, bfloat16 or float16, got {self.scale_dtype!r}")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"Intx: rounding must be 'nearest' or 'stochastic', got {self.rounding!r}")
        if self.narrow and (self.bits == 1 or not (self.signed and self.symmetric)):
            raise ValueError("Intx: narrow=True needs signed=True, symmetric=True and at least 2 bits")

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        usual = self.symmetric == (self.bits == 8)
        return {k: v for k, v in super().settings().items() if k != "symmetric" or not usual}

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def is_binary(self) -> bool:
        """Whether the codes -1 and 0 stand for -scale / 2 and +scale / 2."""
        return self.bits == 1 and self.signed and bool(self.symmetric)

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale and, if asymmetric, zero_point, of shape `grid`, by the formulas of the class."""
        dtype = getattr(torch, self.scale_dtype)
        qmin, qmax = self.qmin, self.qmax
        steps = qmax - qmin
        if not self.symmetric:
            lo, hi = amin_amax(x, grid)
            if self.zero_point != "float":
                lo, hi = lo.clamp(max=0), hi.clamp(min=0)
            scale = (hi - lo) * (1 / steps)
            if self.zero_point == "joint":
                return self._joint(scale, qmin - lo * reciprocal(scale))
            if self.zero_point == "float":
                return self._fraction(lo, hi, scale, dtype)
            scale = round_to(scale, dtype)
            zero_point = (qmin - (lo * reciprocal(scale)).round()).clamp(qmin, qmax)
            return {"scale": scale, "zero_point": zero_point.to(torch.int8 if self.signed else torch.uint8)}
        if not self.clip:
            lo, hi = amin_amax(x, grid)
            scale = hi * (1 / max(qmax, 1))
            if self.signed:
                scale = torch.maximum(scale, lo * (1 / qmin))
        elif self.signed and self.bits <= 2:
            scale = mean_abs(x, grid) * (2 if self.bits == 1 else 1)
        else:
            scale = amax_abs(x, grid) * (1 / (steps / 2 if self.signed else steps))
        return {"scale": round_to(scale, dtype)}

    def check_range(self, x: Tensor) -> None:
        """Raise ValueError where scales are stored in float16 and one of `x` is beyond it, or the largest all but 0 in it."""
        if self.scale_dtype == "float16":
            wide = replace(self, scale_dtype="float32")
            largest = float(wide.choose_qparams(x.float(), self.grid(x.shape))["scale"].max()) if x.numel() else 0.0
            if largest > torch.finfo(torch.float16).max or 0 < largest < 2.0**-20:
                raise ValueError(
                    f"{self}: the largest scale would be {largest:.3g}, and float16 holds 1e-6 to 65504; use "
                    "scale_dtype='bfloat16' or 'float32'"
                )

    def _joint(self, scale: Tensor, zero_point: Tensor) -> dict[str, Tensor]:
        """Scale (bfloat16) and zero point (float32) as they are stored in one."""
        place = self._place(zero_point)
        found = join(scale, place).to(torch.bfloat16)
        return {"scale": found, "zero_point": place.float() * (2**self.bits / PLACES) + self.qmin}

    def _place(self, zero_point: Tensor) -> Tensor:
        """Which of the zero points that there are is next, int32."""
        return ((zero_point.float() - self.qmin) * (PLACES / 2**self.bits)).round().clamp(0, PLACES - 1).to(torch.int32)

    def _fraction(self, lo: Tensor, hi: Tensor, scale: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The scale, no finer than its dtype can place a zero point for numbers far from 0, and the zero point.

        Numbers that are one but for such a step become one number, (q - zero_point) * scale with q = 1 or -1 and a zero point
        near 0, where it has all of its bits. Where an end is 0 but for such a step, as beside an outlier, it becomes 0.
        """
        finest = max(
            min(torch.finfo(dtype).eps, 2**-8), 2**-20
        )  # of the largest number: 8 bits of a block around 0 are coarser
        least = torch.maximum(lo.abs(), hi.abs()) * finest
        middle = lo + (hi - lo) * 0.5
        one = hi - lo <= least
        scale = round_to(torch.where(one, middle.abs(), torch.maximum(scale, least)), dtype)
        code = torch.where(one, middle.sign().clamp(self.qmin, self.qmax), float(self.qmin))
        zero = code - product(torch.where(one, middle, lo), reciprocal(scale))
        zero = torch.where(~one & (lo.abs() <= least), float(self.qmin), zero)
        zero = torch.where(~one & (hi.abs() <= least), float(self.qmax), zero)
        return {"scale": scale, "zero_point": round_to(zero, dtype)}

    def stored(self, *, scale: Tensor, zero_point: Tensor | None = None) -> dict[str, Tensor]:
        """The scale in its dtype. An integer zero point is rounded, and one of the codes, so that 0 is exact."""
        dtype = getattr(torch, self.scale_dtype)
        if self.zero_point == "joint":
            return self._joint(scale.float(), torch.zeros_like(scale) if zero_point is None else zero_point)
        found = {"scale": round_to(scale.float(), dtype)}
        if zero_point is not None and self.zero_point == "float":
            found["zero_point"] = round_to(zero_point.float(), dtype)
        elif zero_point is not None:
            codes = torch.int8 if self.signed else torch.uint8
            found["zero_point"] = zero_point.float().round().clamp(self.qmin, self.qmax).to(codes)
        return found

    def encode(
        self, x: Tensor, *, scale: Tensor, zero_point: Tensor | None = None, inverse: Tensor | None = None
    ) -> dict[str, Tensor | None]:
        """Codes for `x` (float32) under the given qparams. inverse: 1 / scale, where it is known."""
        if self.zero_point == "joint":
            scale, zero_point = self.stored(scale=scale, zero_point=zero_point).values()
        q = self._codes(x, scale, zero_point, inverse).reshape(x.shape)
        if self.bits == 8:
            qdata = q.to(torch.int8 if self.signed else torch.uint8)
        else:
            if self.signed:
                q.add_(2 ** (self.bits - 1))
            # By way of int8, to which a CPU converts five times faster than to uint8.
            qdata = pack(q.to(torch.int8).view(torch.uint8), self.bits, pack_dim(q.shape, self.bits, self))
        if self.zero_point == "joint":
            return {"qdata": qdata, **self._words(scale, zero_point)}
        return {"qdata": qdata, "scale": scale, "zero_point": zero_point}

    def _words(self, scale: Tensor, zero_point: Tensor | None) -> dict[str, Tensor | None]:
        """The fields beside the codes, of qparams as `stored` gives them, where they share 16 bits."""
        assert zero_point is not None
        words = words_of(scale, self._place(zero_point))
        return {"scale": Joint(bits=self.bits).wrap({"words": words}, torch.float32, scale.shape), "zero_point": None}

    def element(self) -> Element | None:
        """None where a mean is the scale, codes are signs, or rounding is at random."""
        by_mean = self.symmetric and self.signed and self.bits <= 2 and self.clip
        if by_mean or self.is_binary or self.rounding != "nearest":
            return None
        offset = 2 ** (self.bits - 1) if self.signed and self.bits < 8 else 0
        low, high = self.qmin + offset, self.qmax + offset
        whole = self.zero_point == "int"

        def reads(scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, ...]:
            inverse = reciprocal(scale)
            if zero_point is None:
                return (inverse,)
            return inverse, zero_point.float() + offset if whole else product(zero_point, scale)

        def code(x: Tensor, inverse: Tensor) -> Tensor:
            return ((x * inverse).round() + offset).clamp(low, high).to(torch.int32) & 255

        def code_from_zero(x: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
            return ((x * inverse).round() + zero).clamp(low, high).to(torch.int32) & 255

        def code_from_fraction(x: Tensor, inverse: Tensor, shift: Tensor) -> Tensor:
            return (((x + shift) * inverse).round() + offset).clamp(low, high).to(torch.int32) & 255

        chosen = code if self.symmetric else code_from_zero if whole else code_from_fraction
        return Element(self.bits, reads, chosen, self._words if self.zero_point == "joint" else dict)

    def round(self, x: Tensor, *, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The multiples of the scale that `x` (float32) becomes."""
        if isinstance(scale, JointTensor):
            zero_point = scale.zero_point.decode() + self.qmin
            scale = dense(scale)
        return self._values(self._codes(x, scale, zero_point), scale, zero_point).reshape(x.shape)

    def operand(self, q: Any) -> Operand:
        """Codes with an affine map."""
        bits = self.bits
        if self.zero_point == "joint":
            both: Any = q.scale
            return Operand(q.qdata, both, both.zero_point, "affine", bits, words=both.words)
        offset = 2 ** (bits - 1) if self.signed and bits < 8 else 0
        return Operand(
            q.qdata, q.scale, q.zero_point, "affine", bits, 0.5 if offset == 1 and self.symmetric else offset
        )

    def cast(self) -> Cast | None:
        """Integers of 8 bits; None for fewer, which are packed."""
        if self.bits < 8:
            return None
        steps = self.qmax - self.qmin
        plain = (self.clip if self.symmetric else self.zero_point == "int") and self.scale_dtype == "float32"
        levels = (steps / 2 if self.signed and self.symmetric else steps) if plain else None
        dtype = torch.int8 if self.signed else torch.uint8
        return Cast(dtype, self.qmin, self.qmax, not self.symmetric, levels, self.rounding == "nearest")

    def _codes(self, x: Tensor, scale: Tensor, zero_point: Tensor | None, inverse: Tensor | None = None) -> Tensor:
        """The codes, in float32 and in blocks."""
        blocks = to_blocks(x, scale.shape)
        steps = in_blocks(reciprocal(scale) if inverse is None else inverse)
        # In place: no fresh memory.
        if zero_point is None:
            if self.is_binary:
                return blocks.clone().lt_(0).neg_()
            q = blocks * steps
        elif zero_point.is_floating_point():
            # Not x * steps + zero_point, which a compiler may or may not contract into one rounding.
            q = (blocks + in_blocks(product(zero_point, scale))).mul_(steps)
        else:
            q = blocks * steps
        q = q.round_() if self.rounding == "nearest" else stochastic_round(q.clamp_(-255, 255), blocks)
        if zero_point is not None and not zero_point.is_floating_point():
            q.add_(in_blocks(zero_point.float()))
        return q.clamp_(self.qmin, self.qmax)

    def _values(self, q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """(q - zero_point) * scale, of codes in float32 and in blocks."""
        if zero_point is not None:
            q = q - in_blocks(zero_point.float())
        elif self.is_binary:
            q = q + 0.5
        return q * in_blocks(scale.float())


class IntxTensor(QTensor, spec=Intx):
    """x = (q - zero_point) * scale.

    qdata: (..., K) int8 or uint8 for 8 bits, else (..., K * bits / 8) uint8.
    scale: one per block, float32, bfloat16 or float16, or `JointTensor`.
    zero_point: like scale, int8 or uint8, or the dtype of scale; None if symmetric, or in the scale.
    """

    qdata: Elements
    scale: PerBlock
    zero_point: PerBlock | None

    spec: Intx

    def codes(self, shape: Sequence[int] | None = None) -> Tensor:
        """The integers, int8 or uint8, of the shape of the tensor, or another view of it."""
        bits, signed = self.spec.bits, self.spec.signed
        codes = unpack(self.qdata, bits, packed_dim(self.qdata.shape, self.shape), shape)
        return codes if bits == 8 or not signed else codes.to(torch.int8) - 2 ** (bits - 1)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = self.codes(blocks_shape(self.scale.shape, self.shape)).float()
        scale, zero_point = dense(self.scale), self.zeros()
        return narrow(self.spec._values(codes, scale, zero_point), dtype).reshape(self.shape)

    def zeros(self) -> Tensor | None:
        """The zero points as a plain tensor, wherever they are; None if there are none."""
        if isinstance(self.scale, JointTensor):
            return self.scale.zero_point.decode() + float(self.spec.qmin)
        return self.zero_point
