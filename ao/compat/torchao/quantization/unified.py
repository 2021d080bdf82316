"""torchao.quantization.unified: the two shapes of a quantizer, to derive from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

__all__ = ["Quantizer", "TwoStepQuantizer"]


class Quantizer(ABC):
    """Quantizes a model in one step."""

    @abstractmethod
    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The quantized model."""


class TwoStepQuantizer:
    """Quantizes a model in two steps, with training or calibration between them."""

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, ready for what comes between."""
        raise NotImplementedError(f"{type(self).__name__} must define prepare")

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The quantized model."""
        raise NotImplementedError(f"{type(self).__name__} must define convert")
