"""Triton kernels for a few tokens and a weight in any format that has an operand: see template.py. The fewest are for
slices_of_k.py.

Nothing of the weight goes through shared memory. A thread reads whole chunks of 32 codes by loads that Triton takes for
arithmetic, so that it gives them the layout of the operand of the tensor cores, one step ahead; they become pairs of bfloat16
there (bf16_pairs.py). The weight is the first operand, since its rows are many. A step is 8 chunks, of which the tensor cores get
the same 4 neighbours of each at once: where a code goes among the places of K is free as long as x follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .ampere import sum_kernel
from .bf16_pairs import OPERANDS, decoding, pairs_asm
from .column_order import gathered
from .device import is_hopper, multiprocessors
from .launch import Launch, cdiv, launch, power_of_two, tile_reader
from .read_once import _factor_and_term, _group_of_half, _no_later, _scale, _stored, _table_words, _words_of_chunk
from .reading import Fields, Reading
from .several import counted, cut, of_three
from .slices_of_k import sliced, sliced_launch, takes
from .template import _SCALED, _column_of, given

_OPERANDS = tl.constexpr(OPERANDS)

STEP = 256
"""Elements of K of a step."""


@triton.jit
def _read_ahead(
    q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, t, K: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, WIDE: tl.constexpr,
    C: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Step t of rows (BN, 1): the words of its C chunks, and what is stored of the groups of both halves.

    EARLY: as of `_words`."""
    U: tl.constexpr = (K + 31) // 32
    T: tl.constexpr = (U + C - 1) // C
    t = tl.minimum(t, T - 1)
    # The scalar and the row come first: the rest is then the same for all steps, or an offset that the load itself adds.
    chunk = tl.arange(0, C)[None, :]
    if U % C != 0:
        chunk = tl.minimum(chunk, U - 1 - t * C)
    words = _words_of_chunk(
        (q_ptr + t * (C * BITS)) + row * (K * BITS // 32) + chunk * BITS, chunk + t * C, K, BITS, WIDE, EARLY
    )
    if NG == 1:
        return words, (0,), (0,)
    else:
        half = chunk * 2 + t * (2 * C)
        g: tl.constexpr = K // 16 // NG  # halves of chunks in a group
        if g % (2 * C) == 0:  # one group for a step
            half = tl.full((1, 1), 0, tl.int32) + t * (2 * C)
        first = _stored(
            scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, half // g, ZERO, RG, NG, NESTED, RG2, NG2, EARLY
        )
        second = first
        if g % 2 != 0:
            half = _group_of_half(half + 1, K, NG)
            second = _stored(
                scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, half, ZERO, RG, NG, NESTED, RG2, NG2, EARLY
            )
        return words, first, second


@triton.jit
def _pairs(w, f0, t0, f1, t1, table, ASM: tl.constexpr):
    """The numbers of codes 4 j to 4 j + 3 of chunks (BN, 8), and of those 16 further on: (BN, 8, 2, 2) each, a pair last."""
    a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
        ASM, _OPERANDS,
        [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], f0, t0, f1, t1,
         table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True, pack=1,
    )  # fmt: skip
    return tl.join(tl.join(a0, a2), tl.join(a1, a3)), tl.join(tl.join(b0, b2), tl.join(b1, b3))


