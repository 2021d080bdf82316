"""Triton kernels for a weight of trits, five numbers -1, 0 and 1 in a byte (`pack_trits`), with a scale per row, block or matrix.

Byte p of a row has elements e, e + 13, ..., e + 52 from e = p + 51 * (p // 13) on; of the last byte of 13 the fifth is not there.
How bytes become numbers is in trits_ptx.py. A product takes two kernels: the first puts x in the order in which the threads of
the second read the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .ampere import _act_scale
from .device import is_hopper, multiprocessors
from .hopper import _magnitude
from .launch import Launch, cdiv, launch, power_of_two
from .read_once import _fetched, _four_words, _word
from .reading import Fields, Reading
from .trits_ptx import digits, pairs, times_word

SLOTS = 12
"""Words of 32 bits that a word of four bytes of the weight meets: 5 of high bytes and 5 of low ones of y, where its sum begins,
and the step of its fixed point."""


@triton.jit
def _row_scale(x_ptr, K: tl.constexpr, B: tl.constexpr, LEVELS: tl.constexpr):
    """The scale of a row of x as `Intx(8)` has it, to the bit, and its inverse."""
    k = tl.arange(0, B)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return _act_scale(tl.max(_magnitude(x), 0).to(tl.float32, bitcast=True), LEVELS)


@triton.jit
def _rounded(x, inverse, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x in float32 -> its codes, int32: half to even, by a sum that has no bits to the right of the point."""
    return (tl.clamp(x * inverse, LOW, HIGH) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


# One token.


@triton.jit
def _in_fixed_point(x, f, inverse, ACT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """(B, 4) numbers as integers. ACT: 0 with the factor f (B,), 1 quantized, 2 codes."""
    if ACT == 0:
        return (x.to(tl.float32) * f[:, None] + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    elif ACT == 1:
        return _rounded(x.to(tl.float32), inverse, LOW, HIGH)
    else:
        return x.to(tl.int32)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _of_digit(x_ptr, p, i: tl.constexpr, K: tl.constexpr):
    """The numbers that digit i of bytes p meets: 0 where there are none."""
    chunk = p // 13
    there = (p < K // 64 * 13) & ((p - chunk * 13 < 12) | (i < 4))
    return tl.load(x_ptr + p + chunk * 51 + i * 13, mask=there, other=0)


@triton.jit
def _four_bytes(value):
    """(B, 4) -> (B,): the last bytes of four, as a word."""
    return tl.sum((value & 255) << (tl.arange(0, 4) * 8)[None, :], 1)


@triton.jit
def _store_two(at, y, there, i: tl.constexpr, LANES: tl.constexpr):
    """y of digit i (B, 4) as 256 high + low, both bytes with a sign."""
    y += 128
    tl.store(at + (i // 4 * LANES * 4 + i % 4), _four_bytes(y >> 8), mask=there)
    tl.store(at + ((5 + i) // 4 * LANES * 4 + (5 + i) % 4), _four_bytes((y & 255) ^ 128), mask=there)


@triton.jit
def meet_kernel(
    x_ptr, met_ptr, row_ptr, K: tl.constexpr, ACT: tl.constexpr, LEVELS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What words of the weight meet, of one token x (K,): met (EACH, 3, LANES, 4) int32, `SLOTS` of each word, and a scale.

    ACT: 0 for numbers, which become fixed point with a step of max|x| / 8128 of a word's 20; 1 for those that are quantized
    first; 2 for codes, of which row has the scale. LOW to HIGH: of them. B: words of a program. BK: K or more.
    """
    if EARLY:
        gdc_launch_dependents()
    word = tl.program_id(0) * B + tl.arange(0, B)
    there = word < LANES * EACH
    of_all = (met_ptr + 12 * LANES * EACH).to(tl.pointer_type(tl.float32), bitcast=True)
    p = word[:, None] * 4 + tl.arange(0, 4)[None, :]
    x0, x1, x2 = _of_digit(x_ptr, p, 0, K), _of_digit(x_ptr, p, 1, K), _of_digit(x_ptr, p, 2, K)
    x3, x4 = _of_digit(x_ptr, p, 3, K), _of_digit(x_ptr, p, 4, K)
    f = tl.zeros((B,), tl.float32)
    step = f
    inverse = 0.0
    if ACT == 0:
        a0, a1, a2 = tl.abs(x0.to(tl.float32)), tl.abs(x1.to(tl.float32)), tl.abs(x2.to(tl.float32))
        a3, a4 = tl.abs(x3.to(tl.float32)), tl.abs(x4.to(tl.float32))
        top = tl.reduce(_larger(_larger(_larger(a0, a1), _larger(a2, a3)), a4), 1, _larger)
        f = tl.where(top > 0, 8128.0 / top, 0.0)
        step = top * (1 / 8128)
    elif ACT == 1:
        scale, inverse = _row_scale(x_ptr, K, BK, LEVELS)
        tl.store(of_all, scale)
    else:
        tl.store(of_all, tl.load(row_ptr))
    q0 = _in_fixed_point(x0, f, inverse, ACT, LOW, HIGH)
    q1 = _in_fixed_point(x1, f, inverse, ACT, LOW, HIGH)
    q2 = _in_fixed_point(x2, f, inverse, ACT, LOW, HIGH)
    q3 = _in_fixed_point(x3, f, inverse, ACT, LOW, HIGH)
    q4 = _in_fixed_point(x4, f, inverse, ACT, LOW, HIGH)
    # Word LANES * j + l is the j-th of lane l.
    at = met_ptr + (word // LANES * (12 * LANES) + word % LANES * 4)
    _store_two(at, q0 - 3 * q1, there, 0, LANES)
    _store_two(at, q1 - 3 * q2, there, 1, LANES)
    _store_two(at, q2 - 3 * q3, there, 2, LANES)
    _store_two(at, q3 - 3 * q4, there, 3, LANES)
    _store_two(at, q4, there, 4, LANES)
    begin = -tl.sum(q0 + q1 + q2 + q3 + q4, 1)  # numbers are digits less 1
    tl.store(at + (2 * LANES * 4 + 2), begin + (0x4B400000 if ACT == 0 else 0), mask=there)
    tl.store(at + (2 * LANES * 4 + 3), step.to(tl.int32, bitcast=True), mask=there)


_NUMBERS_ASM, _CODES_ASM = tl.constexpr(times_word(False)), tl.constexpr(times_word(True))
_NUMBERS_OPERANDS = tl.constexpr("=f" + ",r" * 12 + ",f,f")
_CODES_OPERANDS = tl.constexpr("=r" + ",r" * 14)


@triton.jit
def _ahead(q_ptr, row, lane, N, W: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr):
    """The words of a lane of rows, which are read once."""
    at = q_ptr + (tl.minimum(row, N - 1) * W + lane)
    words = ()
    for j in tl.static_range(EACH):
        if (j + 1) * LANES <= W:
            word = tl.load(at + j * LANES, eviction_policy="evict_first")
        else:
            word = tl.load(at + j * LANES, mask=lane + j * LANES < W, other=0, eviction_policy="evict_first")
        words += (word,)  # type: ignore[assignment]
    return words


@triton.jit
def _four(at):
    """Four words, once the kernel that wrote them is done: nothing may move this."""
    return tl.inline_asm_elementwise(
        "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _times_word(word, h, hl, lb, total, ACT: tl.constexpr):
    """total + a word times the SLOTS that it meets."""
    if ACT == 0:
        return tl.inline_asm_elementwise(
            _NUMBERS_ASM, _NUMBERS_OPERANDS,
            [word, h[0], h[1], h[2], h[3], hl[0], hl[1], hl[2], hl[3], lb[0], lb[1], lb[2], lb[3].to(tl.float32, bitcast=True),
             total],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _CODES_ASM, _CODES_OPERANDS,
            [word, h[0], h[1], h[2], h[3], hl[0], hl[1], hl[2], hl[3], lb[0], lb[1], lb[2], lb[3], total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def gemv_trits_kernel(
    met_ptr, q_ptr, scale_ptr, out_ptr, N, K: tl.constexpr, RG: tl.constexpr, ACT: tl.constexpr,
    LANES: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[n] = (sum of x * trits[n]) * scale[n]. met: of `meet_kernel`. K is a multiple of 256.

    LANES threads share a row, of which each has every LANES-th word, EACH in all; a tile is ROWS rows, and RG share a scale.
    """
    W: tl.constexpr = K // 256 * 13
    q_ptr = q_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    thread = tl.arange(0, ROWS * LANES)
    lane = thread % LANES
    of_tile = thread // LANES
    first = tl.program_id(0)
    stride = tl.num_programs(0)
    ahead = _ahead(q_ptr, first * ROWS + of_tile, lane, N, W, LANES, EACH)
    later = _ahead(q_ptr, (first + stride) * ROWS + of_tile, lane, N, W, LANES, EACH)
    if EARLY:
        gdc_wait()
    scale_of_x = tl.load((met_ptr + 12 * LANES * EACH).to(tl.pointer_type(tl.float32), bitcast=True), volatile=True)
    met = ()
    for j in tl.static_range(EACH):
        at = met_ptr + (j * 12 * LANES + lane * 4)
        met += ((_four(at), _four(at + 4 * LANES), _four(at + 8 * LANES)),)  # type: ignore[assignment]
    for tile in tl.range(first, tl.cdiv(N, ROWS), stride):
        words = ahead
        ahead = later
        later = _ahead(q_ptr, (tile + 2 * stride) * ROWS + of_tile, lane, N, W, LANES, EACH)
        total = tl.zeros((ROWS * LANES,), tl.float32 if ACT == 0 else tl.int32)
        for j in tl.static_range(EACH):
            total = _times_word(words[j], met[j][0], met[j][1], met[j][2], total, ACT)
        out = tl.sum(tl.reshape(total, (ROWS, LANES)), 1).to(tl.float32)
        row = tile * ROWS + tl.arange(0, ROWS)
        if ACT != 0:
            out *= scale_of_x
        out *= tl.load(scale_ptr + tl.minimum(row, N - 1) // RG).to(tl.float32)
        tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=row < N)


# A few tokens.


@triton.jit
def arrange_kernel(
    x_ptr, out_ptr, row_ptr, K: tl.constexpr, ACT: tl.constexpr, LEVELS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A token of x (M, K) as `few_trits_kernel` meets it: out (M, steps, 5, 64), of 16 bits. ACT, LOW, HIGH: as of
    `meet_kernel`; codes are numbers in out, and with 1 their scale goes to row (M,).

    A step has 16 words of a row, of which each of four threads reads 4 neighbours. Place k of a digit is byte
    k // 8 % 2 * 2 + k % 2 of word k // 16 of thread k // 2 % 4.
    """
    if EARLY:
        gdc_launch_dependents()
    T: tl.constexpr = (K // 64 * 13 + 63) // 64
    m = tl.program_id(0).to(tl.int64)
    x_ptr += m * K
    place = tl.program_id(1) * B + tl.arange(0, B)
    k = place % 64
    i = place // 64 % 5
    word = place // 320 * 16 + k // 2 % 4 * 4 + k // 16
    p = word * 4 + k // 8 % 2 * 2 + k % 2
    chunk = p // 13
    there = (p < K // 64 * 13) & ((p - chunk * 13 < 12) | (i < 4))
    x = tl.load(x_ptr + p + chunk * 51 + i * 13, mask=there, other=0)
    if ACT == 1:
        scale, inverse = _row_scale(x_ptr, K, BK, LEVELS)
        tl.store(row_ptr + m, scale)
        x = _rounded(x.to(tl.float32), inverse, LOW, HIGH)
    if ACT != 0:
        x = x.to(tl.float32)
    tl.store(out_ptr + m * (T * 320) + place, x.to(out_ptr.dtype.element_ty), mask=place < T * 320)


_DIGITS_ASM = tl.constexpr(digits())
_BF16_ASM, _F16_ASM = tl.constexpr(pairs("bf16")), tl.constexpr(pairs("f16"))


@triton.jit
def _digits_of(word):
    """Words of four bytes -> words of their digits, of each place."""
    return tl.inline_asm_elementwise(
        _DIGITS_ASM, "=&r,=&r,=&r,=&r,=&r,r", [word],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _numbers(digits, like: tl.constexpr):
    """Words of four digits (BN, 4) -> (BN, 4, 2, 2) of dtype `like`."""
    if like == tl.bfloat16:
        a0, a1, a2, a3 = tl.inline_asm_elementwise(
            _BF16_ASM, "=h,=h,=h,=h,r", [digits], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )  # fmt: skip
    else:
        a0, a1, a2, a3 = tl.inline_asm_elementwise(
            _F16_ASM, "=h,=h,=h,=h,r", [digits], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=1
        )  # fmt: skip
    return tl.join(tl.join(a0, a2), tl.join(a1, a3))


@triton.jit
def _bytes(at, first, last: tl.constexpr):
    """Bytes `first` to `first + 3` at addresses that are no multiples of 4, as a word; those beyond the last one are that one."""
    b0, b1 = at + tl.minimum(first, last), at + tl.minimum(first + 1, last)
    b2, b3 = at + tl.minimum(first + 2, last), at + tl.minimum(first + 3, last)
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d; ld.global.nc.u8 a, [$1]; ld.global.nc.u8 b, [$2]; ld.global.nc.u8 c, [$3];
        ld.global.nc.u8 d, [$4]; prmt.b32 a, a, b, 0x0040; prmt.b32 c, c, d, 0x0040; prmt.b32 $0, a, c, 0x5410; }""",
        "=r,l,l,l,l", [b0, b1, b2, b3], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _read_ahead(q_ptr, row, t, K: tl.constexpr, WIDE: tl.constexpr):
    """Step t of rows (BN, 1): 4 words of each of 4 threads, (BN, 4) each. Beyond a row is any of it, which meets 0."""
    P: tl.constexpr = K // 64 * 13
    T: tl.constexpr = (P + 63) // 64
    t = tl.minimum(t, T - 1)
    first = tl.arange(0, 4)[None, :] * 4
    if P % 4 != 0:
        at = q_ptr + row * P
        words = ()
        for c in tl.static_range(4):
            words += (_bytes(at, (t * 16 + first + c) * 4, P - 1),)  # type: ignore[assignment]
        return words
    else:
        at = (q_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + t * 16) + row * (P // 4)
        if P // 4 % 4 != 0:
            words = ()
            for c in tl.static_range(4):
                words += (_word(at + tl.minimum(first + c, P // 4 - 1 - t * 16)),)  # type: ignore[assignment]
            return words
        else:
            if P // 4 % 16 != 0:
                first = tl.minimum(first, P // 4 - 4 - t * 16)
            return _four_words(at + first, WIDE)


@triton.jit
def _scales_of(scale_ptr, row, word, K: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, like: tl.constexpr):
    """The scales of four bytes each: (BN, 4, 2, 2)."""
    at = scale_ptr + row // RG * NG
    s0 = _fetched(at + _group_of(word * 4, K, NG)).to(like)
    s1 = _fetched(at + _group_of(word * 4 + 1, K, NG)).to(like)
    s2 = _fetched(at + _group_of(word * 4 + 2, K, NG)).to(like)
    s3 = _fetched(at + _group_of(word * 4 + 3, K, NG)).to(like)
    return tl.join(tl.join(s0, s2), tl.join(s1, s3))


@triton.jit
def _group_of(p, K: tl.constexpr, NG: tl.constexpr):
    """The group of byte p of a row, whose groups are whole chunks of 64; within bounds."""
    return tl.minimum(p // 13 // (K // NG // 64), NG - 1)


@triton.jit(do_not_specialize=["M"])
def few_trits_kernel(
    x_ptr, row_ptr, q_ptr, scale_ptr, out_ptr, M, N, K: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, ACT: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum of x[m] * trits[n] * scale[n]. x, row: of `arrange_kernel`.

    SPLIT: in how many parts K is, each with an out of its own, of sums that `sum_trits_kernel` scales, if there are several.
    Those of codes are integers, exact below 2**24. Scales of groups become numbers of x's dtype, and multiply the weight's.
    """
    P: tl.constexpr = K // 64 * 13
    T: tl.constexpr = (P + 63) // 64
    PART: tl.constexpr = (T + SPLIT - 1) // SPLIT
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)[:, None]
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    t0 = tl.minimum(tl.program_id(2) * PART, T)
    t1 = tl.minimum(t0 + PART, T)
    here = (rm < M)[None, :]
    x_at = x_ptr + rm[None, :] * (T * 320) + tl.arange(0, 64)[:, None]
    like: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BN, BM), tl.float32)
    ahead = _read_ahead(q_ptr, row, t0, K, WIDE)
    if EARLY:
        gdc_wait()
    for t in tl.range(t0, t1, num_stages=STAGES):
        words = ahead
        ahead = _read_ahead(q_ptr, row, t + 1, K, WIDE)
        d0, d1, d2, d3 = _digits_of(words[0]), _digits_of(words[1]), _digits_of(words[2]), _digits_of(words[3])
        if NG > 1:
            word = t * 16 + tl.arange(0, 4)[None, :] * 4
            s0 = _scales_of(scale_ptr, row, word, K, RG, NG, like)
            s1 = _scales_of(scale_ptr, row, word + 1, K, RG, NG, like)
            s2 = _scales_of(scale_ptr, row, word + 2, K, RG, NG, like)
            s3 = _scales_of(scale_ptr, row, word + 3, K, RG, NG, like)
        for i in tl.static_range(5):
            w0, w1 = _numbers(d0[i], like), _numbers(d1[i], like)
            w2, w3 = _numbers(d2[i], like), _numbers(d3[i], like)
            if NG > 1:
                w0, w1, w2, w3 = w0 * s0, w1 * s1, w2 * s2, w3 * s3
            w = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (BN, 4, 2, 2, 2, 2)
            w = tl.permute(tl.reshape(w, (BN, 4, 2, 2, 4)), (0, 4, 2, 1, 3))
            x = tl.load(x_at + (t * 320 + i * 64), mask=here, other=0.0)
            acc = tl.dot(tl.reshape(w, (BN, 64)), x, acc)
    if SPLIT == 1:
        if ACT != 0:
            acc *= tl.load(row_ptr + rm, mask=rm < M, other=0.0)[None, :]
        if NG == 1:
            acc *= tl.load(scale_ptr + row // RG).to(tl.float32)
    out = out_ptr + (tl.program_id(2) * M + rm[None, :]) * N + rn[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=here & (rn < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def sum_trits_kernel(
    parts_ptr, row_ptr, scale_ptr, out_ptr, M, N, RG: tl.constexpr, NG: tl.constexpr, ACT: tl.constexpr,
    SPLIT: tl.constexpr, B: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[m, n] = the sum of SPLIT parts, scaled as `few_trits_kernel` does."""
    if EARLY:
        gdc_wait()
    m = tl.program_id(1)
    n = tl.program_id(0) * B + tl.arange(0, B)
    there = n < N
    total = tl.zeros((B,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + (part * M + m) * N + n, mask=there, other=0.0)
    if ACT != 0:
        total *= tl.load(row_ptr + m)
    if NG == 1:
        total *= tl.load(scale_ptr + n // RG, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * N + n, total.to(out_ptr.dtype.element_ty), mask=there)


# Many tokens: the weight goes to memory.


@triton.jit
def decode_trits_kernel(
    q_ptr, scale_ptr, out_ptr, N, K: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """out[n, k] = trit[n, k], as int8, or times its scale, in float32: BN rows and BK elements of each."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)[:, None]
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    i = k % 64 // 13
    byte = k // 64 * 13 + (k % 64 - i * 13)
    power = tl.where(i == 0, 1, tl.where(i == 1, 3, tl.where(i == 2, 9, tl.where(i == 3, 27, 81))))
    there = (k < K)[None, :]
    b = tl.load(q_ptr + row * (K // 64 * 13) + byte[None, :], mask=there, other=0).to(tl.int32)
    digit = ((b * power[None, :] & 255) * 3) >> 8
    if out_ptr.dtype.element_ty == tl.int8:
        value = (digit - 1).to(tl.int8)
    else:
        scale = tl.load(scale_ptr + row // RG * NG + (k // (K // NG))[None, :], mask=there, other=0.0)
        number = ((digit | 0x4B000000).to(tl.float32, bitcast=True) - 8388609.0) * scale.to(tl.float32)
        value = number.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rn[:, None] * K + k[None, :], value, mask=there & (rn < N)[:, None])


# Launches.


class Act(NamedTuple):
    """How an activation becomes codes on its way: those of `Cast`, one scale for each row. levels: 0 for codes that are given."""

    levels: float
    low: float
    high: float


def _act_constants(reading: Reading, act: Act | None) -> dict[str, Any]:
    levels, low, high = act or (1.0, 0.0, 0.0)
    kind = 0 if act is None else 1 if levels else 2
    return {"K": reading.k, "ACT": kind, "LEVELS": levels or 1.0, "LOW": float(low), "HIGH": float(high)}


MOST = 13
"""Words of a row that a thread of `gemv_trits_kernel` has at most: what they meet is in its registers."""


@functools.cache
def lanes_of(k: int, most: int = MOST) -> tuple[int, int]:
    """How many threads share a row (k a multiple of 256), and the words that each has: so that few places stay empty."""
    words = k // 256 * 13

    def cost(lanes: int) -> int:
        return lanes * (35 * cdiv(words, lanes) + 20 + 2 * lanes.bit_length())

    fits = [lanes for lanes in (2**i for i in range(11)) if cdiv(words, lanes) <= most]
    lanes = min(fits, key=cost)
    return lanes, cdiv(words, lanes)


def _registers(each: int) -> int:
    """Of a thread of `gemv_trits_kernel`, as they are given out."""
    return min(256, cdiv(21 * each - 19, 8) * 8)


@functools.cache
def _gemv_constants(reading: Reading, device: torch.device, most: int = MOST) -> tuple[tuple[int], dict[str, Any], int]:
    """The grid, the constants and the warps of `gemv_trits_kernel`."""
    lanes, each = lanes_of(reading.k, most)
    rows, warps = max(1, 32 // lanes), max(1, lanes // 32)
    at_once = max(1, 65536 // (32 * _registers(each)) // warps)
    tiles = cdiv(reading.n, rows)
    rounds = cdiv(tiles, multiprocessors(device) * at_once)
    constants = {"LANES": lanes, "EACH": each, "ROWS": rows, "EARLY": is_hopper(device)}
    return (cdiv(tiles, rounds),), constants, warps


def _meet_constants(reading: Reading, act: Act | None, tile: dict[str, Any]) -> tuple[tuple[int], dict[str, Any]]:
    lanes, each = tile["LANES"], tile["EACH"]
    constants = {**_act_constants(reading, act), "LANES": lanes, "EACH": each, "B": 32}
    return (cdiv(lanes * each, 32),), {**constants, "BK": _whole(reading, act), "EARLY": tile["EARLY"]}


def _whole(reading: Reading, act: Act | None) -> int:
    """The size of a row where a kernel looks for its largest number."""
    return power_of_two(reading.k) if act is not None and act.levels else 1


def gemv(
    x: Tensor, reading: Reading, fields: Fields, dtype: torch.dtype, act: Act | None = None, rows: Tensor | None = None,
    most: int = MOST,
) -> Tensor:  # fmt: skip
    """One token: x (1, K), of 16 bits or the codes that `act` says, rows (1, 1) their scale -> (1, N)."""
    out = torch.empty(1, reading.n, dtype=dtype, device=x.device)
    grid, tile, warps = _gemv_constants(reading, x.device, most)
    lanes, each = tile["LANES"], tile["EACH"]
    met = torch.empty(SLOTS * lanes * each + 4, dtype=torch.int32, device=x.device)
    before, constants = _meet_constants(reading, act, tile)
    launch(meet_kernel, before, x, met, fields[1] if rows is None else rows, **constants)
    launch(
        gemv_trits_kernel, grid, met, fields[0], fields[1], out, reading.n, num_warps=warps, early=tile["EARLY"], K=reading.k,
        RG=reading.rows, ACT=constants["ACT"], **tile,
    )  # fmt: skip
    return out


def gemv_launch(reading: Reading, fields: Fields, act: Act | None = None) -> Callable[[Tensor, Fields], Tensor]:
    """`gemv` of x (..., K) of 16 bits, for weights of the form of these, in eager mode: what it decides is decided once."""
    device, n = fields[0].device, reading.n
    grid, tile, warps = _gemv_constants(reading, device)
    lanes, each = tile["LANES"], tile["EACH"]
    before, constants = _meet_constants(reading, act, tile)
    meet = Launch(meet_kernel, before, **constants)
    start = Launch(
        gemv_trits_kernel, grid, num_warps=warps, early=tile["EARLY"], K=reading.k, RG=reading.rows, ACT=constants["ACT"],
        **tile,
    )  # fmt: skip

    def run(x: Tensor, fields: Fields) -> Tensor:
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
        met = torch.empty(SLOTS * lanes * each + 4, dtype=torch.int32, device=device)
        meet(device.index, x, met, fields[1])
        start(device.index, met, fields[0], fields[1], out, n)
        return out

    return run


class Tile(NamedTuple):
    """How a product of a few tokens is cut.

    tokens, rows: of a tile. warps: of a program. split: in how many parts K is. stages: steps of which x is in shared memory at a
    time.
    """

    tokens: int
    rows: int
    warps: int
    split: int
    stages: int = 3


@functools.cache
def _tile(reading: Reading, m: int, device: torch.device) -> Tile:
    tokens = max(16, min(64, power_of_two(m)))  # with 8 the tensor cores of Hopper are not taken
    # Of 64 tokens x is read once for 128 rows, not for 64: beyond the weight that is most of what is read.
    rows, programs = (64, 4) if tokens < 64 else (128, 2)
    tiles = cdiv(reading.n, rows) * cdiv(m, tokens)
    steps = cdiv(reading.k // 64 * 13, 64)
    split = max(1, min(8, round(programs * multiprocessors(device) / tiles), steps // 2))
    return Tile(tokens, rows, 4, split, 3 if tokens == 16 else 2)


def few(
    x: Tensor, reading: Reading, fields: Fields, dtype: torch.dtype, act: Act | None = None, rows: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """A few tokens: x (M, K), contiguous, of 16 bits or the codes that `act` says, rows (M, 1) their scales -> (M, N)."""
    m, n, k = x.shape[0], reading.n, reading.k
    tile = tile or _tile(reading, m, x.device)
    early = is_hopper(x.device)
    width = cdiv(k // 64 * 13, 64) * 320
    like = x.dtype if act is None and reading.by_row else torch.bfloat16  # which holds codes, and scales of any size
    arranged = torch.empty(m, width, dtype=like, device=x.device)
    if rows is None:
        rows = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    constants = {
        **_act_constants(reading, act),
        "B": 1024,
        "BK": _whole(reading, act),
        "EARLY": early,
    }
    launch(arrange_kernel, (m, cdiv(width, 1024)), x, arranged, rows, **constants)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    parts = out if tile.split == 1 else torch.empty(tile.split, m, n, dtype=torch.float32, device=x.device)
    scaling = {"RG": reading.rows, "NG": reading.groups, "ACT": constants["ACT"]}
    launch(
        few_trits_kernel, (cdiv(n, tile.rows), cdiv(m, tile.tokens), tile.split), arranged, rows, fields[0], fields[1], parts,
        m, n, num_warps=tile.warps, early=early, K=k, **scaling,
        WIDE=fields[0].data_ptr() % 16 == 0, BM=tile.tokens, BN=tile.rows, STAGES=tile.stages, SPLIT=tile.split,
        EARLY=early,
    )  # fmt: skip
    if tile.split > 1:
        launch(
            sum_trits_kernel, (cdiv(n, 1024), m), parts, rows, fields[1], out, m, n, **scaling, SPLIT=tile.split, B=1024,
            EARLY=False,
        )  # fmt: skip
    return out


def product(
    x: Tensor, reading: Reading, fields: Fields, dtype: torch.dtype, act: Act | None = None, rows: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`gemv` or `few`, by the number of tokens."""
    one = x.shape[0] == 1 and reading.for_one_token
    return (gemv if one else few)(x, reading, fields, dtype, act, rows)


def decoded(reading: Reading, fields: Fields, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) as `dtype`, of 16 bits, or its trits as int8."""
    n, k = reading.n, reading.k
    out = torch.empty(n, k, dtype=dtype, device=fields[0].device)
    if out.numel():
        wide = min(512, power_of_two(k))
        height = 4096 // wide
        launch(
            decode_trits_kernel, (cdiv(n, height), cdiv(k, wide)), fields[0], fields[1], out, n, K=k, RG=reading.rows,
            NG=reading.groups, BN=height, BK=wide,
        )  # fmt: skip
    return out
