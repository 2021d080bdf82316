"""torchao.quantization.weight_only."""

from __future__ import annotations

from typing import Any

from torch import nn

import ao
from ao import Intx, QTensor

from ..kinds import Kind

__all__ = ["WeightOnlyInt8QuantLinear"]


class WeightOnlyInt8QuantLinear(metaclass=Kind):
    """A linear layer with an int8 weight."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        weight = getattr(x, "weight", None) if isinstance(x, nn.Linear) else None
        spec = weight.spec if isinstance(weight, QTensor) else None
        return isinstance(spec, Intx) and spec.bits == 8 and spec.act is None

    @staticmethod
    def from_float(mod: nn.Module) -> nn.Module:
        """Quantize a linear layer, in place."""
        ao.quantize_(mod, ao.Int8WeightOnlyConfig())
        return mod
