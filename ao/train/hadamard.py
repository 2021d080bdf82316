"""Products of operands that are turned: (a H)(b H).T = a b.T for an orthogonal H, and rounding hits a spread-out a H less."""

from __future__ import annotations

import torch
from torch import Tensor

_SIGNS = 0x9E3779B97F4A7C15
"""64 fixed signs, the bits of the golden ratio."""


def turned(x: Tensor, points: int) -> Tensor:
    """Each `points` elements of a row of `x` times an orthogonal matrix H, in float32.

    x: (..., K), K a multiple of `points`, a power of two up to 64. H = diag(s) S / sqrt(points), with Sylvester's Hadamard matrix
    S[i, j] = (-1)**popcount(i & j) and fixed signs s, the same wherever it is asked for.
    """
    h = orthogonal(points, x.device)
    return (x.float().reshape(-1, points) @ h).reshape(x.shape)


def orthogonal(points: int, device: torch.device | None = None) -> Tensor:
    """H, (points, points), float32."""
    i = torch.arange(points, device=device)
    parity = i[:, None] & i
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    signs = 1 - 2 * ((_SIGNS >> 1 >> i) & 1)
    return ((1 - 2 * (parity & 1)) * signs[:, None]).float() * points**-0.5
