"""torchao.quantization.quantize_.common.packing_format."""

from . import PackingFormat

__all__ = ["PackingFormat"]
