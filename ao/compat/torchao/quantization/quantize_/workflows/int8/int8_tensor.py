"""torchao.quantization.quantize_.workflows.int8.int8_tensor."""

from .. import Int8Tensor, QuantizeTensorToInt8Kwargs

__all__ = ["Int8Tensor", "QuantizeTensorToInt8Kwargs"]
