"""Number formats: what a quantized tensor is, and what can be done with one."""

from . import linear as _linear  # noqa: F401  gives F.linear and its kin their meaning
from . import ops as _ops  # noqa: F401  gives slices, views and copies theirs
from .base import QTensor, Spec
from .codebook import NF4, Codebook, CodebookTensor, NF4Tensor, linear_nf4, to_nf4
from .float8 import Float8, Float8Tensor
from .intx import Intx, IntxTensor
from .linear import path_name

__all__ = [
    "NF4",
    "Codebook",
    "CodebookTensor",
    "Float8",
    "Float8Tensor",
    "Intx",
    "IntxTensor",
    "NF4Tensor",
    "QTensor",
    "Spec",
    "linear_nf4",
    "path_name",
    "to_nf4",
]
