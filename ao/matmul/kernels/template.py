"""Triton kernels for a weight in any format that has an operand: one token, a few tokens, and a decoder to memory.

ampere.py and hopper.py are for integers of 4 and 8 bits and float8, in which each step is laid out by hand. Here are the same
three products for codes of 1 to 8 bits of every kind, integers, small floats and tables, with scales per group of 16 or more, per
row, per block of rows or for all, and scales that are quantized themselves. What a format is comes in as constants, a `Reading`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ...dtypes.base import QTensor
from ...dtypes.operand import Operand
from .ampere import _bytes, _fixed_point, _largest, sum_kernel
from .device import multiprocessors
from .launch import Launch, cdiv, launch, power_of_two

_AFFINE, _TABLE, _MINIFLOAT, _FLOAT = (tl.constexpr(i) for i in range(4))
_KINDS = {"affine": 0, "table": 1, "minifloat": 2, "float": 3}
"""Kinds of operands, as the kernels have them. A float is a minifloat with NaN."""

_PLAIN, _E4M3, _SCALED, _POWER, _INTEGERS = (tl.constexpr(i) for i in range(5))
_NESTED = {"none": 0, "e4m3": 1, "scaled": 2, "power": 3, "affine": 4}


# What a weight is.


class Reading(NamedTuple):
    """The constants by which the kernels read a weight (n, k).

    kind: of its operand.
    exponent, signed, offset: of its operand.
    rows: how many share a scale. groups: scales of a row, each for `group` elements.
    nested: how scales are stored: "none" as numbers, "e4m3" as float8, "scaled" as float8 that share one scale, "power" as
        exponents, "affine" as integers with scales and zero points of their own.
    outer_rows, outer_groups: how many rows share a scale of the scales, and how many of these a row has.
    """

    n: int
    k: int
    bits: int
    kind: str
    exponent: int
    signed: bool
    offset: float
    rows: int
    groups: int
    nested: str = "none"
    outer_rows: int = 1
    outer_groups: int = 1

    @property
    def group(self) -> int:
        """Elements of a row that share a scale."""
        return self.k // self.groups

    @property
    def by_row(self) -> bool:
        return self.groups == 1

    @property
    def text(self) -> str:
        """It as a word, for the schema of an operator."""
        return " ".join(map(str, self))

    def constants(self, zero: bool) -> dict[str, Any]:
        """Those that every kernel has, in the order of its parameters."""
        return {
            "K": self.k, "BITS": self.bits, "KIND": _KINDS[self.kind], "EXPONENT": self.exponent, "SIGNED": self.signed,
            "ZERO": zero,
            "OFFSET": self.offset, "RG": self.rows, "NG": self.groups, "NESTED": _NESTED[self.nested], "RG2": self.outer_rows,
            "NG2": self.outer_groups,
        }  # fmt: skip


Fields = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]
"""codes, scale, zero point, table, scale of the scales, their zero point."""


@functools.cache
def reading_from(text: str) -> Reading:
    """The inverse of `Reading.text`."""
    n, k, bits, kind, exponent, signed, offset, *scales = text.split()
    rows, groups, nested, outer_rows, outer_groups = scales
    return Reading(
        int(n), int(k), int(bits), kind, int(exponent), signed == "True", float(offset), int(rows), int(groups), nested,
        int(outer_rows), int(outer_groups),
    )  # fmt: skip


def _given(fields: Fields) -> list[Tensor]:
    """The fields as a kernel takes them: the codes in the place of what is not there."""
    return [fields[0] if t is None else t for t in fields]


# Codes and scales, to numbers.


@triton.jit
def _section(q_ptr, row, chunk, there, K: tl.constexpr, BITS: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr):
    """S bits of the codes of chunks of rows, which are bits FIRST and above of them: (R, 32 C) int32.

    Element e of a chunk is in word e // 4 % S of the section, in byte e % 4 of that, at bit e // 4 // S * S (bits.py). So
    each bit of e, from the highest on, doubles the tensor by another word or another shift: all within a thread.
    """
    R: tl.constexpr = row.shape[0]
    C: tl.constexpr = chunk.shape[0]
    at = q_ptr + ((row * (K // 32 * BITS))[:, None] + (chunk * BITS + FIRST)[None, :])
    mask = there[None, :]
    if S == 1:
        w = tl.load(at, mask=mask, other=0)
        w = tl.join(w, w >> 4)
        w = tl.join(w, w >> 2)
        w = tl.join(w, w >> 1)
    elif S == 2:
        w = tl.load(at[:, :, None] + tl.arange(0, 2)[None, None, :], mask=mask[:, :, None], other=0)
        w0, w1 = tl.split(w)
        w = tl.join(_planes2(w0), _planes2(w1))
    else:
        w = tl.load(at[:, :, None] + tl.arange(0, S)[None, None, :], mask=mask[:, :, None], other=0)
        even, odd = tl.split(tl.reshape(w, (R, C, S // 2, 2)))
        w = tl.join(_words_of_parity(even, S), _words_of_parity(odd, S))
    w = tl.join(w, w >> 16)
    w = tl.join(w, w >> 8)
    return (tl.reshape(w, (R, C * 32)) & (2**S - 1)) << FIRST


@triton.jit
def _planes2(w):
    """(...,) -> (..., 2, 2): both bits of e that are shifts, where a section of two bits has four planes."""
    w = tl.join(w, w >> 4)
    return tl.join(w, w >> 2)


@triton.jit
def _words_of_parity(w, S: tl.constexpr):
    """(R, C, S / 2) -> (R, C, 2, 2): the words with an even or odd place, one after another, by the higher two bits of e."""
    R: tl.constexpr = w.shape[0]
    C: tl.constexpr = w.shape[1]
    if S == 4:
        w0, w2 = tl.split(w)
        return tl.join(tl.join(w0, w0 >> 4), tl.join(w2, w2 >> 4))
    else:
        return tl.reshape(w, (R, C, 2, 2))


@triton.jit
def _codes(q_ptr, row, chunk, there, K: tl.constexpr, BITS: tl.constexpr):
    """The codes of chunks of 32 elements of rows: (R, 32 C) int32."""
    if BITS == 8:
        code = _section(q_ptr, row, chunk, there, K, BITS, 8, 0)
    elif BITS & 4:
        code = _section(q_ptr, row, chunk, there, K, BITS, 4, 0)
        if BITS & 2:
            code |= _section(q_ptr, row, chunk, there, K, BITS, 2, 4)
        if BITS & 1:
            code |= _section(q_ptr, row, chunk, there, K, BITS, 1, BITS - 1)
    elif BITS & 2:
        code = _section(q_ptr, row, chunk, there, K, BITS, 2, 0)
        if BITS & 1:
            code |= _section(q_ptr, row, chunk, there, K, BITS, 1, 2)
    else:
        code = _section(q_ptr, row, chunk, there, K, BITS, 1, 0)
    return code


@triton.jit
def _e4m3(byte):
    """float8 e4m3, as int32 -> float32."""
    size = byte & 127
    value = (size << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    value = tl.where(size == 127, float("nan"), value)
    return tl.where(byte > 127, -value, value)


@triton.jit
def _numbers(code, table_ptr, KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr):
    """What codes stand for before zero point and scale, float32."""
    if KIND == _TABLE:
        # Not `tl.load`, which Triton would take for a load of the loop that it should begin some steps ahead.
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [table_ptr + code], dtype=tl.float32, is_pure=True, pack=1
        )
    elif KIND == _AFFINE:
        # Integers into the last bits of 2**23: a conversion would run at a quarter of the rate.
        if SIGNED:
            return ((code ^ 128) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
        else:
            return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    else:
        size = code & (2 ** (BITS - 1) - 1)
        value = (size << (24 - BITS + EXPONENT)).to(tl.float32, bitcast=True) * (2.0 ** (128 - 2 ** (EXPONENT - 1)))
        if KIND == _FLOAT:
            if EXPONENT == 4:
                value = tl.where(size == 127, float("nan"), value)
            else:
                value = tl.where(size == 124, float("inf"), tl.where(size > 124, float("nan"), value))
        return tl.where(code >= 2 ** (BITS - 1), -value, value)


@triton.jit
def _scales(
    scale_ptr, scale2_ptr, zero2_ptr, row, group, there, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr,
    RG2: tl.constexpr, NG2: tl.constexpr,
):  # fmt: skip
    """The scales of groups of rows, float32."""
    scale = tl.load(scale_ptr + (row // RG * NG + group), mask=there, other=0)
    return _scale_of(scale, scale2_ptr, zero2_ptr, row, group, NG, NESTED, RG2, NG2)


@triton.jit
def _scale_of(
    scale, scale2_ptr, zero2_ptr, row, group, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr
):  # fmt: skip
    """Scales as they are stored -> float32. group: may be beyond the last."""
    if NESTED == _PLAIN:
        return scale.to(tl.float32)
    elif NESTED == _POWER:
        code = scale.to(tl.int32)
        return (tl.where(code == 0, 1 << 22, code << 23) | (code == 255)).to(tl.float32, bitcast=True)
    elif NESTED == _E4M3:
        return _e4m3(scale.to(tl.int32))
    elif NESTED == _SCALED:
        return _e4m3(scale.to(tl.int32)) * tl.load(scale2_ptr).to(tl.float32)
    else:
        outer = row // RG2 * NG2 + tl.minimum(group, NG - 1) // (NG // NG2)
        return (scale.to(tl.float32) - tl.load(zero2_ptr + outer).to(tl.float32)) * tl.load(scale2_ptr + outer).to(
            tl.float32
        )


@triton.jit
def _zeros(zero_ptr, row, group, there, RG: tl.constexpr, NG: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr):
    """What to take off the codes of groups of rows, float32."""
    if ZERO:
        return tl.load(zero_ptr + (row // RG * NG + group), mask=there, other=0).to(tl.float32) + OFFSET
    else:
        return tl.full((1, 1), OFFSET, tl.float32)


# Many tokens: the weight goes to memory as plain numbers.


@triton.jit
def decode_any_kernel(
    q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """out[n, k] = (number[n, k] - zero) * scale in float32, BN rows and BK elements of each. RUN elements are in one group."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    first = tl.program_id(1) * BK
    chunk = first // 32 + tl.arange(0, BK // 32)
    value = _numbers(_codes(q_ptr, row, chunk, chunk < K // 32, K, BITS), table_ptr, KIND, BITS, EXPONENT, SIGNED)
    run = first + tl.arange(0, BK // RUN) * RUN
    group = (run // (K // NG))[None, :]
    there = (run < K)[None, :]
    value = tl.reshape(value, (BN, BK // RUN, RUN))
    if ZERO or OFFSET != 0:
        value -= _zeros(zero_ptr, row[:, None], group, there, RG, NG, ZERO, OFFSET)[:, :, None]
    value *= _scales(scale_ptr, scale2_ptr, zero2_ptr, row[:, None], group, there, RG, NG, NESTED, RG2, NG2)[:, :, None]
    k = first + tl.arange(0, BK)
    out = tl.reshape(value, (BN, BK)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rn[:, None] * K + k[None, :], out, mask=(rn < N)[:, None] & (k < K)[None, :])


def _run(reading: Reading, most: int) -> int:
    """How many elements from a multiple of that many on are in one group: a power of two, `most` or less."""
    return most if reading.by_row else min(most, reading.group & -reading.group)


def decoded(reading: Reading, fields: Fields, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) as `dtype`."""
    n, k = reading.n, reading.k
    out = torch.empty(n, k, dtype=dtype, device=fields[0].device)
    if out.numel():
        wide = min(512, power_of_two(k))
        height = 4096 // wide
        launch(
            decode_any_kernel, (cdiv(n, height), cdiv(k, wide)), *_given(fields), out, n,
            **reading.constants(fields[2] is not None), BN=height, BK=wide, RUN=_run(reading, wide), num_warps=8,
        )  # fmt: skip
    return out


# A few tokens.


@triton.jit(do_not_specialize=["M"])
def few_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, M, N, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum of x[m] * w[n], the weights decoded in registers on their way to the tensor cores.

    A program has BM tokens, BN rows of the weight and 1 / SPLIT of K, for which it writes a sum of its own. A step covers BK
    elements, of which RUN after each other are in one group. A scale per row multiplies the sum.
    """
    T: tl.constexpr = (K + BK - 1) // BK
    TS: tl.constexpr = (T + SPLIT - 1) // SPLIT
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    here = (rm < M)[:, None]
    t0 = tl.program_id(2) * TS
    t1 = tl.minimum(t0 + TS, T)
    ks = tl.arange(0, BK)
    x_at = x_ptr + rm[:, None] * K + ks[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    if NG == 1:
        zero = _zeros(zero_ptr, row[:, None], 0, True, RG, NG, ZERO, OFFSET)
        scale = tl.full((1, 1), 1.0, tl.float32)
    for t in tl.range(t0, t1, num_stages=STAGES):
        chunk = t * (BK // 32) + tl.arange(0, BK // 32)
        x = tl.load(x_at + t * BK, mask=here & (t * BK + ks < K)[None, :], other=0.0)
        code = _codes(q_ptr, row, chunk, chunk < K // 32, K, BITS)
        if NG > 1:
            group = ((t * BK + tl.arange(0, BK // RUN) * RUN) // (K // NG))[None, :]
            scale = _scales(scale_ptr, scale2_ptr, zero2_ptr, row[:, None], group, group < NG, RG, NG, NESTED, RG2, NG2)
            zero = _zeros(zero_ptr, row[:, None], group, group < NG, RG, NG, ZERO, OFFSET)
        if KIND == _AFFINE:
            # Integers into the last bits of 2**BITS, so that taking off the zero point and scaling is one operation.
            BASE: tl.constexpr = 2.0**BITS + (128.0 if SIGNED else 0.0)
            if SIGNED:
                code = code ^ 128
            value = ((code << (23 - BITS)) | ((127 + BITS) << 23)).to(tl.float32, bitcast=True)
            if NG == 1:
                w = value - (zero + BASE)
            elif RUN == BK:
                w = value * scale - (zero + BASE) * scale
            else:
                value = tl.reshape(value, (BN, BK // RUN, RUN))
                w = tl.reshape(value * scale[:, :, None] - ((zero + BASE) * scale)[:, :, None], (BN, BK))
        else:
            w = _numbers(code, table_ptr, KIND, BITS, EXPONENT, SIGNED)
            if NG > 1 and RUN == BK:
                w *= scale
            elif NG > 1:
                w = tl.reshape(tl.reshape(w, (BN, BK // RUN, RUN)) * scale[:, :, None], (BN, BK))
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc)
    if NG == 1:
        acc *= tl.trans(_scales(scale_ptr, scale2_ptr, zero2_ptr, row[:, None], 0, True, RG, NG, NESTED, RG2, NG2))
    out = out_ptr + (tl.program_id(2) * M + rm[:, None]) * N + rn[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=here & (rn < N)[None, :])


def _few_constants(reading: Reading, m: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid and the tile of `few_kernel` for m tokens."""
    n, k = reading.n, reading.k
    step = max(32, _run(reading, 64))
    tokens = 16 if m <= 16 else 32 if m <= 32 else 64
    height = 128 if step < 64 else 64
    tiles = cdiv(n, height) * cdiv(m, tokens)
    split = max(1, min(8, round(1056 / tiles), cdiv(k, step) // 4))
    return (cdiv(n, height), cdiv(m, tokens), split), {
        "BM": tokens, "BN": height, "BK": step, "RUN": _run(reading, step), "SPLIT": split, "STAGES": 3, "num_warps": 4,
    }  # fmt: skip


def few(x: Tensor, reading: Reading, fields: Fields) -> Tensor:
    """x @ decode(w).T in x's dtype, a 16-bit one. x: (M, K), contiguous -> (M, N)."""
    m, n = x.shape[0], reading.n
    grid, tile = _few_constants(reading, m)
    split = grid[2]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    parts = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    launch(few_kernel, grid, x, *_given(fields), parts, m, n, **reading.constants(fields[2] is not None), **tile)
    if split > 1:
        launch(sum_kernel, (cdiv(m * n, 1024),), parts, out, m * n, SPLIT=split, B=1024, EARLY=False)
    return out


# One token.


def _integers_asm(bits: int) -> str:
    """32 codes in `bits` words, times 16-bit numbers given as words of bytes: the sums over either half.

    Operands: 7 words of codes, of which the first `bits` count; 8 words of high bytes and 8 of low ones of what they meet. Word g
    of these meets codes 4 g to 4 g + 3, which are one byte each of one word per section (bits.py), at the same bits of all four.
    """
    lines = ["{ .reg .b32 c, t, a0, b0, a1, b1; mov.b32 a0, 0; mov.b32 b0, 0; mov.b32 a1, 0; mov.b32 b1, 0;"]
    for g in range(8):
        first = 0
        for section in (4, 2, 1):
            if not bits & section:
                continue
            word, shift = f"${2 + first + g % section}", g // section * section - first
            mask = f"0x{(2**section - 1 << first) * 0x01010101:08x}"
            move = f"shr.u32 t, {word}, {shift}; " if shift > 0 else f"shl.b32 t, {word}, {-shift}; " if shift else ""
            source = "t" if shift else word
            lines.append(
                move + (f"lop3.b32 c, {source}, {mask}, c, 0xEA;" if first else f"and.b32 c, {source}, {mask};")
            )
            first += section
        lines.append(_dot4("c", g, 9))
    lines.append("shl.b32 a0, a0, 8; add.s32 $0, a0, b0; shl.b32 a1, a1, 8; add.s32 $1, a1, b1; }")
    return " ".join(lines)


def _dot4(codes: str, g: int, first: int) -> str:
    """4 codes times what they meet, added to the sums of their half. first: the operand of the first word of high bytes."""
    half = g // 4
    return " ".join(
        f"dp4a.s32.s32 {name}{half}, {codes}, ${first + place + g}, {name}{half};"
        for name, place in (("a", 0), ("b", 8))
    )


def _table_asm(bytes_each: int, halves: bool) -> str:
    """32 places of 4 bits in 4 words, in a table of 16 signed numbers of one or two bytes, times 16-bit numbers: see above.

    Without `halves`, both nibbles of a byte follow each other, also in what they meet, and only the sum of both sums counts.

    Operands: 4 words of places, 8 and 8 words of bytes, 4 words with the bytes of the table, the high ones first. For two bytes:
    the sums of high times high bytes and of high times low ones, over either half.
    """
    outputs = 2 * bytes_each
    x, table = outputs + 4, outputs + 20
    lines = ["{ .reg .b32 s, u, v, m, n, p, q, r, c, d; .reg .b32 a0, b0, a1, b1;"]
    lines.append("mov.b32 a0, 0; mov.b32 b0, 0; mov.b32 a1, 0; mov.b32 b1, 0;")
    for word in range(4):
        w = f"${outputs + word}"
        # Places of the two nibbles of a byte follow each other; the highest bit of each says which half of the table it is.
        lines.append(f"and.b32 s, {w}, 0x77777777; shr.u32 u, s, 16; shl.b32 v, {w}, 4;")
        lines.append(f"prmt.b32 m, {w}, v, 0x9D8C; prmt.b32 n, {w}, v, 0xBFAE;")
        for byte in range(bytes_each):
            t = [f"${table + 4 * byte + i}" for i in range(4)]
            lines.append(f"prmt.b32 p, {t[0]}, {t[1]}, s; prmt.b32 q, {t[2]}, {t[3]}, s; lop3.b32 r, m, q, p, 0xCA;")
            lines.append(f"prmt.b32 p, {t[0]}, {t[1]}, u; prmt.b32 q, {t[2]}, {t[3]}, u; lop3.b32 q, n, q, p, 0xCA;")
            if halves:
                lines.append("prmt.b32 c, r, q, 0x6420; prmt.b32 d, r, q, 0x7531;")
            for codes, g in (("c", word), ("d", 4 + word)) if halves else (("r", 2 * word), ("q", 2 * word + 1)):
                if byte == 0:
                    lines.append(_dot4(codes, g, x))
                else:
                    lines.append(f"dp4a.s32.s32 b{g // 4}, {codes}, ${x + g}, b{g // 4};")
    if bytes_each == 1:
        lines.append("shl.b32 a0, a0, 8; add.s32 $0, a0, b0; shl.b32 a1, a1, 8; add.s32 $1, a1, b1; }")
    else:
        lines.append("mov.b32 $0, a0; mov.b32 $1, b0; mov.b32 $2, a1; mov.b32 $3, b1; }")
    return " ".join(lines)


_ASM = tl.constexpr(tuple("" if bits == 0 else _integers_asm(bits) for bits in range(8)))
_ASM_OPERANDS = tl.constexpr("=r,=r" + ",r" * 23)
_SMALL_TABLE_ASM = tl.constexpr((_table_asm(1, False), _table_asm(1, True)))
_SMALL_TABLE_OPERANDS = tl.constexpr("=r,=r" + ",r" * 24)
_TABLE_ASM = tl.constexpr((_table_asm(2, False), _table_asm(2, True)))
_TABLE_OPERANDS = tl.constexpr("=r,=r,=r,=r" + ",r" * 28)


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
        return w0, w1, w2, w3, w0, w0, w0
    elif BITS == 2:
        word = tl.arange(0, 2 * J)
        w = tl.load(at + word, mask=word < 2 * U, other=0, eviction_policy="evict_first")
        w0, w1 = tl.split(tl.reshape(w, (J, 2)))
        return w0, w1, w0, w0, w0, w0, w0
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
        return w0, w1, w2, w3, w4, w5, w6


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
def _unit_sums(w, high, low, table, KIND: tl.constexpr, BITS: tl.constexpr, HALVES: tl.constexpr):
    """The sums over both halves of units of 32 codes, float32: (J,) each."""
    if KIND == _TABLE:
        a0, b0, a1, b1 = tl.inline_asm_elementwise(
            _TABLE_ASM[HALVES], _TABLE_OPERANDS,
            [w[0], w[1], w[2], w[3], high[0], high[1], high[2], high[3], high[4], high[5], high[6], high[7],
             low[0], low[1], low[2], low[3], low[4], low[5], low[6], low[7],
             table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        d0 = a0.to(tl.float32) * 65536.0 + b0.to(tl.float32) * 256.0
        return d0, a1.to(tl.float32) * 65536.0 + b1.to(tl.float32) * 256.0
    elif KIND == _MINIFLOAT:
        i0, i1 = tl.inline_asm_elementwise(
            _SMALL_TABLE_ASM[HALVES], _SMALL_TABLE_OPERANDS,
            [w[0], w[1], w[2], w[3], high[0], high[1], high[2], high[3], high[4], high[5], high[6], high[7],
             low[0], low[1], low[2], low[3], low[4], low[5], low[6], low[7], table[0], table[1], table[2], table[3]],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return i0.to(tl.float32), i1.to(tl.float32)
    else:
        i0, i1 = tl.inline_asm_elementwise(
            _ASM[BITS], _ASM_OPERANDS,
            [w[0], w[1], w[2], w[3], w[4], w[5], w[6], high[0], high[1], high[2], high[3], high[4], high[5], high[6], high[7],
             low[0], low[1], low[2], low[3], low[4], low[5], low[6], low[7]],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return i0.to(tl.float32), i1.to(tl.float32)


@triton.jit
def _ahead(
    q_ptr, scale_ptr, zero_ptr, row, unit, N, K: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, RG: tl.constexpr,
    NG: tl.constexpr,
):  # fmt: skip
    """What is loaded of a row before it is needed: the words, and scales and zero points of both halves, as they are stored."""
    U: tl.constexpr = K // 32
    row = tl.minimum(row, N - 1)
    words = _words(q_ptr, row, unit, U, BITS)
    if NG == 1:
        return words, 0, 0, 0, 0
    else:
        at = row // RG * NG
        there = unit < U
        first, second = at + _group_of(unit, 0, K, NG), at + _group_of(unit, 1, K, NG)
        scale0 = tl.load(scale_ptr + first, mask=there, other=0)
        zero0 = tl.load(zero_ptr + first, mask=there, other=0) if ZERO else scale0
        scale1, zero1 = scale0, zero0
        if K // NG % 32 != 0:
            scale1 = tl.load(scale_ptr + second, mask=there, other=0)
            zero1 = tl.load(zero_ptr + second, mask=there, other=0) if ZERO else scale1
        return words, scale0, zero0, scale1, zero1


@triton.jit
def _group_of(unit, half: tl.constexpr, K: tl.constexpr, NG: tl.constexpr):
    """The group of a half of units of 32, within bounds."""
    return tl.minimum((unit * 2 + half) // (K // NG // 16), NG - 1)


@triton.jit
def _row(
    ahead, row, unit, high, low, table, step, total0, total1, N, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, K: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr,
    NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr,
):  # fmt: skip
    """What each unit adds to the product with a row: (J,)."""
    HALVES: tl.constexpr = NG > 1 and K // NG % 32 != 0
    row = tl.minimum(row, N - 1)
    d0, d1 = _unit_sums(ahead[0], high, low, table, KIND, BITS, HALVES)
    if NG == 1:
        d = (d0 + d1) * step
        zero = tl.load(zero_ptr + row // RG).to(tl.float32) + OFFSET if ZERO else OFFSET
        if ZERO or OFFSET != 0:
            d -= zero * (total0 + total1)
        return d * _scales(scale_ptr, scale2_ptr, zero2_ptr, row, 0, True, RG, NG, NESTED, RG2, NG2)
    elif HALVES:
        d0 = d0 * step - _taken_off(ahead[2], total0, ZERO, OFFSET)
        d1 = d1 * step - _taken_off(ahead[4], total1, ZERO, OFFSET)
        d = d0 * _scale_of(ahead[1], scale2_ptr, zero2_ptr, row, _group_of(unit, 0, K, NG), NG, NESTED, RG2, NG2)
        return d + d1 * _scale_of(ahead[3], scale2_ptr, zero2_ptr, row, _group_of(unit, 1, K, NG), NG, NESTED, RG2, NG2)
    else:
        d = (d0 + d1) * step - _taken_off(ahead[2], total0 + total1, ZERO, OFFSET)
        return d * _scale_of(ahead[1], scale2_ptr, zero2_ptr, row, _group_of(unit, 0, K, NG), NG, NESTED, RG2, NG2)


@triton.jit
def _taken_off(zero, total, ZERO: tl.constexpr, OFFSET: tl.constexpr):
    """Zero points times the sums of x."""
    return (zero.to(tl.float32) + OFFSET) * total if ZERO else OFFSET * total


@triton.jit
def gemv_codes_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over groups of (sum over the group of x * number[n] - zero[n] * sum of x) * scale[n].

    As `gemv_int_kernel` of ampere.py, for units of 32 codes that are BITS words. x is 16-bit fixed point with a step of
    max|x| / 32512 of the unit, in two bytes, which stay in registers; codes become bytes, four at a time, and the sum over half
    of a unit is exact. Entries of a table are integers of one byte, small floats among them, or of 15 bits and a sign.
    A tile is four rows, each of which is a vector over the units: so Triton gives a thread the same units of all.
    """
    U: tl.constexpr = K // 32
    MIXED: tl.constexpr = KIND != _AFFINE and not (NG > 1 and K // NG % 32 != 0)
    first = tl.program_id(0)
    x_ptr += tl.program_id(1) * K  # the tokens after the first
    out_ptr += tl.program_id(1) * N
    unit = tl.arange(0, J)
    after = first * 4
    ahead0 = _ahead(q_ptr, scale_ptr, zero_ptr, after, unit, N, K, BITS, ZERO, RG, NG)
    ahead1 = _ahead(q_ptr, scale_ptr, zero_ptr, after + 1, unit, N, K, BITS, ZERO, RG, NG)
    ahead2 = _ahead(q_ptr, scale_ptr, zero_ptr, after + 2, unit, N, K, BITS, ZERO, RG, NG)
    ahead3 = _ahead(q_ptr, scale_ptr, zero_ptr, after + 3, unit, N, K, BITS, ZERO, RG, NG)

    at = (unit * 32)[:, None, None] + (tl.arange(0, 8) * 4)[None, :, None] + tl.arange(0, 4)[None, None, :]
    x = tl.load(x_ptr + at, mask=(unit < U)[:, None, None], other=0.0).to(tl.float32)
    top = _largest(tl.abs(x))
    i = _fixed_point(x, tl.where(top > 0, 32512.0 / top, 0.0))
    step = top * (1 / 32512)
    # Of each half, less 16 times 0x4B400080, modulo 2**32.
    total0, total1 = tl.split((tl.sum(tl.reshape(i, (J, 2, 16)), 2) + 0x4BFFF800).to(tl.float32) * step[:, None])
    high_bytes, low_bytes = _bytes(i)
    high = _eight_words(tl.reshape(high_bytes, (J, 8)), MIXED)
    low = _eight_words(tl.reshape(low_bytes, (J, 8)), MIXED)
    table = (0,)
    if KIND == _TABLE:
        entries = tl.load(table_ptr + tl.arange(0, 16))
        largest = tl.max(tl.abs(entries), 0)
        step *= largest * (1 / 32512)
        level = (entries * (32512 / largest) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        upper = (level + 128) >> 8  # the high byte, for a low one with a sign
        table = (  # type: ignore[assignment]
            _table_word(upper, 0), _table_word(upper, 1), _table_word(upper, 2), _table_word(upper, 3), _table_word(level, 0),
            _table_word(level, 1), _table_word(level, 2), _table_word(level, 3),
        )  # fmt: skip
    elif KIND == _MINIFLOAT:
        # Multiples of the smallest: 1 / 2 for e2m1, 1 / 4 for e3m0.
        SMALLEST: tl.constexpr = 2.0 ** (2 - 2 ** (EXPONENT - 1) - (3 - EXPONENT))
        level = (_numbers(tl.arange(0, 16), table_ptr, KIND, 4, EXPONENT, False) * (1 / SMALLEST)).to(tl.int32)
        step *= SMALLEST
        table = (  # type: ignore[assignment]
            _table_word(level, 0), _table_word(level, 1), _table_word(level, 2), _table_word(level, 3),
        )  # fmt: skip

    for tile in tl.range(first, tl.cdiv(N, 4), tl.num_programs(0)):
        r = tile * 4
        w0, w1, w2, w3 = ahead0, ahead1, ahead2, ahead3
        after = r + tl.num_programs(0) * 4
        ahead0 = _ahead(q_ptr, scale_ptr, zero_ptr, after, unit, N, K, BITS, ZERO, RG, NG)
        ahead1 = _ahead(q_ptr, scale_ptr, zero_ptr, after + 1, unit, N, K, BITS, ZERO, RG, NG)
        ahead2 = _ahead(q_ptr, scale_ptr, zero_ptr, after + 2, unit, N, K, BITS, ZERO, RG, NG)
        ahead3 = _ahead(q_ptr, scale_ptr, zero_ptr, after + 3, unit, N, K, BITS, ZERO, RG, NG)
        d0 = _row(
            w0, r, unit, high, low, table, step, total0, total1, N, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, K, BITS,
            KIND, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2,
        )  # fmt: skip
        d1 = _row(
            w1, r + 1, unit, high, low, table, step, total0, total1, N, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, K, BITS,
            KIND, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2,
        )  # fmt: skip
        d2 = _row(
            w2, r + 2, unit, high, low, table, step, total0, total1, N, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, K, BITS,
            KIND, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2,
        )  # fmt: skip
        d3 = _row(
            w3, r + 3, unit, high, low, table, step, total0, total1, N, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, K, BITS,
            KIND, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2,
        )  # fmt: skip
        four = tl.join(tl.join(d0, d2), tl.join(d1, d3))  # (J, 2, 2): row 2 a + b at [a, b]
        out = tl.sum(four, 0)
        at_row = r + tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(out_ptr + at_row, out.to(out_ptr.dtype.element_ty), mask=at_row < N)


def reads_one_token(reading: Reading) -> bool:
    """Whether `gemv_codes_kernel` is for such a weight."""
    r = reading
    if r.k > 65536 or (r.nested == "affine" and r.groups % r.outer_groups):
        return False
    if r.kind == "affine":
        return r.bits < 8
    # e2m1 and e3m0 are multiples of their smallest number that a byte holds.
    return r.bits == 4 and (r.kind == "table" or (r.kind == "minifloat" and r.exponent in (2, 3)))


def _gemv_constants(reading: Reading, device: torch.device) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the tile of `gemv_codes_kernel`."""
    units = max(32, power_of_two(reading.k // 32))
    warps = min(16, max(1, units // 32))
    tiles = cdiv(reading.n, 4)
    rounds = cdiv(tiles, multiprocessors(device) * max(1, 16 // warps))
    return (cdiv(tiles, rounds),), {"J": units, "num_warps": warps}


@torch.library.triton_op("ao::gemv_codes", mutates_args={})
def gemv(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None, outer_scale: Tensor | None,
    outer_zero_point: Tensor | None, reading: str,
) -> Tensor:  # fmt: skip
    """One token, for weights of which `reads_one_token`. x: (1, K) -> (1, N)."""
    r = reading_from(reading)
    out = torch.empty(1, r.n, dtype=x.dtype, device=x.device)
    fields = _given((codes, scale, zero_point, table, outer_scale, outer_zero_point))
    grid, tile = _gemv_constants(r, x.device)
    wrap_triton(gemv_codes_kernel)[grid](x, *fields, out, r.n, **r.constants(zero_point is not None), **tile)
    return out


def gemv_launch(reading: Reading, fields: Fields) -> Callable[[Tensor, Fields], Tensor]:
    """`gemv` in eager mode for weights of the form of these, x (..., K) -> (..., N): what it decides is decided once."""
    device, n = fields[0].device, reading.n
    grid, tile = _gemv_constants(reading, device)
    start = Launch(gemv_codes_kernel, grid, **reading.constants(fields[2] is not None), **tile)

    def run(x: Tensor, fields: Fields) -> Tensor:
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
        start(device.index, x, *_given(fields), out, n)
        return out

    return run


def gemv_each(x: Tensor, reading: Reading, fields: Fields) -> Tensor:
    """`gemv` for each of a few tokens, in one launch. x: (M, K), contiguous -> (M, N)."""
    m, n = x.shape[0], reading.n
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    (programs,), tile = _gemv_constants(reading, x.device)
    launch(
        gemv_codes_kernel, (programs, m), x, *_given(fields), out, n, **reading.constants(fields[2] is not None), **tile
    )  # fmt: skip
    return out


# From a weight to its reading.


def reading_of(w: QTensor) -> tuple[Reading, Fields] | None:
    """How the kernels read a weight (N, K), and its fields; None where they cannot."""
    a = w.spec.operand(w) if w.dim() == 2 else None
    if a is None or a.kind == "int4pack" or w.numel() >= 2**31:
        return None
    n, k = (int(size) for size in w.shape)  # int: a graph may have any number of tokens, but one shape of the weight
    scale, nested = _scale_fields(a)
    if scale is None or tuple(a.codes.shape) != (n, k * a.bits // 8) or k * a.bits % 8:
        return None
    rows, groups = (int(size) for size in a.scale.shape)
    group = k // groups
    if n % rows or k % groups or k % 32 or (groups > 1 and group % 16):
        return None
    if a.zero_point is not None and tuple(a.zero_point.shape) != (rows, groups):
        return None
    exponent, kind = a.exponent, a.kind
    if kind == "float":
        exponent = {torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}.get(a.codes.dtype, 0)
        if not exponent:
            return None
    outer = tuple(int(size) for size in nested[1].shape) if nested[0] == "affine" else (1, 1)
    if groups % outer[1] or rows % outer[0]:
        return None
    if not a.codes.is_contiguous() or (a.bits == 8 and a.codes.storage_offset() % 4):  # codes are read as words
        return None
    fields = fields_of(w)
    if not all(t is None or t.is_contiguous() for t in fields):
        return None
    signed = a.codes.dtype == torch.int8
    return Reading(
        n, k, a.bits, kind, exponent, signed, float(a.offset), n // rows, groups, nested[0], n // outer[0], outer[1]
    ), fields


def fields_of(w: QTensor) -> Fields:
    """The fields of a weight of which there is a reading."""
    a = w.spec.operand(w)
    assert a is not None
    scale, (_, outer_scale, outer_zero_point) = _scale_fields(a)
    assert scale is not None
    return a.codes.view(torch.int32), scale, a.zero_point, a.table, outer_scale, outer_zero_point


def _scale_fields(operand: Operand) -> tuple[Tensor | None, tuple[Any, ...]]:
    """The tensor that holds the scales; how, and what else it takes: scale and zero point of the scales."""
    scale = operand.scale
    if operand.powers is not None:
        return operand.powers, ("power", None, None)
    if not isinstance(scale, QTensor):
        if scale.dtype == torch.float8_e4m3fn:
            return scale.view(torch.uint8), ("e4m3", None, None)
        return (scale if scale.dtype.itemsize > 1 else None), ("none", None, None)
    a = scale.spec.operand(scale)
    if a is None or a.bits != 8 or isinstance(a.scale, QTensor) or a.codes.shape != scale.shape:
        return None, ("none", None, None)
    if a.kind == "float" and a.codes.dtype == torch.float8_e4m3fn and a.scale.numel() == 1:
        return a.codes.view(torch.uint8), ("scaled", a.scale, None)
    if a.kind == "affine" and a.zero_point is not None:
        return a.codes, ("affine", a.scale, a.zero_point)
    return None, ("none", None, None)
