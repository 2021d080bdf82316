"""torchao.kernel.intmm: products of int8 with the sum in int32."""

from __future__ import annotations

import torch
from torch import Tensor

from ao import int_scaled_matmul

__all__ = ["int_matmul", "int_scaled_matmul", "safe_int_mm"]


def safe_int_mm(input: Tensor, mat2: Tensor) -> Tensor:
    """input @ mat2 in int32, of any shape. input: (M, K) int8. mat2: (K, N) int8."""
    small = input.shape[0] <= 16 or input.shape[1] % 8 or mat2.shape[1] % 8
    if (input.device.type == "cuda" and small) or input.shape[1] == 1 or input.numel() == 0 or mat2.numel() == 0:
        return (input.double() @ mat2.double()).to(torch.int32)  # what the integer product does not take; exact
    return torch._int_mm(input, mat2)


int_matmul = safe_int_mm
