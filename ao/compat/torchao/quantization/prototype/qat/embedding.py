"""torchao.quantization.prototype.qat.embedding."""

from ...qat.embedding import (
    FakeQuantizedEmbedding,
    Int4WeightOnlyEmbeddingQATQuantizer,
    Int4WeightOnlyQATEmbedding,
)

__all__ = [
    "FakeQuantizedEmbedding",
    "Int4WeightOnlyEmbeddingQATQuantizer",
    "Int4WeightOnlyQATEmbedding",
]
