"""torchao.quantization.qat.utils: fake quantization of groups and tokens as plain functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant_primitives import (
    MappingType,
    ZeroPointDomain,
    choose_qparams_affine,
    fake_quantize_affine,
)

__all__: list[str] = []


def _fake_quantize_per_channel_group(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    quant_min: int,
    quant_max: int,
    group_size: int,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
) -> Tensor:
    return fake_quantize_affine(
        input, (1, group_size), scales, zero_points, torch.int32, quant_min, quant_max, zero_point_domain
    )


def _fake_quantize_per_token(
    input: Tensor, scales: Tensor, zero_points: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    block = (*[1] * (input.dim() - 1), input.shape[-1])
    return fake_quantize_affine(input, block, scales, zero_points, torch.int32, quant_min, quant_max).to(input.dtype)


def _choose_qparams_per_token_asymmetric(
    input: Tensor,
    scales_precision: torch.dtype = torch.float32,
    zero_points_precision: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    block = (*[1] * (input.dim() - 1), input.shape[-1])
    eps = torch.finfo(torch.float32).eps
    scale, zero = choose_qparams_affine(
        input, MappingType.ASYMMETRIC, block, torch.int8, None, None, eps, scales_precision, zero_points_precision
    )
    return scale.unsqueeze(-1), zero.unsqueeze(-1)


def _get_qmin_qmax(n_bit: int, symmetric: bool = True) -> tuple[int, int]:
    return (-(2 ** (n_bit - 1)), 2 ** (n_bit - 1) - 1) if symmetric else (0, 2**n_bit - 1)
