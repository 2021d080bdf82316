"""torchao.quantization.utils: sizes of errors, and the functions over plain tensors that its older recipes are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ao import compute_error, recommended_inductor_config_setter

from .granularity import Granularity, PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken
from .quant_primitives import (
    MappingType,
    ZeroPointDomain,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

__all__ = [
    "MultiInput",
    "compute_error",
    "dequantize_per_channel",
    "dequantize_per_tensor",
    "dynamically_quantize_per_channel",
    "get_block_size",
    "get_group_qparams_symmetric",
    "get_groupwise_affine_qparams",
    "group_quantize_tensor_symmetric",
    "groupwise_affine_dequantize_tensor",
    "groupwise_affine_dequantize_tensor_from_qparams",
    "groupwise_affine_quantize_tensor",
    "groupwise_affine_quantize_tensor_from_qparams",
    "pack_tinygemm_scales_and_zeros",
    "per_token_dynamic_quant",
    "quant_int8_dynamic_per_token_linear",
    "quant_int8_per_token_matmul",
    "quantize_activation_per_token_absmax",
    "recommended_inductor_config_setter",
    "unpack_tinygemm_scales_and_zeros",
]


def get_block_size(input_shape: Sequence[int], granularity: Granularity) -> tuple[int, ...]:
    """The block of a granularity for data of `input_shape`, by length. Raises ValueError for one that is not known."""
    shape = tuple(input_shape)
    if isinstance(granularity, PerTensor):
        return shape
    if isinstance(granularity, PerAxis):
        return (*shape[: granularity.axis], 1, *shape[granularity.axis + 1 :])
    if isinstance(granularity, (PerRow, PerToken)):
        return (*[1] * (len(shape) - 1), shape[-1])
    if isinstance(granularity, PerGroup):
        return (*[1] * (len(shape) - 1), granularity.group_size)
    if isinstance(granularity, PerBlock):
        block = granularity.block_size
        return tuple(n if b == -1 else b for b, n in zip((1,) * (len(shape) - len(block)) + block, shape))
    raise ValueError(f"get_block_size: unknown granularity {granularity!r}")


class MultiInput:
    """Several inputs that stand for one in a calibration."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.values = list(inputs)

    def add_input(self, input: Any) -> MultiInput:
        """One more."""
        self.values.append(input)
        return self

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]


_MultiInput = MultiInput


# int8


