"""torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor."""

from .. import IntxUnpackedToInt8Tensor

__all__ = ["IntxUnpackedToInt8Tensor"]
