"""torchao.quantization.quantize_.workflows.int4.int4_tensor."""

from .. import Int4Tensor

__all__ = ["Int4Tensor"]
