"""The Triton kernel for one token and a weight in any format that has an operand, of up to 7 bits: see template.py."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import one_token_mma
from .ampere import _bytes, _fixed_point, _largest
from .device import multiprocessors
from .joint_words import zero_number
from .launch import Launch, cdiv, launch, power_of_two
from .reading import Fields, Reading
from .several import of_three
from .template import _AFFINE, _FIXED, _MINIFLOAT, _numbers, _outer, _scale_of, _scales, given


def _integers_asm(bits: int, signed: bool = False) -> str:
    """32 codes in `bits` words, times 16-bit numbers given as words of bytes: the sums over either half.

    Operands: 8 words of codes, of which the first `bits` count; 8 words of high bytes and 8 of low ones of what they meet. Word g
    of these meets codes 4 g to 4 g + 3, which are one byte each of one word per section (bits.py), at the same bits of all four.
    """
    lines = ["{ .reg .b32 c, t, a0, b0, a1, b1; mov.b32 a0, 0; mov.b32 b0, 0; mov.b32 a1, 0; mov.b32 b1, 0;"]
    for g in range(8):
        lines += [] if bits == 8 else _sections(bits, g, "c")
        lines.append(_dot4(f"${2 + g}" if bits == 8 else "c", g, 10, signed))
    lines.append("shl.b32 a0, a0, 8; add.s32 $0, a0, b0; shl.b32 a1, a1, 8; add.s32 $1, a1, b1; }")
    return " ".join(lines)


def _dot4(codes: str, g: int, first: int, signed: bool = True) -> str:
    """4 codes times what they meet, added to the sums of their half. first: the operand of the first word of high bytes."""
    half, sign = g // 4, "s" if signed else "u"
    return " ".join(
        f"dp4a.{sign}32.s32 {name}{half}, {codes}, ${first + place + g}, {name}{half};"
        for name, place in (("a", 0), ("b", 8))
    )


def _table_asm(halves: bool) -> str:
    """32 places of 4 bits in 4 words, in a table of 16 signed bytes, times 16-bit numbers: see above.

    Without `halves`, both nibbles of a byte follow each other, also in what they meet, and only the sum of both sums counts.

    Operands: 4 words of places, 8 and 8 words of bytes, 4 words with the table.
    """
    lines = ["{ .reg .b32 s, u, v, m, n, p, q, r, c, d; .reg .b32 a0, b0, a1, b1;"]
    lines.append("mov.b32 a0, 0; mov.b32 b0, 0; mov.b32 a1, 0; mov.b32 b1, 0;")
    for word in range(4):
        w = f"${2 + word}"
        # Places of the two nibbles of a byte follow each other; the highest bit of each says which half of the table it is.
        lines.append(f"and.b32 s, {w}, 0x77777777; shr.u32 u, s, 16; shl.b32 v, {w}, 4;")
        lines.append(f"prmt.b32 m, {w}, v, 0x9D8C; prmt.b32 n, {w}, v, 0xBFAE;")
        lines.append("prmt.b32 p, $22, $23, s; prmt.b32 q, $24, $25, s; lop3.b32 r, m, q, p, 0xCA;")
        lines.append("prmt.b32 p, $22, $23, u; prmt.b32 q, $24, $25, u; lop3.b32 q, n, q, p, 0xCA;")
        if halves:
            lines.append("prmt.b32 c, r, q, 0x6420; prmt.b32 d, r, q, 0x7531;")
        for codes, g in (("c", word), ("d", 4 + word)) if halves else (("r", 2 * word), ("q", 2 * word + 1)):
            lines.append(_dot4(codes, g, 6))
    lines.append("shl.b32 a0, a0, 8; add.s32 $0, a0, b0; shl.b32 a1, a1, 8; add.s32 $1, a1, b1; }")
    return " ".join(lines)


def _sections(bits: int, g: int, code: str) -> list[str]:
    """The codes 4 g to 4 g + 3 of a unit, one byte each, to `code`. The words are operands 2 and above."""
    lines, first = [], 0
    for section in (4, 2, 1):
        if not bits & section:
            continue
        word, shift = f"${2 + first + g % section}", g // section * section - first
        mask = f"0x{(2**section - 1 << first) * 0x01010101:08x}"
        move = f"shr.u32 t, {word}, {shift}; " if shift > 0 else f"shl.b32 t, {word}, {-shift}; " if shift else ""
        source = "t" if shift else word
        together = (
            f"lop3.b32 {code}, {source}, {mask}, {code}, 0xEA;" if first else f"and.b32 {code}, {source}, {mask};"
        )
        lines.append(move + together)
        first += section
    return lines


def _lookup_asm(bits: int) -> str:
    """32 codes in `bits` words, looked up in shared memory, times numbers: the sums over either half, float32.

    A table has an entry for each code, or for both codes of a byte where they have 4 bits, at every 128 bytes: a copy for each
    bank.

    Operands: 8 words of codes, of which the first `bits` count; 32 numbers, that of element 4 g + c is number 8 c + g; where the
    copy of this thread begins.
    """
    lines = ["{ .reg .b32 c, t, i; .reg .f32 u, v, a0, b0, a1, b1;"]
    lines.append("mov.f32 a0, 0f00000000; mov.f32 b0, 0f00000000; mov.f32 a1, 0f00000000; mov.f32 b1, 0f00000000;")
    for g in range(4 if bits == 4 else 8):
        code = f"${2 + g}" if bits in (4, 8) else "c"
        lines += [] if bits in (4, 8) else _sections(bits, g, "c")
        for c in range(4):
            lines.append(f"prmt.b32 i, {code}, 0, 0x444{c}; mad.lo.u32 i, i, 128, $42;")
            x, name = 10 + 8 * c + g, "ab"[c % 2]
            if bits == 4:
                lines.append(f"ld.shared.v2.f32 {{u, v}}, [i]; fma.rn.f32 {name}0, u, ${x}, {name}0;")
                lines.append(f"fma.rn.f32 {name}1, v, ${x + 4}, {name}1;")
            else:
                lines.append(f"ld.shared.f32 u, [i]; fma.rn.f32 {name}{g // 4}, u, ${x}, {name}{g // 4};")
    return " ".join([*lines, "add.f32 $0, a0, b0; add.f32 $1, a1, b1; }"])


def _fill_asm(pairs: bool) -> str:
    """An entry of a table to all its copies, each time to another bank than the neighbours. Operands: where the table begins,
    which entry, and one number or both."""
    copies, size, what = (16, 8, "st.shared.v2.f32 [t], {$3, $4};") if pairs else (32, 4, "st.shared.f32 [t], $3;")
    lines = [f"{{ .reg .b32 a, b, t; mad.lo.u32 a, $2, 128, $1; mul.lo.u32 b, $2, {size}; mov.b32 $0, 0;"]
    for _ in range(copies):
        lines.append(f"and.b32 b, b, {128 - size}; add.u32 t, a, b; {what} add.u32 b, b, {size};")
    return " ".join([*lines, "}"])


_LOOKUP_ASM = tl.constexpr(tuple("" if bits < 4 else _lookup_asm(bits) for bits in range(9)))
_LOOKUP_OPERANDS = tl.constexpr("=f,=f" + ",r" * 8 + ",f" * 32 + ",r")
_FILL_ASM = tl.constexpr((_fill_asm(False), _fill_asm(True)))
_TABLE_BYTES = tl.constexpr(tuple(0 if bits < 4 else 256 * 128 if bits == 4 else 2**bits * 128 for bits in range(9)))
_COPY_ASM = tl.constexpr(
    tuple(
        f"{{ .reg .b32 l; mov.u32 l, %laneid; shl.b32 l, l, {shift}; and.b32 l, l, 127; add.u32 $0, $1, l; }}"
        for shift in (2, 3)
    )
)
_PLACE_ASM = tl.constexpr(
    tuple(
        f"{{ .reg .b64 a; .shared .align 128 .b8 ao_lookup[{size}]; mov.u64 a, ao_lookup; cvt.u32.u64 $0, a; }}"
        for size in _TABLE_BYTES.value
    )
)
_ASM = tl.constexpr((*("" if bits == 0 else _integers_asm(bits) for bits in range(9)), _integers_asm(8, signed=True)))
_ASM_OPERANDS = tl.constexpr("=r,=r" + ",r" * 24)
_TABLE_ASM = tl.constexpr((_table_asm(False), _table_asm(True)))
_TABLE_OPERANDS = tl.constexpr("=r,=r" + ",r" * 24)


@triton.jit
def _words(q_ptr, row, unit, U: tl.constexpr, BITS: tl.constexpr):
    """The words of 32 codes of a row, (J,) each; those beyond BITS are the first. They are read once."""
    at = q_ptr + row * (U * BITS)
    J: tl.constexpr = unit.shape[0]
    if BITS == 4:
        word = tl.arange(0, 4 * J)
        w = tl.load(at + word, mask=word < 4 * U, other=0, eviction_policy="evict_first")
        even, odd = tl.split(tl.reshape(w, (J, 2, 2)))  # the last dim
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        return w0, w1, w2, w3, w0, w0, w0, w0
    elif BITS == 8:
        at = at + (unit * 8)[:, None] + tl.arange(0, 4)[None, :]
        there = (unit < U)[:, None]
        w = tl.load(at, mask=there, other=0, eviction_policy="evict_first")
        even, odd = tl.split(tl.reshape(w, (J, 2, 2)))  # the last dim
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        w = tl.load(at + 4, mask=there, other=0, eviction_policy="evict_first")
        even, odd = tl.split(tl.reshape(w, (J, 2, 2)))
        w4, w6 = tl.split(even)
        w5, w7 = tl.split(odd)
        return w0, w1, w2, w3, w4, w5, w6, w7
    elif BITS == 2:
        word = tl.arange(0, 2 * J)
        w = tl.load(at + word, mask=word < 2 * U, other=0, eviction_policy="evict_first")
        w0, w1 = tl.split(tl.reshape(w, (J, 2)))
        return w0, w1, w0, w0, w0, w0, w0, w0
    else:
        at += unit * BITS
        there = unit < U
        w0 = tl.load(at, mask=there, other=0)
        w1 = tl.load(at + 1, mask=there, other=0) if BITS > 1 else w0
        w2 = tl.load(at + 2, mask=there, other=0) if BITS > 2 else w0
        w3 = tl.load(at + 3, mask=there, other=0) if BITS > 3 else w0
        w4 = tl.load(at + 4, mask=there, other=0) if BITS > 4 else w0
        w5 = tl.load(at + 5, mask=there, other=0) if BITS > 5 else w0
        w6 = tl.load(at + 6, mask=there, other=0) if BITS > 6 else w0
        return w0, w1, w2, w3, w4, w5, w6, w0


@triton.jit
def _in_turn(a, b):
    """The bytes of two words in turn, as two words."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; prmt.b32 t, $2, $3, 0x5140; prmt.b32 $1, $2, $3, 0x7362; mov.b32 $0, t; }", "=r,=r,r,r", [a, b],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _eight_words(words, MIXED: tl.constexpr):
    """(J, 8) words of x -> 8 of (J,). MIXED: as `_table_asm` looks codes up, both nibbles of a byte in turn."""
    w0, w1, w2, w3 = _word_of(words, 0), _word_of(words, 1), _word_of(words, 2), _word_of(words, 3)
    w4, w5, w6, w7 = _word_of(words, 4), _word_of(words, 5), _word_of(words, 6), _word_of(words, 7)
    if MIXED:
        a0, a1 = _in_turn(w0, w4)
        a2, a3 = _in_turn(w1, w5)
        a4, a5 = _in_turn(w2, w6)
        a6, a7 = _in_turn(w3, w7)
        return a0, a1, a2, a3, a4, a5, a6, a7
    else:
        return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _word_of(words, g: tl.constexpr):
    """Column g of (J, 8)."""
    return tl.sum(tl.where(tl.arange(0, 8)[None, :] == g, words, 0), 1)


