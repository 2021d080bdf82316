"""torchao.prototype.quantization.quant_api."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import ao

from ...core.config import AOBaseConfig, Translated
from ...quantization.quant_api import (
    FPXWeightOnlyConfig,
    GemliteUIntXWeightOnlyConfig,
    Int4DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt4WeightConfig,
    UIntXWeightOnlyConfig,
    _is_linear,
)
from ...quantization.quantize_.common import KernelPreference, QuantizationStep
from ...recording import finish, start

__all__ = [
    "FPXWeightOnlyConfig",
    "Float8StaticActivationFloat8WeightConfig",
    "GemliteUIntXWeightOnlyConfig",
    "Int4DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationInt4WeightConfig",
    "Int8DynamicActivationUIntxWeightConfig",
    "UIntXWeightOnlyConfig",
    "UIntxWeightOnlyConfig",
]


@dataclass
class UIntxWeightOnlyConfig(Translated):
    """Weights of 4 bits with zero points, or of 8 without: `ao.GemliteUIntXWeightOnlyConfig`."""

    group_size: int | None = 128
    bit_width: int = 4
    packing_bitwidth: int | None = None
    set_inductor_config: bool = True

    def to_ao(self) -> Any:
        """`ao.GemliteUIntXWeightOnlyConfig`."""
        return ao.GemliteUIntXWeightOnlyConfig(
            self.group_size, self.bit_width, self.packing_bitwidth, unsupported="skip"
        )


@dataclass
class Int8DynamicActivationUIntxWeightConfig(UIntxWeightOnlyConfig):
    """The same, with int8 activations per token."""

    def to_ao(self) -> Any:
        """`ao.GemliteUIntXWeightOnlyConfig`."""
        return ao.GemliteUIntXWeightOnlyConfig(
            self.group_size, self.bit_width, self.packing_bitwidth, "dynamic", unsupported="skip"
        )


@dataclass
class Float8StaticActivationFloat8WeightConfig(AOBaseConfig):
    """float8 with a scale of the activation that is known, or found in two steps, "prepare" and "convert"."""

    step: QuantizationStep | str | None = None
    act_quant_scale: torch.Tensor | None = None
    activation_dtype: torch.dtype = torch.float8_e4m3fn
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    granularity: Any = None
    mm_config: Any = None
    kernel_preference: KernelPreference | str = KernelPreference.AUTO
    set_inductor_config: bool = True

    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Any:
        """Do the step."""
        step = None if self.step is None else QuantizationStep(str(getattr(self.step, "value", self.step)))
        if step is QuantizationStep.PREPARE:
            return start(model, filter_fn)
        config = ao.Float8StaticActivationFloat8WeightConfig(
            self.act_quant_scale, self.activation_dtype, self.weight_dtype, unsupported="skip"
        )
        if step is QuantizationStep.CONVERT and self.act_quant_scale is None:
            chosen = None if filter_fn is _is_linear else filter_fn
            return finish(model, config, chosen, device, type(self).__name__)
        return ao.quantize_(model, config, filter_fn, device)
