"""Rotations of queries, and of what attention gives, for keys and values that are stored rotated.

(q a) (b^T k) = q k where a b^T = 1, so that queries meet rotated keys in the same scores, and an output of rotated values is
rotated back. The kernels for a few queries do both by themselves where the entries of a are 1 and -1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix over the last dim, as x's dtype."""
    return (x.to(matrix.dtype) @ matrix).to(x.dtype)


def packed_signs(matrix: Tensor) -> Tensor:
    """A matrix (D, D) of 1 and -1, a bit for each: (D, D / 8) uint8, where bit n of byte i of row j is set if the entry
    (8 i + n, j) is -1. D must be a multiple of 8."""
    bits = (matrix.t() < 0).unflatten(1, (-1, 8))  # (D, D / 8, 8)
    return (bits.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=matrix.device)).sum(2, dtype=torch.uint8)
