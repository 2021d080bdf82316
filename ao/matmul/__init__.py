"""How a quantized matrix multiplies: every product with one comes to `doors`, which picks the fastest path of the device."""

from .doors import path_name
from .kernels.device import has_float8
from .product import Codes, cast_whole, codes_both, codes_of, codes_of_transposed, is_square, scaled_product

__all__ = [
    "Codes",
    "cast_whole",
    "codes_both",
    "codes_of",
    "codes_of_transposed",
    "has_float8",
    "is_square",
    "path_name",
    "scaled_product",
]
