"""Low-precision PyTorch: quantize, train and shrink models, in plain PyTorch and Triton, with nothing to build."""

__distribution__ = "ao-lowbit"  # on the package index, where `ao` is another package

import importlib
from typing import TYPE_CHECKING, Any

from . import installation as _installation  # noqa: F401  raises if another package called `ao` is mixed with this one
from .dtypes import FP6, MXFP4, MXFP6, MXFP8, MXINT8, NF4, NVFP4, Codebook, Float8, FloatX, Intx, QTensor, Spec
from .inductor_config import recommended_inductor_config_setter
from .matmul import path_name

__version__ = "0.1.0"

__all__ = [
    "FP6",
    "MXFP4",
    "MXFP6",
    "MXFP8",
    "MXINT8",
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
]

if TYPE_CHECKING:
    from . import optim as optim
    from . import quant as quant
    from . import sparsity as sparsity
    from . import train as train
    from .dtypes import load, save
    from .quant import *  # noqa: F403
    from .quant import __all__ as _quant

    __all__ += _quant
else:
    # Imported above are the formats, which pickles need, and their products; the rest comes when it is asked for.
    _NAMES = __all__
    del __all__  # asked for by `from ao import *`

    def __getattr__(name: str) -> Any:
        """`ao.optim`, `ao.quant`, `ao.sparsity`, `ao.train`, `load`, `save`, and the public names of `ao.quant`."""
        if name in ("optim", "quant", "sparsity", "train"):
            return importlib.import_module(f".{name}", __name__)
        if name in ("load", "save"):
            return getattr(importlib.import_module(".dtypes", __name__), name)
        if name == "__all__" or not name.startswith("_"):
            quant = importlib.import_module(".quant", __name__)
            if name == "__all__":
                return [*_NAMES, *quant.__all__]
            if name in quant.__all__:
                return globals().setdefault(name, getattr(quant, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__"), "optim", "sparsity", "train"})
