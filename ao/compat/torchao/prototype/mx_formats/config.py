"""torchao.prototype.mx_formats.config: settings of MX training."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

import ao
from ao import Report
from ao.dtypes import FloatX
from ao.train import Gemm, Recipe, TrainingConfig

from ...core.config import AOBaseConfig

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
    """Training with MX products: inputs, weights and gradients are cast along the sum of each product, forward and backward.

    elem_dtype: of all three; elem_dtype_weight_override, elem_dtype_grad_output_override: of weights, and of gradients. The
    numbers of tokens and the sizes of a layer must be multiples of block_size. kernel_preference, gemm_kernel_choice,
    mxfp8_cast_kernel_choice: accepted and without effect.
    """

    block_size: int = 32
    elem_dtype: Any = torch.float8_e4m3fn
    elem_dtype_weight_override: Any = None
    elem_dtype_grad_output_override: Any = None
    kernel_preference: Any = None
    gemm_kernel_choice: MXGemmKernelChoice = MXGemmKernelChoice.EMULATED
    mxfp8_cast_kernel_choice: Any = None
    scale_calculation_mode: ScaleCalculationMode = ScaleCalculationMode.FLOOR

    @staticmethod
    def from_recipe_name(recipe_name: str) -> MXLinearConfig:
        """A recipe by name: "mxfp8_emulated", "mxfp8_cublas", "mxfp8_cublas_rceil", "mxfp4_emulated", "mxfp4_cutlass"."""
        name = str(getattr(recipe_name, "value", recipe_name))
        if not name.startswith(("mxfp8_", "mxfp4_")):
            raise ValueError(
                f"MXLinearConfig: a recipe is called mxfp8_emulated, mxfp8_cublas or mxfp4_cutlass, got {name!r}"
            )
        rule = ScaleCalculationMode.RCEIL if name.endswith("rceil") else ScaleCalculationMode.FLOOR
        dtype = torch.float4_e2m1fn_x2 if name.startswith("mxfp4") else torch.float8_e4m3fn
        return MXLinearConfig(elem_dtype=dtype, scale_calculation_mode=rule)

    def recipe(self) -> Recipe:
        """The three products of a layer."""
        from .mx_tensor import element

        rule: Any = self.scale_calculation_mode.value
        block = (1, self.block_size)
        x, w, g = (
            FloatX(*element(dtype or self.elem_dtype), block, scale_rule=rule)
            for dtype in (None, self.elem_dtype_weight_override, self.elem_dtype_grad_output_override)
        )
        return Recipe(Gemm(x, w), Gemm(g, w), Gemm(g, x))

    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Report:
        """Let the layers that the filter takes train so."""
        return ao.quantize_(model, _Products(self.recipe()), filter_fn, device)


@dataclass(frozen=True)
class _Products(TrainingConfig):
    products: Recipe

    def recipe(self) -> Recipe:
        return self.products
