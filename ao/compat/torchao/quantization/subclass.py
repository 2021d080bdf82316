"""torchao.quantization.subclass: formats by the names that they had first. `from_float` quantizes a weight."""

from __future__ import annotations

from .autoquant import (
    AQInt4G128WeightOnlyQuantizedLinearWeight,
    AQInt8DynamicallyQuantizedLinearWeight,
    AQInt8WeightOnlyQuantizedLinearWeight,
)

__all__ = [
    "Int4WeightOnlyQuantizedLinearWeight",
    "Int8DynamicallyQuantizedLinearWeight",
    "Int8WeightOnlyQuantizedLinearWeight",
]


class Int8DynamicallyQuantizedLinearWeight(AQInt8DynamicallyQuantizedLinearWeight):
    """int8 weights and activations."""


class Int8WeightOnlyQuantizedLinearWeight(AQInt8WeightOnlyQuantizedLinearWeight):
    """int8 weights."""


class Int4WeightOnlyQuantizedLinearWeight(AQInt4G128WeightOnlyQuantizedLinearWeight):
    """int4 weights in groups of 128."""
