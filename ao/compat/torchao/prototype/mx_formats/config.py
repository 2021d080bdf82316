"""torchao.prototype.mx_formats.config: settings of MX training."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ...core.config import AOBaseConfig
from ...quantization.specs import not_here

__all__ = ["MXGemmKernelChoice", "MXLinearConfig", "ScaleCalculationMode"]


class MXGemmKernelChoice(Enum):
    """Which kernel multiplies."""

    EMULATED = "emulated"
    CUTLASS = "cutlass"
    CUBLAS = "cublas"


class ScaleCalculationMode(Enum):
    """How a power of two is found for a block."""

    FLOOR = "floor"
    RCEIL = "rceil"
    CEIL = "ceil"
    EVEN = "even"


@dataclass
class MXLinearConfig(AOBaseConfig):
    """Training with MX products."""

    block_size: int = 32
    elem_dtype: Any = torch.float8_e4m3fn
    elem_dtype_weight_override: Any = None
    elem_dtype_grad_output_override: Any = None
    gemm_kernel_choice: MXGemmKernelChoice = MXGemmKernelChoice.EMULATED
    mxfp8_cast_kernel_choice: Any = None
    scale_calculation_mode: ScaleCalculationMode = ScaleCalculationMode.FLOOR

    @staticmethod
    def from_recipe_name(recipe_name: str) -> MXLinearConfig:
        """A recipe by name: "mxfp8_emulated", "mxfp8_cublas", "mxfp4_cutlass", ..."""
        return MXLinearConfig(elem_dtype="fp4_e2m1" if "fp4" in recipe_name else torch.float8_e4m3fn)

    def replace_in(self, model: Any, filter_fn: Any, device: Any) -> Any:
        """Raises NotImplementedError."""
        raise not_here("MXLinearConfig", "ao.train.Float8LinearConfig.from_recipe_name('blockwise')")
