"""torchao.quantization.quantize_.workflows.float8.float8_tensor."""

from .. import Float8Tensor

__all__ = ["Float8Tensor"]
