"""torchao's import paths over the names of `ao`: change `torchao` to `ao.compat.torchao`, and code written for it runs.

    from ao.compat.torchao.quantization import Int4WeightOnlyConfig, quantize_

    quantize_(model, Int4WeightOnlyConfig(group_size=32))

Its names from release 0.9 on are here, also those that it has taken away since. Each is a name of `ao`, or a few lines that
translate parameters; `NAMES` says which. What chooses kernels and packings is accepted and has no effect. Where `ao` does not
have a format (sparse weights), the name is here, and using it raises NotImplementedError.

Differences that remain: `quantize_` returns a report; two-step recipes remember what the model was called with, and quantize
block by block; checkpoints of that library are not read.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["NAMES", "autoquant", "quantize_"]

_MODULES = ("core", "dtypes", "float8", "kernel", "optim", "prototype", "quantization", "sparsity", "utils")


def __getattr__(name: str) -> Any:
    """Names and modules, which are imported when they are asked for."""
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in ("autoquant", "quantize_"):
        return getattr(importlib.import_module(".quantization", __name__), name)
    if name == "NAMES":
        return importlib.import_module(".names", __name__).table()
    if name == "__version__":
        return "0.18.0"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
