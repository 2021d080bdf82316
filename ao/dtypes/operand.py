"""How a quantized matrix multiplies: what ao.matmul reads of a format, so that it need not know the format.

`Spec.operand` gives an `Operand`, whose `kind` is one of a few ways from codes to numbers; a path or a kernel of ao.matmul knows
kinds, widths and shapes. A format of your own that gives an operand has every path that reads such codes. `Spec.cast` says the
same of an activation before it is quantized: which bytes it becomes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .bits import signed_trits
from .tracing import exporting, is_eager, reads_no_bits

Kind = Literal["affine", "trits", "shifted", "float", "minifloat", "fixed", "table", "int4pack", "sparse24", "blocks"]


class Operand(NamedTuple):
    """A matrix (N, K) as a product reads it.

    codes: (N, K), a byte each, or codes of fewer bits packed by `pack` along the dim where they are shorter.
    scale: one per block; of the rank of the data. It may be a QTensor that dequantizes to it.
    zero_point: like scale, or None; it may be a QTensor, too.
    kind: how a code becomes a number:

        "affine"    x = (code - offset - zero_point) * scale; the dtype of codes of 8 bits says whether they have a sign
        "trits"     x = (code - 1) * scale, where codes are 0 to 2, five in a byte (`pack_trits`)
        "shifted"   x = (code - offset) * scale - zero_point
        "float"     x = code * scale, where codes are float8
        "minifloat"  x = minifloat(code) * scale, where codes are a sign, exponent and mantissa bits
        "fixed"     x = code * 2**(1 + exponent - bits) * scale, where codes are int8: fixed-point numbers
        "table"     x = table[code] * scale
        "int4pack"  codes and scale are in the layout of ATen's int4 product on their device: only that product reads them
        "sparse24"  codes say which two of four are there (pairs.py), (N, K / 8), and `part` is the two: (N, K / 2)
        "blocks"    codes are the columns of the blocks that are there, scale is where each row of blocks begins among them, and
                    `part` is the blocks, one above the other: (kept * size, size)

    bits: of a code.
    offset: what the codes are stored with; signed ones of fewer than 8 bits with 2**(bits - 1).
    table: (2**bits,) float32.
    exponent: bits of the exponent of a minifloat; its mantissa has bits - 1 - exponent. Of a fixed-point number, the bits before
        the point; behind it are bits - 1 - exponent.
    powers: the scales as bytes, uint8, where they are powers of two, 2**(byte - 127).
    part: the numbers that are not zero, a QTensor or plain.
    words: scales and zero points, bfloat16, where one word holds both (joint.py).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    kind: Kind = "affine"
    bits: int = 8
    offset: float = 0
    table: Tensor | None = None
    exponent: int = 0
    powers: Tensor | None = None
    part: Any = None
    words: Tensor | None = None

    @property
    def unit(self) -> float:
        """What an integer code is times: the last place of a fixed-point number, else 1."""
        return 2.0 ** (1 + self.exponent - self.bits) if self.kind == "fixed" else 1.0

    @property
    def linear(self) -> bool:
        """Whether numbers are codes less a zero point, times a scale."""
        return self.kind in ("affine", "float")

    def read(self, codes: Tensor) -> Tensor:
        """What codes that were unpacked (int32; of 8 bits their own dtype) are before zero point and scale, float32."""
        if self.kind == "table":
            assert self.table is not None
            return look_up(self.table, codes)
        if self.kind == "minifloat":
            return minifloat(codes, self.exponent, self.bits - 1 - self.exponent)
        return codes.float() * self.unit if self.kind == "fixed" else codes.float()

    @property
    def by_row(self) -> bool:
        """Whether each row, or the whole matrix, has one scale, so that it can be applied to the sum over K."""
        return self.scale.shape[1] == 1 and self.scale.shape[0] in (1, self.codes.shape[0])

    @property
    def plain(self) -> bool:
        """Whether codes are bytes that, times the scale, are the numbers: without a zero point or a table."""
        whole = self.bits == 8 and self.zero_point is None and not self.offset
        return whole and (self.kind == "affine" or self.kind == "float")

    def in_bytes(self) -> Operand:
        """The same matrix with codes of a byte each, where they were trits."""
        return self._replace(codes=signed_trits(self.codes), kind="affine", bits=8) if self.kind == "trits" else self

    def t(self) -> Operand:
        """The transpose, of codes of a byte each without a zero point."""
        return self._replace(codes=self.codes.t(), scale=self.scale.t())


