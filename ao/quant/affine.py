"""Affine quantization as plain functions over plain tensors, for people who write their own algorithm.

    scale, zero_point = choose_qparams_affine(w, MappingType.ASYMMETRIC, (1, 32), torch.uint4)
    q = quantize_affine(w, (1, 32), scale, zero_point, torch.uint4)     # int8 or uint8, one code per element
    w = dequantize_affine(q, (1, 32), scale, zero_point, torch.uint4)   # (q - zero_point) * scale

Names and parameters are those of the field. A QTensor packs the codes: `Spec.quantize(w, scale=..., zero_point=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import in_blocks, to_blocks
from .granularity import MappingType, ZeroPointDomain


def _bounds(dtype: torch.dtype, quant_min: int | None, quant_max: int | None) -> tuple[int, int]:
    """The range of codes: that of the dtype (int4: -8 to 7), unless given."""
    name = str(dtype).removeprefix("torch.")
    unsigned = name.startswith("uint")
    bits = name.removeprefix("u").removeprefix("int")
    if not (name.removeprefix("u").startswith("int") and bits.isdigit() and 1 <= int(bits) <= 32):
        raise ValueError(f"the dtype of codes must be torch.int1 to int8, uint1 to uint8, int16 or int32, got {dtype}")
    n = int(bits)
    lo, hi = (0, 2**n - 1) if unsigned else (-(2 ** (n - 1)), 2 ** (n - 1) - 1)
    lo, hi = lo if quant_min is None else int(quant_min), hi if quant_max is None else int(quant_max)
    if lo >= hi:
        raise ValueError(f"quant_min must be below quant_max, got {lo} and {hi}")
    return lo, hi


def _stored(dtype: torch.dtype, lo: int, hi: int) -> torch.dtype:
    """The dtype that codes in [lo, hi] are kept in: that asked for, or a whole byte for one of fewer bits."""
    if dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        return dtype
    return torch.uint8 if lo >= 0 else torch.int8


def _grid(shape: torch.Size, block_size: Sequence[int], who: str) -> tuple[int, ...]:
    """The shape of the qparams."""
    block = tuple(n if b == -1 else b for n, b in zip(shape, block_size))
    if len(block_size) != len(shape) or any(b < 1 or n % b for n, b in zip(shape, block)):
        raise ValueError(
            f"{who}: block_size={tuple(block_size)} does not divide the shape {tuple(shape)}; give one entry per dim that "
            "divides it, or -1 for the whole dim"
        )
    return tuple(n // b for n, b in zip(shape, block))


def choose_qparams_affine(
    input: Tensor,
    mapping_type: MappingType,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype = torch.int32,
    preserve_zero: bool = True,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, one per block, in the shape of the blocks' grid.

    input: floating point. block_size: elements per block and dim; -1 for a whole dim.
    target_dtype: of the codes; its range unless quant_min and quant_max are given.
    eps: the least scale; by default the smallest normal number of the input's dtype.
    scale_dtype: by default the input's.
    preserve_zero: the range includes 0. False needs a zero point that is a fraction, and takes a scale of at least
        max(|lo|, |hi|) * eps(scale_dtype), so that the zero point of nearly equal numbers far from 0 stays finite.
    zero_point_domain: INT; or FLOAT for zero points in scale_dtype that keep their fraction.

    With lo, hi the ends of a block (0 among them) and n = quant_max - quant_min:

        SYMMETRIC                  scale = max(-lo, hi) / (n / 2)
        SYMMETRIC_NO_CLIPPING_ERR  scale = max(lo / quant_min, hi / quant_max)
        ASYMMETRIC                 scale = (hi - lo) / n,    zero_point = clamp(quant_min - round(lo / scale))

    The zero point of the symmetric ones is the middle code, round up.
    """
    lo_code, hi_code = _bounds(target_dtype, quant_min, quant_max)
    blocks = to_blocks(input, _grid(input.shape, block_size, "choose_qparams_affine"))
    inside = tuple(range(1, blocks.dim(), 2))
    lo, hi = blocks.amin(inside).float(), blocks.amax(inside).float()
    floating = zero_point_domain is ZeroPointDomain.FLOAT
    if not preserve_zero and not (floating and mapping_type is MappingType.ASYMMETRIC):
        raise ValueError(
            "choose_qparams_affine: preserve_zero=False needs MappingType.ASYMMETRIC and ZeroPointDomain.FLOAT"
        )
    if preserve_zero:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    least = torch.finfo(input.dtype).smallest_normal if eps is None else eps
    middle = torch.full_like(lo, (hi_code + lo_code + 1) // 2)
    if mapping_type is MappingType.SYMMETRIC:
        scale, zero = torch.maximum(-lo, hi) * (1 / ((hi_code - lo_code) / 2)), middle
    elif mapping_type is MappingType.SYMMETRIC_NO_CLIPPING_ERR:
        scale, zero = torch.maximum(lo * (1 / lo_code) if lo_code else -lo, hi * (1 / max(hi_code, 1))), middle
    else:
        scale = ((hi - lo) * (1 / (hi_code - lo_code))).clamp(min=least)
        if not preserve_zero:
            scale = torch.maximum(
                scale, torch.maximum(lo.abs(), hi.abs()) * torch.finfo(scale_dtype or input.dtype).eps
            )
        zero = lo_code - lo / scale
        zero = zero if floating else zero.round().clamp(lo_code, hi_code)
    scale = scale.clamp(min=least).to(scale_dtype or input.dtype)
    return scale, zero.to(scale.dtype if floating else zero_point_dtype)


def _codes(x: Tensor, grid: Sequence[int], scale: Tensor, zero_point: Tensor | None, lo: int, hi: int) -> Tensor:
    """Codes in float32, in blocks."""
    steps = scale.double().reciprocal().float()  # as the formats round it
    q = to_blocks(x.float(), grid) * in_blocks(steps.reshape(tuple(grid)))
    if zero_point is None:
        return q.round().clamp(lo, hi)
    zero = in_blocks(zero_point.float().reshape(tuple(grid)))
    return ((q + zero).round() if zero_point.is_floating_point() else q.round() + zero).clamp(lo, hi)


def quantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    output_dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
) -> Tensor:
    """clamp(round(x / scale) + zero_point), half to even: codes of the shape of `input`.

    scale, zero_point: one per block, in any shape of as many elements; zero_point None for none. Codes of fewer than 8 bits
    come in int8 or uint8.
    """
    lo, hi = _bounds(output_dtype, quant_min, quant_max)
    grid = _grid(input.shape, block_size, "quantize_affine")
    return _codes(input, grid, scale, zero_point, lo, hi).to(_stored(output_dtype, lo, hi)).reshape(input.shape)


def dequantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    input_dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
    *,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(q - zero_point) * scale, computed in float32. input: codes. Returns its shape in output_dtype.

    Raises ValueError for codes of another dtype than `input_dtype` is kept in.
    """
    lo, hi = _bounds(input_dtype, quant_min, quant_max)
    if input.dtype not in (input_dtype, _stored(input_dtype, lo, hi)):
        raise ValueError(f"dequantize_affine: the codes are {input.dtype}, and input_dtype says {input_dtype}")
    grid = _grid(input.shape, block_size, "dequantize_affine")
    values = to_blocks(input.float(), grid)
    if zero_point is not None:
        values = values - in_blocks(zero_point.float().reshape(grid))
    return (values * in_blocks(scale.float().reshape(grid))).to(output_dtype).reshape(input.shape)


class _FakeQuantizeAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Any, scale: Tensor, zero: Tensor | None, lo: int, hi: int) -> Tensor:
        q = _codes(x, grid, scale, zero, lo, hi)
        free = _codes(x, grid, scale, zero, -(2**31), 2**31)
        ctx.save_for_backward((q == free).reshape(x.shape))
        values = q if zero is None else q - in_blocks(zero.float().reshape(tuple(grid)))
        return (values * in_blocks(scale.float().reshape(tuple(grid)))).to(x.dtype).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None, None, None


def fake_quantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    quant_dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
) -> Tensor:
    """What `quantize_affine` and `dequantize_affine` make of `input`, in its dtype. The gradient passes where no code clips."""
    lo, hi = _bounds(quant_dtype, quant_min, quant_max)
    grid = _grid(input.shape, block_size, "fake_quantize_affine")
    return _FakeQuantizeAffine.apply(input, grid, scale.detach(), zero_point, lo, hi)


def int_scaled_matmul(a: Tensor, b: Tensor, scales1: Tensor) -> Tensor:
    """(a @ b) * scales1, with the sum in int32.

    a: (M, K) int8. b: (K, N) int8. scales1: (M, 1), or one element. Returns (M, N) in the dtype of the scales.

    Raises ValueError for other shapes and dtypes.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"int_scaled_matmul: a and b must be int8 of shape (M, K) and (K, N), got {a.dtype} {tuple(a.shape)} and "
            f"{b.dtype} {tuple(b.shape)}"
        )
    if scales1.numel() != 1 and scales1.shape != (a.shape[0], 1):
        raise ValueError(f"int_scaled_matmul: scales1 must have shape ({a.shape[0]}, 1), got {tuple(scales1.shape)}")
    if a.device.type == "cuda" and (a.shape[0] <= 16 or a.shape[1] % 8 or b.shape[1] % 8):
        total = (a.double() @ b.double()).float()  # what CUDA's integer product does not take; exact
    elif a.numel() == 0 or b.numel() == 0:
        total = a.float() @ b.float()
    else:
        total = torch._int_mm(a, b).float()
    return (total * scales1.float()).to(scales1.dtype)
