"""torchao.float8.float8_linear: `Float8Linear`, which is a `LowPrecisionLinear` with float8 products."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ao.train import LowPrecisionLinear

from ..kinds import Kind
from .config import CastConfig, Float8LinearConfig, ScalingType
from .float8_training_tensor import LinearMMConfig, ScaledMMConfig

__all__ = ["Float8Linear", "Float8LinearConfig"]


class Float8Linear(LowPrecisionLinear, metaclass=Kind):
    """A linear layer that trains with float8 products. Any `LowPrecisionLinear` with such products is one.

    config: what it was made with.
    """

    config: Any

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(x, LowPrecisionLinear) and x.recipe.uses_float8

    @staticmethod
    def from_float(mod: nn.Module, config: Any = None) -> nn.Module:
        """Let a linear layer train with float8 products, in place. Returns it."""
        from .float8_linear_utils import convert_to_float8_training

        return convert_to_float8_training(mod, config=config)

    @property
    def linear_mm_config(self) -> LinearMMConfig:
        """How the three products are computed."""
        gemms = (self.recipe.output, self.recipe.grad_input, self.recipe.grad_weight)
        return LinearMMConfig(
            *(ScaledMMConfig(self.recipe.emulate, gemm.fast_accum, False, self.recipe.pad) for gemm in gemms)
        )

    def extra_repr(self) -> str:
        """The arguments of the layer, and how input, weight and gradient are cast."""
        c = self.config
        casts = (c.cast_config_input, c.cast_config_weight, c.cast_config_grad_output)
        kinds = ",".join(f"{name}:{_short(cast)}" for name, cast in zip(("i", "w", "go"), casts))
        return f'{nn.Linear.extra_repr(self)}, "{kinds}"'


def _short(cast: CastConfig) -> str:
    """ "dyn_ten_e4m3": dynamic or not, the granularity, and the format."""
    if cast.scaling_type is ScalingType.DISABLED:
        return "dis"
    granularity = {"tensorwise": "ten", "axiswise": "axs"}.get(
        cast.scaling_granularity.value, cast.scaling_granularity.value
    )
    return f"dyn_{granularity}_{'e5m2' if cast.target_dtype == torch.float8_e5m2 else 'e4m3'}"