class StoredScale(NamedTuple):
    """How the scales of an operand are stored.

    kind: "plain" for numbers, float8 among them; "power" for exponents, 2**(value - 127); "quantized" for bytes that stand for
        (value - zero_point) * scale; "joint" for words that hold zero points as well.
    """

    kind: Literal["plain", "power", "quantized", "joint"]
    values: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None


def stored_scale(a: Operand) -> StoredScale | None:
    """The scales of `a` as they are stored; None where more than one step leads from them to numbers."""
    if a.powers is not None:
        return StoredScale("power", a.powers)
    if a.words is not None:
        return StoredScale("joint", a.words)
    scale: Any = a.scale
    if not hasattr(scale, "spec"):  # a QTensor, which this file does not import
        return StoredScale("plain", scale)
    inner = scale.spec.operand(scale)
    if inner is None or not inner.linear or inner.bits != 8 or inner.offset or hasattr(inner.scale, "spec"):
        return None
    return StoredScale("quantized", inner.codes, inner.scale, inner.zero_point)


class Cast(NamedTuple):
    """How a Spec makes codes of a byte: code = cast(clamp(round(x / scale) + zero_point, low, high)).

    dtype: of the codes, int8, uint8 or float8, to which the cast rounds.
    zero_point: whether there is one.
    levels: scale = max|x| / levels in float32, with a zero point (max(x, 0) - min(x, 0)) / levels; None where a scale is chosen
        otherwise.
    nearest: whether to round half to even, rather than at random.
    """

    dtype: torch.dtype
    low: float
    high: float
    zero_point: bool = False
    levels: float | None = None
    nearest: bool = True


def minifloat(codes: Tensor, exponent: int, mantissa: int) -> Tensor:
    """Sign, exponent and mantissa, from the high bit down, as float32: the bits of the magnitude moved to their places there, and
    then a power of two for the difference of the biases. Numbers below the normal ones come out right as well."""
    if reads_no_bits():
        return look_up(torch.tensor(_numbers(exponent, mantissa), dtype=torch.float32, device=codes.device), codes)
    word = codes.to(torch.int32)
    size = (word & (2 ** (exponent + mantissa) - 1)) << (23 - mantissa)
    value = size.view(torch.float32) * 2.0 ** (128 - 2 ** (exponent - 1))
    return (((word >> (exponent + mantissa)) << 31) | value.view(torch.int32)).view(torch.float32)


def _numbers(exponent: int, mantissa: int) -> list[float]:
    """What all codes of a `minifloat` stand for."""
    positive = []
    for code in range(2 ** (exponent + mantissa)):
        power, fraction = code >> mantissa, code % 2**mantissa / 2**mantissa
        positive.append((fraction + (power > 0)) * 2.0 ** (max(power, 1) + 1 - 2 ** (exponent - 1)))
    return [*positive, *(-x for x in positive)]


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes]. Codes are in bounds: a compiler need not check each of them."""
    if exporting():
        return table[codes.long()]
    return table[codes.int()] if is_eager(codes) else torch.ops.aten._unsafe_index(table, [codes.int()])


class Element(NamedTuple):
    """How a number becomes its code, in a block whose qparams follow from its smallest and its largest number.

    bits: of a code, as it is stored.
    reads: from the qparams to what a code depends on, one float32 per block each.
    code: from numbers (float32) and those, all of one shape, to the codes (int32).
    fields: from the qparams to the fields beside `qdata`, which holds the codes, packed along rows.
    """

    bits: int
    reads: Callable[..., tuple[Tensor, ...]]
    code: Callable[..., Tensor]
    fields: Callable[..., dict[str, Tensor | None]]
