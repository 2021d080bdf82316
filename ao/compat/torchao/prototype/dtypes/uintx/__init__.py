"""torchao.prototype.dtypes.uintx."""

from .uintx_layout import UintxLayout, UintxTensor, to_uintx

__all__ = ["UintxLayout", "UintxTensor", "to_uintx"]
