"""The names of optimum-quanto over ao: in place of `optimum.quanto`, write `ao.compat.quanto`.

    from ao.compat.quanto import Calibration, freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)

names.py says of each name what it is here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...dtypes import QTensor, load, save
from . import nn
from .calibrate import Calibration
from .nn import QConv2d, QLayerNorm, QLinear, QModuleMixin, quantize_module, register_qmodule
from .optimizers import (
    AbsmaxOptimizer,
    AffineOptimizer,
    HqqOptimizer,
    MaxOptimizer,
    Optimizer,
    SymmetricOptimizer,
    absmax_scale,
)
from .qtype import (
    qfloat8,
    qfloat8_e4m3fn,
    qfloat8_e4m3fnuz,
    qfloat8_e5m2,
    qint2,
    qint4,
    qint8,
    qtype,
    qtypes,
)
from .quantize import freeze, quantization_map, quantize, requantize
from .tensors import (
    ActivationQBytesTensor,
    QBitsTensor,
    QBytesTensor,
    WeightQBitsTensor,
    WeightQBytesTensor,
    quantize_activation,
    quantize_weight,
)

__version__ = "0.2.7"
"""The version whose names these are."""

_MODELS = {
    "QuantizedDiffusersModel",
    "QuantizedModelForCausalLM",
    "QuantizedPixArtTransformer2DModel",
    "QuantizedTransformersModel",
}


def __getattr__(name: str) -> Any:
    """The models, which are imported when they are asked for."""
    if name in _MODELS:
        return getattr(importlib.import_module(f"{__name__}.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def safe_save(state_dict: Mapping[str, Tensor], filename: str | Path) -> None:
    """Write a state dict to a file of safetensors."""
    save(dict(state_dict), filename)


def safe_load(filename: str | Path) -> dict[str, Any]:
    """The state dict of a file of safetensors."""
    return dict(load(filename))


def is_transformers_available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return importlib.util.find_spec("diffusers") is not None


__all__ = [
    "AbsmaxOptimizer",
    "ActivationQBytesTensor",
    "AffineOptimizer",
    "Calibration",
    "HqqOptimizer",
    "MaxOptimizer",
    "Optimizer",
    "QBitsTensor",
    "QBytesTensor",
    "QConv2d",
    "QLayerNorm",
    "QLinear",
    "QModuleMixin",
    "QTensor",
    "SymmetricOptimizer",
    "WeightQBitsTensor",
    "WeightQBytesTensor",
    "absmax_scale",
    "freeze",
    "is_diffusers_available",
    "is_transformers_available",
    "nn",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e4m3fnuz",
    "qfloat8_e5m2",
    "qint2",
    "qint4",
    "qint8",
    "qtype",
    "qtypes",
    "quantization_map",
    "quantize",
    "quantize_activation",
    "quantize_module",
    "quantize_weight",
    "register_qmodule",
    "requantize",
    "safe_load",
    "safe_save",
]
