"""torchao.quantization.prototype.qat."""

from ...qat.api import ComposableQATQuantizer
from ...qat.embedding import Int4WeightOnlyEmbeddingQATQuantizer
from ...qat.linear import (
    Int4WeightOnlyQATQuantizer,
    Int8DynActInt4WeightQATLinear,
    Int8DynActInt4WeightQATQuantizer,
    disable_4w_fake_quant,
    disable_8da4w_fake_quant,
    enable_4w_fake_quant,
    enable_8da4w_fake_quant,
)

__all__ = [
    "ComposableQATQuantizer",
    "Int4WeightOnlyEmbeddingQATQuantizer",
    "Int4WeightOnlyQATQuantizer",
    "Int8DynActInt4WeightQATLinear",
    "Int8DynActInt4WeightQATQuantizer",
    "disable_4w_fake_quant",
    "disable_8da4w_fake_quant",
    "enable_4w_fake_quant",
    "enable_8da4w_fake_quant",
]
