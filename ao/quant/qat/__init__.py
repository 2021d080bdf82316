"""Quantization-aware training: train a model with the rounding that it will have.

    quantize_(model, QATConfig(Int4WeightOnlyConfig(group_size=32), step="prepare"))
    ...  # train
    quantize_(model, QATConfig(Int4WeightOnlyConfig(group_size=32), step="convert"))

A prepared layer rounds its weight, and its input if the config says so, each time it runs, and passes gradients straight
through (arXiv:1308.3432). The weight that is stored is the rounded one, bit for bit. Where the input is quantized, a prepared
layer runs the very product of the converted layer, on the codes, in any dtype. Where it is not, it multiplies by the rounded
weight in the model's dtype: what the converted layer computes wherever it decodes its weight, and up to the rounding of
that product where a path reads the codes (`ao.path_name`).
"""

from .config import (
    FakeQuantizeConfig,
    FromIntXQuantizationAwareTrainingConfig,
    IntxFakeQuantizeConfig,
    IntXQuantizationAwareTrainingConfig,
    QATConfig,
)
from .layers import (
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    disable_fake_quantize,
    enable_fake_quantize,
    parameter_groups,
)
from .learned import learned_fake_quantize

__all__ = [
    "FakeQuantizeConfig",
    "FakeQuantizedEmbedding",
    "FakeQuantizedLinear",
    "FromIntXQuantizationAwareTrainingConfig",
    "IntXQuantizationAwareTrainingConfig",
    "IntxFakeQuantizeConfig",
    "QATConfig",
    "disable_fake_quantize",
    "enable_fake_quantize",
    "learned_fake_quantize",
    "parameter_groups",
]