def quantize_activation_per_token_absmax(t: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in [-127, 127] with a scale per token, max|row| / 127, at least 1e-5. float16 takes a float32 scale."""
    block = (*[1] * (t.dim() - 1), t.shape[-1])
    dtype = torch.float32 if t.dtype == torch.float16 else None
    scale, zero = choose_qparams_affine(
        t, MappingType.SYMMETRIC, block, torch.int8, -127, 127, 1e-5, dtype, torch.int32
    )
    return quantize_affine(t, block, scale, zero, torch.int8, -127, 127), scale


_quantize_activation_per_token_absmax = quantize_activation_per_token_absmax


def quant_int8_per_token_matmul(
    x_vals_int8: Tensor,
    x_scales: Tensor,
    w_vals_int8_t: Tensor,
    w_scales: Tensor,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(x @ w) * x_scales * w_scales, with the sum in int32. x: (..., K), w: (K, N), x_scales: (...), w_scales: (N,)."""
    from ..kernel import safe_int_mm

    total = safe_int_mm(x_vals_int8.reshape(-1, x_vals_int8.shape[-1]), w_vals_int8_t)
    y = total * x_scales.float().reshape(-1, 1) * w_scales.float()
    return y.reshape(*x_vals_int8.shape[:-1], -1).to(output_dtype)


def quant_int8_dynamic_per_token_linear(
    x: Tensor, w_vals_int8_t: Tensor, w_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """A linear layer over int8 weights, with its input quantized per token."""
    x_vals, x_scales = quantize_activation_per_token_absmax(x)
    y = quant_int8_per_token_matmul(x_vals, x_scales, w_vals_int8_t, w_scales, out_dtype)
    return y if bias is None else y + bias


_quant_int8_dynamic_per_token_linear = quant_int8_dynamic_per_token_linear
_quant_int8_per_token_matmul = quant_int8_per_token_matmul


def dynamically_quantize_per_channel(
    x: Tensor, quant_min: int, quant_max: int, target_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a matrix, one per row, symmetric. Only int8 from -128 to 127."""
    if (quant_min, quant_max, target_dtype) != (-128, 127, torch.int8):
        raise AssertionError("dynamically_quantize_per_channel: quant_min=-128, quant_max=127, target_dtype=torch.int8")
    eps = float(torch.finfo(torch.float32).eps)
    block = (1, x.shape[1])
    scale, zero = choose_qparams_affine(
        x, MappingType.SYMMETRIC, block, torch.int8, quant_min, quant_max, eps, zero_point_dtype=torch.int64
    )
    return quantize_affine(x, block, scale, zero, torch.int8, quant_min, quant_max), scale, zero


def dequantize_per_tensor(
    int_repr: Tensor, scale: Tensor, zero_point: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """(q - zero_point) * scale."""
    block = int_repr.shape
    return dequantize_affine(int_repr, block, scale, zero_point, int_repr.dtype, output_dtype=out_dtype)


def dequantize_per_channel(
    int_repr: Tensor, scales: Tensor, zero_points: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """(q - zero_point) * scale, with one of each per row."""
    block = (1, int_repr.shape[1])
    return dequantize_affine(int_repr, block, scales, zero_points, int_repr.dtype, output_dtype=out_dtype)


def per_token_dynamic_quant(
    input: Tensor,
    scale_dtype: torch.dtype = torch.float32,
    zero_point_dtype: torch.dtype = torch.float32,
    eps: float | None = None,
) -> Tensor:
    """What int8 with a scale and a zero point per token makes of `input`, in its dtype."""
    block = (*[1] * (input.dim() - 1), input.shape[-1])
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    scale, zero = choose_qparams_affine(
        input, MappingType.ASYMMETRIC, block, torch.int8, -128, 127, eps, scale_dtype, zero_point_dtype
    )
    q = quantize_affine(input, block, scale, zero, torch.int8, -128, 127)
    return dequantize_affine(q, block, scale, zero, torch.int8, -128, 127, output_dtype=input.dtype)


# groups of 4 bits


def _group(w: Tensor, groupsize: int) -> tuple[int, int]:
    groupsize = min(groupsize, w.shape[-1])
    if w.dim() != 2 or groupsize < 2 or w.shape[-1] % groupsize:
        raise AssertionError(f"groupsize={groupsize} must divide the rows of a matrix, got shape {tuple(w.shape)}")
    return 1, groupsize


def get_groupwise_affine_qparams(
    w: Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.FLOAT,
    preserve_zero: bool = False,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (N, K / groupsize) of unsigned codes; in the domain FLOAT, zero points are numbers."""
    block = _group(w, groupsize)
    floating = zero_point_domain is ZeroPointDomain.FLOAT
    scale, zero = choose_qparams_affine(
        w, MappingType.ASYMMETRIC, block, torch.int32, 0, 2**n_bit - 1, 1e-6 if eps is None else eps, dtype,
        dtype if floating else torch.int32, preserve_zero, zero_point_domain,
    )  # fmt: skip
    return scale.to(dtype).reshape(w.shape[0], -1), zero.to(dtype if floating else zero.dtype).reshape(w.shape[0], -1)


def pack_tinygemm_scales_and_zeros(scales: Tensor, zeros: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(N, G) and (N, G) -> (G, N, 2)."""
    if scales.shape != zeros.shape or scales.dtype != dtype or zeros.dtype != dtype:
        raise AssertionError(f"scales and zeros must have one shape, and {dtype}, got {scales.dtype} and {zeros.dtype}")
    return torch.stack([scales, zeros], -1).transpose(0, 1).contiguous()


def unpack_tinygemm_scales_and_zeros(scales_and_zeros: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse."""
    scales, zeros = scales_and_zeros.transpose(0, 1).unbind(-1)
    return scales, zeros


def groupwise_affine_quantize_tensor_from_qparams(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.FLOAT,
) -> Tensor:
    """Codes of a matrix. Of 4 bits and an even number of columns, two to a byte, the first in the high half."""
    high = 2**n_bit - 1
    q = quantize_affine(w, _group(w, groupsize), scales, zeros, torch.int32, 0, high, zero_point_domain)
    if n_bit == 4 and q.device.type != "cpu" and q.shape[-1] > 1:
        q = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
    return q


def groupwise_affine_dequantize_tensor_from_qparams(
    w_int4x8: Tensor,
    scales: Tensor,
    zeros: Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.FLOAT,
) -> Tensor:
    """The numbers of codes, in the dtype of the scales. Codes of two to a byte are taken apart."""
    if w_int4x8.dtype == torch.uint8:
        w_int4x8 = torch.stack([w_int4x8 >> 4, w_int4x8 & 15], -1).flatten(-2)
    codes, high = w_int4x8.to(torch.int32), 2**n_bit - 1
    block = _group(codes, groupsize)
    return dequantize_affine(
        codes, block, scales, zeros, torch.int32, 0, high, zero_point_domain, output_dtype=scales.dtype
    )


def groupwise_affine_quantize_tensor(
    w: Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.FLOAT,
    preserve_zero: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes, and scales with zero points as `pack_tinygemm_scales_and_zeros` lays them."""
    scales, zeros = get_groupwise_affine_qparams(w, n_bit, groupsize, dtype, zero_point_domain, preserve_zero)
    q = groupwise_affine_quantize_tensor_from_qparams(w, scales, zeros, n_bit, groupsize, zero_point_domain)
    return q, pack_tinygemm_scales_and_zeros(scales.to(dtype), zeros.to(dtype), dtype)


def groupwise_affine_dequantize_tensor(
    w_int4x8: Tensor, scales_and_zeros: Tensor, n_bit: int = 4, groupsize: int = 128
) -> Tensor:
    """The inverse."""
    scales, zeros = unpack_tinygemm_scales_and_zeros(scales_and_zeros)
    return groupwise_affine_dequantize_tensor_from_qparams(w_int4x8, scales, zeros, n_bit, groupsize)


def get_group_qparams_symmetric(
    w: Tensor,
    n_bit: int = 4,
    groupsize: int = 128,
    precision: torch.dtype = torch.float32,
    mapping_type: MappingType = MappingType.SYMMETRIC,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (0) of signed codes, (N, K / groupsize)."""
    low, high = -(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    scale, zero = choose_qparams_affine(
        w, mapping_type, _group(w, groupsize), torch.int8, low, high, eps, precision, precision
    )
    return scale.reshape(w.shape[0], -1), zero.reshape(w.shape[0], -1)


def group_quantize_tensor_symmetric(
    w: Tensor,
    n_bit: int = 4,
    group_size: int = 128,
    precision: torch.dtype = torch.float32,
    mapping_type: MappingType = MappingType.SYMMETRIC,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (int8), scales and zero points of a matrix."""
    low, high = -(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1
    scales, zeros = get_group_qparams_symmetric(w, n_bit, group_size, precision, mapping_type)
    q = quantize_affine(w, _group(w, group_size), scales, zeros, torch.int8, low, high)
    return q, scales, zeros
