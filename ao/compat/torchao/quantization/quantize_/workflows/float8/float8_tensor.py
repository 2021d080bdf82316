"""torchao.quantization.quantize_.workflows.float8.float8_tensor."""

from .. import Float8Tensor, QuantizeTensorToFloat8Kwargs

__all__ = ["Float8Tensor", "QuantizeTensorToFloat8Kwargs"]
