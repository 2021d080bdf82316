"""optimum.quanto.tensor.weights."""

from ..tensors import WeightQBitsTensor, WeightQBytesTensor, quantize_weight

__all__ = ["WeightQBitsTensor", "WeightQBytesTensor", "quantize_weight"]
