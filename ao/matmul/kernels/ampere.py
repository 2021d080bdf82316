"""Triton kernels for what Inductor does not fuse: products of a few tokens with a weight that stays packed.

For any NVIDIA GPU since Ampere; hopper.py has those for its tensor cores. They are imported when a path of
gpu.py first runs, since Triton comes with GPU builds of PyTorch only. The planar packing of bits.py is what makes them
short: 4 bytes in a register are 4 low and 4 high nibbles, each 4 neighbours of the row.

No tile has fewer than 8 rows: Triton 3.6 stores a reduced tile of 4 rows wrongly.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import is_hopper, multiprocessors
from .joint_words import scale_number, zero_number
from .launch import Launch, cdiv, launch, power_of_two
from .several import counted, cut, of_three

# Decoding, 4 bytes of a register at a time.


@triton.jit
def _low_bf16(q):
    """uint8 -> bfloat16: 128 + the low nibble, whose bits are the last of the mantissa."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 t; and.b32 t, $2, 0x0f0f0f0f;
        prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342; }""",
        "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _high_bf16(q):
    """uint8 -> bfloat16: 128 + the high nibble."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 t; shr.u32 t, $2, 4; and.b32 t, t, 0x0f0f0f0f;
        prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342; }""",
        "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _e4m3_bf16(q):
    """float8 e4m3, as uint8 -> bfloat16: the bits moved into place, times 2**120, the difference of the exponent biases.

    The hardware's conversion goes through float16 and runs at an eighth of the rate.
    """
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, k; mov.b32 k, 0x7B807B80; prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;
        shr.u32 c, a, 4; and.b32 c, c, 0x07F007F0; and.b32 a, a, 0x80008000; or.b32 a, a, c; mul.rn.bf16x2 $0, a, k;
        shr.u32 c, b, 4; and.b32 c, c, 0x07F007F0; and.b32 b, b, 0x80008000; or.b32 b, b, c; mul.rn.bf16x2 $1, b, k; }""",
        "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


# One token.


def _dot_asm(bits: int, sign: str) -> tuple[str, str]:
    """4 words of codes times 16-bit numbers given as words of bytes: the sum in the first of 4 elements, 0 in the others.

    Operands: the codes; high and low bytes of what they meet; for 4 bits, those of what the high nibbles meet.
    """
    lines = ["{ .reg .b32 a, b, l, h; mov.b32 a, 0; mov.b32 b, 0;"]
    for i in range(4):
        q, *x = (f"${4 + 4 * operand + i}" for operand in range(5 if bits == 4 else 3))
        runs = [(q, x)]
        if bits == 4:
            lines.append(f"and.b32 l, {q}, 0x0f0f0f0f; shr.u32 h, {q}, 4; and.b32 h, h, 0x0f0f0f0f;")
            runs = [("l", x[:2]), ("h", x[2:])]
        for code, (high, low) in runs:
            lines.append(f"dp4a.{sign}.s32 a, {code}, {high}, a; dp4a.{sign}.s32 b, {code}, {low}, b;")
    lines.append("shl.b32 a, a, 8; add.s32 $0, a, b; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }")
    return " ".join(lines), "=r,=r,=r,=r" + ",r" * (20 if bits == 4 else 12)


_NIBBLES, _NIBBLES_OPERANDS = map(tl.constexpr, _dot_asm(4, "s32"))
_SIGNED, _BYTES_OPERANDS = map(tl.constexpr, _dot_asm(8, "s32"))
_UNSIGNED = tl.constexpr(_dot_asm(8, "u32")[0])


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x):
    """(J, W, 4) -> (J,): NaN where there is one, which then makes the sum NaN."""
    return tl.reduce(tl.reduce(x, 2, _larger), 1, _larger)


@triton.jit
def _fixed_point(x, f):
    """(J, W, 4) float32, f (J,) -> 0x4B400080 + round(x * f), whose last 16 bits are round(x * f) + 128."""
    return (x * f[:, None, None] + 12583040.0).to(tl.int32, bitcast=True)


@triton.jit
def _bytes(i):
    """(J, W, 4) int32 i + 128 -> the high and the low bytes of i = 256 high + low, both signed, 4 to a word: (J W,)."""
    high, low = tl.inline_asm_elementwise(
        """{ .reg .b32 a, b; prmt.b32 a, $8, $9, 0x5410; prmt.b32 b, $10, $11, 0x5410; prmt.b32 $0, a, b, 0x7531;
        prmt.b32 a, a, b, 0x6420; xor.b32 $4, a, 0x80808080;
        mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; mov.b32 $5, 0; mov.b32 $6, 0; mov.b32 $7, 0; }""",
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [i], dtype=(tl.int32, tl.int32), is_pure=True, pack=4,
    )  # fmt: skip
    words: tl.constexpr = i.shape[0] * i.shape[1]
    return tl.reshape(tl.sum(high, 2), (words,)), tl.reshape(tl.sum(low, 2), (words,))


@triton.jit
def _act_scale(top, LEVELS: tl.constexpr):
    """The scale of a row whose largest magnitude is `top`, and its inverse: as `Intx(8)` and `Float8()` have them, to the bit."""
    scale = top * (1 / LEVELS)
    return scale, tl.where(scale < 1.1754943508222875e-38, 0.0, (1.0 / scale.to(tl.float64)).to(tl.float32))


