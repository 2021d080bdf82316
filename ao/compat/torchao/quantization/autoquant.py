"""torchao.quantization.autoquant: `ao.autoquant`, and its candidates as classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ao
from ao import Config, QTensor, Spec
from ao.dtypes import MarlinSparseLayout, SemiSparseLayout

from ..core.config import Translated
from ..kinds import Kind
from .granularity import PerRow, PerTensor
from .quant_api import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)

__all__ = [
    "ALL_AUTOQUANT_CLASS_LIST",
    "AUTOQUANT_CACHE",
    "DEFAULT_AUTOQUANT_CLASS_LIST",
    "DEFAULT_FLOAT_AUTOQUANT_CLASS_LIST",
    "DEFAULT_INT4_AUTOQUANT_CLASS_LIST",
    "DEFAULT_SPARSE_AUTOQUANT_CLASS_LIST",
    "GEMLITE_INT4_AUTOQUANT_CLASS_LIST",
    "OTHER_AUTOQUANT_CLASS_LIST",
    "AQBFloat16LinearWeight",
    "AQDefaultLinearWeight",
    "AQFloat8PerRowScalingDynamicallyQuantizedLinearWeight",
    "AQFloat8PerTensorScalingDynamicallyQuantizedLinearWeight",
    "AQFloat8WeightOnlyQuantizedLinearWeight",
    "AQFloat16LinearWeight",
    "AQFloat32LinearWeight",
    "AQGemliteInt4G32WeightOnlyQuantizedLinearWeight",
    "AQGemliteInt4G64WeightOnlyQuantizedLinearWeight",
    "AQGemliteInt4G128WeightOnlyQuantizedLinearWeight",
    "AQGemliteInt4G256WeightOnlyQuantizedLinearWeight",
    "AQInt4G32WeightOnlyQuantizedLinearWeight",
    "AQInt4G64WeightOnlyQuantizedLinearWeight",
    "AQInt4G128WeightOnlyQuantizedLinearWeight",
    "AQInt4G128WeightOnlyQuantizedMarlinSparseLinearWeight",
    "AQInt4G256WeightOnlyQuantizedLinearWeight",
    "AQInt8DynamicallyQuantizedLinearWeight",
    "AQInt8DynamicallyQuantizedSemiSparseLinearWeight",
    "AQInt8WeightOnlyQuantizedLinearWeight",
    "AQInt8WeightOnlyQuantizedLinearWeight2",
    "AQInt8WeightOnlyQuantizedLinearWeight3",
    "AutoQuantizableLinearWeight",
    "autoquant",
]

AUTOQUANT_CACHE: dict[Any, Any] = {}
"""Empty: timings are kept in files, `ao.autoquant(cache=...)`."""


class Candidate(metaclass=Kind):
    """A format that is tried. config: what it stands for; None leaves the layer as it is, which is always tried."""

    config: Any = None

    @classmethod
    def to_ao(cls) -> Config | Spec | None:
        """The config of `ao`."""
        return cls.config.to_ao() if isinstance(cls.config, Translated) else cls.config

    @classmethod
    def from_float(cls, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A weight in this format."""
        ours = cls.to_ao()
        if ours is None:
            return weight
        assert isinstance(ours, Config)
        from dataclasses import replace

        spec = ours.weight(tuple(weight.shape))
        return replace(spec, act=ours.act() or spec.act).quantize(weight)

    @classmethod
    def holds(cls, x: Any) -> bool:
        """Whether `x` is a weight in this format."""
        ours = cls.to_ao() if cls.config is not None else None
        if not isinstance(x, QTensor) or not isinstance(ours, Config):
            return False
        from dataclasses import replace

        spec = ours.weight(tuple(x.shape))
        return x.spec == replace(spec, act=ours.act() or spec.act)


class AQDefaultLinearWeight(Candidate):
    """The layer as it is."""


class AQInt8WeightOnlyQuantizedLinearWeight(Candidate):
    """int8 weights."""

    config = Int8WeightOnlyConfig()


class AQInt8WeightOnlyQuantizedLinearWeight2(AQInt8WeightOnlyQuantizedLinearWeight):
    """int8 weights: `ao` chooses the kernel."""


class AQInt8WeightOnlyQuantizedLinearWeight3(AQInt8WeightOnlyQuantizedLinearWeight):
    """int8 weights: `ao` chooses the kernel."""


class AQInt8DynamicallyQuantizedLinearWeight(Candidate):
    """int8 weights and activations."""

    config = Int8DynamicActivationInt8WeightConfig()


class AQInt8DynamicallyQuantizedSemiSparseLinearWeight(Candidate):
    """int8 activations, and int8 weights that are 2:4."""

    config = Int8DynamicActivationInt8WeightConfig(layout=SemiSparseLayout())


class AQInt4G128WeightOnlyQuantizedMarlinSparseLinearWeight(Candidate):
    """int4 weights that are 2:4, in groups of 128."""

    config = Int4WeightOnlyConfig(128, layout=MarlinSparseLayout())


class AQInt4G32WeightOnlyQuantizedLinearWeight(Candidate):
    """int4 weights in groups of 32."""

    config = Int4WeightOnlyConfig(32)


class AQInt4G64WeightOnlyQuantizedLinearWeight(Candidate):
    """int4 weights in groups of 64."""

    config = Int4WeightOnlyConfig(64)


class AQInt4G128WeightOnlyQuantizedLinearWeight(Candidate):
    """int4 weights in groups of 128."""

    config = Int4WeightOnlyConfig(128)


