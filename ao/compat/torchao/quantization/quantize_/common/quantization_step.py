"""torchao.quantization.quantize_.common.quantization_step."""

from . import QuantizationStep

__all__ = ["QuantizationStep"]
