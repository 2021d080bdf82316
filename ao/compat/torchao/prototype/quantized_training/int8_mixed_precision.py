"""torchao.prototype.quantized_training.int8_mixed_precision."""

from . import (
    Int8MixedPrecisionTrainingConfig,
    Int8MixedPrecisionTrainingLinear,
    Int8MixedPrecisionTrainingLinearWeight,
    int8_mixed_precision_training,
)

__all__ = [
    "Int8MixedPrecisionTrainingConfig",
    "Int8MixedPrecisionTrainingLinear",
    "Int8MixedPrecisionTrainingLinearWeight",
    "int8_mixed_precision_training",
]
