"""torchao.prototype.gptq: `ao.GPTQ` in two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import ao

from ...core.config import AOBaseConfig
from ...quantization.quant_api import Int4WeightOnlyConfig, _is_linear
from ...recording import finish, start, with_algorithm

__all__ = ["GPTQConfig"]


@dataclass
class GPTQConfig(AOBaseConfig):
    """`quantize_(m, GPTQConfig(step="observe"))`, call the model with data, `quantize_(m, GPTQConfig(step="convert"))`.

    percdamp: `damping` of `ao.GPTQ`. gptq_quantize_block_size: accepted and without effect.
    """

    step: str = "observe"
    base_config: Any = None
    percdamp: float = 0.01
    gptq_quantize_block_size: int = 256

    def __post_init__(self) -> None:
        if self.step not in ("observe", "convert"):
            raise ValueError(f"GPTQConfig: step must be 'observe' or 'convert', got {self.step!r}")
        if self.base_config is None:
            self.base_config = Int4WeightOnlyConfig()

    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Any:
        """Do the step."""
        if self.step == "observe":
            return start(model, filter_fn)
        config = with_algorithm(self.base_config, ao.GPTQ(damping=self.percdamp))
        return finish(model, config, None if filter_fn is _is_linear else filter_fn, device, "GPTQConfig")
