"""torchao.dtypes.uintx: layouts of integers."""

from ..utils import (
    BlockSparseLayout,
    CutlassInt4PackedLayout,
    Int4CPULayout,
    MarlinQQQLayout,
    MarlinSparseLayout,
    SemiSparseLayout,
    TensorCoreTiledLayout,
    UintxLayout,
)

__all__ = [
    "BlockSparseLayout",
    "CutlassInt4PackedLayout",
    "Int4CPULayout",
    "MarlinQQQLayout",
    "MarlinSparseLayout",
    "SemiSparseLayout",
    "TensorCoreTiledLayout",
    "UintxLayout",
]
