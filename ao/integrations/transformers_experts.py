"""The product of experts that transformers defines itself, for what PyTorch's `grouped_mm` does not compile: float32."""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401  defines the operator
from torch import Tensor

from ..dtypes import QTensor
from ..dtypes.base import OPS

_product = torch.ops.transformers.grouped_mm_fallback.default


def grouped_mm_fallback(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """Rows [offs[e - 1], offs[e]) of `x` times `w[e]`, which is decoded first. x: (M, K), w: (E, K, N) -> (M, N)."""
    return _product(x, w.dequantize() if isinstance(w, QTensor) else w, offs)


OPS[_product] = grouped_mm_fallback