@triton.jit
def rounded_e4m3(x):
    """x rounded to float8 e4m3, float32: three bits after the leading one; below 2**-6 multiples of 2**-9.

    Triton 3.6 loses the rounding of a cast there and back.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, rounded)


@triton.jit
def _codes_of_rows(q_ptr, row, word, words: tl.constexpr):
    """The words of rows of codes: (BN, 4 J) int32. They are read once, and are the first to leave the cache."""
    at = q_ptr + row[:, None].to(tl.int64) * words + word[None, :]
    if words == word.shape[0]:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=(word < words)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def _scales_of_rows(scale_ptr, zero_ptr, row, unit, U: tl.constexpr, NG: tl.constexpr, ZERO: tl.constexpr):
    """The scale of each unit of rows, and its zero point or nothing: (J, BN), as they are stored.

    Transposed, because Triton then spreads them over threads as it does the sums that they multiply.
    """
    at = (unit // (U // NG))[:, None] + row[None, :].to(tl.int64) * NG
    there = (unit < U)[:, None]
    scale = tl.load(scale_ptr + at, mask=there, other=0)
    return scale, tl.load(zero_ptr + at, mask=there, other=0) if ZERO else 0


@triton.jit
def _place(
    tile, rn, q0, scale0, zero0, n0, q1, scale1, zero1, n1, q2, scale2, zero2, n2, BN: tl.constexpr, WEIGHTS: tl.constexpr
):  # fmt: skip
    """The weight that a tile of BN rows belongs to, of up to three one below the other, and the rows in it: within bounds. Of
    several, each has a multiple of BN rows."""
    if WEIGHTS == 1:
        return tl.minimum(tile * BN + rn, n0 - 1), q0, scale0, zero0
    else:
        first, second = n0 // BN, (n0 + n1) // BN
        tile = tl.minimum(tile, second + n2 // BN - 1)
        in0, in1 = tile < first, tile < second
        row = (tile - tl.where(in0, 0, tl.where(in1, first, second))) * BN + rn
        q = tl.where(in0, q0, tl.where(in1, q1, q2))
        return (
            row,
            q,
            tl.where(in0, scale0, tl.where(in1, scale1, scale2)),
            tl.where(in0, zero0, tl.where(in1, zero1, zero2)),
        )


@triton.jit
def _row_and_places(x_ptr, order_ptr, k, there, K: tl.constexpr, WIDTH: tl.constexpr, ORDERED: tl.constexpr):
    """What `_of_token` takes: one token and order[k], or nothing. WIDTH: a power of two, K or more."""
    if ORDERED:
        whole = tl.arange(0, WIDTH)
        return tl.load(x_ptr + whole, mask=whole < K, other=0.0), tl.load(order_ptr + k, mask=there, other=0).to(
            tl.int32
        )
    else:
        return 0, 0


@triton.jit
def _of_token(x_ptr, row, place, k, there, ORDERED: tl.constexpr):
    """x[k] of one token, or row[place] by way of shared memory: (J, 4, 4) float32."""
    if ORDERED:
        x = tl.gather(row, tl.reshape(place, (k.numel,)), 0)
        return tl.where(there, tl.reshape(x, k.shape).to(tl.float32), 0.0)
    else:
        return tl.load(x_ptr + k, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _gemv_int(
    x_ptr, order_ptr, out_ptr, q0, scale0, zero0, n0, q1, scale1, zero1, n1, q2, scale2, zero2, n2, K: tl.constexpr,
    G: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    BN: tl.constexpr, J: tl.constexpr, AHEAD: tl.constexpr, ACT: tl.constexpr, WEIGHTS: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over groups of (sum over the group of x * (q[n] - zero[n]) * scale[n]), for the rows of up to three weights
    one below the other.

    A program goes through the tiles of BN rows that are its own, and loads the codes of the next tile before it works on
    this one. A row is J units (or fewer, J being a power of two) of 16 bytes of codes, read as words, and a thread has the
    same units of every row: its part of x stays in registers, as 16-bit fixed point with a step of max|x| / 32512 of the
    unit, in two bytes. So the sum of a unit is exact in integers: two 4-way byte products for 4 codes.
    AHEAD: load the scales of the next tile ahead as well. ACT: x is first quantized as `Intx(8)` does. ORDERED: x[order] is what
    is multiplied.
    """
    N = n0 if WEIGHTS == 1 else n0 + n1 + n2
    E: tl.constexpr = 128 // BITS  # elements of a unit
    U: tl.constexpr = K // E
    NG: tl.constexpr = K // G
    first = tl.program_id(0)
    unit = tl.arange(0, J)
    word = tl.arange(0, 4 * J)
    rn = tl.arange(0, BN)
    row, q_ptr, scale_ptr, zero_ptr = _place(
        first, rn, q0, scale0, zero0, n0, q1, scale1, zero1, n1, q2, scale2, zero2, n2, BN, WEIGHTS
    )
    k = (unit * E)[:, None, None] + (tl.arange(0, 4) * 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    there = (unit < U)[:, None, None]
    # Asked for before the codes, behind which they would wait.
    whole, place = _row_and_places(x_ptr, order_ptr, k, there, K, J * E, ORDERED)
    if BITS == 4:
        _, place_y = _row_and_places(x_ptr, order_ptr, k + 16, there, K, J * E, ORDERED)
    ahead = _codes_of_rows(q_ptr, row, word, 4 * U)
    if AHEAD:
        scales, zeros = _scales_of_rows(scale_ptr, zero_ptr, row, unit, U, NG, ZERO)
    x = _of_token(x_ptr, whole, place, k, there, ORDERED)
    if BITS == 4:
        y = _of_token(x_ptr, whole, place_y, k + 16, there, ORDERED)
        top = _largest(_larger(tl.abs(x), tl.abs(y)))
        f = tl.where(top > 0, 32512.0 / top, 0.0)
        i = _fixed_point(x, f)
        j = _fixed_point(y, f)
        total = tl.sum(tl.sum(i + j, 2), 1) - 0x68001000  # 32 times 0x4B400080, modulo 2**32
        high, low = _bytes(i)
        high_y, low_y = _bytes(j)
    else:
        if ACT:
            act, inverse = _act_scale(tl.reduce(_largest(tl.abs(x)), 0, _larger), 127.5)
            # Half to even, by a sum that has no bits to the right of the point.
            x = (tl.clamp(x * inverse, -128.0, 127.0) + 12582912.0) - 12582912.0
        top = _largest(tl.abs(x))
        i = _fixed_point(x, tl.where(top > 0, 32512.0 / top, 0.0))
        total = tl.sum(tl.sum(i, 2), 1) + 0x4BFFF800  # less 16 times 0x4B400080, modulo 2**32
        high, low = _bytes(i)
    step = top * (1 / 32512)
    if ACT:
        step *= act
    total = total.to(tl.float32) * step  # the sum of x over the unit
    for tile in tl.range(first, tl.cdiv(N, BN), tl.num_programs(0)):
        q = ahead
        after, q_after, scale_after, zero_after = _place(
            tile + tl.num_programs(0),
            rn,
            q0,
            scale0,
            zero0,
            n0,
            q1,
            scale1,
            zero1,
            n1,
            q2,
            scale2,
            zero2,
            n2,
            BN,
            WEIGHTS,
        )
        ahead = _codes_of_rows(q_after, after, word, 4 * U)
        if BITS == 4:
            dots = tl.inline_asm_elementwise(
                _NIBBLES, _NIBBLES_OPERANDS, [q, high[None, :], low[None, :], high_y[None, :], low_y[None, :]],
                dtype=tl.int32, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            dots = tl.inline_asm_elementwise(
                _SIGNED if SIGNED else _UNSIGNED, _BYTES_OPERANDS, [q, high[None, :], low[None, :]],
                dtype=tl.int32, is_pure=True, pack=4,
            )  # fmt: skip
        d = tl.sum(tl.reshape(dots, (BN, J, 4)), 2).to(tl.float32) * step[None, :]  # (BN, J)
        if ROW:
            if ZERO:
                d -= (zero_number(tl.load(zero_ptr + row), BITS) + OFFSET)[:, None] * total[None, :]
            elif OFFSET:
                d -= OFFSET * total[None, :]
            out = tl.sum(d, 1) * scale_number(tl.load(scale_ptr + row))
        else:
            if AHEAD:
                scale, zero = scales, zeros
                scales, zeros = _scales_of_rows(scale_after, zero_after, after, unit, U, NG, ZERO)
            else:
                scale, zero = _scales_of_rows(scale_ptr, zero_ptr, row, unit, U, NG, ZERO)
            if ZERO:
                d -= tl.trans(zero_number(zero, BITS) + OFFSET) * total[None, :]
            elif OFFSET:
                d -= OFFSET * total[None, :]
            out = tl.sum(d * tl.trans(scale_number(scale)), 1)
        tl.store(out_ptr + tile * BN + rn, out.to(out_ptr.dtype.element_ty), mask=tile * BN + rn < N)
        row, scale_ptr, zero_ptr = after, scale_after, zero_after


@triton.jit
def gemv_int_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, out_ptr, N, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    SIGNED: tl.constexpr, ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BN: tl.constexpr, J: tl.constexpr,
    AHEAD: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """`_gemv_int` of one weight."""
    _gemv_int(
        x_ptr, x_ptr, out_ptr, q_ptr, scale_ptr, zero_ptr, N, q_ptr, scale_ptr, zero_ptr, 0, q_ptr, scale_ptr, zero_ptr, 0, K, G,
        BITS, SIGNED, ROW, ZERO, OFFSET, BN, J, AHEAD, ACT, 1, False,
    )  # fmt: skip


@triton.jit
def gemv_int_ordered_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, out_ptr, order_ptr, N, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    SIGNED: tl.constexpr, ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BN: tl.constexpr, J: tl.constexpr,
    AHEAD: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """`_gemv_int` of one weight whose columns are stored in another order."""
    _gemv_int(
        x_ptr, order_ptr, out_ptr, q_ptr, scale_ptr, zero_ptr, N, q_ptr, scale_ptr, zero_ptr, 0, q_ptr, scale_ptr, zero_ptr, 0,
        K, G, BITS, SIGNED, ROW, ZERO, OFFSET, BN, J, AHEAD, ACT, 1, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def gemv_int_joined_kernel(
    x_ptr, order_ptr, out_ptr, q0, scale0, zero0, n0, q1, scale1, zero1, n1, q2, scale2, zero2, n2, K: tl.constexpr,
    G: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    BN: tl.constexpr, J: tl.constexpr, AHEAD: tl.constexpr, ACT: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """`_gemv_int` of two or three weights; of two, n2 is 0."""
    _gemv_int(
        x_ptr, order_ptr, out_ptr, q0, scale0, zero0, n0, q1, scale1, zero1, n1, q2, scale2, zero2, n2, K, G, BITS, SIGNED, ROW,
        ZERO, OFFSET, BN, J, AHEAD, ACT, 3, ORDERED,
    )  # fmt: skip


@triton.jit
def _gemv_float(
    x_ptr, out_ptr, q0, scale0, n0, q1, scale1, n1, q2, scale2, n2, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACT: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """out[n] = scale[n] * sum of x * q[n], in float32, BN rows a program, for the rows of up to three weights. q: float8. ACT: x
    is first quantized as `Float8()` does."""
    N = n0 if WEIGHTS == 1 else n0 + n1 + n2
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row, q_ptr, scale_ptr, _ = _place(
        tl.program_id(0),
        tl.arange(0, BN),
        q0,
        scale0,
        scale0,
        n0,
        q1,
        scale1,
        scale1,
        n1,
        q2,
        scale2,
        scale2,
        n2,
        BN,
        WEIGHTS,
    )
    k = tl.arange(0, BK)
    acc = tl.zeros((BN, BK // 16), tl.float32)
    if ACT:
        tops = tl.zeros((BK,), tl.float32)
        for k0 in range(0, K, BK):
            tops = _larger(tops, tl.abs(tl.load(x_ptr + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)))
        act, inverse = _act_scale(tl.reduce(tops, 0, _larger), 448.0)
    for k0 in range(0, K, BK):
        if K % BK == 0:
            q = tl.load(q_ptr + row[:, None] * K + (k0 + k)[None, :], eviction_policy="evict_first").to(tl.float32)
            x = tl.load(x_ptr + k0 + k).to(tl.float32)
        else:
            there = k0 + k < K
            q = tl.load(
                q_ptr + row[:, None] * K + (k0 + k)[None, :], mask=there[None, :], eviction_policy="evict_first"
            )
            q = tl.where(there[None, :], q.to(tl.float32), 0.0)
            x = tl.load(x_ptr + k0 + k, mask=there, other=0.0).to(tl.float32)
        if ACT:
            x = rounded_e4m3(tl.clamp(x * inverse, -448.0, 448.0))
        acc += tl.sum(tl.reshape(q * x[None, :], (BN, BK // 16, 16)), 2)
    out = tl.sum(acc, 1) * tl.load(scale_ptr + row).to(tl.float32)
    if ACT:
        out *= act
    tl.store(out_ptr + rn, out.to(out_ptr.dtype.element_ty), mask=rn < N)


@triton.jit
def gemv_float_kernel(
    x_ptr, q_ptr, scale_ptr, out_ptr, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr
):  # fmt: skip
    """`_gemv_float` of one weight."""
    _gemv_float(x_ptr, out_ptr, q_ptr, scale_ptr, N, q_ptr, scale_ptr, 0, q_ptr, scale_ptr, 0, K, BN, BK, ACT, 1)


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def gemv_float_joined_kernel(
    x_ptr, out_ptr, q0, scale0, n0, q1, scale1, n1, q2, scale2, n2, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """`_gemv_float` of two or three weights; of two, n2 is 0."""
    _gemv_float(x_ptr, out_ptr, q0, scale0, n0, q1, scale1, n1, q2, scale2, n2, K, BN, BK, ACT, 3)


# A few tokens.


@triton.jit
def _column(t, u: tl.constexpr, U: tl.constexpr):
    """Column u of (BN, U)."""
    return tl.sum(tl.where(tl.arange(0, U)[None, :] == u, t, 0.0), 1)


@triton.jit
def _dots(acc, x_ptr, mask, wl, wh, BITS: tl.constexpr):
    acc = tl.dot(tl.load(x_ptr, mask=mask, other=0).to(tl.bfloat16), wl, acc)
    if BITS == 4:
        acc = tl.dot(tl.load(x_ptr + 16, mask=mask, other=0).to(tl.bfloat16), wh, acc)
    return acc


@triton.jit
def _fused(
    x_ptr, row_ptr, q_ptr, scale_ptr, zero_ptr, out_ptr, block, M, N, TOTAL, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    E4M3: tl.constexpr, ACT: tl.constexpr, ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, U: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum of x[m] * decode(q)[n], the weights decoded in registers on their way to the tensor cores.

    A program has MB (1 or 2) blocks of BM tokens, BN rows of the weight, and 1 / SPLIT of K, for which it writes a sum of
    its own. A step covers U groups, whose scales and zero points are loaded one step ahead. (q - zero) is exact in bfloat16;
    a scale per group multiplies it there, a scale per row multiplies the float32 sum. ACT: x is int8 times row[m].
    TOTAL: rows of the output, of all weights. EARLY: lets the kernel that sums begin, on Hopper.
    """
    NG: tl.constexpr = K // G
    B: tl.constexpr = G * BITS // 8  # bytes of a group
    T: tl.constexpr = NG // U
    TS: tl.constexpr = (T + SPLIT - 1) // SPLIT
    SG: tl.constexpr = 1 if ROW else NG
    BASE: tl.constexpr = OFFSET + (128.0 if BITS == 4 else 0.0)
    rn = block * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    rm = tl.program_id(1) * (BM * MB) + tl.arange(0, BM)
    t0 = tl.program_id(2) * TS
    t1 = tl.minimum(t0 + TS, T)
    byte = tl.arange(0, B)
    k = (byte // 16 * 32 + byte % 16) if BITS == 4 else byte
    mask0 = (rm < M)[:, None]
    mask1 = (rm + BM < M)[:, None]
    acc0 = tl.zeros((BM, BN), tl.float32)
    acc1 = acc0
    x = x_ptr + rm[:, None] * K + k[None, :]
    weights = q_ptr + row[None, :] * (NG * B) + byte[:, None]
    u0 = tl.arange(0, U)
    scales = scale_ptr + row[:, None] * SG + u0[None, :]
    zeros = zero_ptr + row[:, None] * SG + u0[None, :]
    if ROW:
        if ZERO:
            zero = (tl.load(zero_ptr + row).to(tl.float32) + BASE).to(tl.bfloat16)[None, :]
    else:
        s_next = tl.load(scales + t0 * U).to(tl.float32)
        if ZERO:
            z_next = tl.load(zeros + t0 * U).to(tl.float32)
    for t in tl.range(t0, t1, num_stages=STAGES):
        if not ROW:
            s_now = s_next
            ahead = tl.minimum(t + 1, t1 - 1) * U
            s_next = tl.load(scales + ahead).to(tl.float32)
            if ZERO:
                z_now = z_next
                z_next = tl.load(zeros + ahead).to(tl.float32)
        for u in tl.static_range(U):
            q = tl.load(weights + (t * U + u) * B)
            if BITS == 4:
                wl = _low_bf16(q)
                wh = _high_bf16(q)
            elif E4M3:
                wl = _e4m3_bf16(q)
                wh = wl
            else:
                wl = q.to(tl.bfloat16)
                wh = wl
            if ZERO:
                if not ROW:
                    zero = (_column(z_now, u, U) + BASE).to(tl.bfloat16)[None, :]
                wl -= zero
                wh -= zero
            elif BASE != 0:
                wl -= tl.full((1, 1), BASE, tl.bfloat16)
                wh -= tl.full((1, 1), BASE, tl.bfloat16)
            if not ROW:
                scale = _column(s_now, u, U).to(tl.bfloat16)[None, :]
                wl *= scale
                wh *= scale
            xt = x + (t * U + u) * G
            acc0 = _dots(acc0, xt, mask0, wl, wh, BITS)
            if MB == 2:
                acc1 = _dots(acc1, xt + BM * K, mask1, wl, wh, BITS)
    if EARLY:
        gdc_launch_dependents()
    if ACT:  # before the scales of the weight, as in `int_mm`
        acc0 *= tl.load(row_ptr + rm, mask=rm < M, other=0.0)[:, None]
        acc1 *= tl.load(row_ptr + rm + BM, mask=rm + BM < M, other=0.0)[:, None]
    if ROW:
        scale = tl.load(scale_ptr + row).to(tl.float32)[None, :]
        acc0 *= scale
        acc1 *= scale
    out = out_ptr + tl.program_id(2) * M * TOTAL + rm[:, None] * N + rn[None, :]
    tl.store(out, acc0.to(out_ptr.dtype.element_ty), mask=mask0 & (rn < N)[None, :])
    if MB == 2:
        tl.store(out + BM * N, acc1.to(out_ptr.dtype.element_ty), mask=mask1 & (rn < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def fused_kernel(
    x_ptr, row_ptr, q_ptr, scale_ptr, zero_ptr, out_ptr, M, N, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    E4M3: tl.constexpr, ACT: tl.constexpr, ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, U: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """`_fused` of one weight."""
    _fused(
        x_ptr, row_ptr, q_ptr, scale_ptr, zero_ptr, out_ptr, tl.program_id(0), M, N, N, K, G, BITS, E4M3, ACT, ROW, ZERO,
        OFFSET, BM, MB, BN, U, SPLIT, STAGES, EARLY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def fused_ordered_kernel(
    x_ptr, order_ptr, own_ptr, q_ptr, scale_ptr, zero_ptr, out_ptr, M, N, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    E4M3: tl.constexpr, ACT: tl.constexpr, ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, U: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """`fused_kernel` of x[:, order], bfloat16, for as many tokens as one program has. Each puts them in order for itself, as
    `gather_kernel` does, in memory of its own, (M, K) at own_ptr. WIDTH: a power of two, K or more."""
    own_ptr += tl.program_id(0) * (M * K)
    k = tl.arange(0, WIDTH)
    there = k < K
    order = tl.load(order_ptr + k, mask=there, other=0).to(tl.int32)
    for m in tl.range(0, M, 2):
        second = there & (m + 1 < M)
        row = tl.load(x_ptr + m * K + k, mask=there, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        below = tl.load(x_ptr + (m + 1) * K + k, mask=second, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
        both = tl.gather((row & 0xFFFF) | (below << 16), order, 0)
        tl.store(own_ptr + m * K + k, both.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=there)
        tl.store(own_ptr + (m + 1) * K + k, (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=second)
    tl.debug_barrier()  # what other threads of the program have stored is read next
    fused_kernel(
        own_ptr, scale_ptr, q_ptr, scale_ptr, zero_ptr, out_ptr, M, N, K, G, BITS, E4M3, ACT, ROW, ZERO, OFFSET, BM, MB, BN, U,
        SPLIT, STAGES, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "n0", "n1", "n2", "p0", "p1"])
def fused_joined_kernel(
    x_ptr, row_ptr, out_ptr, q0, scale0, zero0, n0, q1, scale1, zero1, n1, q2, scale2, zero2, n2, M, p0, p1,
    K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    E4M3: tl.constexpr, ACT: tl.constexpr, ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, U: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """`_fused` of two or three weights one below the other, of n rows; the first two have p programs. Of two, n2 is 0."""
    i = tl.program_id(0)
    first, second = p0, p0 + p1
    _fused(
        x_ptr, row_ptr, of_three(i, first, second, q0, q1, q2), of_three(i, first, second, scale0, scale1, scale2),
        of_three(i, first, second, zero0, zero1, zero2), out_ptr + M * of_three(i, first, second, 0, n0, n0 + n1),
        i - of_three(i, first, second, 0, first, second), M, of_three(i, first, second, n0, n1, n2), n0 + n1 + n2,
        K, G, BITS, E4M3, ACT, ROW, ZERO, OFFSET, BM, MB, BN, U, SPLIT,
        STAGES, EARLY,
    )  # fmt: skip


@triton.jit
def sum_kernel(parts_ptr, out_ptr, size, SPLIT: tl.constexpr, B: tl.constexpr, EARLY: tl.constexpr):
    """out = sum of the SPLIT float32 parts, in order. EARLY: launched before the parts are there, so wait for them."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    if EARLY:
        gdc_wait()
    acc = tl.zeros((B,), tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts_ptr + part * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def scale_kernel(total_ptr, row_ptr, column_ptr, bias_ptr, out_ptr, N, BIAS: tl.constexpr, B: tl.constexpr):
    """out[m, n] = total[m, n] * row[m] * column[n] + bias[n]."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * B + tl.arange(0, B)
    there = n < N
    total = tl.load(total_ptr + row * N + n, mask=there, other=0).to(tl.float32)
    total = total * tl.load(row_ptr + row) * tl.load(column_ptr + n, mask=there, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, total.to(out_ptr.dtype.element_ty), mask=there)


# Launches.


def _gemv_kernel(
    n: int, k: int, width: int, qdata: torch.dtype, groups: int, zero: bool, offset: int, act: bool, device: torch.device,
    tokens: int = 1, ordered: bool = False,
) -> tuple[Any, tuple[int], dict[str, Any]]:  # fmt: skip
    """The kernel for one token and a weight (n, k) whose rows are `width` bytes, its grid and its constants; where several
    `tokens` run side by side, each on its part of the GPU, the grid of one.

    ordered: every program reads the order too, so that fewer programs of more rows are faster."""
    if qdata.is_floating_point:
        return gemv_float_kernel, (cdiv(n, 8),), {"K": k, "BN": 8, "BK": 1024, "ACT": act, "num_warps": 4}
    bits = 8 * width // k
    by_row = groups == 1
    # At least 8, of 16 numbers each, 4 for every thread of a warp: Triton 3.6 computes with a smaller tile wrongly.
    units = max(8, power_of_two(k * bits // 128))
    if ordered and bits == 4 and not 128 < units <= 256:
        rows, warps, places = (8, max(1, units // 32), 4) if units <= 128 else (8, 16, 1)
    elif units <= 128:
        rows, warps, places = 4, max(1, units // (64 if bits == 4 else 32)), 6
    elif units <= 256:
        rows, warps, places = 4, 8, 3 if bits == 4 else 4
    else:
        rows, warps, places = (2, 16, 2) if bits == 8 else (4 if units <= 512 else 2, 16, 1)
    tiles = cdiv(n, rows)
    rounds = cdiv(tiles, max(1, multiprocessors(device) * places // tokens))
    constants = {
        "K": k, "G": 128 if by_row else k // groups, "BITS": bits, "SIGNED": qdata == torch.int8, "ROW": by_row, "ZERO": zero,
        "OFFSET": offset, "BN": rows, "J": units, "AHEAD": bits == 4 and units > 128 and not by_row, "ACT": act,
        "num_warps": warps,
    }  # fmt: skip
    return gemv_int_kernel, (cdiv(tiles, rounds),), constants


def gemv(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int, act: bool, order: Tensor | None = None
) -> Tensor:  # fmt: skip
    """One token. x: (1, K), qdata: (N, K) one-byte or (N, K / 2) 4-bit, scale: (N, K / group) or (N, 1), zero_point alike
    -> (1, N).

    offset: what to add to zero_point. act: whether x is first quantized to 8 bits, as `Intx(8)` or `Float8()` do.
    order: (K,) integers, for weights that are integers: x[:, order] is multiplied.
    """
    of = None if order is None else order.dtype
    run = gemv_launch(x.dtype, qdata.shape[0], x.shape[1], qdata, scale, zero_point, offset, act, of)
    return run(x, qdata, scale, zero_point, *(() if order is None else (order,)))


def gemv_joined(
    x: Tensor, qdata: Sequence[Tensor], scale: Sequence[Tensor], zero_point: Sequence[Tensor], offset: int, act: bool,
    order: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`gemv` of two or three weights of one format, one K and one order in one launch: (1, N) for the sum of their rows, of which
    each has a multiple of 8. zero_point: of each, or none."""
    k, first = x.shape[1], qdata[0]
    rows = [q.shape[0] for q in qdata]
    dtypes = x.dtype, first.dtype, scale[0].dtype, zero_point[0].dtype if zero_point else None
    start = _gemv_joined_launch(
        dtypes,
        sum(rows),
        k,
        first.shape[1],
        scale[0].shape[1],
        offset,
        act,
        first.device,
        None if order is None else order.dtype,
    )
    out = torch.empty(1, sum(rows), dtype=x.dtype, device=x.device)
    places = [0, 1, min(2, len(rows) - 1)]
    rows = [*rows, 0][:3]
    if first.dtype.is_floating_point:
        start(first.device.index, x, out, *itertools.chain(*((qdata[i], scale[i], n) for i, n in zip(places, rows))))
    else:
        each = ((qdata[i], scale[i], (zero_point or scale)[i], n) for i, n in zip(places, rows))
        start(first.device.index, x, x if order is None else order, out, *itertools.chain(*each))
    return out


@functools.cache
def _gemv_joined_launch(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None], n: int, k: int, width: int, groups: int,
    offset: int, act: bool, device: torch.device, order: torch.dtype | None,
) -> Launch:  # fmt: skip
    kernel, grid, constants = _gemv_kernel(
        n, k, width, dtypes[1], groups, dtypes[3] is not None, offset, act, device, ordered=order is not None
    )
    if kernel is gemv_float_kernel:
        return Launch(gemv_float_joined_kernel, grid, **constants)
    views = dict.fromkeys((3, 7, 11), torch.int32)
    return Launch(gemv_int_joined_kernel, grid, views=views, **constants, ORDERED=order is not None)


Product = Callable[..., Tensor]
"""Of x (..., K) and the qdata, scale and zero_point of weights of one form -> (..., N)."""


def gemv_launch(
    dtype: torch.dtype, n: int, k: int, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int, act: bool,
    order: torch.dtype | None = None,
) -> Product:  # fmt: skip
    """`gemv` for x of `dtype` and weights of the form of these: what it decides is decided once.

    order: the dtype of an order, (K,), one more argument of the function, for weights that are integers: of x[..., order].
    """
    dtypes = dtype, qdata.dtype, scale.dtype, None if zero_point is None else zero_point.dtype
    return _gemv_launch(dtypes, n, k, qdata.shape[1], scale.shape[1], offset, act, qdata.device, order)


@functools.cache
def _gemv_launch(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype | None], n: int, k: int, width: int, groups: int,
    offset: int, act: bool, device: torch.device, order: torch.dtype | None,
) -> Product:  # fmt: skip
    """dtypes: of x, codes, scales and zero points. A `Launch` is for one of each."""
    index = device.index
    zero = dtypes[3] is not None
    ordered = order is not None
    kernel, grid, constants = _gemv_kernel(n, k, width, dtypes[1], groups, zero, offset, act, device, ordered=ordered)
    if dtypes[1].is_floating_point:
        start = Launch(kernel, grid, **constants)

        def run_float(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
            out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
            start(index, x, qdata, scale, out, n)
            return out

        return run_float

    start = Launch(gemv_int_ordered_kernel if ordered else kernel, grid, views={1: torch.int32}, **constants)

    def run(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, *order: Tensor) -> Tensor:
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
        start(index, x, qdata, scale, scale if zero_point is None else zero_point, out, *order, n)
        return out

    return run


def _fused_kernel(
    m: int, n: int, k: int, bits: int, groups: int, parts: int = 8
) -> tuple[tuple[int, int, int], dict[str, Any]]:  # fmt: skip
    """The grid for m tokens and a weight (n, k), and the constants that follow from the shapes. parts: of K, at most."""
    by_row = groups == 1
    group = 128 if by_row else k // groups
    steps = k // group
    unroll = 1
    while not by_row and unroll * 2 * group <= 256 and steps % (unroll * 2) == 0:
        unroll *= 2
    tokens, blocks = (16, 1) if m <= 16 else (32, 1) if m <= 32 else (32, 2)
    height = 128 if m > 32 or n >= 16384 or (bits == 4 and m > 16) else 64
    tiles = cdiv(n, height) * cdiv(m, tokens * blocks)
    split = max(1, min(parts, round(256 / tiles), steps // unroll // 4))
    constants = {
        "K": k, "G": group, "BITS": bits, "ROW": by_row, "BM": tokens, "MB": blocks, "BN": height, "U": unroll,
        "SPLIT": split, "STAGES": 4 if by_row and m <= 16 else 3,
    }  # fmt: skip
    return (cdiv(n, height), cdiv(m, tokens * blocks), split), constants


def fused(
    x: Tensor, rows: Tensor | None, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """x @ decode(qdata).T as `dtype`. x: (M, K) bfloat16, or int8 times rows (M, 1); the rest as in `gemv`."""
    (out,) = fused_joined(x, rows, [(qdata, scale, zero_point)], offset, dtype)
    return out


def fused_joined(
    x: Tensor, rows: Tensor | None, weights: Sequence[tuple[Tensor, Tensor, Tensor | None]], offset: int, dtype: torch.dtype
) -> list[Tensor]:  # fmt: skip
    """`fused` of one, two or three weights in one launch: of the qdata, scale and zero point of each."""
    (m, k), (q, scale, zero_point) = x.shape, weights[0]
    sizes, joined = [each[0].shape[0] for each in weights], len(weights) > 1
    (_, tiles, split), constants = _fused_kernel(m, sum(sizes), k, 8 * q.shape[1] // k, scale.shape[1])
    blocks = counted(sizes, constants["BN"])
    size, early = m * sum(sizes), split > 1 and is_hopper(x.device)
    out = torch.empty(size, dtype=dtype, device=x.device)
    parts = out if split == 1 else torch.empty(split, size, dtype=torch.float32, device=x.device)
    e4m3 = q.dtype == torch.float8_e4m3fn
    each = [(q.view(torch.uint8) if e4m3 else q, s, s if z is None else z, n) for (q, s, z), n in zip(weights, sizes)]
    if joined:
        each = [*each, (*each[1][:3], 0)][:3]
        args = [parts, *itertools.chain(*each), m, *blocks[:2]]
    else:
        args = [*each[0][:3], parts, m, *sizes]
    launch(
        fused_joined_kernel if joined else fused_kernel, (sum(blocks), tiles, split), x, scale if rows is None else rows, *args,
        **_in_order(constants, E4M3=e4m3, ACT=rows is not None, ZERO=zero_point is not None, OFFSET=offset, EARLY=early),
    )  # fmt: skip
    if split > 1:
        launch(sum_kernel, (cdiv(size, 1024),), parts, out, size, early=early, SPLIT=split, B=1024, EARLY=early)
    return cut(out, m, sizes)


def _in_order(constants: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The constants of `fused_kernel` as its parameters follow each other."""
    constants = constants | more
    return {name: constants[name] for name in fused_kernel.arg_names if name in constants}


def fused_launch(
    m: int, n: int, k: int, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int
) -> Product:  # fmt: skip
    """`fused` in one launch, K not cut in parts, for weights of the form of these, decided once: for m tokens, or, of more than
    16, as many as make the same power of two."""
    device, index = qdata.device, qdata.device.index
    grid, constants = _fused_kernel(m, n, k, 8 * qdata.shape[1] // k, scale.shape[1], parts=1)
    e4m3 = qdata.dtype == torch.float8_e4m3fn
    start = Launch(
        fused_kernel, grid, views={2: torch.uint8} if e4m3 else {},
        **_in_order(constants, E4M3=e4m3, ACT=False, ZERO=zero_point is not None, OFFSET=offset, EARLY=False),
    )  # fmt: skip

    def run(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
        start(index, x, scale, qdata, scale, scale if zero_point is None else zero_point, out, x.numel() // k, n)
        return out

    return run


def fused_ordered_launch(
    m: int, n: int, k: int, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int
) -> Product | None:  # fmt: skip
    """`fused_launch` of x[..., order] for m tokens, the order, (K,) integers, being one more argument; None where a second launch
    takes less than what every program has to do first."""
    device, index = qdata.device, qdata.device.index
    grid, constants = _fused_kernel(m, n, k, 8 * qdata.shape[1] // k, scale.shape[1], parts=1)
    size = grid[0] * m * k
    if m > 16 or k > 4096 or size > 2**23:
        return None
    e4m3 = qdata.dtype == torch.float8_e4m3fn
    constants = _in_order(constants, E4M3=e4m3, ACT=False, ZERO=zero_point is not None, OFFSET=offset)
    width = max(256, power_of_two(k))
    start = Launch(fused_ordered_kernel, grid, views={3: torch.uint8} if e4m3 else {}, **constants, WIDTH=width)

    def run(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, order: Tensor) -> Tensor:
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
        own = _own_memory(size, device, torch._C._cuda_getCurrentRawStream(index))
        start(index, x, order, own, qdata, scale, scale if zero_point is None else zero_point, out, x.numel() // k, n)
        return out

    return run


_OWN: dict[tuple[torch.device, int], Tensor] = {}
"""By stream, whose kernels run one after the other: what the programs of one of them write for themselves, up to 16 MB."""


def _own_memory(size: int, device: torch.device, stream: int) -> Tensor:
    own = _OWN.get((device, stream))
    if own is None or own.numel() < size:
        own = _OWN[device, stream] = torch.empty(size, dtype=torch.bfloat16, device=device)
    return own


# Many tokens: the weight goes to memory as plain numbers.


@triton.jit
def decode_kernel(
    q_ptr, scale_ptr, zero_ptr, out_ptr, N, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, ROW: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """out[n, k] = (q[n, k] - zero) * scale in float32, of BN rows and BB bytes of each."""
    KB: tl.constexpr = K * BITS // 8
    row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    byte = tl.program_id(1) * BB + tl.arange(0, BB)
    there = (row < N)[:, None] & (byte < KB)[None, :]
    q = tl.load(q_ptr + row[:, None] * KB + byte[None, :], mask=there)
    k = byte // 16 * 32 + byte % 16 if BITS == 4 else byte
    if ROW:
        at = row[:, None] + byte[None, :] * 0
    else:
        at = row[:, None] * (K // G) + (k // G)[None, :]
    scale = tl.load(scale_ptr + at, mask=there, other=0.0).to(tl.float32)
    if ZERO:
        zero = tl.load(zero_ptr + at, mask=there, other=0).to(tl.float32) + OFFSET
    else:
        zero = tl.full((1, 1), OFFSET, tl.float32)
    out = out_ptr + row[:, None] * K + k[None, :]
    if BITS == 4:
        tl.store(out, (((q & 15).to(tl.float32) - zero) * scale).to(out_ptr.dtype.element_ty), mask=there)
        tl.store(out + 16, (((q >> 4).to(tl.float32) - zero) * scale).to(out_ptr.dtype.element_ty), mask=there)
    else:
        tl.store(out, ((q.to(tl.float32) - zero) * scale).to(out_ptr.dtype.element_ty), mask=there)


def decoded(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int, k: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """The weight (N, K) as `dtype`: qdata (N, K) one-byte or (N, K / 2) 4-bit, scale (N, groups), zero_point alike."""
    n = qdata.shape[0]
    out = torch.empty(n, k, dtype=dtype, device=qdata.device)
    if out.numel():
        grid, constants = _decode_kernel(qdata, scale, zero_point, offset, k)
        launch(decode_kernel, grid, qdata, scale, scale if zero_point is None else zero_point, out, n, **constants)
    return out


def _decode_kernel(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int, k: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid and the constants of `decode_kernel`."""
    n, width, groups = qdata.shape[0], qdata.shape[1], scale.shape[1]
    wide = 1024 if width >= 1024 else max(32, power_of_two(width))
    height = 4096 // wide
    constants = {
        "K": k, "G": k // groups, "BITS": 8 * width // k, "ROW": groups == 1, "ZERO": zero_point is not None,
        "OFFSET": offset, "BN": height, "BB": wide, "num_warps": 8,
    }  # fmt: skip
    return (cdiv(n, height), cdiv(width, wide)), constants


def decode_launch(
    dtype: torch.dtype, n: int, k: int, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int
) -> Product:
    """x @ decoded(w).T + bias for weights of the form of these and x of `dtype`, the kernel being decided once."""
    device, index = qdata.device, qdata.device.index
    grid, constants = _decode_kernel(qdata, scale, zero_point, offset, k)
    start = Launch(decode_kernel, grid, **constants)

    def run(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None = None) -> Tensor:
        w = torch.empty(n, k, dtype=dtype, device=device)
        start(index, qdata, scale, scale if zero_point is None else zero_point, w, n)
        return F.linear(x, w, None if bias is None else bias.to(dtype))

    return run


def scaled(
    total: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype, tokens: int, bias: Tensor | None = None
) -> Tensor:
    """The first `tokens` rows of total (M, N), times rows (M, 1) and columns (N, 1), plus bias (N,), as `dtype`."""
    n = total.shape[1]
    out = torch.empty(tokens, n, dtype=dtype, device=total.device)
    launch(
        scale_kernel, (tokens, cdiv(n, 1024)), total, rows, columns, columns if bias is None else bias, out, n,
        BIAS=bias is not None, B=1024,
    )  # fmt: skip
    return out
