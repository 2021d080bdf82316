"""How a quantized matrix multiplies: every product with one comes to `doors`, which picks the fastest path of the device."""

from .doors import path_name
from .kernels.device import has_float8
from .layers import adopt, set_parameter
from .product import Codes, cast_whole, codes_both, codes_of, codes_of_transposed, is_square, scaled_product

__all__ = [
    "Codes",
    "adopt",
    "cast_whole",
    "codes_both",
    "codes_of",
    "codes_of_transposed",
    "has_float8",
    "is_square",
    "path_name",
    "scaled_product",
    "set_parameter",
]