@triton.jit
def _few(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, block, M, N, TOTAL,
    K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, SHIFT: tl.constexpr,
    POWER: tl.constexpr, LAST_POWER: tl.constexpr, ASM0: tl.constexpr, ASM1: tl.constexpr, ASM2: tl.constexpr,
    ASM3: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum of x[m] * w[n], by the tensor cores that every GPU has.

    A program has BM tokens, BN rows of the weight and a part of K, for which it writes a sum of its own. A scale per row
    multiplies the sum. SHIFT, ASM0 to ASM3: see `pairs_asm`. POWER, LAST_POWER: of two, for what scales and the sum are
    multiplied with. TOTAL: rows of the output, of all weights. EARLY: lets the kernel that sums begin, on Hopper.
    """
    T: tl.constexpr = (K + 255) // 256
    part = tl.cdiv(T, tl.num_programs(2))
    rn = block * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)[:, None]
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    t0 = tl.maximum(
        tl.minimum(tl.program_id(2) * part, T), 0
    )  # between, so that the compiler knows that no address overflows
    t1 = tl.minimum(t0 + part, T)
    place = tl.arange(0, 32)
    k = place // 4 * 32 + place % 4
    here = (rm < M)[None, :]
    x_row = x_ptr + rm[None, :] * K
    x_at = x_row + k[:, None]
    table = _table_words(table_ptr, KIND, BITS)
    acc = tl.zeros((BN, BM), tl.float32)
    ahead = _read_ahead(
        q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, t0, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2, WIDE,
        8,
    )  # fmt: skip
    if NG == 1:
        of_rows = _stored(scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, 0, ZERO, RG, NG, NESTED, RG2, NG2)
        f0, z0 = _factor_and_term(of_rows, BITS, KIND, SIGNED, ZERO, OFFSET, NG > 1, NESTED, SHIFT, POWER)
        f1, z1 = f0, z0
    for t in tl.range(t0, t1, num_stages=STAGES):
        words, first, second = ahead
        ahead = _read_ahead(
            q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, t + 1, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2, WIDE,
            8,
        )  # fmt: skip
        if NG > 1:
            f0, z0 = _factor_and_term(first, BITS, KIND, SIGNED, ZERO, OFFSET, NG > 1, NESTED, SHIFT, POWER)
            f1, z1 = f0, z0
            if K // NG % 32 != 0:
                f1, z1 = _factor_and_term(second, BITS, KIND, SIGNED, ZERO, OFFSET, NG > 1, NESTED, SHIFT, POWER)
        there = here if K % 256 == 0 else here & (t * 8 + place // 4 < K // 32)[:, None]
        for j in tl.static_range(4):
            low, high = _pairs(
                words, f0, z0, f1, z1, table, ASM0 if j == 0 else ASM1 if j == 1 else ASM2 if j == 2 else ASM3
            )
            if K % 32 == 0:
                acc = _times(acc, low, x_at + (t * 256 + 4 * j), there)
                acc = _times(acc, high, x_at + (t * 256 + 4 * j + 16), there)
            else:
                column, in_row = _column_of(t * 8 + place // 4, place % 4 + 4 * j, K, BITS)
                acc = _times(acc, low, x_row + column[:, None], here & in_row[:, None])
                column, in_row = _column_of(t * 8 + place // 4, place % 4 + (4 * j + 16), K, BITS)
                acc = _times(acc, high, x_row + column[:, None], here & in_row[:, None])
    if EARLY:
        gdc_launch_dependents()
    if NG == 1:
        acc *= _scale(of_rows, NESTED)
    if NESTED == _SCALED:
        acc *= tl.load(scale2_ptr).to(tl.float32)
    if LAST_POWER != 0:
        acc *= 2.0**LAST_POWER
    out = out_ptr + tl.program_id(2) * M * TOTAL + rm[None, :] * N + rn[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=here & (rn < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def few_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, M, N, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, SHIFT: tl.constexpr,
    POWER: tl.constexpr, LAST_POWER: tl.constexpr, ASM0: tl.constexpr, ASM1: tl.constexpr, ASM2: tl.constexpr,
    ASM3: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`_few` of one weight."""
    _few(
        x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, tl.program_id(0), M, N, N,
        K, BITS, KIND, EXPONENT, SIGNED, ZERO, OFFSET, RG, NG,
        NESTED, RG2, NG2, SHIFT, POWER, LAST_POWER, ASM0, ASM1, ASM2, ASM3, WIDE, BM, BN, STAGES, EARLY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "n0", "n1", "n2", "p0", "p1"])
