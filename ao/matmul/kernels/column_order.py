"""Columns of an activation in another order, for a weight whose columns are stored so."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import is_hopper, multiprocessors
from .launch import Launch, cdiv, power_of_two


@triton.jit(do_not_specialize=["M"])
def gather_kernel(
    x_ptr, order_ptr, out_ptr, M, K: tl.constexpr, B: tl.constexpr, PAIRS: tl.constexpr, EARLY: tl.constexpr
):
    """out[m, k] = x[m, order[k]] of 16 bits, row after row, or two rows after two, as words of a number of each.

    A row goes through shared memory, which takes a quarter of the time that the cache takes for numbers from all over a row, and
    no longer for a word than for a number. EARLY: whether it begins before the kernel before is done, and the next too.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    ROWS: tl.constexpr = 2 if PAIRS else 1
    k = tl.arange(0, B)
    there = k < K
    order = tl.load(order_ptr + k, mask=there, other=0).to(tl.int32)
    x_ptr += tl.program_id(0) * (ROWS * K)
    out_ptr += tl.program_id(0) * (ROWS * K)
    for m in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = tl.load(x_ptr + k, mask=there, other=0.0)
        if PAIRS:
            second = there & (m + 1 < M)
            below = tl.load(x_ptr + K + k, mask=second, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
            both = tl.gather((row.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (below << 16), order, 0)
            tl.store(out_ptr + k, both.to(tl.int16).to(out_ptr.dtype.element_ty, bitcast=True), mask=there)
            below = (both >> 16).to(tl.int16).to(out_ptr.dtype.element_ty, bitcast=True)
            tl.store(out_ptr + K + k, below, mask=second)
        else:
            tl.store(out_ptr + k, tl.gather(row, order, 0), mask=there)
        x_ptr += tl.num_programs(0) * (ROWS * K)
        out_ptr += tl.num_programs(0) * (ROWS * K)


def gathered(x: Tensor, order: Tensor) -> Tensor:
    """x[..., order]. x: (..., K) of 16 bits, contiguous, K up to 32768. order: (K,) integers."""
    return gather_launch(x.view(-1, x.shape[-1]), order)(x, order) if x.numel() else torch.empty_like(x)


def gather_launch(x: Tensor, order: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`gathered` of any number of tokens, of which there is one or more, with the programs for those of x, (M, K): decided once
    for its dtype and that of the order."""
    m, k = x.shape
    pairs = m > 1 and k <= 16384  # beyond, a thread has no room for words
    programs = min(cdiv(m, 2) if pairs else m, 4 * multiprocessors(x.device))
    return _gather_launch((x.dtype, order.dtype), programs, pairs, k, x.device)


@functools.cache
def _gather_launch(
    dtypes: tuple[torch.dtype, torch.dtype], programs: int, pairs: bool, k: int, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """dtypes: of x and the order. A `Launch` is for one of each."""
    block = max(256, power_of_two(k))
    early = is_hopper(device)
    start = Launch(
        gather_kernel, (programs,), num_warps=min(32, max(4, block // 512)), early=early, K=k, B=block, PAIRS=pairs,
        EARLY=early,
    )  # fmt: skip
    index = device.index

    def run(x: Tensor, order: Tensor) -> Tensor:
        out = torch.empty_like(x)
        start(index, x, order, out, x.numel() // k)
        return out

    return run
