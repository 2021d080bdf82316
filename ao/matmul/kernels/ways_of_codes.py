"""How codes of 8 bits are multiplied on a GPU: by which kernel of ours, or of PyTorch."""

from __future__ import annotations

import functools

import torch

from .device import is_hopper


@functools.lru_cache(4096)
def way_of_codes(
    m: int, k: int, n: int, x: torch.dtype, q: torch.dtype, dtype: torch.dtype, bias: bool, aligned: bool, device: torch.device
) -> str:  # fmt: skip
    """How codes x (m, k) and q (n, k) are multiplied to `dtype`. aligned: whether both begin where the copy engine can read."""
    copied = aligned and is_hopper(device) and k % 16 == 0 and x == q != torch.float8_e5m2
    few = 256 if q.is_floating_point and dtype == torch.bfloat16 else 512  # beyond, cuBLAS is faster in float8
    if copied and m <= few and k <= 65536:
        return "few codes"
    if x == torch.int8:
        if m <= 32 and k % 128 == 0:
            return "fused"
        return "many codes" if m > 128 and copied else "int_mm"
    if m > 256 and copied and bias:
        return "many codes"
    return "scaled_mm" if m > 256 and dtype == torch.bfloat16 else "float32"


def joins(m: int, n: int, k: int, codes: torch.dtype, dtype: torch.dtype, bias: bool, device: torch.device) -> bool:
    """Whether weights (n, k) can meet codes (m, k) in one launch."""
    way = way_of_codes(m, k, n, codes, codes, dtype, bias, True, device) if device.type == "cuda" else ""
    return way == "many codes" or (way == "few codes" and not bias and n % 64 == 0)
