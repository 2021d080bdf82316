"""torchao.float8.float8_linear: `Float8Linear`, which is a `LowPrecisionLinear` with float8 products."""

from __future__ import annotations

from typing import Any

from torch import nn

from ao.train import LowPrecisionLinear
from ao.train import convert_to_float8_training as convert

from ..kinds import Kind
from .config import Float8LinearConfig

__all__ = ["Float8Linear", "Float8LinearConfig"]


class Float8Linear(metaclass=Kind):
    """A linear layer that trains with float8 products."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(x, LowPrecisionLinear) and x.recipe.uses_float8

    @staticmethod
    def from_float(mod: nn.Module, config: Float8LinearConfig | None = None) -> nn.Module:
        """Let a linear layer train with float8 products, in place. Returns it."""
        return convert(mod, config=config)