def few_joined_kernel(
    x_ptr, out_ptr, q0, scale0, zero0, table0, outer0, outer_zero0, n0, q1, scale1, zero1, table1, outer1, outer_zero1, n1,
    q2, scale2, zero2, table2, outer2, outer_zero2, n2, M, p0, p1, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, SHIFT: tl.constexpr,
    POWER: tl.constexpr, LAST_POWER: tl.constexpr, ASM0: tl.constexpr, ASM1: tl.constexpr, ASM2: tl.constexpr,
    ASM3: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`_few` of two or three weights one below the other, of n rows; the first two have p programs. Of two, n2 is 0."""
    i = tl.program_id(0)
    first, second = p0, p0 + p1
    _few(
        x_ptr, of_three(i, first, second, q0, q1, q2), of_three(i, first, second, scale0, scale1, scale2),
        of_three(i, first, second, zero0, zero1, zero2), of_three(i, first, second, table0, table1, table2),
        of_three(i, first, second, outer0, outer1, outer2), of_three(i, first, second, outer_zero0, outer_zero1, outer_zero2),
        out_ptr + M * of_three(i, first, second, 0, n0, n0 + n1), i - of_three(i, first, second, 0, first, second), M,
        of_three(i, first, second, n0, n1, n2), n0 + n1 + n2, K, BITS, KIND, EXPONENT, SIGNED, ZERO, OFFSET, RG, NG,
        NESTED, RG2, NG2, SHIFT, POWER, LAST_POWER, ASM0, ASM1, ASM2, ASM3, WIDE, BM, BN, STAGES, EARLY,
    )  # fmt: skip


@triton.jit
def _times(acc, w, x_at, there):
    """acc + w (BN, 8, 2, 2) times x (32, BM). Numbers of float16 are the sum of two of bfloat16."""
    w = tl.reshape(w, (w.shape[0], 32))
    x = tl.load(x_at, mask=there, other=0.0)
    if x.dtype == tl.bfloat16:
        return tl.dot(w, x, acc)
    else:
        high = x.to(tl.bfloat16)
        low = (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(w, low, tl.dot(w, high, acc))


@triton.jit
def arrange_kernel(
    x_ptr, order_ptr, out_ptr, K: tl.constexpr, BITS: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr,
    CHUNKS: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """A token of x (M, K) as `some_kernel` meets it: out (M / BM, PARTS, BM, K, rounded up to whole steps), bfloat16.

    A place of a step of 4 or 8 chunks holds element l of pair h of codes 4 (j + 4 half) and on, of chunk 4 c + t, where places
    count j, half, c, h, t, l.
    PARTS: 2 for float16, which is the sum of two of bfloat16. ORDERED: of x[:, order].
    """
    gdc_launch_dependents()
    m = tl.program_id(0)
    p = tl.program_id(1) * B + tl.arange(0, B)
    step: tl.constexpr = 32 * CHUNKS
    of_a_half: tl.constexpr = 4 * CHUNKS
    chunk = p // step * CHUNKS + p % of_a_half // 16 * 4 + p % 8 // 2
    code = p % step // (8 * CHUNKS) * 4 + p % (8 * CHUNKS) // of_a_half * 16 + p % 16 // 8 * 2 + p % 2
    k, there = _column_of(chunk, code, K, BITS)
    if ORDERED:
        k = tl.load(order_ptr + k, mask=there, other=0)
    gdc_wait()
    x = tl.load(x_ptr + m.to(tl.int64) * K + k, mask=there, other=0.0)
    width: tl.constexpr = (K + step - 1) // step * step
    out_ptr += (m // BM * (PARTS * BM) + m % BM).to(tl.int64) * width + p
    high = x.to(tl.bfloat16)
    tl.store(out_ptr, high, mask=p < width)
    if PARTS == 2:
        low = (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(out_ptr + BM * width, low, mask=p < width)


@triton.jit
def _decoded(
    words, f0, t0, f1, t1, table, ASM0: tl.constexpr, ASM1: tl.constexpr, ASM2: tl.constexpr, ASM3: tl.constexpr,
    j: tl.constexpr,
):  # fmt: skip
    """`_pairs` of both halves: (BN, chunks, 2, 2, 2)."""
    low, high = _pairs(words, f0, t0, f1, t1, table, ASM0 if j == 0 else ASM1 if j == 1 else ASM2 if j == 2 else ASM3)
    return tl.join(low, high)


@triton.jit
def _share(p, rest, shares, T: tl.constexpr):
    """The steps of a program, of all steps of the rest, one tile after the other: the first, and the one after the last."""
    steps = rest * T
    return tl.minimum(p, shares) * steps // shares, tl.minimum(p + 1, shares) * steps // shares


@triton.jit
def _pieces(begin, end, T: tl.constexpr):
    """In how many tiles a share is."""
    return tl.where(end > begin, (end - 1) // T - begin // T + 1, 0)


@triton.jit
def _at(i, p, programs, begin, end, whole, T: tl.constexpr):
    """What a program does after i others: a tile, the first step and the one after the last."""
    of_rest = begin // T + i - whole
    t0, t1 = tl.maximum(begin - of_rest * T, 0), tl.minimum(end - of_rest * T, T)
    tile = tl.where(i < whole, i * programs + p, whole * programs + of_rest)
    # Between, so that the compiler knows that no address overflows.
    t0, t1 = tl.minimum(tl.where(i < whole, 0, t0), T), tl.minimum(tl.where(i < whole, T, t1), T)
    return tile, t0, t1


@triton.jit
def _piece(
    x, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, block, tile, t0, t1, N,
    K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, SHIFT: tl.constexpr,
    POWER: tl.constexpr, LAST_POWER: tl.constexpr, ASM0: tl.constexpr, ASM1: tl.constexpr, ASM2: tl.constexpr,
    ASM3: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """The products of a block of rows and a tile of tokens over steps t0 to t1 of K: (BN, BM), float32.

    By the tensor cores of Hopper, in steps of 4 or 8 chunks and 1, 2 or 4 products in each. x: of `arrange_kernel`, in boxes
    (PARTS BM, 32 CHUNKS / DOTS) of 16 rows or more.
    """
    WIDTH: tl.constexpr = 32 * CHUNKS // DOTS
    row = tl.minimum(block * BN + tl.arange(0, BN), N - 1)[:, None]
    m0 = tile * (PARTS * BM)
    table = _table_words(table_ptr, KIND, BITS)
    acc = tl.zeros((BN, PARTS * BM), tl.float32)
    ahead = _read_ahead(
        q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, t0, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2, WIDE,
        CHUNKS,
    )  # fmt: skip
    if NG == 1:
        of_rows = _stored(scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, 0, ZERO, RG, NG, NESTED, RG2, NG2)
        f0, z0 = _factor_and_term(of_rows, BITS, KIND, SIGNED, ZERO, OFFSET, NG > 1, NESTED, SHIFT, POWER)
        f1, z1 = f0, z0
    gdc_wait()
    for t in tl.range(t0, t1, num_stages=STAGES):
        words, first, second = ahead
        ahead = _read_ahead(
            q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, t + 1, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2, WIDE,
            CHUNKS, True,
        )  # fmt: skip
        _no_later()
        if NG > 1:
            f0, z0 = _factor_and_term(first, BITS, KIND, SIGNED, ZERO, OFFSET, NG > 1, NESTED, SHIFT, POWER)
            f1, z1 = f0, z0
            if K // NG % 32 != 0:
                f1, z1 = _factor_and_term(second, BITS, KIND, SIGNED, ZERO, OFFSET, NG > 1, NESTED, SHIFT, POWER)
        for i in tl.static_range(DOTS):
            w = _decoded(words, f0, z0, f1, z1, table, ASM0, ASM1, ASM2, ASM3, i * (4 // DOTS))
            if DOTS == 2:
                w = tl.join(w, _decoded(words, f0, z0, f1, z1, table, ASM0, ASM1, ASM2, ASM3, i * 2 + 1))
            elif DOTS == 1:
                w1 = _decoded(words, f0, z0, f1, z1, table, ASM0, ASM1, ASM2, ASM3, 1)
                w2 = _decoded(words, f0, z0, f1, z1, table, ASM0, ASM1, ASM2, ASM3, 2)
                w3 = _decoded(words, f0, z0, f1, z1, table, ASM0, ASM1, ASM2, ASM3, 3)
                w = tl.join(tl.join(w, w2), tl.join(w1, w3))
            w = tl.reshape(w, (BN, CHUNKS // 4, 4, 2, 2, 2, 4 // DOTS))  # c, t, h, l, half, j
            w = tl.reshape(tl.permute(w, (0, 6, 5, 1, 3, 2, 4)), (BN, WIDTH))
            acc = tl.dot(w, x.load([m0, t * (32 * CHUNKS) + WIDTH * i]).T, acc)
        if DOTS > 1:
            # One product is in flight while the next step is decoded. Of more, none may be where a step ends: the assembler,
            # which sees the registers of the first operand written meanwhile, would wait for every 16 places of K.
            acc = _same(acc)
    if PARTS == 2:
        high, low = tl.split(tl.permute(tl.reshape(acc, (BN, 2, BM)), (0, 2, 1)))  # within a thread: nothing moves
        acc = high + low
    if NG == 1:
        acc *= _scale(of_rows, NESTED)
    if NESTED == _SCALED:
        acc *= tl.load(scale2_ptr).to(tl.float32)
    if LAST_POWER != 0:
        acc *= 2.0**LAST_POWER
    return acc


@triton.jit
def _same(x):
    """x, in a way that Triton does not see through."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _put(
    acc, out_ptr, parts_ptr, block, tile, first, whole, M, N, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Store a tile: where it is whole in out (M, N), else in parts (programs, 2, BM, BN), float32, the first piece of a tile as
    the second of its program."""
    m, n = tl.arange(0, BM)[None, :], tl.arange(0, BN)[:, None]
    if whole:
        rm, rn = tile * BM + m, block * BN + n
        tl.store(out_ptr + rm * N + rn, acc.to(out_ptr.dtype.element_ty), mask=(rm < M) & (rn < N))
    else:
        place = tl.program_id(0) * 2 + tl.where(first, 1, 0)
        tl.store(parts_ptr + place.to(tl.int64) * (BM * BN) + m * BN + n, acc)


@triton.jit(do_not_specialize=["M", "TILES", "WHOLE", "REST", "SHARES"])
def some_kernel(
    x, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, bias_ptr, out_ptr, parts_ptr, M, N, TILES, WHOLE, REST,
    SHARES, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, SHIFT: tl.constexpr,
    POWER: tl.constexpr, LAST_POWER: tl.constexpr, ASM0: tl.constexpr, ASM1: tl.constexpr, ASM2: tl.constexpr,
    ASM3: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr,
    DOTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x times the weight + bias, in tiles of BM tokens and BN rows, of which TILES share the rows.

    A program makes WHOLE tiles, and its share of the steps of the REST, which are cut among SHARES programs: so all have as much
    to do. Pieces of tiles go to parts, for `meet_kernel`."""
    T: tl.constexpr = (K + 32 * CHUNKS - 1) // (32 * CHUNKS)
    p, programs = tl.program_id(0), tl.num_programs(0)
    begin, end = _share(p, REST, SHARES, T)
    for i in tl.range(0, WHOLE + _pieces(begin, end, T)):
        tile, t0, t1 = _at(i, p, programs, begin, end, WHOLE, T)
        block, tile = tile // TILES, tile % TILES
        acc = _piece(
            x, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, block, tile, t0, t1, N,
            K, BITS, KIND, EXPONENT, SIGNED, ZERO, OFFSET, RG, NG,
            NESTED, RG2, NG2, SHIFT, POWER, LAST_POWER, ASM0, ASM1, ASM2, ASM3, WIDE, BM, BN, STAGES,
            PARTS, CHUNKS, DOTS,
        )  # fmt: skip
        if BIAS:
            n = block * BN + tl.arange(0, BN)
            acc += tl.load(bias_ptr + n, mask=(n < N) & (t0 == 0), other=0.0).to(tl.float32)[:, None]
        _put(acc, out_ptr, parts_ptr, block, tile, t0 == 0, t1 - t0 == T, M, N, BM, BN)
    gdc_launch_dependents()


@triton.jit(do_not_specialize=["M", "n0", "n1", "n2", "p0", "p1", "TILES", "WHOLE", "REST", "SHARES"])
def some_joined_kernel(
    x, out_ptr, q0, scale0, zero0, table0, outer0, outer_zero0, n0, q1, scale1, zero1, table1, outer1, outer_zero1, n1,
    q2, scale2, zero2, table2, outer2, outer_zero2, n2, parts_ptr, M, p0, p1, TILES, WHOLE, REST, SHARES,
    K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, SHIFT: tl.constexpr,
    POWER: tl.constexpr, LAST_POWER: tl.constexpr, ASM0: tl.constexpr, ASM1: tl.constexpr, ASM2: tl.constexpr,
    ASM3: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """`some_kernel` of two or three weights one below the other, of n rows; the first two have p blocks. Of two, n2 is 0."""
    T: tl.constexpr = (K + 32 * CHUNKS - 1) // (32 * CHUNKS)
    p, programs = tl.program_id(0), tl.num_programs(0)
    begin, end = _share(p, REST, SHARES, T)
    first, second = p0, p0 + p1
    for i in tl.range(0, WHOLE + _pieces(begin, end, T)):
        tile, t0, t1 = _at(i, p, programs, begin, end, WHOLE, T)
        block, tile = tile // TILES, tile % TILES
        acc = _piece(
            x, of_three(block, first, second, q0, q1, q2), of_three(block, first, second, scale0, scale1, scale2),
            of_three(block, first, second, zero0, zero1, zero2), of_three(block, first, second, table0, table1, table2),
            of_three(block, first, second, outer0, outer1, outer2),
            of_three(block, first, second, outer_zero0, outer_zero1, outer_zero2),
            block - of_three(block, first, second, 0, first, second), tile, t0, t1, of_three(block, first, second, n0, n1, n2),
            K, BITS, KIND, EXPONENT, SIGNED, ZERO, OFFSET, RG, NG,
            NESTED, RG2, NG2, SHIFT, POWER, LAST_POWER, ASM0, ASM1, ASM2, ASM3, WIDE, BM, BN, STAGES, PARTS, CHUNKS, DOTS,
        )  # fmt: skip
        _put(
            acc, out_ptr + M * of_three(block, first, second, 0, n0, n0 + n1), parts_ptr,
            block - of_three(block, first, second, 0, first, second), tile, t0 == 0, t1 - t0 == T, M,
            of_three(block, first, second, n0, n1, n2), BM, BN,
        )  # fmt: skip
    gdc_launch_dependents()


@triton.jit(do_not_specialize=["M", "n0", "n1", "n2", "p0", "p1", "TILES", "BEFORE", "REST", "SHARES", "T"])
def meet_kernel(
    parts_ptr, out_ptr, M, n0, n1, n2, p0, p1, TILES, BEFORE, REST, SHARES, T, BM: tl.constexpr, BN: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """The sums of the pieces of the REST of the tiles, BEFORE which there are others, in order.

    n, p: as of `some_joined_kernel`."""
    of_rest = tl.program_id(0)
    steps = REST * T
    first = ((of_rest * T + 1) * SHARES + steps - 1) // steps - 1  # the program whose share has the first step
    last = ((of_rest + 1) * T * SHARES + steps - 1) // steps - 1
    if last > first:
        block, tile = (BEFORE + of_rest) // TILES, (BEFORE + of_rest) % TILES
        n = of_three(block, p0, p0 + p1, n0, n1, n2)
        out_ptr += M * of_three(block, p0, p0 + p1, 0, n0, n0 + n1)
        block -= of_three(block, p0, p0 + p1, 0, p0, p0 + p1)
        i = tl.program_id(1) * B + tl.arange(0, B)
        rm, rn = tile * BM + i // BN, block * BN + i % BN
        there = (rm < M) & (rn < n)
        gdc_wait()
        acc = tl.load(parts_ptr + (first * 2 + 1).to(tl.int64) * (BM * BN) + i, mask=there, other=0.0)
        for p in tl.range(first + 1, last + 1, 4):  # four loads are on their way at a time
            parts = ()
            for j in tl.static_range(4):
                at = parts_ptr + ((p + j) * 2).to(tl.int64) * (BM * BN) + i
                parts += (tl.load(at, mask=there & (p + j <= last), other=0.0),)  # type: ignore[assignment]
            for j in tl.static_range(4):
                acc += parts[j]
        tl.store(out_ptr + rm * n + rn, acc.to(out_ptr.dtype.element_ty), mask=there)


# Launches.


@functools.cache
def _constants(reading: Reading, zero: torch.dtype | None) -> Mapping[str, Any]:
    """zero: the dtype of the zero points, if there are any."""
    constants, how = decoding(reading, zero, reading.groups > 1)
    return {**constants, **{f"ASM{j}": pairs_asm(*how, j) for j in range(4)}}


class Tile(NamedTuple):
    """How a product is cut.

    hopper: by `some_kernel`. tokens, rows: of a tile. warps: of a program.
    stages: steps of which x is in shared memory at a time.
    split: in how many parts K is, of `few_kernel`.
    Of `some_kernel`: chunks of a step, 4 or 8, and dots, its products, 1, 2 or 4. registers: of a thread, at most. programs: on a
    multiprocessor at a time.
    cut: whether the tiles that fill no round are cut, so that all programs have as much to do.
    """

    hopper: bool
    tokens: int
    rows: int
    warps: int
    stages: int = 3
    split: int = 1
    chunks: int = 8
    dots: int = 4
    registers: int = 128
    programs: int = 2
    cut: bool = True


@functools.cache
def _tile(reading: Reading, m: int, half: bool, device: torch.device) -> Tile:
    """For m tokens. half: whether they are float16, which `few_kernel` takes apart in every warp."""
    hopper = is_hopper(device)
    tokens = max(16, min(32 if half else 256 if hopper else 64, power_of_two(m)))
    if not hopper:
        tiles = cdiv(reading.n, 64) * cdiv(m, tokens)
        # K is cut for 16 warps of a multiprocessor.
        split = max(1, min(8, round(4 * multiprocessors(device) / tiles), cdiv(reading.k, STEP) // 2))
        return Tile(False, tokens, 64, 4, split=split)
    if tokens > 64:
        # Sums of 256 tokens take half of all registers: one program to a multiprocessor, whose next step is decoded meanwhile.
        tile = Tile(True, tokens, 128, 8, chunks=8 if tokens == 128 else 4, dots=1, registers=255, programs=1)
    else:
        tile = Tile(True, tokens, 64, 4, stages=2, programs=3 if half else 4)
        if tokens == 64:
            tile = Tile(True, tokens, 128, 8, stages=2)
            if cdiv(reading.n, 128) * cdiv(m, 64) * reading.k < 1024 * 2 * multiprocessors(device):
                tile = tile._replace(rows=64, warps=4, registers=255)  # small weights: more programs
        # Beyond 48 KB of shared memory little is left of the cache of a multiprocessor, which scales whose loads share lines
        # need, and words of many loads: shorter steps for these.
        if tokens * (2 if half else 1) == 64 and (reading.bits > 4 or (not reading.by_row and reading.group <= 16)):
            tile = tile._replace(chunks=4, dots=2)
    tiles, places = cdiv(reading.n, tile.rows) * cdiv(m, tokens), multiprocessors(device) * tile.programs
    tile = tile._replace(cut=(places - tiles % places) * reading.k >= SPARED * places)
    if tokens == 64 and tile.rows == 128 and (tile.cut or reading.bits == 3):
        # Warps of 32 rows read each number of x once for two of 16: faster where every multiprocessor has two programs, and for
        # three bits everywhere.
        tile = tile._replace(warps=4, chunks=4, dots=2, registers=255)
    return tile


SPARED = 1500
"""Columns of K that the longest program is spared, at least, where tiles are cut: their sums take as long to write and add up."""


def columns(reading: Reading, m: int, device: torch.device) -> float:
    """How many columns of K a program of more than 64 tokens goes through; what its sums cost besides counts as so many."""
    tile = _tile(reading, m, False, device)
    step = 32 * tile.chunks
    tiles = cdiv(reading.n, tile.rows) * cdiv(m, tile.tokens)
    _, whole, rest, shares = _shared_out(tiles, cdiv(reading.k, step), tile, device)
    return (whole + rest / shares) * reading.k + (1000 if rest < shares else 0)


def few(
    x: Tensor, reading: Reading, fields: Fields, order: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """x @ decode(w).T + bias in x's dtype, a 16-bit one. x: (M, K), contiguous -> (M, N).

    order: (K,) integers; x[:, order] is multiplied, which costs no launch where x is arranged before. bias: (N,).
    """
    (out,) = few_joined(x, reading, [fields], order, bias)
    return out


def few_joined(
    x: Tensor, reading: Reading, weights: Sequence[Fields], order: Tensor | None = None, bias: Tensor | None = None
) -> list[Tensor]:  # fmt: skip
    """`few` of one, two or three weights in one launch, whose readings are the same but for n. bias: of one weight."""
    whole = reading._replace(n=sum(fields[0].shape[0] for fields in weights))
    tile = None
    if takes(whole, x.shape[0], x.dtype == torch.float16):
        out = sliced(x if order is None else gathered(x, order), reading, weights)
    else:
        tile = _tile(whole, x.shape[0], x.dtype == torch.float16, x.device)
        if order is not None and not tile.hopper:
            x, order = gathered(x, order), None
        out = few_in_tiles(x, reading, weights, tile, order, bias)
    if bias is not None and (tile is None or not tile.hopper):
        out[0].add_(bias)
    return out


def few_launch(m: int, dtype: torch.dtype, reading: Reading, fields: Fields) -> Callable[[Tensor, Fields], Tensor]:
    """`few` in one launch, K not cut in parts, for m tokens (16 at most) of `dtype`, x (..., K) -> (..., N), and weights of the
    form of these: what it decides is decided once."""
    half = dtype == torch.float16
    if m and takes(reading, m, half):
        return sliced_launch(m, half, reading, fields)
    device, n = fields[0].device, reading.n
    tile = Tile(False, 16, 64, 4)
    zero = None if fields[2] is None else fields[2].dtype
    constants = {
        **_constants(reading, zero), "WIDE": True, "BM": tile.tokens, "BN": tile.rows, "STAGES": tile.stages,
        "EARLY": False,
    }  # fmt: skip
    start = Launch(few_kernel, (cdiv(n, tile.rows),), num_warps=tile.warps, **constants)

    def run(x: Tensor, fields: Fields) -> Tensor:
        if fields[0].data_ptr() % 16:
            (out,) = few_in_tiles(x.reshape(m, reading.k), reading, [fields], tile)
            return out.view(*x.shape[:-1], n)
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
        start(device.index, x, *given(fields), out, m, n)
        return out

    return run


def few_in_tiles(
    x: Tensor, reading: Reading, weights: Sequence[Fields], tile: Tile, order: Tensor | None = None,
    bias: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """`few_joined`, cut as it is told. order, bias: only for `some_kernel`."""
    m, fields = x.shape[0], weights[0]
    rows = [each[0].shape[0] for each in weights]
    split, size, joined = tile.split, m * sum(rows), len(weights) > 1
    out = torch.empty(size, dtype=x.dtype, device=x.device)
    zero = None if fields[2] is None else fields[2].dtype
    constants = {
        **_constants(reading, zero), "WIDE": all(each[0].data_ptr() % 16 == 0 for each in weights), "BM": tile.tokens,
        "BN": tile.rows, "STAGES": tile.stages,
    }  # fmt: skip
    tiles, blocks = cdiv(m, tile.tokens), counted(rows, tile.rows)
    last = [] if len(weights) == 3 else [*given(weights[-1]), 0]
    each = [arg for fields, n in zip(weights, rows) for arg in (*given(fields), n)]
    if tile.hopper:
        count = 2 if x.dtype == torch.float16 else 1
        step = 32 * tile.chunks
        steps = cdiv(reading.k, step)
        arranged = torch.empty(
            m if count == 1 else tiles * count * tile.tokens, steps * step, dtype=torch.bfloat16, device=x.device
        )
        launch(
            arrange_kernel, (m, cdiv(steps * step, 1024)), x, x if order is None else order, arranged, K=reading.k,
            BITS=reading.bits, B=1024, BM=tile.tokens, PARTS=count, CHUNKS=tile.chunks, ORDERED=order is not None, early=True,
        )  # fmt: skip
        programs, whole, rest, shares = _shared_out(sum(blocks) * tiles, steps, tile, x.device)
        pieces = 0 < rest < shares
        room = 2 * shares * tile.tokens * tile.rows if pieces else 0
        parts = torch.empty(room, dtype=torch.float32, device=x.device)
        work = [parts, m, *(blocks[:2] if joined else rows), tiles, whole, rest, shares]
        reader = tile_reader(arranged, (count * tile.tokens, step // tile.dots))
        more: dict[str, Any] = {} if joined else {"BIAS": bias is not None}
        if joined:
            args = [out, *each, *last, *work]
        else:
            args = [*given(fields), fields[0] if bias is None else bias, out, *work]
        launch(
            some_joined_kernel if joined else some_kernel, (programs,), reader, *args, num_warps=tile.warps,
            registers=tile.registers, early=True, **constants, PARTS=count, CHUNKS=tile.chunks, DOTS=tile.dots,
            **more,
        )  # fmt: skip
        if pieces:
            launch(
                meet_kernel, (rest, cdiv(tile.tokens * tile.rows, 1024)), parts, out, m, *[*rows, 0, 0][:3], *blocks[:2], tiles,
                whole * programs, rest, shares, steps, early=True, BM=tile.tokens, BN=tile.rows, B=1024,
            )  # fmt: skip
        return cut(out, m, rows)
    early = split > 1 and is_hopper(x.device)
    parts = out if split == 1 else torch.empty(split, size, dtype=torch.float32, device=x.device)
    args = [parts, *each, *last, m, *blocks[:2]] if joined else [*given(fields), parts, m, *rows]
    launch(
        few_joined_kernel if joined else few_kernel, (sum(blocks), tiles, split), x, *args, num_warps=tile.warps, **constants,
        EARLY=early,
    )  # fmt: skip
    if split > 1:
        launch(
            sum_kernel, (cdiv(size, 1024),), parts, out, size, early=early, SPLIT=split, B=1024, EARLY=early
        )  # fmt: skip
    return cut(out, m, rows)


LEAST = 512
"""Columns of K in a share of a tile that is cut, at least."""


def _shared_out(tiles: int, steps: int, tile: Tile, device: torch.device) -> tuple[int, int, int, int]:
    """How tiles of so many steps are shared out: the programs, how many whole tiles each has, the rest of the tiles and among how
    many programs it is cut."""
    places, step = multiprocessors(device) * tile.programs, 32 * tile.chunks
    whole, rest = divmod(tiles, places)
    shares = rest
    if tile.cut and rest:
        shares = max(rest, min(places, rest * steps * step // LEAST))
        each = shares // rest
        # A program of two pieces has two sums to write, which takes as long as some columns more of one piece do.
        if (steps / each - steps * rest / shares) * step <= LEAST:
            shares = rest * each
    return (places if whole else shares), whole, rest, max(1, shares)
