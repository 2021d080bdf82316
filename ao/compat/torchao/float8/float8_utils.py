"""torchao.float8.float8_utils: scales as that library has them, numbers to multiply by: max of the format / max|x|."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ao import compute_error

from .config import ScalingGranularity

__all__ = [
    "EPS",
    "FP8_TYPES",
    "amax_to_scale",
    "compute_error",
    "fp8_tensor_statistics",
    "is_row_major",
    "pad_tensor_for_matmul",
    "tensor_to_amax",
    "tensor_to_scale",
    "to_fp8_saturated",
]

EPS = 1e-12
FP8_TYPES = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}


@torch.no_grad()
def amax_to_scale(amax: Tensor, float8_dtype: torch.dtype, round_scales_to_power_of_2: bool = False) -> Tensor:
    """max of the format / amax, float32, rounded down to a power of two if asked."""
    scale = (torch.finfo(float8_dtype).max / amax.double().clamp(min=EPS)).float()
    return _round_scale_down_to_power_of_2(scale) if round_scales_to_power_of_2 else scale


def _round_scale_down_to_power_of_2(scale: Tensor) -> Tensor:
    if scale.dtype != torch.float32:
        raise AssertionError(f"the scale must be float32, got {scale.dtype}")
    return (scale.view(torch.int32) & 0x7F800000).view(torch.float32)


@torch.no_grad()
def tensor_to_amax(
    x: Tensor,
    reduce_amax: bool = False,
    device_mesh: Any = None,
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE,
    axiswise_dim: int | None = None,
) -> Tensor:
    """max|x|, of the tensor or along a dim, over all ranks of the mesh if asked."""
    if scaling_granularity is ScalingGranularity.AXISWISE:
        assert axiswise_dim is not None
        amax = x.abs().amax(axiswise_dim, keepdim=True)
    else:
        amax = x.abs().max()
    if reduce_amax:
        group = device_mesh.get_group() if device_mesh is not None else None
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    return amax


@torch.no_grad()
def tensor_to_scale(
    hp_tensor: Tensor,
    float8_dtype: torch.dtype,
    reduce_amax: bool = False,
    device_mesh: Any = None,
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE,
    axiswise_dim: int | None = None,
    round_scales_to_power_of_2: bool = False,
) -> Tensor:
    """`amax_to_scale` of `tensor_to_amax`."""
    amax = tensor_to_amax(hp_tensor, reduce_amax, device_mesh, scaling_granularity, axiswise_dim)
    return amax_to_scale(amax, float8_dtype, round_scales_to_power_of_2)


def to_fp8_saturated(x: Tensor, float8_dtype: torch.dtype) -> Tensor:
    """`x` as float8, with what is too large at its largest number."""
    most = torch.finfo(float8_dtype).max
    return x.clamp(-most, most).to(float8_dtype)


def fp8_tensor_statistics(tensor: Any, lp_dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[int, int]:
    """How many numbers of a float8 tensor are 0, and how many the largest."""
    size = tensor.qdata.float().abs()
    return int((size == 0).sum()), int((size == torch.finfo(lp_dtype).max).sum())


def is_row_major(stride: Sequence[int]) -> bool:
    """Whether the strides of a matrix are those of rows that follow one another."""
    assert len(stride) == 2
    return stride[0] > stride[1] and stride[1] == 1


def pad_tensor_for_matmul(tensor: Tensor, dims: int | Sequence[int]) -> Tensor:
    """A matrix with zeros after it up to the next multiples of 16 along `dims`."""
    which = {d % 2 for d in ([dims] if isinstance(dims, int) else dims)}
    rows, columns = (-tensor.shape[d] % 16 if d in which else 0 for d in (0, 1))
    return torch.nn.functional.pad(tensor, (0, columns, 0, rows))
