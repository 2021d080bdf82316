"""Blocks: the elements that share one qparam.

A qparam has the rank of the data. Along each dim the data is `tile` times as long as the qparam, so a qparam of shape
(N, K / 128) over data of shape (N, K) belongs to blocks of (1, 128), and one of shape (1, 1) to the whole tensor. The
block size is read off the two shapes; nobody stores it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .tracing import is_eager, known


def spans(block: Sequence[int], rank: int, dim: int) -> bool:
    """Whether a block, as `Spec.grid` reads it, is as long as dim `dim` of data of `rank` dims, however long that is."""
    entry = dim - rank + len(block)
    return all(b == -1 for b in block) or (entry >= 0 and block[entry] == -1)


def to_blocks(x: Tensor, grid: Sequence[int]) -> Tensor:
    """View (s0, s1, ...) as (g0, s0 / g0, g1, s1 / g1, ...): the odd dims run inside a block."""
    return x.reshape(blocks_shape(grid, x.shape))


def blocks_shape(grid: Sequence[int], shape: Sequence[int]) -> list[int]:
    """The shape of `to_blocks`."""
    return [n for g, size in zip(grid, shape) for n in (g, 1 if known(g == size) else size // max(g, 1))]


def in_blocks(qparam: Tensor) -> Tensor:
    """View a qparam (g0, g1, ...) as (g0, 1, g1, 1, ...), so that it broadcasts against `to_blocks`."""
    return qparam.reshape([n for g in qparam.shape for n in (g, 1)])


def expand(qparam: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat a qparam over its blocks: (g0, g1, ...) -> `shape`."""
    return in_blocks(qparam).expand(blocks_shape(qparam.shape, shape)).reshape(tuple(shape))


# Reductions of blocks, of any floating-point dtype, to float32 of shape `grid`. Empty data gives zeros. Eager code reduces a
# single block at once, and so reads it once and copies nothing; what torch.jit.trace records is for any number of blocks.


def amin_amax(x: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest element of each block."""
    if known(x.numel() == 0):
        return _zeros(x, grid), _zeros(x, grid)
    if is_eager(x, or_recorded=False) and all(g == 1 for g in grid):
        lo, hi = torch.aminmax(x)
        return lo.float().reshape(tuple(grid)), hi.float().reshape(tuple(grid))
    blocks = to_blocks(x, grid)
    return _inside(blocks, Tensor.amin).float(), _inside(blocks, Tensor.amax).float()


def amax_abs(x: Tensor, grid: Sequence[int]) -> Tensor:
    """The largest magnitude of each block."""
    if known(x.numel() == 0):
        return _zeros(x, grid)
    if is_eager(x, or_recorded=False) and all(g == 1 for g in grid):
        lo, hi = torch.aminmax(x)
        return torch.maximum(lo.abs(), hi.abs()).float().reshape(tuple(grid))
    size = to_blocks(x, grid).abs()
    if x.device.type != "cpu" and x.dtype == torch.float32:
        # Bits of positive numbers are ordered as they are, with NaN above all: one instruction, where a maximum of floats
        # that keeps NaN is three.
        return _inside(size.view(torch.int32), Tensor.amax).view(torch.float32)
    return _inside(size, Tensor.amax).float()


def _inside(blocks: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Reduce the dims that run inside a block, one after the other: a compiler gives one reduction over a whole tensor of
    unknown size to a single thread block."""
    for dim in reversed(range(1, blocks.dim(), 2)):
        blocks = blocks.squeeze(dim) if known(blocks.shape[dim] == 1) else reduce(blocks, dim)
    return blocks


def mean_abs(x: Tensor, grid: Sequence[int]) -> Tensor:
    """The mean magnitude of each block, summed in float64, so that the order of the sum does not show."""
    if known(x.numel() == 0):
        return _zeros(x, grid)
    blocks = to_blocks(x, grid)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return blocks.abs().mean(list(range(1, blocks.dim(), 2)), dtype=wide).float()


def mean(x: Tensor) -> Tensor:
    """The mean of all elements, summed in float64, so that the order of the sum does not show."""
    if known(x.numel() == 0):
        return _zeros(x, ())
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return x.mean(dtype=wide).float()


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are: sixty times as fast as `x.isfinite().all()` on a CPU, and without a temporary.

    A sum that is finite has only finite terms. One that is not may be beyond the range of its dtype: then the ends tell.
    """
    return bool(x.sum().isfinite()) or all(bool(end.isfinite()) for end in torch.aminmax(x))


def _zeros(x: Tensor, grid: Sequence[int]) -> Tensor:
    return torch.zeros(tuple(grid), dtype=torch.float32, device=x.device)
