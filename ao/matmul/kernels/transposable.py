"""The Triton kernel that prunes a weight to two of four along both dims, as `transposable_mask` of sparse.py does in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes.pairs import TRANSPOSABLE, TWO_OF_FOUR
from .launch import cdiv, launch

_PATTERNS = tl.constexpr(TRANSPOSABLE)
_KEPT = tl.constexpr(
    tuple(sum(1 << 4 * row + column for row in range(4) for column in TWO_OF_FOUR[rows[row]]) for rows in TRANSPOSABLE)
)


@triton.jit
def _four(x):
    """The last dim, of 4, as a tuple."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _sums_of_pairs(a):
    """Magnitudes of a row of 4, of which NaN is the largest, by pair."""
    a0, a1, a2, a3 = _magnitude(a[0]), _magnitude(a[1]), _magnitude(a[2]), _magnitude(a[3])
    return a0 + a1, a0 + a2, a0 + a3, a1 + a2, a1 + a3, a2 + a3


@triton.jit
def _magnitude(a):
    a = tl.abs(a.to(tl.float32))
    return tl.where(a == a, a, float("inf"))


@triton.jit
def _kept(row, mask, r: tl.constexpr):
    """A row of 4 with zeros where the bits 4 r to 4 r + 3 of the mask are none: (tiles, 4)."""
    a = tl.where((mask >> (4 * r)) & 1 != 0, row[0], 0.0)
    b = tl.where((mask >> (4 * r + 1)) & 1 != 0, row[1], 0.0)
    c = tl.where((mask >> (4 * r + 2)) & 1 != 0, row[2], 0.0)
    d = tl.where((mask >> (4 * r + 3)) & 1 != 0, row[3], 0.0)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (mask.shape[0], 4))


@triton.jit
def prune_kernel(w_ptr, out_ptr, turned_ptr, N, K, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr):
    """out (N, K) = w with the eight of each 4 x 4 whose magnitudes have the largest sum, of those with two in each row and each
    column. TURNED: its transpose goes to turned (K, N)."""
    TILES: tl.constexpr = BN * BK // 16
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    there = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(w_ptr + n[:, None].to(tl.int64) * K + k[None, :], mask=there, other=0.0)
    tiles = tl.permute(tl.reshape(w, (BN // 4, 4, BK // 4, 4)), (0, 2, 3, 1))  # (row, column, k, n)
    by_row = _four(tl.reshape(tiles, (TILES * 4, 4)))
    r0, r1 = _four(tl.reshape(by_row[0], (TILES, 4))), _four(tl.reshape(by_row[1], (TILES, 4)))
    r2, r3 = _four(tl.reshape(by_row[2], (TILES, 4))), _four(tl.reshape(by_row[3], (TILES, 4)))
    p0, p1, p2, p3 = _sums_of_pairs(r0), _sums_of_pairs(r1), _sums_of_pairs(r2), _sums_of_pairs(r3)
    best = tl.full((TILES,), -1.0, tl.float32)
    mask = tl.zeros((TILES,), tl.int32)
    for i in tl.static_range(90):
        total = (p0[_PATTERNS[i][0]] + p1[_PATTERNS[i][1]]) + (p2[_PATTERNS[i][2]] + p3[_PATTERNS[i][3]])
        mask = tl.where(total > best, _KEPT[i], mask)
        best = tl.maximum(best, total)
    rows = tl.join(
        tl.join(_kept(r0, mask, 0), _kept(r2, mask, 2)), tl.join(_kept(r1, mask, 1), _kept(r3, mask, 3))
    )  # (tiles, k, 2, 2)
    rows = tl.reshape(rows, (BN // 4, BK // 4, 4, 4)).to(out_ptr.dtype.element_ty)
    out = tl.reshape(tl.permute(rows, (0, 3, 1, 2)), (BN, BK))
    tl.store(out_ptr + n[:, None].to(tl.int64) * K + k[None, :], out, mask=there)
    if TURNED:
        tl.store(turned_ptr + k[:, None].to(tl.int64) * N + n[None, :], tl.trans(out), mask=tl.trans(there))


def pruned(w: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    """w (N, K), contiguous, with two of four along both dims; its transpose (K, N) too, or `w` itself where that is not asked."""
    (n, k), out = w.shape, torch.empty_like(w)
    other = w.new_empty(k, n) if turned else w
    constants: dict[str, Any] = {"BN": 32, "BK": 128, "TURNED": turned}
    launch(prune_kernel, (cdiv(n, 32), cdiv(k, 128)), w, out, other, n, k, **constants)
    return out, other
