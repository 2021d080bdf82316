"""torchao.prototype.dtypes: layouts that left `dtypes`, and integers of 2 bits."""

from ...dtypes.utils import (
    BlockSparseLayout,
    CutlassInt4PackedLayout,
    GemlitePackedLayout,
    Int8DynamicActInt4WeightCPULayout,
    MarlinQQQLayout,
    UintxLayout,
)

__all__ = [
    "BlockSparseLayout",
    "CutlassInt4PackedLayout",
    "GemlitePackedLayout",
    "Int8DynamicActInt4WeightCPULayout",
    "MarlinQQQLayout",
    "UintxLayout",
]
