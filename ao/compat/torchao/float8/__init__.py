"""torchao.float8: training with float8 products."""

from .config import (
    CastConfig,
    Float8GemmConfig,
    Float8LinearConfig,
    Float8LinearRecipeName,
    ScalingGranularity,
    ScalingType,
)
from .float8_linear_utils import _auto_filter_for_recipe, convert_to_float8_training
from .float8_training_tensor import Float8TrainingTensor, GemmInputRole, LinearMMConfig, ScaledMMConfig
from .fsdp_utils import precompute_float8_dynamic_scale_for_fsdp
from .inference import Float8MMConfig
from .types import FP8Granularity

__all__ = [
    "CastConfig",
    "FP8Granularity",
    "Float8GemmConfig",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "Float8MMConfig",
    "Float8TrainingTensor",
    "GemmInputRole",
    "LinearMMConfig",
    "ScaledMMConfig",
    "ScalingGranularity",
    "ScalingType",
    "_auto_filter_for_recipe",
    "convert_to_float8_training",
    "precompute_float8_dynamic_scale_for_fsdp",
]
