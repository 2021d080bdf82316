"""Attention with decomposed relative positions, of image encoders such as SAM's, that never makes a mask of all pairs of tokens.

kernels/relative_attention.py says what it computes. It is for inference in 16 bits on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.device import has_kernels

WINDOW = 16
"""The longest side of a window, whose keys are multiplied several rows at a time."""

_LONGEST = 128
_TILE = 64 * 128
"""Numbers of a tile of keys, at most: what registers and the shared memory of any GPU have room for."""


def halves(head_dim: int) -> tuple[int, int]:
    """Two powers of two that make head_dim; the second may be 0. (0, 0) where none from 16 on make it."""
    low = 1 << (head_dim.bit_length() - 1)
    high = head_dim - low
    one = low >= 16 and (high == 0 or (high >= 16 and high & (high - 1) == 0))
    return (low, high) if one else (0, 0)


def takes_relative_attention(x: Tensor, head_dim: int, height: int, width: int) -> bool:
    """Whether `relative_attention` is there for activations of the dtype and on the device of x, and images of height x width."""
    if x.dtype not in (torch.bfloat16, torch.float16) or not has_kernels(x.device):
        return False
    height, width = int(height), int(width)  # a graph is for one size of images
    keys = max(1 << (width - 1).bit_length(), 64)
    return halves(head_dim) != (0, 0) and max(height, width) <= _LONGEST and keys * head_dim <= _TILE


def relative_attention(
    qkv: Tensor, table_h: Tensor, table_w: Tensor, heads: int, height: int, width: int, scale: float
) -> Tensor:
    """softmax(scores) v -> (B, H * W, heads * D), where the scores of query q and key k, at (y, x) in the image, are

        scale q.k + q.table_h[y(q) - y(k) + H - 1] + q.table_w[x(q) - x(k) + W - 1]

    qkv: (B, H * W, 3 * heads * D), what one projection gives: all heads of the queries, then keys, then values.
    table_h, table_w: (2 H - 1, D) and (2 W - 1, D).

    Only where `takes_relative_attention` says so. It has no gradient.
    """
    from .kernels import operators  # Triton is there only with a GPU build of PyTorch

    tables = (t.to(qkv.dtype) for t in (table_h, table_w))
    return operators.image_attention(qkv, *tables, heads, int(height), int(width), scale)
