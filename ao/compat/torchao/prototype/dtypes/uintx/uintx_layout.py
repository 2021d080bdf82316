"""torchao.prototype.dtypes.uintx.uintx_layout."""

from ....dtypes.uintx.uintx_layout import UintxLayout, UintxTensor, to_uintx

__all__ = ["UintxLayout", "UintxTensor", "to_uintx"]
