"""torchao.prototype.mx_formats.inference_workflow: configs of MX and NVFP4."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

import ao

from ...core.config import Translated
from ...quantization.quantize_.common import KernelPreference
from .config import MXGemmKernelChoice, ScaleCalculationMode

__all__ = [
    "MXDynamicActivationMXWeightConfig",
    "MXFPInferenceConfig",
    "NVFP4DynamicActivationNVFP4WeightConfig",
    "NVFP4InferenceConfig",
    "NVFP4MMConfig",
    "NVFP4WeightOnlyConfig",
]


def _element(dtype: Any) -> Any:
    """ "e3m2" of torchao's "fp6_e3m2"; a dtype of torch as it is."""
    return dtype.rpartition("_")[2] if isinstance(dtype, str) else dtype


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
        """The same in `ao`."""
        return ao.MXDynamicActivationMXWeightConfig(
            weight_dtype=_element(self.weight_dtype),
            block_size=self.block_size,
            scale_rule=self.scaling_mode.value,
            activation_dtype=_element(self.activation_dtype),
        )


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
        """The same in `ao`."""
        per_tensor = self.use_dynamic_per_tensor_scale
        if self.mm_config is NVFP4MMConfig.WEIGHT_ONLY:
            return ao.NVFP4WeightOnlyConfig(per_tensor)
        return ao.NVFP4DynamicActivationNVFP4WeightConfig(per_tensor)


class NVFP4InferenceConfig(NVFP4DynamicActivationNVFP4WeightConfig):
    """`NVFP4DynamicActivationNVFP4WeightConfig` by its former name."""


@dataclass
class NVFP4WeightOnlyConfig(Translated):
    """NVFP4 weights."""

    use_dynamic_per_tensor_scale: bool = True

    def to_ao(self) -> Any:
        """The same in `ao`."""
        return ao.NVFP4WeightOnlyConfig(self.use_dynamic_per_tensor_scale)
