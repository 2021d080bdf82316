"""Triton kernels for matrices of which some blocks are stored, in any format that has an operand: see template.py.

The kept blocks are one matrix (kept * size, size), which the kernels read as those of template.py read a weight. A row of blocks
is a program's; what it takes is in proportion to what is kept there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ampere import sum_kernel
from .launch import cdiv, launch
from .reading import Fields, Reading
from .template import given
from .two_of_four import _constants, _pairs


@triton.jit
def gemv_blocks_kernel(
    x_ptr, start_ptr, column_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, WIDTH,
    K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr,
    NG2: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over the kept blocks of x[m] * w[n], of BN rows of a row of blocks, BLOCKS blocks at a time.

    K: the size of a block. WIDTH: of x.
    """
    first = tl.program_id(0) * BN
    x_ptr += tl.program_id(1) * WIDTH
    out_ptr += tl.program_id(1) * N
    start, end = tl.load(start_ptr + first // K), tl.load(start_ptr + first // K + 1)
    rn = tl.arange(0, BN)
    ks = tl.arange(0, K)
    acc = tl.zeros((BN * BLOCKS, K), tl.float32)
    for t in tl.range(start, end, BLOCKS, num_stages=1):
        # First what does not wait for where the blocks are.
        j = t + tl.arange(0, BLOCKS)
        column = tl.load(column_ptr + j, mask=j < end, other=0)
        there = (j < end)[:, None]
        j = tl.minimum(j, end - 1)
        row = tl.reshape((j * K + first % K)[None, :] + rn[:, None], (BN * BLOCKS,))
        w = _pairs(
            q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, row, 0, K, BITS, KIND, EXPONENT, SIGNED, ZERO, OFFSET,
            RG, NG, NESTED, RG2, NG2, K, RUN, True,
        )  # fmt: skip
        x = tl.load(x_ptr + column[:, None] * K + ks[None, :], mask=there, other=0.0)
        acc += tl.reshape(tl.reshape(w.to(tl.float32), (BN, BLOCKS, K)) * x.to(tl.float32)[None], (BN * BLOCKS, K))
    out = tl.sum(tl.reshape(acc, (BN, BLOCKS * K)), 1)
    tl.store(out_ptr + first + rn, out.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M"])
def few_blocks_kernel(
    x_ptr, start_ptr, column_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, M, N, WIDTH,
    K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr,
    NG2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same on the tensor cores, of BM tokens, block after block of 1 / SPLIT of a row, for which it writes its own sum."""
    first = tl.program_id(0) * BN
    begin, stop = tl.load(start_ptr + first // K), tl.load(start_ptr + first // K + 1)
    start = begin + (stop - begin) * tl.program_id(2) // SPLIT
    end = begin + (stop - begin) * (tl.program_id(2) + 1) // SPLIT
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    here = (rm < M)[:, None]
    rn = tl.arange(0, BN)
    x_at = x_ptr + rm[:, None] * WIDTH + tl.arange(0, K)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for j in tl.range(start, end, num_stages=STAGES):
        column = tl.load(column_ptr + j)
        x = tl.load(x_at + column * K, mask=here, other=0.0)
        w = _pairs(
            q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, j * K + first % K + rn, 0, K, BITS, KIND, EXPONENT,
            SIGNED, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, K, RUN, True,
        )  # fmt: skip
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc)
    out = out_ptr + (tl.program_id(2) * M + rm[:, None]) * N + (first + rn)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=here)


def product(x: Tensor, starts: Tensor, columns: Tensor, n: int, reading: Reading, fields: Fields) -> Tensor:
    """x @ decode(w).T in x's dtype, a 16-bit one. x: (M, K), contiguous -> (M, n). reading, fields: of the kept blocks."""
    (m, k), size = x.shape, reading.k
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    run = min(size, reading.group & -reading.group)
    constants = _constants(reading, fields)
    if m <= 2:
        height = 8
        launch(
            gemv_blocks_kernel, (n // height, m), x, starts, columns, *given(fields), out, n, k, **constants, BN=height,
            BLOCKS=max(512 // size, 1), RUN=run, num_warps=4,
        )  # fmt: skip
        return out
    tokens = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    height = min(size, 64)
    tiles = n // height * cdiv(m, tokens)
    split = max(1, min(8, round(1056 / tiles)))
    parts = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    launch(
        few_blocks_kernel, (n // height, cdiv(m, tokens), split), x, starts, columns, *given(fields), parts, m, n, k,
        **constants, BM=tokens, BN=height, RUN=run, SPLIT=split, STAGES=3, num_warps=4 if tokens < 128 else 8,
    )  # fmt: skip
    if split > 1:
        launch(sum_kernel, (cdiv(m * n, 1024),), parts, out, m * n, SPLIT=split, B=1024, EARLY=False)
    return out


def takes(reading: Reading) -> bool:
    """Whether `product` takes blocks of this size: a power of two that the tensor cores have."""
    return reading.k in (32, 64, 128) and reading.group & (reading.group - 1) == 0
