"""How a quantized matrix multiplies: doors.py takes every call, linear.py picks the fastest path of the device."""

import importlib
from typing import TYPE_CHECKING, Any

from . import doors as _doors  # noqa: F401  gives F.linear and its kin their meaning
from .block_scaled import swizzle, unswizzle
from .graph_fields import tensor_of
from .kernels.device import has_float8
from .layers import QuantizedLayer, layer_class, set_parameter
from .linear import path_name
from .product import cast_whole, codes_both, codes_of, codes_of_transposed, is_square, scaled_product
from .sparse import both_pruned, pruned_both, semi_sparse_product, transposable_mask

if TYPE_CHECKING:
    from .attention import attend
    from .attention_fields import attend_fields, encode_fields, register_form
    from .relative_positions import relative_attention, takes_relative_attention
    from .softmax_pieces import Exact, Sight
else:
    _LATER = {
        "attend": ".attention",
        **dict.fromkeys(("Exact", "Sight"), ".softmax_pieces"),
        **dict.fromkeys(("attend_fields", "encode_fields", "register_form"), ".attention_fields"),
        **dict.fromkeys(("relative_attention", "takes_relative_attention"), ".relative_positions"),
    }

    def __getattr__(name: str) -> Any:
        """What is imported when it is asked for."""
        if name in _LATER:
            return getattr(importlib.import_module(_LATER[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Exact",
    "QuantizedLayer",
    "Sight",
    "attend",
    "attend_fields",
    "both_pruned",
    "cast_whole",
    "codes_both",
    "codes_of",
    "codes_of_transposed",
    "encode_fields",
    "has_float8",
    "is_square",
    "layer_class",
    "path_name",
    "pruned_both",
    "register_form",
    "relative_attention",
    "scaled_product",
    "semi_sparse_product",
    "set_parameter",
    "swizzle",
    "takes_relative_attention",
    "tensor_of",
    "transposable_mask",
    "unswizzle",
]
