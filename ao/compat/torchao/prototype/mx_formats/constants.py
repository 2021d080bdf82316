"""torchao.prototype.mx_formats.constants: the formats of elements, and their limits."""

from __future__ import annotations

import torch

__all__ = ["DTYPE_FP6_E2M3", "DTYPE_FP6_E3M2", "SUPPORTED_ELEM_DTYPES"]

DTYPE_FP6_E3M2 = "fp6_e3m2"
DTYPE_FP6_E2M3 = "fp6_e2m3"

SUPPORTED_ELEM_DTYPES = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    DTYPE_FP6_E2M3,
    DTYPE_FP6_E3M2,
    torch.float4_e2m1fn_x2,
]
"""What an MXTensor is made of."""

F8E4M3_MAX, F8E5M2_MAX = 448.0, 57344.0
F6_E2M3_MAX, F6_E3M2_MAX = 7.5, 28.0
F4_E2M1_MAX = 6.0
BLOCK_SIZE_DEFAULT = 32
E8M0_EXPONENT_BIAS = 127
E8M0_EXPONENT_NAN_VAL = 255
