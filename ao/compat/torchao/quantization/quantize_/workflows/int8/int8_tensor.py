"""torchao.quantization.quantize_.workflows.int8.int8_tensor."""

from .. import Int8Tensor

__all__ = ["Int8Tensor"]
