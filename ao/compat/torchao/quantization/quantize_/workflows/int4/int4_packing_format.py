"""torchao.quantization.quantize_.workflows.int4.int4_packing_format."""

from .. import Int4PackingFormat

__all__ = ["Int4PackingFormat"]
