"""torchao.float8.float8_scaling_utils."""

from .float8_training_tensor import hp_tensor_to_float8_dynamic

__all__ = ["hp_tensor_to_float8_dynamic"]
