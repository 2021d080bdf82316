"""How a quantized matrix multiplies: doors.py takes every call, linear.py picks the fastest path of the device."""

from . import doors as _doors  # noqa: F401  gives F.linear and its kin their meaning
from .block_scaled import swizzle, unswizzle
from .kernels.device import has_float8
from .layers import QuantizedLayer, adopt, layer_class, set_parameter
from .linear import path_name
from .product import cast_whole, codes_both, codes_of, codes_of_transposed, is_square, scaled_product
from .sparse import both_pruned, pruned_both, semi_sparse_product, transposable_mask

__all__ = [
    "QuantizedLayer",
    "adopt",
    "both_pruned",
    "cast_whole",
    "codes_both",
    "codes_of",
    "codes_of_transposed",
    "has_float8",
    "is_square",
    "layer_class",
    "path_name",
    "pruned_both",
    "scaled_product",
    "semi_sparse_product",
    "set_parameter",
    "swizzle",
    "transposable_mask",
    "unswizzle",
]
