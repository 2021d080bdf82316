"""`Codebook`: x = table[code] * scale. `NF4`, QLoRA's 4-bit NormalFloat with double quantization, is a constant of it.

Codes of fewer than 8 bits are packed along the last dim that is a multiple of 8 (bits.py). Cost: `bits + 32 / block` bits
per element. With `scale_spec` the scales themselves are quantized: NF4 in blocks of 64 costs 4 + 8 / 64 = 4.125 bits per
element and 64 bits per row, in place of 4.5.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Elements, PerBlock, QTensor, Shared, Spec, dense
from .bits import pack, pack_dim, packed_dim, unpack
from .blocks import amax_abs, blocks_shape, expand, in_blocks, mean, to_blocks
from .intx import Intx
from .operand import Element, Operand, look_up
from .rounding import narrow, reciprocal, round_to, uncontracted


def _dynamic() -> tuple[float, ...]:
    """The signed map of 8 bits with seven decades (arXiv:1511.04561), rounded to float32 as bitsandbytes rounds it: decade i is
    the middles of 2**i steps from 0.1 to 1, times 10**(i - 6)."""
    values = [0.0, 1.0]
    for i in range(7):
        n = 2**i
        step = _float32(0.9 / n)
        ends = [_float32(0.1) + step * j if 2 * j <= n else 1.0 - step * (n - j) for j in range(n + 1)]
        ends = [_float32(e) for e in ends]
        for a, b in itertools.pairwise(ends):
            value = _float32(_float32((a + b) / 2) * _float32(10.0 ** (i - 6)))
            values += [value, -value]
    return tuple(sorted(values))


def _float32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


TABLES: dict[str, tuple[float, ...]] = {
    # QLoRA (arXiv:2305.14314), appendix E: the quantiles of a normal distribution, with an exact zero.
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # bitsandbytes' 4-bit float, over 12, and its map of the scales of double quantization.
    "fp4": tuple(sorted(_float32(s * v / 12) for s in (-1, 1) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))),
    "dynamic": _dynamic(),
}


@dataclass(frozen=True, repr=False)
class Codebook(Spec):
    """Codes into a sorted table of values, with a scale per block.

    table: a name in `TABLES`, or the sorted values themselves, 2, 4, 8, ... or 256 of them.
    block: elements that share a scale.
    scale_dtype: "float32", "bfloat16" or "float16".
    scale_spec: how to quantize the scales instead (double quantization).
    offset: take the mean of all elements off first, one float32: x = table[code] * scale + offset.

        scale = max|x| over the block / max|table|,    code = argmin_i |x / scale - table[i]|

    A value midway between two entries takes the lower one. With `scale_spec` the codes are chosen for the scale as it is
    stored. Raises ValueError for a table that is not sorted or whose length is no power of two.
    """

    table: str | tuple[float, ...] = "nf4"
    block: tuple[int, ...] = (1, 64)
    scale_spec: Spec | None = None
    offset: bool = False
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.table, str) and self.table not in TABLES:
            raise ValueError(
                f"Codebook: table must be one of {sorted(TABLES)} or a tuple of values, got {self.table!r}"
            )
        n = len(self.values)
        if n not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"Codebook: table must have 2, 4, 8, ... or 256 values, got {n}")
        if list(self.values) != sorted(self.values):
            raise ValueError("Codebook: the values of table must be sorted")
        if self.scale_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"Codebook: scale_dtype must be float32, bfloat16 or float16, got {self.scale_dtype!r}")

    @property
    def values(self) -> tuple[float, ...]:
        """The entries of the table."""
        return TABLES[self.table] if isinstance(self.table, str) else self.table

    @property
    def bits(self) -> int:
        """Bits per code."""
        return int(math.log2(len(self.values)))

    def block_of(self, qparam: str) -> tuple[int, ...]:
        """The offset is that of the tensor."""
        return (-1,) if qparam == "offset" else self.block

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale of shape `grid`, as it is stored; and the offset, of one element."""
        offset = None
        if self.offset:
            offset = mean(x).reshape((1,) * x.dim())
            x = x - offset
        largest, scale = max(map(abs, self.values)), amax_abs(x, grid)
        return self.stored(scale=scale if largest == 1 else scale * (1 / largest), offset=offset)

    def stored(self, *, scale: Tensor, offset: Tensor | None = None) -> dict[str, Tensor]:
        """The scale in its dtype, or quantized by `scale_spec`, and the offset."""
        scale = scale.float()
        nested = self.scale_spec
        stored = round_to(scale, getattr(torch, self.scale_dtype)) if nested is None else nested.quantize(scale)
        found: dict[str, Tensor] = {"scale": stored}
        return found if offset is None else {**found, "offset": offset}

    def encode(self, x: Tensor, *, scale: Tensor, offset: Tensor | None = None) -> dict[str, Tensor | None]:
        """The nearest entries of the table for `x` (float32) under the given scale and offset."""
        codes, table = self._codes(x, scale, offset)
        return {
            "qdata": pack(codes, self.bits, pack_dim(x.shape, self.bits, self)),
            "scale": scale,
            "offset": offset,
            "table": table,
        }

    def round(self, x: Tensor, *, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """The nearest multiples of the scale for `x` (float32)."""
        codes, table = self._codes(x, scale, offset)
        values = (to_blocks(look_up(table, codes), scale.shape) * in_blocks(dense(scale).float())).reshape(x.shape)
        return values if offset is None else uncontracted(values) + expand(offset, x.shape)

    def operand(self, q: Any) -> Operand | None:
        """Codes into a table; None with an offset."""
        return Operand(q.qdata, q.scale, None, "table", self.bits, 0, q.table) if q.offset is None else None

    def element(self) -> Element | None:
        """None with an offset, where scales of several rows are quantized together, or with many entries to compare with."""
        nested = self.scale_spec
        if self.offset or self.bits > 4 or not (nested is None or (len(nested.block) == 2 and nested.block[0] == 1)):
            return None
        middles = torch.tensor(
            [(a + b) / 2 for a, b in zip(self.values, self.values[1:])], dtype=torch.float32, device="cpu"
        )
        # Those that the bits of a code compare with, the highest first: which of them is next is said by the bits before.
        levels = [middles[2**bit - 1 :: 2 ** (bit + 1)].clone() for bit in reversed(range(self.bits))]

        def code(x: Tensor, inverse: Tensor) -> Tensor:
            unit = x * inverse
            code = (unit > float(levels[0])).int()
            for level in levels[1:]:
                code = code + code + (unit > level[code.long()]).int()
            return code

        def fields(scale: Tensor) -> dict[str, Tensor | None]:
            return {
                "scale": scale,
                "offset": None,
                "table": torch.tensor(self.values, dtype=torch.float32, device="cpu"),
            }

        return Element(self.bits, lambda scale: (reciprocal(dense(scale)),), code, fields)

    def _codes(self, x: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes, uint8 of the shape of `x`, and the table."""
        x = x if offset is None else x - expand(offset, x.shape)
        unit = (to_blocks(x, scale.shape) * in_blocks(reciprocal(dense(scale)))).reshape(x.shape)
        table = torch.tensor(self.values, dtype=torch.float32, device=x.device)
        middles = [(a + b) / 2 for a, b in zip(self.values, self.values[1:])]
        if len(middles) < 16:
            # Counted in float32: a CPU compares into floats five times faster than into bools.
            codes = unit.clone().gt_(middles[0])
            above = torch.empty_like(unit)
            for middle in middles[1:]:
                codes.add_(torch.gt(unit, middle, out=above))
            return codes.to(torch.int8).view(torch.uint8), table
        return torch.bucketize(unit.contiguous(), (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8), table


class CodebookTensor(QTensor, spec=Codebook):
    """x = table[code] * scale + offset.

    qdata: (..., K * bits / 8) uint8.
    scale: one per block, of scale_dtype, or a QTensor that dequantizes to it.
    offset: (1, ..., 1) float32, or None for 0.
    table: (2**bits,) float32.
    """

    qdata: Elements
    scale: PerBlock
    offset: PerBlock | None
    table: Shared

    spec: Codebook

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        blocks = blocks_shape(self.scale.shape, self.shape)
        codes = unpack(self.qdata, self.spec.bits, packed_dim(self.qdata.shape, self.shape), blocks)
        values = look_up(self.table, codes) * in_blocks(dense(self.scale).float())
        if self.offset is not None:
            values = uncontracted(values).reshape(self.shape) + expand(self.offset, self.shape)
        return narrow(values, dtype).reshape(self.shape)


NF4 = Codebook("nf4", (1, 64), Intx(8, (1, -1), signed=False, symmetric=False, zero_point="float")).called("NF4")
"""QLoRA's NormalFloat: blocks of 64, the scales of a row quantized to 8 bits with a row scale and offset."""

NF4Tensor = CodebookTensor


def nf4_spec(shape: Sequence[int], block_size: int = 64, scaler_block_size: int = 256) -> Codebook:
    """NF4 for data of `shape`: at most `scaler_block_size` scales of a row share a scale and an offset of their own.

    Raises ValueError when `block_size` does not divide the last dim.
    """
    scales = Codebook("nf4", (1, block_size)).grid(tuple(shape))[-1]
    group = max((d for d in range(1, min(scales, scaler_block_size) + 1) if scales % d == 0), default=scales)
    block = (1, -1 if group == scales else group)
    return Codebook("nf4", (1, block_size), Intx(8, block, signed=False, symmetric=False, zero_point="float"))


def to_nf4(tensor: Tensor, block_size: int = 64, scaler_block_size: int = 256) -> QTensor:
    """Quantize to NF4 with double quantization (arXiv:2305.14314).

    tensor: floating point, any shape whose rows (last dim) are a multiple of `block_size`.
    block_size: elements that share a scale.
    scaler_block_size: at most so many scales of a row share a scale of their own.

    Raises ValueError when `block_size` does not divide the last dim.
    """
    return nf4_spec(tensor.shape, block_size, scaler_block_size).quantize(tensor)


def linear_nf4(input: Tensor, weight: QTensor) -> Tensor:
    """`input @ weight.T` for a frozen NF4 weight: backward decodes the weight again rather than keep it dense."""
    return torch.nn.functional.linear(input, weight)
