"""torchao.optim.quant_utils: maps of codes as plain functions."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ao.dtypes import DynamicTree
from ao.optim import stochastic_round

__all__ = [
    "create_dynamic_map",
    "dequant_with_qmap",
    "quantize_4bit_with_qmap",
    "quantize_8bit_with_qmap",
    "scale_tensor",
]


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> list[float]:
    """The map of `ao.dtypes.DynamicTree`, up to 1. Raises ValueError for another number of decades than total_bits - 1."""
    if max_exponent_bits != total_bits - 1:
        raise ValueError(f"create_dynamic_map: max_exponent_bits must be total_bits - 1, got {max_exponent_bits}")
    values = DynamicTree(total_bits, signed).values
    return [v / values[-1] for v in values]


def scale_tensor(input: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`input` divided by the largest magnitude of each block, and those, (blocks,)."""
    blocks = input.reshape(-1, block_size)
    scale = blocks.abs().amax(-1).clamp(min=1e-12)
    return (blocks / scale[:, None]).reshape(input.shape), scale


def _nearest(input: Tensor, qmap: Tensor) -> Tensor:
    middles = (qmap[1:] + qmap[:-1]) / 2
    below = torch.bucketize(input, middles, right=False)
    # A value beside a middle may be as near to one as the other when the middle was rounded.
    other = (below + 1).clamp(max=qmap.numel() - 1)
    nearer = (input - qmap[other]).abs() < (input - qmap[below]).abs()
    return torch.where(nearer, other, below).to(torch.uint8)


def quantize_8bit_with_qmap(input: Tensor, qmap: Tensor) -> Tensor:
    """The code of the nearest of 256 sorted values, uint8."""
    return _nearest(input, qmap)


def quantize_4bit_with_qmap(input: Tensor, qmap: Tensor) -> Tensor:
    """The code of the nearest of 16 sorted values, uint8."""
    return _nearest(input, qmap)


def dequant_with_qmap(codes: Tensor, qmap: Tensor, scale: Tensor) -> Tensor:
    """qmap[codes] * scale, where a scale is for as many codes as follow one another."""
    values = qmap[codes.int()].reshape(scale.shape[0], -1) * scale.reshape(-1, 1)
    return values.reshape(codes.shape)


def _fp32_to_bf16_sr(x_f32: Tensor) -> Tensor:
    """`ao.optim.stochastic_round` with a seed of torch's generator. A DTensor is rounded shard by shard."""
    distributed = sys.modules.get("torch.distributed.tensor")  # without it there is no DTensor
    if distributed is not None and isinstance(x_f32, distributed.DTensor):
        local = _fp32_to_bf16_sr(x_f32.to_local())
        shape, stride = x_f32.shape, x_f32.stride()
        return distributed.DTensor.from_local(
            local, x_f32.device_mesh, x_f32.placements, run_check=False, shape=shape, stride=stride
        )
    return stochastic_round(x_f32, torch.randint(2**31 - 1, (), dtype=torch.int32, device=x_f32.device))
