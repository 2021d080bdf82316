"""Low-precision training: float8, int8 and ternary matrix products, quantized weights, gathers and adapters."""

import importlib
from typing import TYPE_CHECKING, Any

from .bitnet import BitNetTrainingConfig, bitnet_training
from .convert import (
    auto_module_filter,
    convert_from_low_precision_training,
    convert_to_float8_training,
    convert_to_low_precision_training,
)
from .experts import convert_experts_to_low_precision_training, low_precision_bmm, low_precision_grouped_mm
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
from .precision import PRECISIONS, convert_to_precision
from .qlora import LoRALinear, convert_to_qlora, merge_qlora
from .recipe import Gemm, Recipe
from .small_floats import MXFP4TrainingConfig, MXFP8TrainingConfig, NVFP4TrainingConfig
from .training_config import TrainingConfig

if TYPE_CHECKING:
    from .tensor_parallel import Float8ColwiseParallel, Float8RowwiseParallel, PrepareFloat8ModuleInput

_TENSOR_PARALLEL = ("Float8ColwiseParallel", "Float8RowwiseParallel", "PrepareFloat8ModuleInput")
"""Names that need torch.distributed, whose import takes long."""


def __getattr__(name: str) -> Any:
    if name in _TENSOR_PARALLEL:
        return getattr(importlib.import_module(".tensor_parallel", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PRECISIONS",
    "BitNetTrainingConfig",
    "CastConfig",
    "Float8ColwiseParallel",
    "Float8GemmConfig",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "Float8RowwiseParallel",
    "Gemm",
    "Int8MixedPrecisionTrainingConfig",
    "Int8WeightOnlyQuantizedTrainingConfig",
    "LoRALinear",
    "LowPrecisionLinear",
    "MXFP4TrainingConfig",
    "MXFP8TrainingConfig",
    "NVFP4TrainingConfig",
    "PrepareFloat8ModuleInput",
    "Recipe",
    "ScalingGranularity",
    "ScalingType",
    "TrainingConfig",
    "auto_module_filter",
    "bitnet_training",
    "convert_experts_to_low_precision_training",
    "convert_from_low_precision_training",
    "convert_to_float8_training",
    "convert_to_low_precision_training",
    "convert_to_precision",
    "convert_to_qlora",
    "int8_mixed_precision_training",
    "int8_weight_only_quantized_training",
    "low_precision_bmm",
    "low_precision_grouped_mm",
    "low_precision_linear",
    "merge_qlora",
    "precompute_bitnet_scale_for_fsdp",
    "precompute_float8_dynamic_scale_for_fsdp",
]
