"""torchao.quantization.qat.two_step_quantizer."""

from ..unified import TwoStepQuantizer

__all__ = ["TwoStepQuantizer"]
