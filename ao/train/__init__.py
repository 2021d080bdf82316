"""Low-precision training: float8, int8 and ternary matrix products, quantized weights, gathers and adapters."""

from .bitnet import BitNetTrainingConfig, bitnet_training
from .convert import (
    auto_module_filter,
    convert_from_low_precision_training,
    convert_to_float8_training,
    convert_to_low_precision_training,
)
from .float8_config import (
    CastConfig,
    Float8GemmConfig,
    Float8LinearConfig,
    Float8LinearRecipeName,
    ScalingGranularity,
    ScalingType,
)
from .gather import precompute_bitnet_scale_for_fsdp, precompute_float8_dynamic_scale_for_fsdp
from .int8 import (
    Int8MixedPrecisionTrainingConfig,
    Int8WeightOnlyQuantizedTrainingConfig,
    int8_mixed_precision_training,
    int8_weight_only_quantized_training,
)
from .linear import LowPrecisionLinear, low_precision_linear
from .recipe import Gemm, Recipe

__all__ = [
    "BitNetTrainingConfig",
    "CastConfig",
    "Float8GemmConfig",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "Gemm",
    "Int8MixedPrecisionTrainingConfig",
    "Int8WeightOnlyQuantizedTrainingConfig",
    "LowPrecisionLinear",
    "Recipe",
    "ScalingGranularity",
    "ScalingType",
    "auto_module_filter",
    "bitnet_training",
    "convert_from_low_precision_training",
    "convert_to_float8_training",
    "convert_to_low_precision_training",
    "int8_mixed_precision_training",
    "int8_weight_only_quantized_training",
    "low_precision_linear",
    "precompute_bitnet_scale_for_fsdp",
    "precompute_float8_dynamic_scale_for_fsdp",
]
