"""Triton kernels for weights of which two of four numbers are stored, in any format that has an operand: see template.py.

The two are read as the kernels of template.py read a weight that is half as wide, with a `Reading` of their own. Codes that say
which two they are become places in registers: of 64 elements they are two words, in which the group with the number
8 h + 4 w + b is in word w, in byte b, in the low or the high half of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ampere import _bytes, _fixed_point, _largest, sum_kernel
from .device import multiprocessors
from .launch import cdiv, launch, power_of_two
from .reading import Fields, Reading
from .template import _codes, _numbers, _scales, _zeros, given


@triton.jit
def _which(place_ptr, row, chunk, there, K: tl.constexpr):
    """The codes of 16 groups each of chunks of 64 elements: (R, 16 C) int32, first + 4 * second."""
    R: tl.constexpr = row.shape[0]
    C: tl.constexpr = chunk.shape[0]
    at = place_ptr + ((row * (K // 32))[:, None] + (chunk * 2)[None, :])
    w = tl.load(at[:, :, None] + tl.arange(0, 2)[None, None, :], mask=there[None, :, None], other=0)
    w0, w1 = tl.split(w)
    w = tl.join(tl.join(w0, w0 >> 4), tl.join(w1, w1 >> 4))  # by the half, the word, and the byte below
    w = tl.join(w, w >> 16)
    w = tl.join(w, w >> 8)
    return tl.reshape(w, (R, C * 16)) & 15


@triton.jit
def _spread(pairs, which):
    """(R, K / 2) and (R, K / 4) -> (R, K)."""
    R: tl.constexpr = pairs.shape[0]
    G: tl.constexpr = which.shape[1]
    first, second = tl.split(tl.reshape(pairs, (R, G, 2)))
    a, b = which & 3, which >> 2
    e0 = tl.where(a == 0, first, tl.zeros_like(first))
    e1 = tl.where(a == 1, first, tl.where(b == 1, second, tl.zeros_like(first)))
    e2 = tl.where(a == 2, first, tl.where(b == 2, second, tl.zeros_like(first)))
    e3 = tl.where(b == 3, second, tl.zeros_like(first))
    return tl.reshape(tl.join(tl.join(e0, e2), tl.join(e1, e3)), (R, G * 4))


@triton.jit
def _pairs(
    q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, row, first, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, BK: tl.constexpr,
    RUN: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """BK numbers of rows of K, from `first` on. BITS: 16 for plain ones. SCALED: whether to multiply by scales per row, too."""
    R: tl.constexpr = row.shape[0]
    if BITS == 16:
        k = first + tl.arange(0, BK)
        return tl.load(q_ptr + (row * K)[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
    else:
        chunk = first // 32 + tl.arange(0, BK // 32)
        value = _numbers(_codes(q_ptr, row, chunk, chunk < K // 32, K, BITS), table_ptr, KIND, BITS, EXPONENT, SIGNED)
        run = first + tl.arange(0, BK // RUN) * RUN
        group = (run // (K // NG))[None, :]
        there = (run < K)[None, :]
        if ZERO or OFFSET != 0 or SCALED or NG > 1:
            value = tl.reshape(value, (R, BK // RUN, RUN))
            if ZERO or OFFSET != 0:
                value -= _zeros(zero_ptr, row[:, None], group, there, BITS, RG, NG, ZERO, OFFSET)[:, :, None]
            if SCALED or NG > 1:
                value *= _scales(
                    scale_ptr, scale2_ptr, zero2_ptr, row[:, None], group, there, RG, NG, NESTED, RG2, NG2
                )[:, :, None]
            value = tl.reshape(value, (R, BK))
        return value


@triton.jit
def decode24_kernel(
    place_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, K: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The weight as plain numbers, BN rows and 2 BK elements of each. K: the pairs of a row."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    first = tl.program_id(1) * BK
    pairs = _pairs(
        q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, row, first, K, BITS, KIND, EXPONENT, SIGNED, ZERO, OFFSET,
        RG, NG, NESTED, RG2, NG2, BK, RUN, True,
    )  # fmt: skip
    chunk = first // 32 + tl.arange(0, BK // 32)
    which = _which(place_ptr, row, chunk, chunk < K // 32, 2 * K)
    k = 2 * first + tl.arange(0, 2 * BK)
    out = _spread(pairs.to(out_ptr.dtype.element_ty), which)
    tl.store(out_ptr + rn[:, None] * (2 * K) + k[None, :], out, mask=(rn < N)[:, None] & (k < 2 * K)[None, :])


def _run(reading: Reading, most: int) -> int:
    """How many pairs from a multiple of that many on are in one group: a power of two, `most` or less."""
    return most if reading.by_row else min(most, reading.group & -reading.group)


def decoded(places: Tensor, reading: Reading, fields: Fields, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) as `dtype`. reading, fields: of the pairs."""
    n, k = reading.n, reading.k
    out = torch.empty(n, 2 * k, dtype=dtype, device=places.device)
    if out.numel():
        wide = min(256, power_of_two(k))
        height = 2048 // wide
        launch(
            decode24_kernel, (cdiv(n, height), cdiv(k, wide)), places.view(torch.int32), *given(fields), out, n,
            **_constants(reading, fields), BN=height, BK=wide, RUN=_run(reading, wide), num_warps=8,
        )  # fmt: skip
    return out


