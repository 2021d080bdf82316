"""Products of small floats in blocks on both sides, MX and NVFP4: `scaled_mm` by blocks on chips that have it, else emulated.

Scales are powers of two or e4m3, with at most one float32 for all. Codes times such scales are exact in bfloat16, so that an
emulated product, whose sum is in float32, differs from one of the chip by the order of the sum only. No chip was at hand that
has these products: they were traced on tensors without data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.base import dense
from ..dtypes.bits import packed_dim, unpack
from ..dtypes.blocks import expand, in_blocks, to_blocks
from ..dtypes.operand import Operand, stored_scale
from .kernels.device import cuda_capability

ROWS, COLUMNS = 128, 4
"""Of a tile of scales."""


def swizzle(scale: Tensor) -> Tensor:
    """Scales of rows (R, C) as the block-scaled products of Blackwell read them ("32_4_4"), flat.

    Tiles of 128 x 4, filled up with zeros, row of tiles by row of tiles; within a tile the scale of (r, c) is at
    (r % 32) * 16 + (r // 32) * 4 + c. scale: any dtype of a byte -> (ceil(R / 128) * 128 * ceil(C / 4) * 4,).
    """
    rows, columns = scale.shape
    octets = F.pad(scale.view(torch.uint8), (0, -columns % COLUMNS, 0, -rows % ROWS))
    tiles = octets.reshape(-(-rows // ROWS), 4, 32, -(-columns // COLUMNS), COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scale.dtype)


def unswizzle(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzle`: -> (rows, columns). Raises ValueError for another number of scales."""
    down, across = -(-rows // ROWS), -(-columns // COLUMNS)
    if scale.numel() != down * across * ROWS * COLUMNS:
        raise ValueError(
            f"unswizzle: scale has {scale.numel()} elements, and {rows} x {columns} scales are stored as {down * across} "
            f"tiles of {ROWS} x {COLUMNS}"
        )
    tiles = scale.view(torch.uint8).reshape(down, across, 32, 4, COLUMNS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * ROWS, across * COLUMNS)[:rows, :columns].contiguous().view(scale.dtype)


class Levels(NamedTuple):
    """The scales of an operand. blocks: bytes of powers of two, or e4m3. whole: float32, what multiplies all of them, or None."""

    blocks: Tensor
    whole: Tensor | None


def levels(a: Operand | None) -> Levels | None:
    """The scales of small floats in blocks; None where they are of another kind."""
    if a is None or a.kind != "minifloat":
        return None
    found = stored_scale(a)
    if found is None or (found.kind != "power" and found.values.dtype != torch.float8_e4m3fn):
        return None
    if found.scale is None:
        return Levels(found.values, None)
    return Levels(found.values, found.scale.float()) if found.scale.numel() == 1 else None


def numbers(a: Operand, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Codes times the scales of their blocks, float32 of `shape`, and what multiplies all of them."""
    found = levels(a)
    assert found is not None
    scale = dense(a.scale).float() if a.powers is not None else found.blocks.float()
    codes = unpack(a.codes, a.bits, packed_dim(a.codes.shape, shape))
    return (to_blocks(a.read(codes), scale.shape) * in_blocks(scale)).reshape(shape), found.whole


def times(total: Tensor, *factors: Tensor | None) -> Tensor:
    """`total` in float32 times the factors that there are."""
    total = total.float()
    for factor in factors:
        total = total if factor is None else total * factor.reshape(())
    return total


# What the chip multiplies.


def has_block_scaled(device: torch.device) -> bool:
    """Whether the chip multiplies blocks of small floats: NVIDIA's since Blackwell, with CUDA 12.8."""
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return cuda_capability(device) >= (10, 0) and version >= (12, 8)


def multiplies(a: Operand, b: Operand) -> bool:
    """Whether `scaled_mm` takes the two, a (M, K) and b (N, K): along K, floats up to e4m3 in blocks of 32 with powers of two, or
    e2m1 in blocks of 16 with e4m3; N a multiple of 16 and K of 32."""
    found = [_form(t) for t in (a, b)]
    return found[0] is not None and found[0] == found[1] and b.codes.shape[0] % 16 == 0 and _k(a) % 32 == 0


def _k(a: Operand) -> int:
    return a.codes.shape[1] * 8 // a.bits


def _form(a: Operand) -> tuple[int, bool] | None:
    """The block, and whether a second scale multiplies all."""
    found = levels(a)
    if found is None or a.codes.dim() != 2 or not found.blocks.shape[1] or a.codes.shape[0] % found.blocks.shape[0]:
        return None
    block = _k(a) // found.blocks.shape[1]
    if a.powers is not None:  # every number of such a format is one of e4m3
        return (32, False) if block == 32 and a.exponent <= 4 and a.bits - 1 - a.exponent <= 3 else None
    return (16, found.whole is not None) if block == 16 and (a.bits, a.exponent) == (4, 2) else None


def block_scaled_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a @ b.T as `dtype`, on the chip. a: (M, K), b: (N, K) that it `multiplies` -> (M, N).

    MXFP4 and MXFP6 go as MXFP8, exactly: PyTorch has no product of them that can be traced.
    """
    kinds, swizzled = F.ScalingType, F.SwizzleType
    form = _form(a)
    assert form is not None
    block, second = form
    recipes = [kinds.BlockWise1x32 if block == 32 else kinds.BlockWise1x16, *([kinds.TensorWise] if second else [])]
    swizzles = [swizzled.SWIZZLE_32_4_4, *([swizzled.NO_SWIZZLE] if second else [])]
    out = F.scaled_mm(
        _as_the_chip_reads(a), _as_the_chip_reads(b).t(), _scales(a), recipes, _scales(b), recipes, swizzles, swizzles,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    return out.to(dtype)


def _scales(a: Operand) -> list[Tensor]:
    """Those of blocks of each row, swizzled, and the one for all where there is one."""
    found = levels(a)
    assert found is not None
    octets = found.blocks.view(torch.uint8)
    rows = expand(octets, torch.Size([a.codes.shape[0], octets.shape[1]])).contiguous()  # of squares, each of them
    dtype = torch.float8_e4m3fn if a.powers is None else torch.float8_e8m0fnu
    return [swizzle(rows).view(dtype), *([] if found.whole is None else [found.whole.reshape(1)])]


def _as_the_chip_reads(a: Operand) -> Tensor:
    """Codes in e4m3; or in e2m1, two in a byte, the even one in the low half."""
    codes = unpack(a.codes, a.bits, 1)
    if a.powers is None:
        return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.float4_e2m1fn_x2)
    if a.exponent == 4 and a.bits == 8:
        return codes.contiguous().view(torch.float8_e4m3fn)
    return a.read(codes).to(torch.float8_e4m3fn)
