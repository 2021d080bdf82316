"""Low-precision PyTorch: quantize, train and shrink models, in plain PyTorch and Triton, with nothing to build."""

__distribution__ = "ao-lowbit"  # on the package index, where `ao` is another package

import importlib
from typing import Any

from . import installation as _installation  # noqa: F401  raises if another package called `ao` is mixed with this one
from .dtypes import (
    FP6,
    MXFP4,
    MXFP6,
    MXFP8,
    NF4,
    NVFP4,
    Codebook,
    Float8,
    FloatX,
    Intx,
    QTensor,
    Spec,
    load,
    save,
)
from .inductor_config import recommended_inductor_config_setter
from .matmul import path_name
from .quant import *  # noqa: F403
from .quant import __all__ as _quant


def __getattr__(name: str) -> Any:
    """`ao.optim` and `ao.train`, which are imported when they are asked for."""
    if name in ("optim", "train"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "FP6",
    "MXFP4",
    "MXFP6",
    "MXFP8",
    "NF4",
    "NVFP4",
    "Codebook",
    "Float8",
    "FloatX",
    "Intx",
    "QTensor",
    "Spec",
    "load",
    "path_name",
    "recommended_inductor_config_setter",
    "save",
    *_quant,
]
