"""torchao.prototype.mx_formats: MX and NVFP4."""

from .config import MXGemmKernelChoice, MXLinearConfig, ScaleCalculationMode
from .inference_workflow import (
    MXDynamicActivationMXWeightConfig,
    MXFPInferenceConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4InferenceConfig,
    NVFP4MMConfig,
    NVFP4WeightOnlyConfig,
)

__all__ = [
    "MXDynamicActivationMXWeightConfig",
    "MXFPInferenceConfig",
    "MXGemmKernelChoice",
    "MXLinearConfig",
    "NVFP4DynamicActivationNVFP4WeightConfig",
    "NVFP4InferenceConfig",
    "NVFP4MMConfig",
    "NVFP4WeightOnlyConfig",
    "ScaleCalculationMode",
]
