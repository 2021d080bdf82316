"""The Triton kernel for one token by the tensor cores, for codes of a byte or less of every kind: see template.py.

A product of 16 rows of codes with 8 columns of x is far more than one token needs, and so columns keep things apart: the k of a
product come from 4 chunks, one of each of the four lanes that share a row, and two columns hold x of one chunk alone, with zeros
at the k of the others. So each lane gets the sums of one chunk, and multiplies them with the scales of that. Which columns a
chunk has changes from step to step, so that each lane has x for one of four steps.

    bytes   integers and tables: codes are signed bytes, or two; x is 16-bit fixed point, the columns are its high and low bytes
    halves  small floats whose bits are those of a float16, moved: x is float16 times a power of two, the columns are halves of
            a chunk
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bf16_pairs import WORDS, bytes_of_codes
from .decode_attention import _numbers as _both_halves
from .decode_attention import _of_lane
from .device import multiprocessors
from .few_tokens import _four_words, _scale, _stored, _words
from .joint_words import zero_number
from .launch import cdiv, launch
from .reading import Fields, Reading
from .template import _AFFINE, _E4M3, _PLAIN, _SCALED, _TABLE, given
from .template import _numbers as _numbers_of

_OUTPUTS = 4
_X = _OUTPUTS + 16
_TABLE_AT = _X + 8
_OPERANDS = tl.constexpr(",".join(["=f"] * _OUTPUTS + ["r"] * (16 + 8 + 8 + 2)))
"""Of `step_asm`. Results: the sums of the first row over either half of a chunk, and of the second. Then 8 words of codes of each
row, of which the first `bits` count; 8 words of x; 4 words with the high or only bytes of a table and 4 with the low ones; and
two masks, by which x is kept for the first half of a chunk and, of halves, for the second."""

_EVEN, _ODD = f"${_TABLE_AT + 8}", f"${_TABLE_AT + 9}"


def _row_codes(bits: int, g: int, row: int, sign: bool = False) -> str:
    """`bytes_of_codes` of a row."""
    return re.sub(
        r"\$(\d+)", lambda found: f"${int(found[1]) - WORDS + _OUTPUTS + 8 * row}", bytes_of_codes(bits, g, 0, sign)
    )


def _byte_mma(sums: str, a: Sequence[str], x: int) -> str:
    """Four words of codes, of which the first two meet word x of x and the others the next."""
    c = ", ".join(f"{sums}{n}" for n in range(4))
    return f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{{c}}}, {{{', '.join(a)}}}, {{x{x}, x{x + 1}}}, {{{c}}};"


def _integers(bits: int, flip: bool, halves: bool) -> list[str]:
    """Codes 8 i to 8 i + 7 of both rows meet words 2 i and 2 i + 1 of x. flip: whether bytes are made signed."""
    lines = []
    for i in range(4):
        for part in range(2):
            for row in range(2):
                name = f"a{2 * part + row}"
                if bits == 8:
                    source = f"${_OUTPUTS + 8 * row + 2 * i + part}"
                    lines.append(f"xor.b32 {name}, {source}, 0x80808080;" if flip else f"mov.b32 {name}, {source};")
                else:
                    lines.append(f"{_row_codes(bits, 2 * i + part, row)} mov.b32 {name}, c;")
        lines.append(_byte_mma("d" if halves and i >= 2 else "c", ("a0", "a1", "a2", "a3"), 2 * i))
    return lines


def _places(bytes_each: int, halves: bool) -> list[str]:
    """Words of 8 places of 4 bits are looked up at once.

    Without `halves` both nibbles of a byte follow each other, also in x; else two words give what either half has of them.
    """
    lines = []
    for word in range(4):
        for row in range(2):
            w = f"${_OUTPUTS + 8 * row + word}"
            # Places of the two nibbles of a byte follow each other; the highest bit of each says which half of the table it is.
            lines.append(f"and.b32 s, {w}, 0x77777777; shr.u32 u, s, 16; shl.b32 t, {w}, 4;")
            lines.append(f"prmt.b32 m, {w}, t, 0x9D8C; prmt.b32 n, {w}, t, 0xBFAE;")
            for byte in range(bytes_each):
                t = [f"${_TABLE_AT + 4 * byte + i}" for i in range(4)]
                names = [f"{'ab'[byte]}{2 * part + row}" for part in range(2)]
                if halves:
                    names = ["y", "z"]
                for name, places, upper in zip(names, "su", "mn"):
                    lines.append(f"prmt.b32 p, {t[0]}, {t[1]}, {places}; prmt.b32 q, {t[2]}, {t[3]}, {places};")
                    lines.append(f"lop3.b32 {name}, {upper}, q, p, 0xCA;")
                if halves:
                    # Of this word and the next, which are the first and the last k of a product.
                    to = [f"{name}{2 * (word % 2) + row}" for name in ("ag", "bi")[byte]]
                    lines.append(f"prmt.b32 {to[0]}, y, z, 0x6420; prmt.b32 {to[1]}, y, z, 0x7531;")
        for byte in range(bytes_each):
            if not halves:
                lines.append(_byte_mma("ce"[byte], [f"{'ab'[byte]}{i}" for i in range(4)], 2 * word))
            elif word % 2:
                first, second = ("ag", "bi")[byte]
                lines.append(_byte_mma("ce"[byte], [f"{first}{i}" for i in range(4)], word - 1))
                lines.append(_byte_mma("dj"[byte], [f"{second}{i}" for i in range(4)], 4 + word - 1))
    return lines


def _halves(bits: int) -> list[str]:
    """Codes 4 i to 4 i + 3 of both rows meet words 2 i and 2 i + 1 of x, of the first half of the chunk or of the second."""
    lines = []
    for g in range(8):
        for row in range(2):
            if bits == 8:
                w = f"${_OUTPUTS + 8 * row + g}"
                lines.append(
                    f"mov.b32 {{h, l}}, {w}; cvt.rn.f16x2.e4m3x2 a{row}, h; cvt.rn.f16x2.e4m3x2 a{2 + row}, l;"
                )
            else:
                lines.append(f"{_row_codes(bits, g, row, sign=True)} mad.lo.u32 c, s, {2 ** (8 - bits)}, c;")
                lines.append(f"prmt.b32 a{row}, c, 0, 0x1404; prmt.b32 a{2 + row}, c, 0, 0x3424;")
        mask = _ODD if g >= 4 else _EVEN
        x = [f"${_X + 2 * (g % 4) + i}" for i in range(2)]
        lines.append(f"and.b32 p, {x[0]}, {mask}; and.b32 q, {x[1]}, {mask};")
        c = ", ".join(f"f{n}" for n in range(4))
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{c}}}, {{a0, a1, a2, a3}}, {{p, q}}, {{{c}}};"
        )
    return lines


@functools.cache
def step_asm(kind: str, bits: int, exponent: int, signed: bool, halves: bool) -> str:
    """A chunk of each lane in two rows times x: the sums over both halves, or over all and a zero.

    kind: "affine", "table" (two bytes of each number), "minifloat" (one), "halves".
    """
    lines = ["{ .reg .b32 s, t, u, m, n, o, p, q, y, z; .reg .b16 h, l; .reg .f32 f0, f1, f2, f3; .reg .b32 c;"]
    lines.append(f".reg .b32 {', '.join(f'{name}{i}' for name in 'abcdegij' for i in range(4))};")
    if kind == "halves":
        lines += [f"mov.f32 f{i}, 0f00000000;" for i in range(4)]
        lines += _halves(bits)
        return " ".join([*lines, "mov.f32 $0, f0; mov.f32 $1, f1; mov.f32 $2, f2; mov.f32 $3, f3; }"])
    lines += [f"mov.b32 {name}{i}, 0;" for name in "cdej" for i in range(4)]
    lines.append(f".reg .b32 {', '.join(f'x{i}' for i in range(8))};")
    lines += [f"and.b32 x{i}, ${_X + i}, {_EVEN};" for i in range(8)]
    if kind == "affine":
        lines += _integers(bits, bits == 8 and not signed, halves)
    else:
        lines += _places(2 if kind == "table" else 1, halves)
    for row in range(2):
        high, low = f"{2 * row}", f"{2 * row + 1}"  # columns
        for half, (first, second) in enumerate((("c", "e"), ("d", "j"))):
            out = f"${2 * row + half}"
            if half and not halves:
                lines.append(f"mov.f32 {out}, 0f00000000;")
                continue
            lines.append(f"shl.b32 t, {first}{high}, 8; add.s32 t, t, {first}{low};")
            if kind == "table":
                lines.append(f"add.s32 t, t, {second}{high}; cvt.rn.f32.s32 f0, t; cvt.rn.f32.s32 f1, {second}{low};")
                lines.append(f"fma.rn.f32 {out}, f0, 0f43800000, f1;")
            else:
                lines.append(f"cvt.rn.f32.s32 {out}, t;")
    return " ".join([*lines, "}"])


@triton.jit
def _byte_words(w, f, selector, flip, HALF: tl.constexpr):
    """Four numbers of x, in two words, as one word of bytes; and the sum of them as fixed point, with 4 times 0x4B400080."""
    a, b = _both_halves(w[0], HALF)
    c, d = _both_halves(w[1], HALF)
    i, j = (a * f + 12583040.0).to(tl.int32, bitcast=True), (b * f + 12583040.0).to(tl.int32, bitcast=True)
    k, n = (c * f + 12583040.0).to(tl.int32, bitcast=True), (d * f + 12583040.0).to(tl.int32, bitcast=True)
    word = tl.inline_asm_elementwise(
        "{ .reg .b32 a, b; prmt.b32 a, $1, $2, $5; prmt.b32 b, $3, $4, $5; prmt.b32 a, a, b, 0x5410; xor.b32 $0, a, $6; }",
        "=r,r,r,r,r,r,r", [i, j, k, n, selector, flip], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    return word, i + j + k + n


@triton.jit
def _in_turn(a, b):
    """The bytes of two words in turn, as two words."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; prmt.b32 t, $2, $3, 0x5140; prmt.b32 $1, $2, $3, 0x7362; mov.b32 $0, t; }", "=r,=r,r,r", [a, b],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _largest_of(words, HALF: tl.constexpr):
    top = tl.zeros(words[0].shape, tl.float32)
    for i in tl.static_range(16):
        a, b = _both_halves(words[i], HALF)
        top = tl.maximum(top, tl.abs(a), propagate_nan=tl.PropagateNan.ALL)
        top = tl.maximum(top, tl.abs(b), propagate_nan=tl.PropagateNan.ALL)
    return top


