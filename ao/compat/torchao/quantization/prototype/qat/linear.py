"""torchao.quantization.prototype.qat.linear."""

from ...qat.linear import (
    FakeQuantizedLinear,
    Int4WeightOnlyQATLinear,
    Int4WeightOnlyQATQuantizer,
    Int8DynActInt4WeightQATLinear,
    Int8DynActInt4WeightQATQuantizer,
    disable_4w_fake_quant,
    disable_8da4w_fake_quant,
    enable_4w_fake_quant,
    enable_8da4w_fake_quant,
)

__all__ = [
    "FakeQuantizedLinear",
    "Int4WeightOnlyQATLinear",
    "Int4WeightOnlyQATQuantizer",
    "Int8DynActInt4WeightQATLinear",
    "Int8DynActInt4WeightQATQuantizer",
    "disable_4w_fake_quant",
    "disable_8da4w_fake_quant",
    "enable_4w_fake_quant",
    "enable_8da4w_fake_quant",
]
