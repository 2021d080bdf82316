"""torchao.float8.float8_training_tensor: float8 tensors by hand."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ao import Float8, QTensor

from ..kinds import Kind
from ..quantization.specs import FLOAT8
from .config import ScalingGranularity

__all__ = [
    "Float8TrainingTensor",
    "GemmInputRole",
    "LinearMMConfig",
    "ScaledMMConfig",
    "hp_tensor_and_scale_to_float8",
    "hp_tensor_to_float8_dynamic",
]


class ScaledMMConfig(NamedTuple):
    """How one product is computed. Accepted; the chip chooses here."""

    emulate: bool = False
    use_fast_accum: bool = False
    fp8_output: bool = False
    pad_inner_dim: bool = False


class LinearMMConfig(NamedTuple):
    """How the three products of a linear layer are computed."""

    output: ScaledMMConfig = ScaledMMConfig(False, True, False, False)
    grad_input: ScaledMMConfig = ScaledMMConfig()
    grad_weight: ScaledMMConfig = ScaledMMConfig()


class GemmInputRole(Enum):
    """What an operand is to a linear layer."""

    INPUT = "input"
    WEIGHT = "weight"
    GRAD_OUTPUT = "grad_output"


class Float8TrainingTensor(metaclass=Kind):
    """A `Float8Tensor` of `ao.dtypes`."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(x, QTensor) and isinstance(x.spec, Float8)


Float8Tensor = Float8TrainingTensor


def hp_tensor_and_scale_to_float8(
    hp_tensor: Tensor, s: Tensor, float8_dtype: torch.dtype, *args: Any, **kwargs: Any
) -> QTensor:
    """x * s as float8. s: what the other library multiplies by; its inverse is the scale here."""
    spec = Float8(FLOAT8[float8_dtype], (-1, -1) if s.numel() == 1 else (1, -1))
    return spec.quantize(hp_tensor, scale=(1.0 / s.float()).reshape(spec.grid(hp_tensor.shape)))


def hp_tensor_to_float8_dynamic(
    hp_tensor: Tensor,
    float8_dtype: torch.dtype,
    linear_mm_config: LinearMMConfig | None = None,
    reduce_amax: bool = False,
    gemm_input_role: GemmInputRole = GemmInputRole.INPUT,
    device_mesh: Any = None,
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE,
    axiswise_dim: int | None = None,
    round_scales_to_power_of_2: bool = False,
) -> QTensor:
    """Quantize a tensor by a scale of its own, or one per row or column (axiswise_dim -1 or 0)."""
    block = (-1, -1)
    if scaling_granularity is ScalingGranularity.AXISWISE:
        block = (-1, 1) if axiswise_dim == 0 else (1, -1)
    return Float8(FLOAT8[float8_dtype], block, round_scales_to_power_of_2).quantize(hp_tensor)
