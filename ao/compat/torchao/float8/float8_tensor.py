"""torchao.float8.float8_tensor: where `float8_training_tensor` was before."""

from .float8_training_tensor import (
    Float8Tensor,
    GemmInputRole,
    LinearMMConfig,
    ScaledMMConfig,
    hp_tensor_and_scale_to_float8,
)

__all__ = ["Float8Tensor", "GemmInputRole", "LinearMMConfig", "ScaledMMConfig", "hp_tensor_and_scale_to_float8"]
