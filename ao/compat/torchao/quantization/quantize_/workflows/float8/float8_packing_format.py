"""torchao.quantization.quantize_.workflows.float8.float8_packing_format."""

from .. import Float8PackingFormat

__all__ = ["Float8PackingFormat"]
