"""torchao.prototype.quantized_training: the configs of `ao.train`, for `quantize_`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import ao
import ao.train as train
from ao import Intx, QTensor, Report
from ao.train import (
    BitNetTrainingConfig,
    Int8WeightOnlyQuantizedTrainingConfig,
    LowPrecisionLinear,
    precompute_bitnet_scale_for_fsdp,
)

from ...core.config import AOBaseConfig
from ...kinds import Kind

__all__ = [
    "BitNetTrainingConfig",
    "BitNetTrainingLinearWeight",
    "Int8MixedPrecisionTrainingConfig",
    "Int8MixedPrecisionTrainingLinear",
    "Int8MixedPrecisionTrainingLinearWeight",
    "Int8QuantizedTrainingLinearWeight",
    "Int8WeightOnlyQuantizedTrainingConfig",
    "bitnet_training",
    "int8_mixed_precision_training",
    "int8_weight_only_quantized_training",
    "precompute_bitnet_scale_for_fsdp",
    "quantize_int8_rowwise",
]

int8_weight_only_quantized_training = Int8WeightOnlyQuantizedTrainingConfig
bitnet_training = BitNetTrainingConfig


@dataclass
class Int8MixedPrecisionTrainingConfig(AOBaseConfig):
    """`ao.train.Int8MixedPrecisionTrainingConfig`. module_swap: accepted; layers stay the objects that they are."""

    output: bool = True
    grad_input: bool = True
    grad_weight: bool = True
    module_swap: bool = False

    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Report:
        """Let the layers that the filter takes train so."""
        ours = train.Int8MixedPrecisionTrainingConfig(self.output, self.grad_input, self.grad_weight)
        return ao.quantize_(model, ours, filter_fn, device)


def int8_mixed_precision_training(
    config: Int8MixedPrecisionTrainingConfig | bool = True, *args: bool, **fields: bool
) -> Int8MixedPrecisionTrainingConfig:
    """The config itself, or one that says which of output, grad_input and grad_weight are int8."""
    if isinstance(config, Int8MixedPrecisionTrainingConfig):
        return config
    return Int8MixedPrecisionTrainingConfig(config, *args, **fields)


def quantize_int8_rowwise(
    tensor: Tensor, stochastic_rounding: bool = False, eps: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Codes (int8) of a matrix and one scale per row, max|row| / 127, in its dtype."""
    q: Any = Intx(8, narrow=True, rounding="stochastic" if stochastic_rounding else "nearest").quantize(tensor)
    return q.qdata, q.scale[:, 0].to(tensor.dtype)


class Int8QuantizedTrainingLinearWeight(metaclass=Kind):
    """An `IntxTensor` of 8 bits with stochastic rounding."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(x, QTensor) and isinstance(x.spec, Intx) and x.spec.rounding == "stochastic"

    @staticmethod
    def from_float(tensor: Tensor) -> QTensor:
        """Quantize a weight, to nearest; what is written later is rounded at random."""
        q = Intx(8, narrow=True).quantize(tensor)
        return Intx(8, narrow=True, rounding="stochastic").wrap(q.fields(), q.dtype, q.shape)


class Int8MixedPrecisionTrainingLinear(metaclass=Kind):
    """A `LowPrecisionLinear` with int8 products."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        gemms = (
            (x.recipe.output, x.recipe.grad_input, x.recipe.grad_weight) if isinstance(x, LowPrecisionLinear) else ()
        )
        return any(isinstance(gemm.a, Intx) for gemm in gemms)


class Int8MixedPrecisionTrainingLinearWeight(metaclass=Kind):
    """Nothing: the layer knows its products here, and its weight is a plain one."""


class BitNetTrainingLinearWeight(metaclass=Kind):
    """Nothing: the layer knows its products here."""