def _constants(reading: Reading, fields: Fields) -> dict[str, Any]:
    return reading.constants(fields[2] is not None)


@triton.jit(do_not_specialize=["M"])
def few24_kernel(
    x_ptr, place_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, M, N, K: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum of x[m] * w[n], the weights decoded in registers on their way to the tensor cores.

    As `few_kernel` of few_tokens.py. K: the pairs of a row, of which a step covers BK. A scale per row multiplies the sum.
    """
    T: tl.constexpr = (K + BK - 1) // BK
    TS: tl.constexpr = (T + SPLIT - 1) // SPLIT
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    here = (rm < M)[:, None]
    t0 = tl.program_id(2) * TS
    t1 = tl.minimum(t0 + TS, T)
    ks = tl.arange(0, 2 * BK)
    x_at = x_ptr + rm[:, None] * (2 * K) + ks[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for t in tl.range(t0, t1, num_stages=STAGES):
        x = tl.load(x_at + t * (2 * BK), mask=here & (t * (2 * BK) + ks < 2 * K)[None, :], other=0.0)
        pairs = _pairs(
            q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, row, t * BK, K, BITS, KIND, EXPONENT, SIGNED, ZERO,
            OFFSET, RG, NG, NESTED, RG2, NG2, BK, RUN, False,
        )  # fmt: skip
        chunk = t * (BK // 32) + tl.arange(0, BK // 32)
        w = _spread(pairs.to(x.dtype), _which(place_ptr, row, chunk, chunk < K // 32, 2 * K))
        acc = tl.dot(x, tl.trans(w), acc)
    if NG == 1 and BITS != 16:
        acc *= tl.trans(_scales(scale_ptr, scale2_ptr, zero2_ptr, row[:, None], 0, True, RG, NG, NESTED, RG2, NG2))
    out = out_ptr + (tl.program_id(2) * M + rm[:, None]) * N + rn[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=here & (rn < N)[None, :])


def _few_constants(reading: Reading, m: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid and the tile of `few24_kernel` for m tokens."""
    n, k = reading.n, reading.k
    step = 32
    tokens = 16 if m <= 16 else 32 if m <= 32 else 64
    height = 64
    tiles = cdiv(n, height) * cdiv(m, tokens)
    split = max(1, min(8, round(1056 / tiles), cdiv(k, step) // 4))
    return (cdiv(n, height), cdiv(m, tokens), split), {
        "BM": tokens, "BN": height, "BK": step, "RUN": _run(reading, step), "SPLIT": split, "STAGES": 3, "num_warps": 4,
    }  # fmt: skip


def few(x: Tensor, places: Tensor, reading: Reading, fields: Fields) -> Tensor:
    """x @ decode(w).T in x's dtype, a 16-bit one. x: (M, K), contiguous -> (M, N). reading, fields: of the pairs."""
    m, n = x.shape[0], reading.n
    grid, tile = _few_constants(reading, m)
    split = grid[2]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    parts = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    launch(
        few24_kernel, grid, x, places.view(torch.int32), *given(fields), parts, m, n, **_constants(reading, fields), **tile
    )  # fmt: skip
    if split > 1:
        launch(sum_kernel, (cdiv(m * n, 1024),), parts, out, m * n, SPLIT=split, B=1024, EARLY=False)
    return out


# One token.


def _unit_asm(bits: int) -> str:
    """The sum of 64 elements of x and a row: 32 codes in `bits` words, times the numbers of x that they meet.

    Operands: `bits` words of codes, which are signed; two words of places; 16 words of high bytes of x and 16 of low ones, one
    word per group of four. A selector of four digits takes the two places of each of two groups out of their words, and four
    codes meet them. Codes of 4 bits stay in the high half of their bytes, times 16.
    """
    code, place, high = 1, 1 + bits, 3 + bits
    low = high + 16
    lines = ["{ .reg .b32 s, t, v, x, a, b; mov.b32 a, 0; mov.b32 b, 0;"]
    for half in range(2):
        for pair in range(4):  # groups 8 * half + 2 * pair and the next
            g = 8 * half + 2 * pair
            shift = 16 * (pair % 2) + 4 * half
            word = f"${place + pair // 2}"
            if shift:
                lines.append(f"shr.u32 s, {word}, {shift};")
            s = "s" if shift else word
            lines.append(f"shl.b32 t, {s}, 2; lop3.b32 s, {s}, 0x0303, 0x4400, 0xEA; lop3.b32 s, t, 0x3030, s, 0xEA;")
            if bits == 8:
                v = f"${code + 4 * half + pair}"
            else:
                v = "v"
                w = f"${code + pair}"
                if half == 0:
                    lines.append(f"shl.b32 v, {w}, 4;")
                    w = "v"
                lines.append(f"lop3.b32 v, {w}, 0xF0F0F0F0, 0x80808080, 0x6A;")  # (w & 0xF0..) ^ 0x80..
            lines.append(f"prmt.b32 x, ${high + g}, ${high + g + 1}, s; dp4a.s32.s32 a, {v}, x, a;")
            lines.append(f"prmt.b32 x, ${low + g}, ${low + g + 1}, s; dp4a.s32.s32 b, {v}, x, b;")
    lines.append("shl.b32 a, a, 8; add.s32 $0, a, b; }")
    return " ".join(lines)


_ASM4, _ASM8 = tl.constexpr(_unit_asm(4)), tl.constexpr(_unit_asm(8))
_OPERANDS4, _OPERANDS8 = tl.constexpr("=r" + ",r" * 38), tl.constexpr("=r" + ",r" * 42)


@triton.jit
def _column(words, g: tl.constexpr):
    """Column g of (J, 16)."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] == g, words, 0), 1)


@triton.jit
def _columns(w):
    """(J, 16) -> 16 of (J,)."""
    return (
        _column(w, 0), _column(w, 1), _column(w, 2), _column(w, 3), _column(w, 4), _column(w, 5), _column(w, 6), _column(w, 7),
        _column(w, 8), _column(w, 9), _column(w, 10), _column(w, 11), _column(w, 12), _column(w, 13), _column(w, 14),
        _column(w, 15),
    )  # fmt: skip


@triton.jit
def _four_words(at, word, N4: tl.constexpr):
    """Words 0 to 3 of units of four: (J,) each."""
    J4: tl.constexpr = word.shape[0]
    w = tl.load(at + word, mask=word < N4, other=0, eviction_policy="evict_first")
    even, odd = tl.split(tl.reshape(w, (J4 // 4, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _row_ahead(place_ptr, q_ptr, scale_ptr, row, unit, N, K: tl.constexpr, BITS: tl.constexpr, NG: tl.constexpr):
    """What is loaded of a row before it is needed: words of places and of codes, and scales."""
    U: tl.constexpr = K // 64
    J: tl.constexpr = unit.shape[0]
    row = tl.minimum(row, N - 1)
    two = tl.arange(0, 2 * J)
    p = tl.load(place_ptr + row * (2 * U) + two, mask=two < 2 * U, other=0, eviction_policy="evict_first")
    p0, p1 = tl.split(tl.reshape(p, (J, 2)))
    if BITS == 4:
        codes = _four_words(q_ptr + row * (4 * U), tl.arange(0, 4 * J), 4 * U)
    else:
        w = tl.load(
            q_ptr + row * (8 * U) + tl.arange(0, 8 * J),
            mask=tl.arange(0, 8 * J) < 8 * U,
            other=0,
            eviction_policy="evict_first",
        )
        even, odd = tl.split(tl.reshape(w, (J, 2, 2, 2)))  # words 0 2 4 6 and 1 3 5 7
        e0, e1 = tl.split(even)  # 0 4 and 2 6
        o0, o1 = tl.split(odd)  # 1 5 and 3 7
        w0, w4 = tl.split(e0)
        w2, w6 = tl.split(e1)
        w1, w5 = tl.split(o0)
        w3, w7 = tl.split(o1)
        codes = (w0, w1, w2, w3, w4, w5, w6, w7)
    if NG == 1:
        scale = tl.load(scale_ptr + row).to(tl.float32) + tl.zeros((J,), tl.float32)
    else:
        group = unit // (U // NG)
        scale = tl.load(scale_ptr + row * NG + group, mask=group < NG, other=0).to(tl.float32)
    return p0, p1, codes, scale


@triton.jit
def _row_sum(ahead, high, low, step, BITS: tl.constexpr):
    """What each unit adds to the product with a row: (J,) float32."""
    p0, p1, c, scale = ahead
    if BITS == 4:
        total = tl.inline_asm_elementwise(
            _ASM4, _OPERANDS4,
            [c[0], c[1], c[2], c[3], p0, p1, high[0], high[1], high[2], high[3], high[4], high[5], high[6], high[7], high[8],
             high[9], high[10], high[11], high[12], high[13], high[14], high[15], low[0], low[1], low[2], low[3], low[4], low[5],
             low[6], low[7], low[8], low[9], low[10], low[11], low[12], low[13], low[14], low[15]],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        total = tl.inline_asm_elementwise(
            _ASM8, _OPERANDS8,
            [c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], p0, p1, high[0], high[1], high[2], high[3], high[4], high[5],
             high[6], high[7], high[8], high[9], high[10], high[11], high[12], high[13], high[14], high[15], low[0], low[1],
             low[2], low[3], low[4], low[5], low[6], low[7], low[8], low[9], low[10], low[11], low[12], low[13], low[14],
             low[15]],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return total.to(tl.float32) * step * scale


@triton.jit
def gemv24_kernel(
    x_ptr, place_ptr, q_ptr, scale_ptr, out_ptr, N, K: tl.constexpr, BITS: tl.constexpr, NG: tl.constexpr, J: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over groups of (sum over the group of x * code) * scale, of signed codes of 4 or 8 bits.

    As `gemv_codes_kernel` of one_token.py, for units of 64 elements: x is 16-bit fixed point with a step of max|x| / 32512 of the
    unit, in two bytes, which stay in registers, and the sum over a unit is exact. TURN rows at a time, the next ones ahead.
    """
    U: tl.constexpr = K // 64
    first = tl.program_id(0)
    x_ptr += tl.program_id(1) * K  # the tokens after the first
    out_ptr += tl.program_id(1) * N
    unit = tl.arange(0, J)
    ahead0 = _row_ahead(place_ptr, q_ptr, scale_ptr, first * TURN, unit, N, K, BITS, NG)
    ahead1 = _row_ahead(place_ptr, q_ptr, scale_ptr, first * TURN + 1, unit, N, K, BITS, NG)
    ahead2, ahead3 = ahead0, ahead1
    if TURN == 4:
        ahead2 = _row_ahead(place_ptr, q_ptr, scale_ptr, first * TURN + 2, unit, N, K, BITS, NG)
        ahead3 = _row_ahead(place_ptr, q_ptr, scale_ptr, first * TURN + 3, unit, N, K, BITS, NG)
    at = (unit * 64)[:, None, None] + (tl.arange(0, 16) * 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    x = tl.load(x_ptr + at, mask=(unit < U)[:, None, None], other=0.0).to(tl.float32)
    top = _largest(tl.abs(x))
    i = _fixed_point(x, tl.where(top > 0, 32512.0 / top, 0.0))
    step = top * (1 / 32512) * (1 / 16 if BITS == 4 else 1.0)
    high_bytes, low_bytes = _bytes(i)
    high = _columns(tl.reshape(high_bytes, (J, 16)))
    low = _columns(tl.reshape(low_bytes, (J, 16)))
    for tile in tl.range(first, tl.cdiv(N, TURN), tl.num_programs(0)):
        r = tile * TURN
        w0, w1, w2, w3 = ahead0, ahead1, ahead2, ahead3
        after = r + tl.num_programs(0) * TURN
        ahead0 = _row_ahead(place_ptr, q_ptr, scale_ptr, after, unit, N, K, BITS, NG)
        ahead1 = _row_ahead(place_ptr, q_ptr, scale_ptr, after + 1, unit, N, K, BITS, NG)
        if TURN == 4:
            ahead2 = _row_ahead(place_ptr, q_ptr, scale_ptr, after + 2, unit, N, K, BITS, NG)
            ahead3 = _row_ahead(place_ptr, q_ptr, scale_ptr, after + 3, unit, N, K, BITS, NG)
        two = tl.join(_row_sum(w0, high, low, step, BITS), _row_sum(w1, high, low, step, BITS))  # (J, 2)
        at_row = r + tl.arange(0, 2)
        tl.store(out_ptr + at_row, tl.sum(two, 0).to(out_ptr.dtype.element_ty), mask=at_row < N)
        if TURN == 4:
            two = tl.join(_row_sum(w2, high, low, step, BITS), _row_sum(w3, high, low, step, BITS))
            tl.store(out_ptr + at_row + 2, tl.sum(two, 0).to(out_ptr.dtype.element_ty), mask=at_row + 2 < N)


def for_one_token(reading: Reading, fields: Fields) -> bool:
    """Whether `gemv` takes these pairs: signed codes of 4 or 8 bits with plain scales and no zero points."""
    signed = (reading.bits == 4 and reading.offset == 8) or (reading.bits == 8 and reading.signed)
    whole = reading.by_row or reading.group % 32 == 0
    plain = reading.kind == "affine" and reading.nested == "none" and reading.rows == 1
    return signed and whole and plain and fields[2] is None and reading.k % 32 == 0 and reading.k <= 32768


def gemv(x: Tensor, places: Tensor, reading: Reading, fields: Fields) -> Tensor:
    """x @ decode(w).T of a few tokens, one after another, for pairs `for_one_token`. x: (M, K), contiguous -> (M, N)."""
    m, n, k = x.shape[0], reading.n, 2 * reading.k
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    units = max(32, power_of_two(k // 64))
    warps = min(16, max(1, units // 32))
    turn = 4 if reading.bits == 4 else 2  # rows in flight: as many as registers hold
    tiles = cdiv(n, turn)
    rounds = cdiv(tiles, multiprocessors(x.device) * max(1, 16 // warps))
    launch(
        gemv24_kernel, (cdiv(tiles, rounds), m), x, places.view(torch.int32), fields[0], fields[1], out, n, K=k,
        BITS=reading.bits, NG=reading.groups, J=units, TURN=turn, num_warps=warps,
    )  # fmt: skip
    return out
