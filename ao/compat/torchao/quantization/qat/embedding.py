"""torchao.quantization.qat.embedding: int4 embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..specs import INT4
from ..unified import TwoStepQuantizer
from .fake_quantize_config import IntxFakeQuantizeConfig
from .layers import FakeQuantizedEmbedding, set_weight

__all__ = ["FakeQuantizedEmbedding", "Int4WeightOnlyEmbeddingQATQuantizer", "Int4WeightOnlyQATEmbedding"]


def _config(group_size: int, scale_precision: torch.dtype) -> IntxFakeQuantizeConfig:
    return IntxFakeQuantizeConfig(INT4, group_size=group_size, is_symmetric=True, scale_precision=scale_precision)


class Int4WeightOnlyEmbeddingQATQuantizer(TwoStepQuantizer):
    """int4 embeddings in groups."""

    def __init__(
        self,
        group_size: int = 256,
        scale_precision: torch.dtype = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
    ) -> None:
        self.group_size, self.scale_precision, self.zero_point_precision = (
            group_size,
            scale_precision,
            zero_point_precision,
        )

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, whose embeddings round their rows."""
        for module in list(model.modules()):
            if type(module) is nn.Embedding:
                FakeQuantizedEmbedding.from_embedding(module, _config(self.group_size, self.scale_precision))
        return model

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, whose embeddings are quantized as they were trained."""
        for module in list(model.modules()):
            if isinstance(module, FakeQuantizedEmbedding):
                weight = module.quantized_weight()
                set_weight(module.plain(), weight)
        return model


class Int4WeightOnlyQATEmbedding(FakeQuantizedEmbedding):
    """One embedding of `Int4WeightOnlyEmbeddingQATQuantizer`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        group_size: int = 32,
        scale_precision: torch.dtype = torch.float32,
        zero_point_precision: torch.dtype = torch.int32,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            _config(group_size, scale_precision), *args, **kwargs,
        )  # fmt: skip