@triton.jit
def _x_of_chunk(x_ptr, chunk, there, column, HALF: tl.constexpr, MIXED: tl.constexpr, FLOATS: tl.constexpr):
    """x of a chunk, as the lanes of its columns take it: 8 words; what the sums are to be multiplied with; sums of both halves.

    there: whether there is such a chunk.
    """
    at = x_ptr + chunk * 16
    w = _four_words(at, True) + _four_words(at + 4, True) + _four_words(at + 8, True) + _four_words(at + 12, True)
    top = _largest_of(w, HALF)
    if FLOATS:
        # A power of two takes the largest to 1 and above.
        power = tl.minimum(top.to(tl.int32, bitcast=True) & 0x7F800000, 253 << 23)
        f = tl.where(there, ((254 << 23) - power).to(tl.float32, bitcast=True), 0.0)
        step = tl.where(top < float("inf"), power.to(tl.float32, bitcast=True), float("nan"))
        words = ()
        for i in tl.static_range(8):
            p, q = _both_halves(tl.where(column % 2 == 0, w[i], w[8 + i]), HALF)
            pair = tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [q * f, p * f], dtype=tl.int32, is_pure=True, pack=1
            )
            words += (pair,)  # type: ignore[assignment]
        return words, tl.where(there, step, 0.0), step, step
    else:
        f = tl.where(there & (top > 0), 32512.0 / top, 0.0)
        step = tl.where(there, top * (1 / 32512), 0.0)
        selector = tl.where(column % 2 == 0, 0x51, 0x40)
        flip = tl.where(column % 2 == 0, 0, -2139062144)  # 0x80808080
        w0, i0 = _byte_words((w[0], w[1]), f, selector, flip, HALF)
        w1, i1 = _byte_words((w[2], w[3]), f, selector, flip, HALF)
        w2, i2 = _byte_words((w[4], w[5]), f, selector, flip, HALF)
        w3, i3 = _byte_words((w[6], w[7]), f, selector, flip, HALF)
        w4, i4 = _byte_words((w[8], w[9]), f, selector, flip, HALF)
        w5, i5 = _byte_words((w[10], w[11]), f, selector, flip, HALF)
        w6, i6 = _byte_words((w[12], w[13]), f, selector, flip, HALF)
        w7, i7 = _byte_words((w[14], w[15]), f, selector, flip, HALF)
        # Less 16 times 0x4B400080, modulo 2**32.
        total0 = (i0 + i1 + i2 + i3 + 0x4BFFF800).to(tl.float32) * step
        total1 = (i4 + i5 + i6 + i7 + 0x4BFFF800).to(tl.float32) * step
        if MIXED:
            return _in_turn(w0, w4) + _in_turn(w1, w5) + _in_turn(w2, w6) + _in_turn(w3, w7), step, total0, total1
        else:
            return (w0, w1, w2, w3, w4, w5, w6, w7), step, total0, total1


