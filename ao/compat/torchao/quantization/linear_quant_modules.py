"""torchao.quantization.linear_quant_modules."""

from .GPTQ import (
    Int4WeightOnlyQuantizer,
    Int8DynActInt4WeightLinear,
    Int8DynActInt4WeightQuantizer,
    WeightOnlyInt4Linear,
)

__all__ = [
    "Int4WeightOnlyQuantizer",
    "Int8DynActInt4WeightLinear",
    "Int8DynActInt4WeightQuantizer",
    "WeightOnlyInt4Linear",
]
