"""`Codebook`: x = table[code] * scale. `NF4`, QLoRA's 4-bit NormalFloat with double quantization, is a constant of it.

Codes of fewer than 8 bits are packed along the last dim that is a multiple of 8 (bits.py). Cost: `bits + 32 / block` bits
per element. With `scale_spec` the scales themselves are quantized: NF4 in blocks of 64 costs 4 + 8 / 64 = 4.125 bits per
element and 64 bits per row, in place of 4.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Elements, PerBlock, QTensor, Shared, Spec, dense
from .bits import pack, pack_dim, packed_dim, unpack
from .blocks import amax_abs, blocks_shape, in_blocks, to_blocks
from .intx import Intx
from .onnx_mode import exporting
from .pieces import is_eager
from .rounding import reciprocal

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
}


@dataclass(frozen=True, repr=False)
class Codebook(Spec):
    """Codes into a sorted table of values in [-1, 1], with a float32 scale per block.

    table: a name in `TABLES`, or the sorted values themselves, 2, 4, 8, ... or 256 of them.
    block: elements that share a scale.
    scale_spec: how to quantize the scales (double quantization); None keeps them in float32.

        scale = max|x| over the block,    code = argmin_i |x / scale - table[i]|

    A value midway between two entries takes the lower one. With `scale_spec` the codes are chosen for the scale as it is
    stored. Raises ValueError for a table that is not sorted or whose length is no power of two.
    """

    table: str | tuple[float, ...] = "nf4"
    block: tuple[int, ...] = (1, 64)
    scale_spec: Spec | None = None

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

    @property
    def values(self) -> tuple[float, ...]:
        """The entries of the table."""
        return TABLES[self.table] if isinstance(self.table, str) else self.table

    @property
    def bits(self) -> int:
        """Bits per code."""
        return int(math.log2(len(self.values)))

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """scale of shape `grid`: float32, or quantized by `scale_spec`."""
        return self.stored(scale=amax_abs(x, grid))

    def stored(self, *, scale: Tensor) -> dict[str, Tensor]:
        """The scale, quantized by `scale_spec`."""
        return {"scale": scale if self.scale_spec is None else self.scale_spec.quantize(scale)}

    def encode(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor | None]:
        """The nearest entries of the table for `x` (float32) under the given scale."""
        codes, table = self._codes(x, scale)
        return {
            "qdata": pack(codes, self.bits, pack_dim(x.shape, self.bits, str(self))),
            "scale": scale,
            "table": table,
        }

    def round(self, x: Tensor, *, scale: Tensor) -> Tensor:
        """The nearest multiples of the scale for `x` (float32)."""
        codes, table = self._codes(x, scale)
        return (to_blocks(look_up(table, codes), scale.shape) * in_blocks(dense(scale))).reshape(x.shape)

    def _codes(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, uint8 of the shape of `x`, and the table."""
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
    """x = table[code] * scale.

    qdata: (..., K * bits / 8) uint8.
    scale: one per block, float32, or a QTensor that dequantizes to it.
    table: (2**bits,) float32.
    """

    qdata: Elements
    scale: PerBlock
    table: Shared

    spec: Codebook

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        blocks = blocks_shape(self.scale.shape, self.shape)
        codes = unpack(self.qdata, self.spec.bits, packed_dim(self.qdata.shape, self.shape), blocks)
        return (look_up(self.table, codes) * in_blocks(dense(self.scale))).to(dtype).reshape(self.shape)


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes]. Codes are in bounds: a compiler need not check each of them."""
    if exporting():
        return table[codes.long()]
    return table[codes.int()] if is_eager(codes) else torch.ops.aten._unsafe_index(table, [codes.int()])


NF4 = Codebook("nf4", (1, 64), Intx(8, (1, -1), signed=False, symmetric=False, zero_point="float"))
"""QLoRA's NormalFloat: blocks of 64, the scales of a row quantized to 8 bits with a row scale and offset."""

Spec.named[NF4] = "NF4"

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