@triton.jit
def _table_word(level, i: tl.constexpr):
    """Bytes 4 i to 4 i + 3 of 16 numbers, as a word."""
    at = tl.arange(0, 16)
    return tl.sum(tl.where(at // 4 == i, (level & 255) << (at % 4 * 8), 0), 0)


@triton.jit
def _eight(x):
    """(J, 8) -> 8 of (J,)."""
    J: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, (J, 2, 2, 2)))  # the last dim
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _filled(table_ptr, unit, KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr):
    """Puts what codes stand for in shared memory; where the copy of a thread begins."""
    place = tl.inline_asm_elementwise(_PLACE_ASM[BITS], "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    if BITS == 4:
        entry = tl.arange(0, 256)
        low = _numbers(entry & 15, table_ptr, KIND, BITS, EXPONENT, SIGNED)
        high = _numbers(entry >> 4, table_ptr, KIND, BITS, EXPONENT, SIGNED)
    else:
        entry = tl.arange(0, 2**BITS)
        low = _numbers(entry, table_ptr, KIND, BITS, EXPONENT, SIGNED)
        high = low
    tl.inline_asm_elementwise(
        _FILL_ASM[BITS == 4], "=r,r,r,f,f", [place, entry, low, high], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip
    tl.debug_barrier()
    # After the barrier, so that what depends on it is, too.
    return tl.inline_asm_elementwise(
        _COPY_ASM[BITS == 4], "=r,r", [unit * 0 + place], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def _unit_sums(
    w, high, low, table, KIND: tl.constexpr, BITS: tl.constexpr, HALVES: tl.constexpr, LOOKUP: tl.constexpr, SIGNED: tl.constexpr
):  # fmt: skip
    """The sums over both halves of units of 32 codes, float32: (J,) each. high: with LOOKUP the 32 numbers that they meet."""
    if LOOKUP:
        return tl.inline_asm_elementwise(
            _LOOKUP_ASM[BITS], _LOOKUP_OPERANDS,
            [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], high[0], high[1], high[2], high[3], high[4], high[5], high[6],
             high[7], high[8], high[9], high[10], high[11], high[12], high[13], high[14], high[15], high[16], high[17],
             high[18], high[19], high[20], high[21], high[22], high[23], high[24], high[25], high[26], high[27], high[28],
             high[29], high[30], high[31], table[0]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    elif KIND == _MINIFLOAT:
        i0, i1 = tl.inline_asm_elementwise(
            _TABLE_ASM[HALVES], _TABLE_OPERANDS,
            [w[0], w[1], w[2], w[3], high[0], high[1], high[2], high[3], high[4], high[5], high[6], high[7],
             low[0], low[1], low[2], low[3], low[4], low[5], low[6], low[7], table[0], table[1], table[2], table[3]],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return i0.to(tl.float32), i1.to(tl.float32)
    else:
        i0, i1 = tl.inline_asm_elementwise(
            _ASM[BITS + SIGNED], _ASM_OPERANDS,
            [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], high[0], high[1], high[2], high[3], high[4], high[5], high[6],
             high[7], low[0], low[1], low[2], low[3], low[4], low[5], low[6], low[7]],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return i0.to(tl.float32), i1.to(tl.float32)


@triton.jit
def _ahead(
    q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, unit, N, K: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr,
):  # fmt: skip
    """What is loaded of a row before it is needed: the words, and scales and zero points of both halves, as they are stored, each
    with what the scale itself is scaled by."""
    U: tl.constexpr = K // 32
    row = tl.minimum(row, N - 1)
    words = _words(q_ptr, row, unit, U, BITS)
    if NG == 1:
        return words, 0, 0, 0, 0, (0,), (0,)
    else:
        at = row // RG * NG
        there = unit < U
        first, second = at + _group_of(unit, 0, K, NG), at + _group_of(unit, 1, K, NG)
        scale0 = tl.load(scale_ptr + first, mask=there, other=0)
        zero0 = tl.load(zero_ptr + first, mask=there, other=0) if ZERO else scale0
        outer0 = _outer(scale2_ptr, zero2_ptr, row, _group_of(unit, 0, K, NG), NG, NESTED, RG2, NG2)
        scale1, zero1, outer1 = scale0, zero0, outer0
        if K // NG % 32 != 0:
            scale1 = tl.load(scale_ptr + second, mask=there, other=0)
            zero1 = tl.load(zero_ptr + second, mask=there, other=0) if ZERO else scale1
            outer1 = _outer(scale2_ptr, zero2_ptr, row, _group_of(unit, 1, K, NG), NG, NESTED, RG2, NG2)
        return words, scale0, zero0, scale1, zero1, outer0, outer1


@triton.jit
def _group_of(unit, half: tl.constexpr, K: tl.constexpr, NG: tl.constexpr):
    """The group of a half of units of 32, within bounds."""
    return tl.minimum((unit * 2 + half) // (K // NG // 16), NG - 1)


@triton.jit
def _row(
    ahead, row, unit, high, low, table, step, total0, total1, N, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, K: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr,
    NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, LOOKUP: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """What each unit adds to the product with a row: (J,)."""
    HALVES: tl.constexpr = NG > 1 and K // NG % 32 != 0
    row = tl.minimum(row, N - 1)
    d0, d1 = _unit_sums(ahead[0], high, low, table, KIND, BITS, HALVES, LOOKUP, SIGNED)
    if NG == 1:
        d = (d0 + d1) * step
        zero = zero_number(tl.load(zero_ptr + row // RG), BITS) + OFFSET if ZERO else OFFSET
        if ZERO or OFFSET != 0:
            d -= zero * (total0 + total1)
        return d * _scales(scale_ptr, scale2_ptr, zero2_ptr, row, 0, True, RG, NG, NESTED, RG2, NG2)
    elif HALVES:
        d0 = d0 * step - _taken_off(ahead[2], total0, BITS, ZERO, OFFSET)
        d1 = d1 * step - _taken_off(ahead[4], total1, BITS, ZERO, OFFSET)
        d = d0 * _scale_of(ahead[1], ahead[5], NESTED)
        return d + d1 * _scale_of(ahead[3], ahead[6], NESTED)
    else:
        d = (d0 + d1) * step - _taken_off(ahead[2], total0 + total1, BITS, ZERO, OFFSET)
        return d * _scale_of(ahead[1], ahead[5], NESTED)


@triton.jit
def _taken_off(zero, total, BITS: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr):
    """Zero points times the sums of x."""
    return (zero_number(zero, BITS) + OFFSET) * total if ZERO else OFFSET * total


@triton.jit
def _gemv_codes(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, first, programs, K: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr,
    J: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over groups of (sum over the group of x * number[n] - zero[n] * sum of x) * scale[n], by program `first` of
    `programs`.

    As `gemv_int_kernel` of ampere.py, for units of 32 codes that are BITS words. x is 16-bit fixed point with a step of
    max|x| / 32512 of the unit, in two bytes, which stay in registers; codes become bytes, four at a time, and the sum over half
    of a unit is exact. Floats of 4 bits become multiples of the smallest, which are bytes. What has no such bytes, entries of a
    table and other floats, is looked up in shared memory as float32.
    A tile is four rows, each of which is a vector over the units: so Triton gives a thread the same units of all.
    """
    U: tl.constexpr = K // 32
    MIXED: tl.constexpr = KIND != _AFFINE and KIND != _FIXED and not (NG > 1 and K // NG % 32 != 0)
    unit = tl.arange(0, J)
    after = first * 4
    ahead0 = _ahead(
        q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, after, unit, N, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2,
    )  # fmt: skip
    ahead1 = _ahead(
        q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, after + 1, unit, N, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2,
    )  # fmt: skip
    ahead2 = _ahead(
        q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, after + 2, unit, N, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2,
    )  # fmt: skip
    ahead3 = _ahead(
        q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, after + 3, unit, N, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2,
    )  # fmt: skip

    at = (unit * 32)[:, None, None] + (tl.arange(0, 8) * 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    x = tl.load(x_ptr + at, mask=(unit < U)[:, None, None], other=0.0).to(tl.float32)
    table = (0,)
    if LOOKUP:
        step = 1.0
        total0, total1 = tl.split(tl.sum(tl.reshape(x, (J, 2, 16)), 2))
        even, odd = tl.split(tl.reshape(x, (J, 8, 2, 2)))  # the last dim
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        high = _eight(x0) + _eight(x1) + _eight(x2) + _eight(x3)
        low = (0,)
        table = (_filled(table_ptr, unit, KIND, BITS, EXPONENT, SIGNED),)
    else:
        top = _largest(tl.abs(x))
        i = _fixed_point(x, tl.where(top > 0, 32512.0 / top, 0.0))
        step = top * (1 / 32512)
        # Of each half, less 16 times 0x4B400080, modulo 2**32.
        total0, total1 = tl.split((tl.sum(tl.reshape(i, (J, 2, 16)), 2) + 0x4BFFF800).to(tl.float32) * step[:, None])
        high_bytes, low_bytes = _bytes(i)
        high = _eight_words(tl.reshape(high_bytes, (J, 8)), MIXED)
        low = _eight_words(tl.reshape(low_bytes, (J, 8)), MIXED)
        if KIND == _FIXED:
            step *= 2.0 ** (EXPONENT + 1 - BITS)
        elif KIND == _MINIFLOAT:
            # Multiples of the smallest: 1 / 2 for e2m1, 1 / 4 for e3m0.
            SMALLEST: tl.constexpr = 2.0 ** (2 - 2 ** (EXPONENT - 1) - (3 - EXPONENT))
            level = (_numbers(tl.arange(0, 16), table_ptr, KIND, 4, EXPONENT, False) * (1 / SMALLEST)).to(tl.int32)
            step *= SMALLEST
            table = (  # type: ignore[assignment]
                _table_word(level, 0), _table_word(level, 1), _table_word(level, 2), _table_word(level, 3),
            )  # fmt: skip

    for tile in tl.range(first, tl.cdiv(N, 4), programs):
        r = tile * 4
        w0, w1, w2, w3 = ahead0, ahead1, ahead2, ahead3
        after = r + programs * 4
        ahead0 = _ahead(
            q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, after, unit, N, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2,
        )  # fmt: skip
        ahead1 = _ahead(
            q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, after + 1, unit, N, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2,
        )  # fmt: skip
        ahead2 = _ahead(
            q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, after + 2, unit, N, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2,
        )  # fmt: skip
        ahead3 = _ahead(
            q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, after + 3, unit, N, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2,
        )  # fmt: skip
        d0 = _row(
            w0, r, unit, high, low, table, step, total0, total1, N, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, K, BITS,
            KIND, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, LOOKUP, SIGNED,
        )  # fmt: skip
        d1 = _row(
            w1, r + 1, unit, high, low, table, step, total0, total1, N, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, K, BITS,
            KIND, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, LOOKUP, SIGNED,
        )  # fmt: skip
        d2 = _row(
            w2, r + 2, unit, high, low, table, step, total0, total1, N, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, K, BITS,
            KIND, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, LOOKUP, SIGNED,
        )  # fmt: skip
        d3 = _row(
            w3, r + 3, unit, high, low, table, step, total0, total1, N, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, K, BITS,
            KIND, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, LOOKUP, SIGNED,
        )  # fmt: skip
        four = tl.join(tl.join(d0, d2), tl.join(d1, d3))  # (J, 2, 2): row 2 a + b at [a, b]
        out = tl.sum(four, 0)
        at_row = r + tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(out_ptr + at_row, out.to(out_ptr.dtype.element_ty), mask=at_row < N)


@triton.jit
def gemv_codes_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, J: tl.constexpr,
    LOOKUP: tl.constexpr,
):  # fmt: skip
    """`_gemv_codes` of one weight, for each token."""
    token = tl.program_id(1)
    _gemv_codes(
        x_ptr + token * K, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr + token * N, N,
        tl.program_id(0), tl.num_programs(0), K, BITS, KIND, EXPONENT, SIGNED, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, J, LOOKUP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n0", "n1", "n2", "p0", "p1", "p2"])
def gemv_codes_joined_kernel(
    x_ptr, out_ptr, q0, scale0, zero0, table0, outer0, outer_zero0, n0, p0, q1, scale1, zero1, table1, outer1, outer_zero1,
    n1, p1, q2, scale2, zero2, table2, outer2, outer_zero2, n2, p2, K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, RG: tl.constexpr,
    NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, J: tl.constexpr,
    LOOKUP: tl.constexpr,
):  # fmt: skip
    """`_gemv_codes` of two or three weights one below the other, of n rows and with p programs each; of two, p2 is 0."""
    i = tl.program_id(0)
    first, second = p0, p0 + p1
    _gemv_codes(
        x_ptr, of_three(i, first, second, q0, q1, q2), of_three(i, first, second, scale0, scale1, scale2),
        of_three(i, first, second, zero0, zero1, zero2), of_three(i, first, second, table0, table1, table2),
        of_three(i, first, second, outer0, outer1, outer2),
        of_three(i, first, second, outer_zero0, outer_zero1, outer_zero2),
        out_ptr + of_three(i, first, second, 0, n0, n0 + n1), of_three(i, first, second, n0, n1, n2),
        i - of_three(i, first, second, 0, first, second), of_three(i, first, second, p0, p1, p2), K, BITS, KIND, EXPONENT,
        SIGNED, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, J, LOOKUP,
    )  # fmt: skip


def _gemv_constants(
    k: int, rows: Sequence[int], device: torch.device, warps_at_once: int = 20, tokens: int = 1, looks_up: bool = False
) -> tuple[list[int], dict[str, Any]]:
    """The programs of each weight (rows, k) of a launch and the tile of `_gemv_codes`, for so many warps on a multiprocessor at a
    time; where several `tokens` run side by side, each on its part of the GPU, the programs of one. looks_up: each program has a
    table in shared memory, of which a multiprocessor has room for six."""
    units = max(32, power_of_two(k // 32))
    warps = min(16, max(1, units // 32))
    tiles = [cdiv(n, 4) for n in rows]
    each = min(max(1, warps_at_once // warps), 6 if looks_up else 32)
    at_once = max(1, multiprocessors(device) * each // tokens)
    rounds = cdiv(sum(tiles), at_once)
    while sum(cdiv(t, rounds) for t in tiles) > max(
        at_once, len(tiles)
    ):  # each weight has a last program that is done sooner
        rounds += 1
    return [cdiv(t, rounds) for t in tiles], {"J": units, "LOOKUP": looks_up, "num_warps": warps}


def gemv_launch(reading: Reading, fields: Fields) -> Callable[[Tensor, Fields], Tensor]:
    """One token, for weights of the form of these, x (..., K) -> (..., N): what it decides is decided once."""
    if one_token_mma.takes(reading):
        return one_token_mma.gemv_launch(reading, fields)
    device, n = fields[0].device, reading.n
    programs, tile = _gemv_constants(reading.k, [n], device, looks_up=reading.looks_up)
    start = Launch(gemv_codes_kernel, tuple(programs), **reading.constants(fields[2] is not None), **tile)

    def run(x: Tensor, fields: Fields) -> Tensor:
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
        start(device.index, x, *given(fields), out, n)
        return out

    return run


def gemv_each(x: Tensor, reading: Reading, fields: Fields, warps_at_once: int = 20) -> Tensor:
    """One token, or each of a few in one launch, for weights whose reading is `for_one_token`. x: (M, K) -> (M, N).

    warps_at_once: on a multiprocessor, for how many there are programs."""
    if one_token_mma.takes(reading):
        return one_token_mma.gemv(x, reading, fields)
    m, n = x.shape[0], reading.n
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    (programs,), tile = _gemv_constants(reading.k, [n], x.device, warps_at_once, looks_up=reading.looks_up)
    launch(
        gemv_codes_kernel, (programs, m), x, *given(fields), out, n, **reading.constants(fields[2] is not None), **tile
    )  # fmt: skip
    return out


def gemv_joined(x: Tensor, reading: Reading, weights: Sequence[Fields]) -> Tensor:
    """One token and two or three weights in one launch, whose readings are the same but for n: x (1, K) -> (1, N) for the sum of
    their rows."""
    rows = tuple(fields[0].shape[0] for fields in weights)
    by_mma = [one_token_mma.takes(reading._replace(n=n)) for n in rows]
    if all(by_mma):
        return one_token_mma.gemv_joined(x, reading, weights)
    if any(by_mma):  # some have too few rows
        return torch.cat([gemv_each(x, reading._replace(n=n), each) for n, each in zip(rows, weights)], 1)
    dtypes = x.dtype, *(None if t is None else t.dtype for t in weights[0])
    start, programs = _joined_launch(reading, rows, dtypes, x.device)
    out = torch.empty(1, sum(rows), dtype=x.dtype, device=x.device)
    parts = [(*given(fields), n, p) for fields, n, p in zip(weights, rows, programs)]
    if len(parts) == 2:
        parts.append((*given(weights[1]), 0, 0))
    start(x.device.index, x, out, *itertools.chain(*parts))
    return out


@functools.cache
def _joined_launch(
    reading: Reading, rows: tuple[int, ...], dtypes: tuple[torch.dtype | None, ...], device: torch.device
) -> tuple[Launch, list[int]]:
    """dtypes: of x and the fields. A `Launch` is for one of each."""
    programs, tile = _gemv_constants(reading.k, rows, device, looks_up=reading.looks_up)
    constants = reading.constants(dtypes[3] is not None) | tile
    return Launch(gemv_codes_joined_kernel, (sum(programs),), **constants), programs
