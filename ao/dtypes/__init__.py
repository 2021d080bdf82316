"""Number formats: what a quantized tensor is, and what can be done with one."""

import importlib
from typing import TYPE_CHECKING, Any

from .. import installation as _installation  # noqa: F401  raises if ao/__init__.py is another package's
from . import coalesced as _coalesced  # noqa: F401  gives DDP its first broadcast
from . import ops as _ops  # noqa: F401  gives slices, views and copies theirs
from . import sharding as _sharding  # noqa: F401  and collectives
from .base import Elements, Opaque, PerBlock, QTensor, Shared, Spec, blank, dense, sources_digest, view_mode
from .bits import pack, pack_dim, pack_trits, packed_dim, unpack, unpack_trits
from .block_sparse import BlockSparse, BlockSparseTensor
from .blocks import amax_abs, amin_amax, blocks_shape, expand, in_blocks, is_finite, to_blocks
from .codebook import NF4, Codebook, CodebookTensor, NF4Tensor, linear_nf4, nf4_spec, to_nf4
from .dynamic_tree import DynamicTree
from .e8m0 import E8M0, E8M0Tensor
from .flat import Flat, FlatTensor
from .float8 import Float8, Float8Tensor
from .floatx import FP6, MXFP4, MXFP6, MXFP8, NVFP4, FloatX, FloatXTensor
from .int4_prepacked import Int4Prepacked, Int4PrepackedTensor
from .intx import Intx, IntxTensor
from .joint import Joint, JointTensor
from .layouts import (
    BlockSparseLayout,
    Int4CPULayout,
    Int4XPULayout,
    Layout,
    MarlinSparseLayout,
    PlainLayout,
    SemiSparseLayout,
    TensorCoreTiledLayout,
)
from .mapped import Mapped, MappedTensor
from .mxint import MXINT8, MXInt, MXIntTensor
from .operand import Cast, Operand
from .positive_steps import PositiveSteps
from .rounding import reciprocal
from .shifted import Shifted, ShiftedTensor
from .sparse24 import Sparse24, Sparse24Tensor
from .ternary import Ternary, TernaryTensor
from .tracing import fresh

if TYPE_CHECKING:
    from .caching import cache_directory
    from .checkpoint import load, save
    from .cpp import cpp_compiler, cpp_instructions, cpp_library
    from .cpp_vectors import CPP_VECTORS, NotElementwise, cpp_function
else:
    _LATER = {
        "NotElementwise": ".cpp_vectors",
        "CPP_VECTORS": ".cpp_vectors",
        "cache_directory": ".caching",
        "cpp_compiler": ".cpp",
        "cpp_function": ".cpp_vectors",
        "cpp_library": ".cpp",
        "cpp_instructions": ".cpp",
        "load": ".checkpoint",
        "save": ".checkpoint",
    }

    def __getattr__(name: str) -> Any:
        """What is imported when it is asked for."""
        if name in _LATER:
            return getattr(importlib.import_module(_LATER[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "CPP_VECTORS",
    "E8M0",
    "FP6",
    "MXFP4",
    "MXFP6",
    "MXFP8",
    "MXINT8",
    "NF4",
    "NVFP4",
    "BlockSparse",
    "BlockSparseLayout",
    "BlockSparseTensor",
    "Cast",
    "Codebook",
    "CodebookTensor",
    "DynamicTree",
    "E8M0Tensor",
    "Elements",
    "Flat",
    "FlatTensor",
    "Float8",
    "Float8Tensor",
    "FloatX",
    "FloatXTensor",
    "Int4CPULayout",
    "Int4Prepacked",
    "Int4PrepackedTensor",
    "Int4XPULayout",
    "Intx",
    "IntxTensor",
    "Joint",
    "JointTensor",
    "Layout",
    "MXInt",
    "MXIntTensor",
    "Mapped",
    "MappedTensor",
    "MarlinSparseLayout",
    "NF4Tensor",
    "NotElementwise",
    "Opaque",
    "Operand",
    "PerBlock",
    "PlainLayout",
    "PositiveSteps",
    "QTensor",
    "SemiSparseLayout",
    "Shared",
    "Shifted",
    "ShiftedTensor",
    "Sparse24",
    "Sparse24Tensor",
    "Spec",
    "TensorCoreTiledLayout",
    "Ternary",
    "TernaryTensor",
    "amax_abs",
    "amin_amax",
    "blank",
    "blocks_shape",
    "cache_directory",
    "cpp_compiler",
    "cpp_function",
    "cpp_instructions",
    "cpp_library",
    "dense",
    "expand",
    "fresh",
    "in_blocks",
    "is_finite",
    "linear_nf4",
    "load",
    "nf4_spec",
    "pack",
    "pack_dim",
    "pack_trits",
    "packed_dim",
    "reciprocal",
    "save",
    "sources_digest",
    "to_blocks",
    "to_nf4",
    "unpack",
    "unpack_trits",
    "view_mode",
]
