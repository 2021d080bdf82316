"""Triton kernels for the tensor cores of Hopper (wgmma), fed by its copy engine (tensor descriptors).

8-bit weights stay 8 bits: a tile goes from memory to shared memory and from there to the 8-bit tensor cores, which run at
twice the rate of 16-bit ones. The activation is split beforehand in two 8-bit parts that stand side by side in its tile, so
that one product multiplies both:

    int8      x = f * (256 h + l), 16-bit fixed point with a step f per token; the sum is exact
    float8    x = f * (h + l), h = e4m3(x / f), l = e4m3(x / f - h): the 8 significant bits of bfloat16. The tensor cores
              add up float8 products with some 14 bits.

4-bit weights are decoded to bfloat16 in registers, from where wgmma takes its first operand. They are read as int16, four
codes each: position t of 8 holds the elements 2t, 2t + 1 of two runs of 8, which is how that operand is spread over
threads, so that nothing moves between them.

Kernels in a row are launched early (programmatic dependent launch): `gdc_wait` waits for the one before.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .ampere import rounded_e4m3, sum_kernel
from .device import multiprocessors
from .launch import Launch, cdiv, power_of_two
from .several import cut, of_three


@triton.jit
def _magnitude(x):
    """|x| as an integer of the same order, so that the largest of a group is NaN where there is one, and makes the sum NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _of_first_part(ptr):
    """What is at `ptr` as float32, for the program that sums the first part of K; 0 for the others."""
    return tl.load(ptr, mask=tl.program_id(1) == 0, other=0.0).to(tl.float32)


# 8-bit activations.


