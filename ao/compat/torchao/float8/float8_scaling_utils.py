"""torchao.float8.float8_scaling_utils: scales by hand."""

from __future__ import annotations

from .config import ScalingGranularity
from .float8_training_tensor import hp_tensor_to_float8_dynamic

__all__ = ["get_maybe_axiswise_dim", "hp_tensor_to_float8_dynamic"]


def get_maybe_axiswise_dim(axiswise_dim: int, scaling_granularity: ScalingGranularity) -> int | None:
    """The dim, where there is a scale per index of the others; else None."""
    return axiswise_dim if scaling_granularity is ScalingGranularity.AXISWISE else None