class AQInt4G256WeightOnlyQuantizedLinearWeight(Candidate):
    """int4 weights in groups of 256."""

    config = Int4WeightOnlyConfig(256)


class AQGemliteInt4G32WeightOnlyQuantizedLinearWeight(AQInt4G32WeightOnlyQuantizedLinearWeight):
    """int4 weights in groups of 32."""


class AQGemliteInt4G64WeightOnlyQuantizedLinearWeight(AQInt4G64WeightOnlyQuantizedLinearWeight):
    """int4 weights in groups of 64."""


class AQGemliteInt4G128WeightOnlyQuantizedLinearWeight(AQInt4G128WeightOnlyQuantizedLinearWeight):
    """int4 weights in groups of 128."""


class AQGemliteInt4G256WeightOnlyQuantizedLinearWeight(AQInt4G256WeightOnlyQuantizedLinearWeight):
    """int4 weights in groups of 256."""


class AQFloat8WeightOnlyQuantizedLinearWeight(Candidate):
    """float8 weights."""

    config = Float8WeightOnlyConfig()


class AQFloat8PerRowScalingDynamicallyQuantizedLinearWeight(Candidate):
    """float8 weights and activations, per row."""

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


class AQFloat8PerTensorScalingDynamicallyQuantizedLinearWeight(Candidate):
    """float8 weights and activations, per tensor."""

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor())


class _Floating(Candidate):
    """A dtype that is not quantized. `autoquant` leaves the dtype of a model as it is, and passes over it."""

    dtype = torch.float32

    @classmethod
    def from_float(cls, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The weight in this dtype."""
        return weight.to(cls.dtype)


class AQFloat32LinearWeight(_Floating):
    """float32."""


class AQBFloat16LinearWeight(_Floating):
    """bfloat16."""

    dtype = torch.bfloat16


class AQFloat16LinearWeight(_Floating):
    """float16."""

    dtype = torch.float16


class AutoQuantizableLinearWeight(metaclass=Kind):
    """Nothing: while `autoquant` records, weights are what they were, and the calls of the layers are watched."""


DEFAULT_AUTOQUANT_CLASS_LIST: list[Any] = [
    AQDefaultLinearWeight,
    AQInt8WeightOnlyQuantizedLinearWeight,
    AQInt8WeightOnlyQuantizedLinearWeight2,
    AQInt8DynamicallyQuantizedLinearWeight,
]
DEFAULT_INT4_AUTOQUANT_CLASS_LIST: list[Any] = [
    AQDefaultLinearWeight,
    AQInt8DynamicallyQuantizedLinearWeight,
    AQInt4G64WeightOnlyQuantizedLinearWeight,
]
GEMLITE_INT4_AUTOQUANT_CLASS_LIST: list[Any] = [
    AQDefaultLinearWeight,
    AQInt8DynamicallyQuantizedLinearWeight,
    AQGemliteInt4G64WeightOnlyQuantizedLinearWeight,
]
DEFAULT_FLOAT_AUTOQUANT_CLASS_LIST: list[Any] = [AQFloat32LinearWeight, AQBFloat16LinearWeight, AQFloat16LinearWeight]
OTHER_AUTOQUANT_CLASS_LIST: list[Any] = [
    AQDefaultLinearWeight,
    AQFloat8WeightOnlyQuantizedLinearWeight,
    AQFloat8PerRowScalingDynamicallyQuantizedLinearWeight,
    AQFloat8PerTensorScalingDynamicallyQuantizedLinearWeight,
]
DEFAULT_SPARSE_AUTOQUANT_CLASS_LIST: list[Any] = [
    AQDefaultLinearWeight,
    AQInt4G128WeightOnlyQuantizedMarlinSparseLinearWeight,
    AQInt8DynamicallyQuantizedSemiSparseLinearWeight,
]
ALL_AUTOQUANT_CLASS_LIST: list[Any] = [
    *DEFAULT_AUTOQUANT_CLASS_LIST,
    AQInt4G64WeightOnlyQuantizedLinearWeight,
    *DEFAULT_FLOAT_AUTOQUANT_CLASS_LIST,
    *OTHER_AUTOQUANT_CLASS_LIST[1:],
]


def autoquant(
    model: nn.Module,
    example_input: Any = None,
    qtensor_class_list: Sequence[Any] | str = DEFAULT_AUTOQUANT_CLASS_LIST,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    mode: Any = None,
    manual: bool = False,
    set_inductor_config: bool = True,
    supress_autoquant_errors: bool = True,
    min_sqnr: float | None = None,
    **aq_kwargs: Any,
) -> nn.Module:
    """`ao.autoquant`: the fastest format for each linear layer, on the shapes that it runs.

    qtensor_class_list: classes of this module, or configs. mode, supress_autoquant_errors: accepted and without effect.
    error_on_unseen=False: leave layers alone that never ran. Other keyword arguments are those of `ao.autoquant`.
    """
    if isinstance(qtensor_class_list, str):
        candidates: Any = qtensor_class_list
    else:
        found = [_config(candidate) for candidate in qtensor_class_list]
        candidates = list({repr(c): c for c in found if c is not None}.values())
        if not candidates:
            return model
    return ao.autoquant(model, example_input, candidates, filter_fn, manual=manual, min_sqnr=min_sqnr, **aq_kwargs)


def _config(candidate: Any) -> Config | Spec | None:
    if isinstance(candidate, type) and issubclass(candidate, Candidate):
        return candidate.to_ao()
    return candidate.to_ao() if isinstance(candidate, Translated) else candidate
