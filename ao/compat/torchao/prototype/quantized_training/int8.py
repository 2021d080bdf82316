"""torchao.prototype.quantized_training.int8."""

from . import Int8QuantizedTrainingLinearWeight, int8_weight_only_quantized_training, quantize_int8_rowwise

__all__ = ["Int8QuantizedTrainingLinearWeight", "int8_weight_only_quantized_training", "quantize_int8_rowwise"]
