"""torchao.quantization.quantize_.workflows.intx.intx_packing_format."""

from .. import IntxPackingFormat

__all__ = ["IntxPackingFormat"]
