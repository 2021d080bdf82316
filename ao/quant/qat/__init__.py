"""Quantization-aware training: train a model with the rounding that it will have.

    quantize_(model, QATConfig(Int4WeightOnlyConfig(group_size=32), step="prepare"))
    ...  # train
    quantize_(model, QATConfig(Int4WeightOnlyConfig(group_size=32), step="convert"))

A prepared layer rounds its weight, and its input if the config says so, each time it runs, and passes gradients straight
through (arXiv:1308.3432). The weight that is stored is the rounded one, bit for bit. Where the input is quantized, a prepared
layer runs the very product of the converted layer, on the codes, in any dtype. Where it is not, it multiplies by the rounded
weight in the model's dtype: what the converted layer computes wherever it decodes its weight, and up to the rounding of
that product where a path reads the codes (`ao.path_name`).

Any format can be trained for, NVFP4 and MXFP4 with or without quantized inputs included. Without labels, or to keep what a
model was tuned for, train on `distillation_loss` of its logits and those of the original.
"""

from .config import (
    FakeQuantizeConfig,
    FromIntXQuantizationAwareTrainingConfig,
    IntxFakeQuantizeConfig,
    IntXQuantizationAwareTrainingConfig,
    QATConfig,
)
from .distillation import distillation_loss
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
    "distillation_loss",
    "enable_fake_quantize",
    "learned_fake_quantize",
    "parameter_groups",
]
