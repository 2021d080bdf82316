"""torchao.prototype.mx_formats.inference_workflow: configs of MX and NVFP4. Using one raises NotImplementedError."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ...core.config import Translated
from ...quantization.quantize_.common import KernelPreference
from ...quantization.specs import not_here
from .config import MXGemmKernelChoice, ScaleCalculationMode

__all__ = [
    "MXDynamicActivationMXWeightConfig",
    "MXFPInferenceConfig",
    "NVFP4DynamicActivationNVFP4WeightConfig",
    "NVFP4InferenceConfig",
    "NVFP4MMConfig",
    "NVFP4WeightOnlyConfig",
]


class NVFP4MMConfig(Enum):
    """What meets a weight."""

    DYNAMIC = "dynamic"
    WEIGHT_ONLY = "weight_only"


@dataclass
class MXDynamicActivationMXWeightConfig(Translated):
    """MX weights and activations."""

    block_size: int = 32
    activation_dtype: Any = torch.float8_e4m3fn
    weight_dtype: Any = torch.float8_e4m3fn
    kernel_preference: KernelPreference | str = KernelPreference.AUTO
    scaling_mode: ScaleCalculationMode = ScaleCalculationMode.RCEIL
    gemm_kernel_choice: MXGemmKernelChoice = MXGemmKernelChoice.CUBLAS
    set_inductor_config: bool = True

    def to_ao(self) -> Any:
        """Raises NotImplementedError."""
        raise not_here(type(self).__name__, "Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())")


class MXFPInferenceConfig(MXDynamicActivationMXWeightConfig):
    """`MXDynamicActivationMXWeightConfig` by its former name."""


@dataclass
class NVFP4DynamicActivationNVFP4WeightConfig(Translated):
    """NVFP4 weights and activations."""

    use_triton_kernel: bool = True
    use_dynamic_per_tensor_scale: bool = True
    step: Any = None
    mm_config: NVFP4MMConfig = NVFP4MMConfig.DYNAMIC

    def to_ao(self) -> Any:
        """Raises NotImplementedError."""
        raise not_here(type(self).__name__, "Int8DynamicActivationInt4WeightConfig(group_size=32)")


class NVFP4InferenceConfig(NVFP4DynamicActivationNVFP4WeightConfig):
    """`NVFP4DynamicActivationNVFP4WeightConfig` by its former name."""


@dataclass
class NVFP4WeightOnlyConfig(Translated):
    """NVFP4 weights."""

    use_dynamic_per_tensor_scale: bool = True

    def to_ao(self) -> Any:
        """Raises NotImplementedError."""
        raise not_here(type(self).__name__, "Int4WeightOnlyConfig(group_size=32), or ao.NF4WeightOnlyConfig")