@triton.jit
def _codes_of_many(
    x, row_ptr, q0, q1, q2, column0, column1, column2, bias0, bias1, bias2, out0, out1, out2, out_ptr, M, N, K: tl.constexpr,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr, COPIED: tl.constexpr, PROGRAMS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """out[w, m, n] = row[m] * column w[n] * sum of x[m] * q w[n] + bias w[n], int8 with an int32 sum, or float8.

    Of one, two or three WEIGHTS q (N, K) of one shape. BIASES: bit w says whether weight w has one. x, q and, where they are
    COPIED, out0 to out2: tensor descriptors. Each of PROGRAMS programs, which all run at a time, makes tile after tile: so the
    loads of the next one begin before the sums of this one are stored. BAND tiles of rows share a column of tiles, which then
    stays in the cache. Tiles are stored by halves, which takes fewer registers. (To begin before the kernel before it is done
    took up to 8 % longer.)
    """
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = BAND * across * WEIGHTS
    for tile in tl.range(tl.program_id(0), down * across * WEIGHTS, PROGRAMS, flatten=True, num_stages=STAGES):
        first = tile // band * BAND
        height = tl.minimum(down - first, BAND)
        m0 = (first + tile % band % height) * BM
        block = tile % band // height
        weight = block // across
        n0 = (block - weight * across) * BN
        q, out = q0, out0
        if WEIGHTS > 1:  # a descriptor can't be an operand of tl.where
            if weight == 1:
                q, out = q1, out1
            elif weight == 2:
                q, out = q2, out2
        if FLOAT:
            acc = tl.zeros((BM, BN), tl.float32)
        else:
            acc = tl.zeros((BM, BN), tl.int32)
        for k in range(0, K, BK):
            if FLOAT:
                acc = tl.dot(x.load([m0, k]), q.load([n0, k]).T, acc)
            else:
                acc = tl.dot(x.load([m0, k]), q.load([n0, k]).T, acc, out_dtype=tl.int32)
        column_ptr = of_three(weight, 1, 2, column0, column1, column2)
        bias_ptr = of_three(weight, 1, 2, bias0, bias1, bias2)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        _store_scaled(left, row_ptr, column_ptr, bias_ptr, out, out_ptr, weight, m0, n0, M, N, BIASES, COPIED)
        _store_scaled(
            right, row_ptr, column_ptr, bias_ptr, out, out_ptr, weight, m0, n0 + BN // 2, M, N, BIASES, COPIED
        )


@triton.jit(do_not_specialize=["M"])
def codes_kernel(
    x, row_ptr, q, column_ptr, bias_ptr, out, out_ptr, M, N, K: tl.constexpr, WEIGHTS: tl.constexpr, BIASES: tl.constexpr,
    COPIED: tl.constexpr, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    STAGES: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """`_codes_of_many` of one weight."""
    _codes_of_many(
        x, row_ptr, q, q, q, column_ptr, column_ptr, column_ptr, bias_ptr, bias_ptr, bias_ptr, out, out, out, out_ptr, M, N, K,
        WEIGHTS, BIASES, COPIED, PROGRAMS, BM, BN, BK, BAND, STAGES, FLOAT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def codes_joined_kernel(
    x, row_ptr, q0, q1, q2, column0, column1, column2, bias0, bias1, bias2, out0, out1, out2, out_ptr, M, N, K: tl.constexpr,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr, COPIED: tl.constexpr, PROGRAMS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """`_codes_of_many` of two or three weights; of two, the third is the second."""
    _codes_of_many(
        x, row_ptr, q0, q1, q2, column0, column1, column2, bias0, bias1, bias2, out0, out1, out2, out_ptr, M, N, K, WEIGHTS,
        BIASES, COPIED, PROGRAMS, BM, BN, BK, BAND, STAGES, FLOAT,
    )  # fmt: skip


@triton.jit
def _store_scaled(
    acc, row_ptr, column_ptr, bias_ptr, out, out_ptr, weight, m0, n0, M, N, BIASES: tl.constexpr, COPIED: tl.constexpr
):  # fmt: skip
    """Sums to the result."""
    rm = m0 + tl.arange(0, acc.shape[0])
    rn = n0 + tl.arange(0, acc.shape[1])
    row = tl.load(row_ptr + rm, mask=rm < M, other=0.0)
    column = tl.load(column_ptr + rn, mask=rn < N, other=0.0)
    y = acc.to(tl.float32) * row[:, None] * column[None, :]
    if BIASES:
        there = (rn < N) & ((BIASES >> weight & 1) != 0)
        y += tl.load(bias_ptr + rn, mask=there, other=0.0).to(tl.float32)[None, :]
    if COPIED:
        out.store([m0, n0], y.to(out_ptr.dtype.element_ty))
    else:
        there = (rm < M)[:, None] & (rn < N)[None, :]
        at = out_ptr + (weight * M + rm[:, None]).to(tl.int64) * N + rn[None, :]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=there)


# 8-bit weights.


@triton.jit
def split_kernel(x_ptr, parts_ptr, step_ptr, K: tl.constexpr, BM: tl.constexpr, B: tl.constexpr, FLOAT: tl.constexpr):
    """One token of x (M, K) in two 8-bit parts; parts (M / BM, 2, BM, K): the high, then the low ones of BM tokens."""
    gdc_launch_dependents()
    m = tl.program_id(0)
    k = tl.arange(0, B)
    x = tl.load(x_ptr + m.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
    top = tl.maximum(tl.max(_magnitude(x), 0), 0x0DA24260).to(tl.float32, bitcast=True)  # at least 1e-30
    parts = parts_ptr + (m // BM * (2 * BM) + m % BM).to(tl.int64) * K + k
    if FLOAT:
        x = x * (448.0 / top)
        rounded = rounded_e4m3(x)
        high = rounded.to(tl.float8e4nv)
        low = (x - rounded).to(tl.float8e4nv)
        tl.store(step_ptr + m, top * (1.0 / 448.0))
    else:
        i = (x * (32512.0 / top) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000 + 128  # round(x / f) + 128
        high = (i >> 8).to(tl.int8)
        low = ((i & 255) - 128).to(tl.int8)
        tl.store(step_ptr + m, top * (1.0 / 32512.0))
    tl.store(parts, high, mask=k < K)
    tl.store(parts + BM * K, low, mask=k < K)


@triton.jit
def _parts(
    parts, step_ptr, q, scale_ptr, bias_ptr, out_ptr, block, tile, M, N, TOTAL, K: tl.constexpr, BM: tl.constexpr,
    PARTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, FLOAT: tl.constexpr,
    BIAS: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum of x[m] * q[n] * scale[n] over 1 / SPLIT of K, the first with bias[n], for a block of
    BN rows of q and a tile of BM tokens.

    parts: x in PARTS (1 or 2) parts, in boxes (PARTS BM, BK); q (N, K) in boxes (BN, BK).
    TOTAL: rows of the output, of all weights. SHORT: whether the last block has fewer than BN rows.
    """
    T: tl.constexpr = (K + BK - 1) // BK  # what the copy engine reads beyond K is zero
    TS: tl.constexpr = (T + SPLIT - 1) // SPLIT
    n0 = block * BN
    t0 = tl.program_id(1) * TS
    t1 = tl.minimum(t0 + TS, T)
    if FLOAT:
        acc = tl.zeros((BN, PARTS * BM), tl.float32)
    else:
        acc = tl.zeros((BN, PARTS * BM), tl.int32)
    gdc_wait()
    for t in tl.range(t0, t1, num_stages=STAGES):
        w = q.load([n0, t * BK])
        x = parts.load([tile * PARTS * BM, t * BK])
        if FLOAT:
            acc = tl.dot(w, x.T, acc)
        else:
            acc = tl.dot(w, x.T, acc, out_dtype=tl.int32)
    gdc_launch_dependents()
    if PARTS == 1:
        y = acc.to(tl.float32)
    else:
        high, low = tl.split(tl.permute(tl.reshape(acc, (BN, 2, BM)), (0, 2, 1)))  # within a thread: nothing moves
        if FLOAT:
            y = high + low
        else:
            y = high.to(tl.float32) * 256.0 + low.to(tl.float32)
    rn = n0 + tl.arange(0, BN)
    rm = tile * BM + tl.arange(0, BM)
    in_block = rn < N
    scale = (tl.load(scale_ptr + rn, mask=in_block, other=0.0) if SHORT else tl.load(scale_ptr + rn)).to(tl.float32)
    y = y * tl.load(step_ptr + rm, mask=rm < M, other=0.0)[None, :] * scale[:, None]  # in the order of `int_mm`
    if BIAS:
        y += _of_first_part(bias_ptr + (tl.minimum(rn, N - 1) if SHORT else rn))[:, None]
    out = out_ptr + tl.program_id(1) * M * TOTAL + rm[None, :] * N + rn[:, None]
    there = (rm < M)[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=there & in_block[:, None] if SHORT else there)


@triton.jit(do_not_specialize=["M", "TILES"])
def parts_kernel(
    parts, step_ptr, q, scale_ptr, bias_ptr, out_ptr, M, N, TILES, K: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, FLOAT: tl.constexpr, BIAS: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """`_parts` of one weight. TILES of tokens share a block of q and are neighbours."""
    i = tl.program_id(0)
    _parts(
        parts, step_ptr, q, scale_ptr, bias_ptr, out_ptr, i // TILES, i % TILES, M, N, N, K, BM, PARTS, BN, BK, SPLIT, STAGES,
        FLOAT, BIAS, SHORT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "TILES"])
def parts_joined_kernel(
    parts, step_ptr, out_ptr, q0, scale0, n0, q1, scale1, n1, q2, scale2, n2, M, TILES, K: tl.constexpr, BM: tl.constexpr,
    PARTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """`_parts` of two or three weights one below the other, of n rows each; of two, n2 is 0."""
    block = tl.program_id(0) // TILES
    first, second = n0 // BN, (n0 + n1) // BN
    if block < first:  # a descriptor can't be an operand of tl.where
        q = q0
    elif block < second:
        q = q1
    else:
        q = q2
    _parts(
        parts, step_ptr, q, of_three(block, first, second, scale0, scale1, scale2), scale0,
        out_ptr + M * of_three(block, first, second, 0, n0, n0 + n1), block - of_three(block, first, second, 0, first, second),
        tl.program_id(0) % TILES, M, of_three(block, first, second, n0, n1, n2), n0 + n1 + n2, K, BM, PARTS, BN, BK, SPLIT,
        STAGES, FLOAT, False, False,
    )  # fmt: skip


# 4-bit weights.


@triton.jit
def _codes(q):
    """int16, 4 codes -> 128 + code as bfloat16: the low nibbles of both bytes, then the high ones."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 y, a, b; mov.b32 a, {$4, $4}; prmt.b32 y, a, 0, 0x4140;
        lop3.b32 a, y, 0x000f000f, 0x43004300, 0xea; shr.u32 y, y, 4;
        lop3.b32 b, y, 0x000f000f, 0x43004300, 0xea; mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }""",
        "=h,=h,=h,=h,h", [q], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "TILES"])
def nibbles_kernel(
    x, q, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, TILES, K: tl.constexpr, G: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum of x[m] * (q[n] - zero[n]) * scale[n] over 1 / SPLIT of K, a group at a time, the first with bias[n].
    x (M, K) in boxes (BM, G); q: the codes as int16 (N, K / 4) in boxes (BN, G / 4). (q - zero) is exact in bfloat16, scale is
    rounded to it."""
    NG: tl.constexpr = K // G
    TS: tl.constexpr = (NG + SPLIT - 1) // SPLIT
    n0 = tl.program_id(0) // TILES * BN
    tile = tl.program_id(0) % TILES
    rn = n0 + tl.arange(0, BN)
    t0 = tl.program_id(1) * TS
    t1 = tl.minimum(t0 + TS, NG)
    acc = tl.zeros((BN, BM), tl.float32)
    for t in tl.range(t0, t1, num_stages=STAGES):
        # No loop argument and no scalar may come between these loads and the product: Triton then reads the codes in the
        # layout of the operand; else they go through shared memory once more.
        # Products are in flight while the next codes are decoded. That is safe as the operand is packed from 16-bit numbers right
        # before each product, when the one that read these registers is done; Triton 3.6 does not see to it with 8-bit codes.
        scale = tl.load(scale_ptr + rn * NG + t).to(tl.bfloat16)
        low_0, low_1, high_0, high_1 = _codes(q.load([n0, t * (G // 4)]))
        w = tl.join(tl.join(low_0, low_1), tl.join(high_0, high_1))  # (BN, G / 4, 2, 2)
        w = tl.permute(tl.reshape(w, (BN, G // 32, 8, 2, 2)), (0, 1, 4, 2, 3))  # (BN, chunks, nibble, byte pair, byte)
        w = tl.reshape(w, (BN, G))
        if ZERO:
            zero = ((tl.load(zero_ptr + rn * NG + t).to(tl.int16) + OFFSET) | 0x4300).to(tl.bfloat16, bitcast=True)
            w = w - zero[:, None]  # 128 + q - (128 + zero)
        else:
            w = w - tl.full((BN, G), 128 + OFFSET, tl.bfloat16)
        acc = tl.dot(w * scale[:, None], x.load([tile * BM, t * G]).T, acc)
    gdc_launch_dependents()
    rm = tile * BM + tl.arange(0, BM)
    if BIAS:
        acc += _of_first_part(bias_ptr + rn)[:, None]
    out = out_ptr + (tl.program_id(1) * M + rm[None, :]) * N + rn[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(rm < M)[None, :])


# Launches.


def many_codes_product(
    x: Tensor, rows: Tensor, qdata: Sequence[Tensor], columns: Sequence[Tensor], dtype: torch.dtype,
    biases: Sequence[Tensor | None],
) -> list[Tensor]:  # fmt: skip
    """(x @ qdata.T) * rows * columns.T + bias, int8 or float8 e4m3, of one, two or three weights of one shape in one launch: x
    (M, K), rows (M, 1), qdata (N, K), columns (N, 1), bias (N,) or None -> (M, N) each. K % 16 == 0."""
    (m, k), n, count = x.shape, qdata[0].shape[0], len(qdata)
    out = torch.empty(count * m, n, dtype=dtype, device=x.device)
    added = tuple(None if bias is None else bias.dtype for bias in biases)
    start, copied = _many_launch(m, n, k, x.dtype, rows.dtype, columns[0].dtype, dtype, added, x.device.index)
    if count == 1:
        (q,), (column,), (bias,) = qdata, columns, biases
        start(x.device.index, x, rows, q, column, column if bias is None else bias, out if copied else x, out, m, n)
        return [out]
    outs = list(out.split(m))
    some = next((bias for bias in biases if bias is not None), columns[0])
    each = [qdata, columns, [some if bias is None else bias for bias in biases], outs if copied else [x] * count]
    three = [[*given, given[-1]][:3] for given in each]
    start(x.device.index, x, rows, *itertools.chain(*three), out, m, n)
    return outs


@functools.lru_cache(4096)
def _many_launch(
    m: int, n: int, k: int, codes: torch.dtype, rows: torch.dtype, columns: torch.dtype, out: torch.dtype,
    biases: tuple[torch.dtype | None, ...], device: int,
) -> tuple[Launch, bool]:  # fmt: skip
    """The launch, and whether the copy engine stores its result."""
    copied, count = out.itemsize == 2 and n % 8 == 0, len(biases)
    programs = 2 * multiprocessors(torch.device("cuda", device))
    read, stored = ((0, 2), (5,)) if count == 1 else ((0, 2, 3, 4), (11, 12, 13))
    tiles = dict.fromkeys(read, (128, 128)) | dict.fromkeys(stored, (128, 64 if copied else 128))
    kernel = codes_kernel if count == 1 else codes_joined_kernel
    start = Launch(
        kernel, (min(programs, count * cdiv(m, 128) * cdiv(n, 128)),), num_warps=4, tiles=tiles, K=k, WEIGHTS=count,
        BIASES=sum(1 << i for i, bias in enumerate(biases) if bias is not None), COPIED=copied, PROGRAMS=programs, BM=128,
        BN=128, BK=128, BAND=8, STAGES=3, FLOAT=codes.is_floating_point,
    )  # fmt: skip
    return start, copied


def parts_product(
    x: Tensor, qdata: Sequence[Tensor], scale: Sequence[Tensor], bias: Tensor | None = None
) -> list[Tensor]:
    """x (M, K) bfloat16 times one, two or three qdata (N, K) int8 or float8 e4m3 with scale (N, 1), in one launch -> (M, N) each.
    K % 16 == 0; of several N % 64 == 0. bias: (N,), of one weight."""
    m, k = x.shape
    sizes = [q.shape[0] for q in qdata]
    n, wide = sum(sizes), all(size % 128 == 0 for size in sizes)
    if m <= 32:
        tokens, height, warps, stages = 16 if m <= 16 else 32, 64, 4, 5
    elif n >= 16384 and wide:
        tokens, height, warps, stages = 64, 128, 8, 3
    elif m <= 128 and k <= 8192:
        tokens, height, warps, stages = 32, 64, 4, 6
    elif 64 < m <= 256 and k > 8192:
        tokens, height, warps, stages = 128, 64, 4, 5
    elif m > 256 and wide and n // 128 * cdiv(m, 128) <= 132:
        tokens, height, warps, stages = 128, 128, 8, 4
    else:
        tokens, height, warps, stages = 64, 64, 4, 4
    tiles = cdiv(m, tokens)
    dtype = qdata[0].dtype
    parts = torch.empty(tiles * 2 * tokens, k, dtype=dtype, device=x.device)
    step = torch.empty(m, dtype=torch.float32, device=x.device)
    split_into_parts = _split_launch(m, k, tokens, x.dtype, dtype, x.device.index)
    split_into_parts(x.device.index, x, parts, step)
    return _parts_product(parts, 2, step, qdata, scale, bias, m, x.dtype, tokens, height, warps, stages)


@functools.lru_cache(4096)
def _split_launch(m: int, k: int, tokens: int, x: torch.dtype, dtype: torch.dtype, device: int) -> Launch:
    return Launch(
        split_kernel, (m,), num_warps=8, K=k, BM=tokens, B=power_of_two(k), FLOAT=dtype.is_floating_point
    )  # fmt: skip


def _parts_product(
    x: Tensor, parts: int, rows: Tensor, qdata: Sequence[Tensor], columns: Sequence[Tensor], bias: Tensor | None, m: int,
    dtype: torch.dtype, tokens: int, height: int, warps: int, stages: int,
) -> list[Tensor]:  # fmt: skip
    """`parts_kernel`, or of several weights `parts_joined_kernel`, over tiles of `tokens` x `height`."""
    k, sizes = qdata[0].shape[1], [q.shape[0] for q in qdata]
    device, n = x.device.index, sum(sizes)
    start, split = _parts_launch(
        len(qdata), m, n, k, parts, tokens, height, warps, stages, qdata[0].dtype, columns[0].dtype,
        None if bias is None else bias.dtype, dtype, device,
    )  # fmt: skip
    out, sums = _outputs(m * n, split, dtype, x.device)
    weights = list(zip(qdata, columns, sizes))
    if len(weights) == 1:
        (q, scale, _), *_ = weights
        start(device, x, rows, q, scale, scale if bias is None else bias, sums, m, n, cdiv(m, tokens))
    else:
        weights = [*weights, (*weights[1][:2], 0)][:3]
        start(device, x, rows, sums, *itertools.chain(*weights), m, cdiv(m, tokens))
    return cut(_summed(sums, out, split), m, sizes)


@functools.lru_cache(4096)
def _parts_launch(
    weights: int, m: int, n: int, k: int, parts: int, tokens: int, height: int, warps: int, stages: int, dtype: torch.dtype,
    columns: torch.dtype, bias: torch.dtype | None, out: torch.dtype, device: int,
) -> tuple[Launch, int]:  # fmt: skip
    """The launch and in how many parts of K. Fewer stages where three programs then share a multiprocessor, or four if that
    makes room for all at once."""
    programs = cdiv(n, height) * cdiv(m, tokens)
    size = (parts * tokens + height) * 128
    split = _splits(programs, cdiv(k, 128), 2 if size * stages <= 116_000 else 1)
    share = 57_000 if 396 < programs * split <= 528 else 76_000
    if programs * split > 264 and size * 3 <= share:
        stages = min(stages, share // size)
    more: dict[str, Any] = {"BIAS": bias is not None, "SHORT": n % height != 0} if weights == 1 else {}
    tiles = {0: (parts * tokens, 128), **dict.fromkeys((2,) if weights == 1 else (3, 6, 9), (height, 128))}
    start = Launch(
        parts_kernel if weights == 1 else parts_joined_kernel, (programs, split), num_warps=warps, early=True, tiles=tiles,
        K=k, BM=tokens, PARTS=parts, BN=height, BK=128, SPLIT=split, STAGES=stages, FLOAT=dtype.is_floating_point, **more,
    )  # fmt: skip
    return start, split


def codes_product(
    x: Tensor, rows: Tensor, qdata: Sequence[Tensor], columns: Sequence[Tensor], dtype: torch.dtype,
    bias: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """(x @ qdata.T) * rows * columns.T for up to 512 tokens, int8 or float8 e4m3, of one, two or three weights in one launch: x
    (M, K), rows (M, 1), qdata (N, K), columns (N, 1) -> (M, N) each. K % 16 == 0; of several N % 64 == 0. bias: (N,), of
    one weight."""
    m, k = x.shape
    sizes = [q.shape[0] for q in qdata]
    n, wide = sum(sizes), all(size % 128 == 0 for size in sizes)
    if m <= 64 or (m <= 128 and n < 16384):
        tokens, height, warps, stages = max(16, min(64, power_of_two(m))), 64, 4, 6
    elif m <= 128:
        tokens, height, warps, stages = 128, 64, 4, 4
    elif wide and n // 128 * cdiv(m, 256) >= 90:
        tokens, height, warps, stages = 256, 128, 8, 4
    elif k > 8192:
        tokens, height, warps, stages = (128, 64, 4, 6) if m <= 256 or not wide else (128, 128, 8, 6)
    else:
        tokens, height, warps, stages = (64, 64, 4, 6) if m <= 256 else (128, 64, 4, 4)
    return _parts_product(x, 1, rows, qdata, columns, bias, m, dtype, tokens, height, warps, stages)


def nibbles_product(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int, bias: Tensor | None = None
) -> Tensor:
    """x (M, K) bfloat16 times 4-bit codes (N, K / 2) with scale and zero_point (N, K / 128), plus bias (N,) -> (M, N).
    N % 64 == 0."""
    (m, k), n = x.shape, qdata.shape[0]
    device = x.device.index
    zero, added = (None if t is None else t.dtype for t in (zero_point, bias))
    start, split, tokens = _nibbles_launch(m, n, k, scale.dtype, zero, offset, added, device)
    out, sums = _outputs(m * n, split, x.dtype, x.device)
    start(
        device, x, qdata, scale,
        scale if zero_point is None else zero_point, scale if bias is None else bias, sums, m, n, cdiv(m, tokens),
    )  # fmt: skip
    return _summed(sums, out, split).view(m, n)


@functools.lru_cache(4096)
def _nibbles_launch(
    m: int, n: int, k: int, scale: torch.dtype, zero: torch.dtype | None, offset: int, bias: torch.dtype | None, device: int
) -> tuple[Launch, int, int]:  # fmt: skip
    """The launch, in how many parts of K, and the tokens of a tile."""
    group = 128
    tokens, height, warps, programs, split, _ = _nibbles_tiles(m, n, k)
    start = Launch(
        nibbles_kernel, (programs, split), num_warps=warps, views={1: torch.int16},
        tiles={0: (tokens, 128), 1: (height, 32)}, K=k, G=group, ZERO=zero is not None,
        OFFSET=offset, BIAS=bias is not None, BM=tokens, BN=height, SPLIT=split, STAGES=3 if split > 1 or m > 64 else 4,
    )  # fmt: skip
    return start, split, tokens


def _nibbles_tiles(m: int, n: int, k: int) -> tuple[int, int, int, int, int, int]:
    """The tokens and rows of a tile, the warps of a program, the programs, in how many parts K is, and how many programs share a
    multiprocessor."""
    tokens = max(16, min(256, power_of_two(m)))
    height, warps = (128, 8) if tokens == 64 and n >= 16384 and n % 128 == 0 else (64, 4)
    programs = n // height * cdiv(m, tokens)
    places = 3 if tokens <= 64 else 2 if tokens == 128 else 1
    return tokens, height, warps, programs, _splits(programs, k // 256, places), places


def nibbles_columns(m: int, n: int, k: int) -> float:
    """How many columns of K a program of `nibbles_kernel` goes through for more than 64 tokens, as `few_tokens.columns` counts.

    A program there has twice the rows, and takes 1.1 times as long for a tile of 128 tokens, 1.7 times for one of 256."""
    tokens, _, _, programs, split, places = _nibbles_tiles(m, n, k)
    return cdiv(programs * split, 132 * places) * k / split / (1.1 if tokens == 128 else 1.7)


def _splits(programs: int, steps: int, places: int) -> int:
    """In how many parts to cut K: as many as fill `places` on each of 132 multiprocessors, four steps or more each."""
    steps = max(steps, 1)
    split = max(1, min(132 * places // programs, steps // 4))
    return cdiv(steps, cdiv(steps, split))


def _outputs(size: int, split: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The result, flat, and where its parts go, which is the same for one part."""
    out = torch.empty(size, dtype=dtype, device=device)
    return out, out if split == 1 else torch.empty(split, size, dtype=torch.float32, device=device)


def _summed(sums: Tensor, out: Tensor, split: int) -> Tensor:
    if split > 1:
        size = out.numel()
        _sum_launch(size, split, out.dtype, out.device.index)(out.device.index, sums, out, size)
    return out


@functools.lru_cache(4096)
def _sum_launch(size: int, split: int, dtype: torch.dtype, device: int) -> Launch:
    return Launch(sum_kernel, (cdiv(size, 1024),), early=True, SPLIT=split, B=1024, EARLY=True)