@triton.jit
def _fetched_pair(at):
    """What is at these addresses and after them, which are multiples of twice its size: a word, or two of 32 bits."""
    if at.dtype.element_ty.primitive_bitwidth == 8:
        return tl.inline_asm_elementwise(
            "ld.global.nc.u16 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=True, pack=1
        )
    elif at.dtype.element_ty.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [at], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )


@triton.jit
def _both(word, ptr, FLOAT8: tl.constexpr):
    """The two of `_fetched_pair`. FLOAT8: whether bytes are float8 e4m3, which become float32."""
    if ptr.dtype.element_ty.primitive_bitwidth == 8:
        if FLOAT8:
            return tl.inline_asm_elementwise(
                """{ .reg .b16 t, l, h; .reg .b32 p; cvt.u16.u32 t, $2; cvt.rn.f16x2.e4m3x2 p, t; mov.b32 {l, h}, p;
                cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }""",
                "=f,=f,r", [word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
            )  # fmt: skip
        elif ptr.dtype.element_ty == tl.int8:
            return (word << 24) >> 24, (word << 16) >> 24
        else:
            return word & 255, word >> 8
    elif ptr.dtype.element_ty.primitive_bitwidth == 16:
        first, second = word.to(tl.int16), (word >> 16).to(tl.int16)
        return first.to(ptr.dtype.element_ty, bitcast=True), second.to(ptr.dtype.element_ty, bitcast=True)
    else:
        return word[0].to(ptr.dtype.element_ty, bitcast=True), word[1].to(ptr.dtype.element_ty, bitcast=True)


@triton.jit
def _fetch(
    q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, chunk, summed, N, K: tl.constexpr, BITS: tl.constexpr,
    ZERO: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The words of a chunk of a row, and what is stored of both halves of the chunk whose sums the lane gets."""
    U: tl.constexpr = K // 32
    row = tl.minimum(row, N - 1)
    words = _words(q_ptr + row * (U * BITS) + tl.minimum(chunk, U - 1) * BITS, BITS, WIDE)
    chunk = tl.minimum(summed, U - 1)
    if NG == 1:
        return words, (0,), (0,)
    elif PAIRS:
        at = row // RG * NG + chunk * 2
        scale = _fetched_pair(scale_ptr + at)
        return words, scale, _fetched_pair(zero_ptr + at) if ZERO else scale
    else:
        g: tl.constexpr = U * 2 // NG  # halves of chunks in a group
        first = _stored(scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, chunk * 2 // g, ZERO, RG, NG, NESTED, RG2, NG2)
        second = first
        if g % 2 != 0:
            second = _stored(
                scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, (chunk * 2 + 1) // g, ZERO, RG, NG, NESTED, RG2, NG2
            )
        return words, first, second


@triton.jit
def _fetch_group(
    q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, chunk0, lane, N, K: tl.constexpr, BITS: tl.constexpr,
    ZERO: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr, START: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """`_fetch` of this row and the one 8 further on, for each of some steps."""
    found = ()
    for s in tl.static_range(START, END):
        chunk = chunk0 + 4 * s + lane
        summed = chunk0 + 4 * s + (lane + 4 - s % 4) % 4
        a = _fetch(
            q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, chunk, summed, N, K, BITS, ZERO,
            RG, NG, NESTED, RG2, NG2, WIDE, PAIRS,
        )  # fmt: skip
        b = _fetch(
            q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row + 8, chunk, summed, N, K, BITS,
            ZERO, RG, NG, NESTED, RG2, NG2, WIDE, PAIRS,
        )  # fmt: skip
        found += ((a, b),)  # type: ignore[assignment]
    return found


@triton.jit
def _to_cache(at):
    """Ask for the line of the GPU's cache at each address; returns nothing of use."""
    return tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _ask_ahead(
    q_ptr, scale_ptr, zero_ptr, tile, thread, N, K: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Ask for the parts of a tile that a warp will read. The assembler puts loads off to where their registers are free; this
    needs none."""
    U: tl.constexpr = K // 32
    lines: tl.constexpr = (STEPS * 4 * BITS + 31) // 32  # of a row, of 32 words
    lane = thread % 32
    chunk = thread // 32 * (4 * STEPS)
    for i in tl.static_range((16 * lines + 31) // 32):
        line = tl.minimum(lane + 32 * i, 16 * lines - 1)
        row = tl.minimum(tile * 16 + line // lines, N - 1)
        word = tl.minimum(chunk * BITS + line % lines * 32, U * BITS - 1)
        _to_cache(q_ptr + row * (U * BITS) + word)
    if NG > 1:
        at = tl.minimum(tile * 16 + lane % 16, N - 1) // RG * NG + tl.minimum(chunk, U - 1) * NG // U
        _to_cache(scale_ptr + at)
        if ZERO:
            _to_cache(zero_ptr + at)


@triton.jit
def _of_rows(
    scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, N, ZERO: tl.constexpr, RG: tl.constexpr, NESTED: tl.constexpr,
    RG2: tl.constexpr,
):  # fmt: skip
    """What is stored of rows of one group: of these and of those 8 further on."""
    row0, row1 = tl.minimum(row, N - 1), tl.minimum(row + 8, N - 1)
    return (
        _stored(scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row0, 0, ZERO, RG, 1, NESTED, RG2, 1),
        _stored(scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row1, 0, ZERO, RG, 1, NESTED, RG2, 1),
    )


@triton.jit
def _sum_of_group(d, total, stored, BITS: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, NESTED: tl.constexpr):
    """(sum of numbers times x - zero point times sum of x) * scale."""
    if ZERO:
        d -= (zero_number(stored[1], BITS) + OFFSET) * total
    elif OFFSET != 0:
        d -= OFFSET * total
    return d * _scale(stored, NESTED)


@triton.jit
def _table_word(number, i: tl.constexpr):
    """The last bytes of numbers 4 i to 4 i + 3 of 16, as a word."""
    at = tl.arange(0, 16)
    return tl.sum(tl.where(at // 4 == i, (number & 255) << (at % 4 * 8), 0), 0)


@triton.jit
def mma_codes_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, ASM: tl.constexpr,
    POWER: tl.constexpr, FLOATS: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr,
    AHEAD: tl.constexpr, ASKED: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over groups of (sum over the group of x * number[n] - zero[n] * sum of x) * scale[n].

    A warp has STEPS times 4 chunks of K, of which x stays in registers, and goes through tiles of 16 rows, AHEAD steps ahead, and
    asks for the tile that is ASKED further on.
    FLOATS: whether the tensor cores get halves. POWER: of two, for what their sums are multiplied with.
    """
    U: tl.constexpr = K // 32
    HALVES: tl.constexpr = NG > 1 and K // NG % 32 != 0
    SHARED: tl.constexpr = NESTED == _SCALED  # one scale of all scales
    FLOAT8: tl.constexpr = SHARED or NESTED == _E4M3
    OF_A_PAIR: tl.constexpr = _PLAIN if FLOAT8 else NESTED
    MIXED: tl.constexpr = not FLOATS and KIND != _AFFINE and not HALVES
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    first = tl.program_id(0)
    x_ptr += tl.program_id(1) * K  # the tokens after the first
    out_ptr += tl.program_id(1) * N
    thread = tl.arange(0, 32 * WARPS)
    row, lane = thread % 32 // 4, thread % 4
    column = row  # of x
    chunk0 = thread // 32 * (4 * STEPS)
    ahead = _fetch_group(
        q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, first * 16 + row, chunk0, lane, N, K, BITS, ZERO, RG, NG, NESTED,
        RG2, NG2, WIDE, PAIRS, 0, min(AHEAD, STEPS),
    )  # fmt: skip
    if NG == 1:
        rows_ahead = _of_rows(scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, first * 16 + row, N, ZERO, RG, NESTED, RG2)
    table = (0, 0, 0, 0, 0, 0, 0, 0)
    if KIND == _TABLE:
        number = tl.load(table_ptr + tl.arange(0, 16))
        top = tl.max(tl.abs(number), 0)
        factor = tl.where(top > 0, 32512.0 / top, 0.0)
        level = tl.floor(number * factor + 0.5).to(tl.int32)
        upper = (level + 128) >> 8  # the high byte, for a low one with a sign
        last = top * (1 / 32512)
        table = (
            _table_word(upper, 0), _table_word(upper, 1), _table_word(upper, 2), _table_word(upper, 3), _table_word(level, 0),
            _table_word(level, 1), _table_word(level, 2), _table_word(level, 3),
        )  # fmt: skip
    elif not FLOATS and KIND != _AFFINE:
        # Multiples of the smallest: 1 / 2 for e2m1, 1 / 4 for e3m0.
        SMALLEST: tl.constexpr = 2.0 ** (2 - 2 ** (EXPONENT - 1) - (3 - EXPONENT))
        level = (_numbers_of(tl.arange(0, 16), table_ptr, KIND, 4, EXPONENT, False) * (1 / SMALLEST)).to(tl.int32)
        last = SMALLEST
        table = (
            _table_word(level, 0), _table_word(level, 1), _table_word(level, 2), _table_word(level, 3), 0, 0, 0, 0,
        )  # fmt: skip
    else:
        last = 2.0**POWER

    # Of four steps, a lane has x for one.
    mine = (column // 2 + 4 - lane) % 4
    x_words = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    xs = ()
    for j in tl.static_range((STEPS + 3) // 4):
        which = 4 * j + mine
        chunk = chunk0 + 4 * which + lane
        xs += (  # type: ignore[assignment]
            _x_of_chunk(x_words, tl.minimum(chunk, U - 1), (chunk < U) & (which < STEPS), column, HALF, MIXED, FLOATS),
        )
    ofs = ()
    for s in tl.static_range(STEPS):
        # The lane that has x of the chunk whose sums this one gets.
        other = thread % 4 * 8 + (lane + 4 - s % 4) % 4
        ofs += (  # type: ignore[assignment]
            (_of_lane(xs[s // 4][1], other), _of_lane(xs[s // 4][2], other), _of_lane(xs[s // 4][3], other)),
        )

    for tile in tl.range(first, tl.cdiv(N, 16), tl.num_programs(0)):
        r = tile * 16 + row
        if ASKED > 0:
            _ask_ahead(
                q_ptr, scale_ptr, zero_ptr, tile + ASKED * tl.num_programs(0), thread, N, K, BITS, ZERO, RG, NG, STEPS
            )
        if NG == 1:
            rows = rows_ahead
            rows_ahead = _of_rows(
                scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, r + tl.num_programs(0) * 16, N, ZERO, RG, NESTED, RG2
            )
        sum0 = tl.zeros((32 * WARPS,), tl.float32)
        sum1 = tl.zeros((32 * WARPS,), tl.float32)
        for s in tl.static_range(STEPS):
            if s % AHEAD == 0:
                now = ahead
                if s + AHEAD < STEPS:
                    ahead = _fetch_group(
                        q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, r, chunk0, lane, N, K, BITS, ZERO, RG, NG,
                        NESTED, RG2, NG2, WIDE, PAIRS, s + AHEAD, min(s + 2 * AHEAD, STEPS),
                    )  # fmt: skip
                else:
                    ahead = _fetch_group(
                        q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, r + tl.num_programs(0) * 16, chunk0, lane, N, K,
                        BITS, ZERO, RG, NG, NESTED, RG2, NG2, WIDE, PAIRS, 0, min(AHEAD, STEPS),
                    )  # fmt: skip
            a, b = now[s % AHEAD]
            step, total0, total1 = ofs[s]  # type: ignore[var-annotated]
            here = mine == s % 4
            if FLOATS:
                first_mask = tl.where(here & (column % 2 == 0), -1, 0)
                second_mask = tl.where(here & (column % 2 == 1), -1, 0)
            else:
                first_mask = tl.where(here, -1, 0)
                second_mask = first_mask
            d = tl.inline_asm_elementwise(
                ASM, _OPERANDS, _eight(a[0]) + _eight(b[0]) + xs[s // 4][0] + table + (first_mask, second_mask),
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
            )  # fmt: skip
            if PAIRS:
                s0, s1 = _both(a[1], scale_ptr, FLOAT8)
                s2, s3 = _both(b[1], scale_ptr, FLOAT8)
                z0, z1 = _both(a[2], zero_ptr, False) if ZERO else (s0, s1)
                z2, z3 = _both(b[2], zero_ptr, False) if ZERO else (s2, s3)
                sum0 += _sum_of_group(d[0] * step, total0, (s0, z0), BITS, ZERO, OFFSET, OF_A_PAIR)
                sum0 += _sum_of_group(d[1] * step, total1, (s1, z1), BITS, ZERO, OFFSET, OF_A_PAIR)
                sum1 += _sum_of_group(d[2] * step, total0, (s2, z2), BITS, ZERO, OFFSET, OF_A_PAIR)
                sum1 += _sum_of_group(d[3] * step, total1, (s3, z3), BITS, ZERO, OFFSET, OF_A_PAIR)
            elif HALVES:
                sum0 += _sum_of_group(d[0] * step, total0, a[1], BITS, ZERO, OFFSET, NESTED)
                sum0 += _sum_of_group(d[1] * step, total1, a[2], BITS, ZERO, OFFSET, NESTED)
                sum1 += _sum_of_group(d[2] * step, total0, b[1], BITS, ZERO, OFFSET, NESTED)
                sum1 += _sum_of_group(d[3] * step, total1, b[2], BITS, ZERO, OFFSET, NESTED)
            else:
                of0, of1 = rows if NG == 1 else (a[1], b[1])
                total = total0 + total1  # type: ignore[var-annotated]
                d0 = d[0] + d[1] if FLOATS else d[0]
                d1 = d[2] + d[3] if FLOATS else d[2]
                sum0 += _sum_of_group(d0 * step, total, of0, BITS, ZERO, OFFSET, NESTED)
                sum1 += _sum_of_group(d1 * step, total, of1, BITS, ZERO, OFFSET, NESTED)
        of_lanes = tl.reshape(tl.join(sum0, sum1), (WARPS, 8, 4, 2))
        out = tl.reshape(tl.permute(tl.sum(tl.sum(of_lanes, 2), 0), (1, 0)), (16,)) * last
        at = tile * 16 + tl.arange(0, 16)
        if SHARED:
            out *= tl.load(scale2_ptr).to(tl.float32)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=at < N)


@triton.jit
def _eight(w):
    return (w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7])


def mma_kind(reading: Reading) -> str | None:
    """The kind of `step_asm` for a weight; None where there is none."""
    if reading.kind == "affine" or (reading.kind == "table" and reading.bits == 4):
        return reading.kind
    if reading.kind == "minifloat":
        if reading.bits == 4 and reading.exponent in (2, 3):
            return "minifloat"
        # Two bits after the leading one are where a float16 has its first two; e4m3 has an instruction.
        if reading.bits - 1 - reading.exponent == 2 or (reading.bits, reading.exponent) == (8, 4):
            return "halves"
    return None


def mma_constants(
    reading: Reading, zero: bool, wide: bool, pairs: bool, warps: int | None, ahead: int, asked: int
) -> dict[str, Any]:
    """The constants of `mma_codes_kernel`.

    zero: whether there are zero points. wide, pairs: whether addresses of codes are multiples of 16, and of scales of 8.
    """
    kind = mma_kind(reading)
    assert kind is not None
    steps = cdiv(reading.k, 128)
    if warps is None:
        warps = next((w for w in (1, 2, 4, 8) if steps <= 4 * w), 16)
    halves = reading.groups > 1 and reading.group % 32 != 0
    offset = reading.offset - (128 if kind == "affine" and reading.bits == 8 and not reading.signed else 0)
    floats = kind == "halves"
    bias = 0 if reading.bits == 8 or not floats else 15 - (2 ** (reading.exponent - 1) - 1)
    pairs = pairs and reading.group == 16 and reading.groups > 1 and reading.nested != "affine"
    return {
        **reading.constants(zero), "OFFSET": offset,
        "ASM": step_asm(kind, reading.bits, reading.exponent, reading.signed, halves), "POWER": bias, "FLOATS": floats,
        "WIDE": wide, "PAIRS": pairs, "WARPS": warps, "STEPS": cdiv(steps, warps), "AHEAD": min(ahead, cdiv(steps, warps)),
        "ASKED": asked,
    }  # fmt: skip


def mma_each(
    x: Tensor, reading: Reading, fields: Fields, warps: int | None = None, ahead: int = 2, asked: int = 2,
    at_once: int = 16, registers: int = 128,
) -> Tensor:  # fmt: skip
    """One token, or each of a few in one launch. x: (M, K), contiguous -> (M, N).

    warps: of a program. ahead: steps. asked: tiles that are asked for before they are loaded.
    at_once: warps on a multiprocessor, for how many there are programs. registers: of a thread, at most.
    """
    m, n = x.shape[0], reading.n
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    pairs = all(t is None or t.data_ptr() % 8 == 0 for t in fields[1:3])
    constants = mma_constants(
        reading, fields[2] is not None, fields[0].data_ptr() % 16 == 0, pairs, warps, ahead, asked
    )
    warps = constants["WARPS"]
    tiles = cdiv(n, 16)
    rounds = cdiv(tiles, multiprocessors(x.device) * max(1, at_once // warps))
    launch(
        mma_codes_kernel, (cdiv(tiles, rounds), m), x, *given(fields), out, n, num_warps=warps, registers=registers,
        **constants,
    )  # fmt: skip
    return out
