"""torchao.quantization.qat.linear: the quantizers of one format each, which replace every linear layer of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ao import Intx, Spec, is_linear

from ..granularity import PerRow
from ..specs import INT4, UINT4
from ..unified import TwoStepQuantizer
from .fake_quantize_config import Float8FakeQuantizeConfig, IntxFakeQuantizeConfig
from .layers import (
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    Part,
    Prepared,
    disable_fake_quant,
    enable_fake_quant,
    set_weight,
)

__all__ = [
    "FakeQuantizedEmbedding",
    "FakeQuantizedLinear",
    "Float8ActInt4WeightQATQuantizer",
    "Int4WeightOnlyQATLinear",
    "Int4WeightOnlyQATQuantizer",
    "Int8DynActInt4WeightQATLinear",
    "Int8DynActInt4WeightQATQuantizer",
    "disable_4w_fake_quant",
    "disable_8da4w_fake_quant",
    "disable_linear_fake_quant",
    "enable_4w_fake_quant",
    "enable_8da4w_fake_quant",
    "enable_linear_fake_quant",
]


class QATQuantizer(TwoStepQuantizer):
    """Prepares every linear layer whose rows the groups divide, and quantizes them."""

    def __init__(self, activation: Part, weight: Part) -> None:
        self.activation, self.weight = activation, weight

    def get_activation_fake_quantize_config(self) -> Part:
        """How the input is rounded."""
        return self.activation

    def get_weight_fake_quantize_config(self) -> Part:
        """How the weight is rounded."""
        return self.weight

    def fits(self, module: nn.Module) -> bool:
        """Whether a layer is one to prepare."""
        weight = self.weight if isinstance(self.weight, Spec) else None if self.weight is None else self.weight.spec()
        if not is_linear(module, "") or isinstance(module, Prepared) or weight is None:
            return False
        try:
            weight.grid(module.weight.shape)  # type: ignore[arg-type]
        except ValueError:
            return False
        return True

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, whose linear layers round what they compute with."""
        for module in list(model.modules()):
            if self.fits(module):
                FakeQuantizedLinear.from_linear(module, self.activation, self.weight)
        return model

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, whose linear layers are quantized as they were trained."""
        for module in list(model.modules()):
            if isinstance(module, FakeQuantizedLinear):
                weight = module.quantized_weight()
                set_weight(module.plain(), weight)
        return model


def _8da4w(groupsize: int, scales_precision: torch.dtype) -> tuple[IntxFakeQuantizeConfig, IntxFakeQuantizeConfig]:
    eps = torch.finfo(torch.float32).eps
    return (
        IntxFakeQuantizeConfig(
            torch.int8, "per_token", None, scales_precision, scales_precision, eps=eps, is_symmetric=False
        ),
        IntxFakeQuantizeConfig(
            INT4, None, None, scales_precision, scales_precision, eps=eps, group_size=groupsize, is_symmetric=True
        ),
    )


def _4w(groupsize: int, scales_precision: torch.dtype) -> IntxFakeQuantizeConfig:
    return IntxFakeQuantizeConfig(UINT4, group_size=groupsize, is_symmetric=False, scale_precision=scales_precision)


class Int8DynActInt4WeightQATQuantizer(QATQuantizer):
    """int4 weights in groups, int8 activations per token. Layers whose rows the groups do not divide stay as they are."""

    def __init__(
        self,
        groupsize: int = 256,
        padding_allowed: bool = False,
        precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(*_8da4w(groupsize, scales_precision))
        self.groupsize, self.precision, self.scales_precision = groupsize, precision, scales_precision


class Int4WeightOnlyQATQuantizer(QATQuantizer):
    """int4 weights in groups, with zero points."""

    def __init__(
        self,
        groupsize: int = 256,
        inner_k_tiles: int | None = 8,
        precision: torch.dtype = torch.bfloat16,
        scales_precision: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(None, _4w(groupsize, scales_precision))
        self.groupsize, self.scales_precision = groupsize, scales_precision


class Float8ActInt4WeightQATQuantizer(QATQuantizer):
    """int4 weights in groups, float8 activations per row."""

    def __init__(self, group_size: int | None = 64, scale_precision: torch.dtype = torch.bfloat16) -> None:
        scales = str(scale_precision).removeprefix("torch.")
        super().__init__(
            Float8FakeQuantizeConfig(torch.float8_e4m3fn, PerRow()),
            Intx(4, (1, group_size or -1), symmetric=True, scale_dtype=scales),
        )


class Int8DynActInt4WeightQATLinear(FakeQuantizedLinear):
    """One layer of `Int8DynActInt4WeightQATQuantizer`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        groupsize: int = 256,
        precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, *_8da4w(groupsize, scales_precision), device=device, dtype=precision
        )
        self.groupsize = groupsize


class Int4WeightOnlyQATLinear(FakeQuantizedLinear):
    """One layer of `Int4WeightOnlyQATQuantizer`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        groupsize: int = 256,
        inner_k_tiles: int = 8,
        precision: torch.dtype = torch.bfloat16,
        scales_precision: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, None, _4w(groupsize, scales_precision), device=device, dtype=precision
        )
        self.groupsize, self.inner_k_tiles = groupsize, inner_k_tiles


enable_8da4w_fake_quant = enable_4w_fake_quant = enable_fake_quant
disable_8da4w_fake_quant = disable_4w_fake_quant = disable_linear_fake_quant = disable_fake_quant


def enable_linear_fake_quant(mod: nn.Module, enabled: bool = True) -> None:
    """For `model.apply`: round, or not."""
    if isinstance(mod, FakeQuantizedLinear):
        mod.enable_fake_quant(enabled)
