"""The Triton kernel for one token and integers of any format: see template.py. Tables and small floats, which this module is
called for as well, are for one_token_mma.py."""

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
from .read_once import _fetched, _no_later
from .reading import Fields, Reading
from .several import of_three
from .template import _E4M3, _FIXED, _PLAIN, _column_of, _outer, _scale_of, given


def _integers_asm(bits: int, signed: bool = False) -> str:
    """32 codes in `bits` words, times 16-bit numbers given as words of bytes: the sums over either half.

    Operands: 8 words of codes, of which the first `bits` count; 8 words of high bytes and 8 of low ones of what they meet. Word g
    of these meets codes 4 g to 4 g + 3, which are one byte each of one word per section (bits.py), at the same bits of all four.
    """
    lines = ["{ .reg .b32 c, t, a0, b0, a1, b1; mov.b32 a0, 0; mov.b32 b0, 0; mov.b32 a1, 0; mov.b32 b1, 0;"]
    kind, codes = f"dp4a.{'s' if signed else 'u'}32.s32", "c"
    for g in range(8):
        half = g // 4
        if bits == 8:
            codes = f"${2 + g}"
        else:
            lines += _sections(bits, g)
        lines.append(f"{kind} a{half}, {codes}, ${10 + g}, a{half}; {kind} b{half}, {codes}, ${18 + g}, b{half};")
    lines.append("shl.b32 a0, a0, 8; add.s32 $0, a0, b0; shl.b32 a1, a1, 8; add.s32 $1, a1, b1; }")
    return " ".join(lines)


def _sections(bits: int, g: int) -> list[str]:
    """The codes 4 g to 4 g + 3 of a unit, one byte each, to c. The words are operands 2 and above."""
    lines, first = [], 0
    for section in (4, 2, 1):
        if not bits & section:
            continue
        word, shift = f"${2 + first + g % section}", g // section * section - first
        mask = f"0x{(2**section - 1 << first) * 0x01010101:08x}"
        move = f"shr.u32 t, {word}, {shift}; " if shift > 0 else f"shl.b32 t, {word}, {-shift}; " if shift else ""
        source = "t" if shift else word
        together = f"lop3.b32 c, {source}, {mask}, c, 0xEA;" if first else f"and.b32 c, {source}, {mask};"
        lines.append(move + together)
        first += section
    return lines


_ASM = tl.constexpr((*("" if bits == 0 else _integers_asm(bits) for bits in range(9)), _integers_asm(8, signed=True)))
_ASM_OPERANDS = tl.constexpr("=r,=r" + ",r" * 24)


@triton.jit
def _words(q_ptr, row, unit, K: tl.constexpr, BITS: tl.constexpr):
    """The words of 32 codes of a row, (J,) each; those beyond BITS are the first. They are read once."""
    U: tl.constexpr = (K + 31) // 32
    at = q_ptr + row * (K * BITS // 32)
    J: tl.constexpr = unit.shape[0]
    if BITS == 4 and K % 32 != 0:  # rows are multiples of 8 bytes, and the last unit has as many
        at = at + (unit * 4)[:, None] + tl.arange(0, 2)[None, :]
        w0, w1 = tl.split(tl.load(at, mask=(unit < U)[:, None], other=0, eviction_policy="evict_first"))
        w2, w3 = tl.split(tl.load(at + 2, mask=(unit < K // 32)[:, None], other=0, eviction_policy="evict_first"))
        return w0, w1, w2, w3, w0, w0, w0, w0
    elif BITS == 4:
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
        if K % 32 != 0:
            there = (unit < K // 32)[:, None]
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
def _eight_words(words):
    """(J, 8) words of x -> 8 of (J,)."""
    return (
        _word_of(words, 0), _word_of(words, 1), _word_of(words, 2), _word_of(words, 3), _word_of(words, 4),
        _word_of(words, 5), _word_of(words, 6), _word_of(words, 7),
    )  # fmt: skip


@triton.jit
def _word_of(words, g: tl.constexpr):
    """Column g of (J, 8)."""
    return tl.sum(tl.where(tl.arange(0, 8)[None, :] == g, words, 0), 1)


@triton.jit
def _unit_sums(w, high, low, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """The sums over both halves of units of 32 codes, float32: (J,) each."""
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
    U: tl.constexpr = (K + 31) // 32
    row = tl.minimum(row, N - 1)
    words = _words(q_ptr, row, unit, K, BITS)
    if NG == 1:
        scale = tl.load(scale_ptr + row // RG)
        zero = _zero_at(zero_ptr + row // RG) if ZERO else scale
        return words, scale, zero, scale, zero, _outer(scale2_ptr, zero2_ptr, row, 0, NG, NESTED, RG2, NG2), (0,)
    elif K // NG == 16 and NG % 2 == 0 and (NESTED == _PLAIN or NESTED == _E4M3):  # noqa: SIM109
        at = row // RG * NG
        scale0, scale1 = _of_both_halves(scale_ptr + at, unit, U)
        zero0, zero1 = scale0, scale1
        if ZERO and zero_ptr.dtype.element_ty.primitive_bitwidth == 8:
            first = at + _group_of(unit, 0, K, NG)
            zero0, zero1 = _zero_at(zero_ptr + first), _zero_at(zero_ptr + first + 1)
        elif ZERO:
            zero0, zero1 = _of_both_halves(zero_ptr + at, unit, U)
        return words, scale0, zero0, scale1, zero1, (0,), (0,)
    else:
        at = row // RG * NG
        there = unit < U
        first, second = at + _group_of(unit, 0, K, NG), at + _group_of(unit, 1, K, NG)
        scale0 = tl.load(scale_ptr + first, mask=there, other=0)
        zero0 = _zero_at(zero_ptr + first) if ZERO else scale0
        outer0 = _outer(scale2_ptr, zero2_ptr, row, _group_of(unit, 0, K, NG), NG, NESTED, RG2, NG2)
        scale1, zero1, outer1 = scale0, zero0, outer0
        if K // NG % 32 != 0:
            scale1 = tl.load(scale_ptr + second, mask=there, other=0)
            zero1 = _zero_at(zero_ptr + second) if ZERO else scale1
            outer1 = _outer(scale2_ptr, zero2_ptr, row, _group_of(unit, 1, K, NG), NG, NESTED, RG2, NG2)
        return words, scale0, zero0, scale1, zero1, outer0, outer1


@triton.jit
def _zero_at(at):
    """Zero points as they are stored. Of one byte each has a register: the compiler would wait for two to put them in one."""
    if at.dtype.element_ty.primitive_bitwidth == 8:
        return _fetched(at, EARLY=True)
    else:
        return tl.load(at)


@triton.jit
def _of_both_halves(at, unit, U: tl.constexpr):
    """What is stored of the groups of both halves of units, at once. at: where a row begins."""
    J: tl.constexpr = unit.shape[0]
    half = tl.arange(0, 2 * J)
    return tl.split(tl.reshape(tl.load(at + half, mask=half < 2 * U, other=0), (J, 2)))


@triton.jit
def _group_of(unit, half: tl.constexpr, K: tl.constexpr, NG: tl.constexpr):
    """The group of a half of units of 32, within bounds."""
    return tl.minimum((unit * 2 + half) // (K // NG // 16), NG - 1)


@triton.jit
def _row(
    ahead, high, low, step, total0, total1, K: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """What each unit adds to the product with a row: (J,). ahead: of `_ahead`."""
    d0, d1 = _unit_sums(ahead[0], high, low, BITS, SIGNED)
    if NG > 1 and K // NG % 32 != 0:
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
    if ZERO:
        return (zero_number(zero, BITS) + OFFSET) * total
    elif OFFSET != 0:
        return OFFSET * total
    else:
        return 0.0


@triton.jit
def _gemv_codes(
    x_ptr, q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, out_ptr, N, first, programs, K: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr,
    J: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over groups of (sum over the group of x * number[n] - zero[n] * sum of x) * scale[n], by program `first` of
    `programs`.

    As `gemv_int_kernel` of ampere.py, for units of 32 codes that are BITS words. x is 16-bit fixed point with a step of
    max|x| / 32512 of the unit, in two bytes, which stay in registers; codes become bytes, four at a time, and the sum over half
    of a unit is exact.
    A tile is four rows, each of which is a vector over the units: so Triton gives a thread the same units of all.
    """
    unit = tl.arange(0, J)
    # What is needed first is asked for first.
    word, byte = (tl.arange(0, 8) * 4)[None, :, None], tl.arange(0, 4)[None, None, :]
    if K % 32 == 0:
        column, in_row = (unit * 32)[:, None, None] + word + byte, (unit < K // 32)[:, None, None]
    else:
        column, in_row = _column_of(unit[:, None, None], word + byte, K, BITS)
    x = tl.load(x_ptr + column, mask=in_row, other=0.0)
    ahead = ()
    for k in tl.static_range(4):
        row = first * 4 + k
        ahead += (  # type: ignore[assignment]
            _ahead(q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, unit, N, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2),
        )  # fmt: skip
    _no_later()

    x = x.to(tl.float32)
    top = _largest(tl.abs(x))
    i = _fixed_point(x, tl.where(top > 0, 32512.0 / top, 0.0))
    step = top * (1 / 32512)
    # Of each half, less 16 times 0x4B400080, modulo 2**32.
    total0, total1 = tl.split((tl.sum(tl.reshape(i, (J, 2, 16)), 2) + 0x4BFFF800).to(tl.float32) * step[:, None])
    high_bytes, low_bytes = _bytes(i)
    high = _eight_words(tl.reshape(high_bytes, (J, 8)))
    low = _eight_words(tl.reshape(low_bytes, (J, 8)))
    if KIND == _FIXED:
        step *= 2.0 ** (EXPONENT + 1 - BITS)

    for tile in tl.range(first, tl.cdiv(N, 4), programs):
        r = tile * 4
        sums = ()
        for k in tl.static_range(4):
            one = ahead[0]  # type: ignore[misc]
            d = tl.zeros((J,), tl.float32)
            # It always is, or there is no such row. Because the assembler cannot know, it asks for this row of the next tile
            # before it goes on; it would put that off to the end of all rows.
            if k < N:
                d = _row(one, high, low, step, total0, total1, K, BITS, SIGNED, ZERO, OFFSET, NG, NESTED)
                after = r + programs * 4 + k
                one = _ahead(
                    q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, after, unit, N, K, BITS, ZERO, RG, NG, NESTED, RG2,
                    NG2,
                )  # fmt: skip
                _no_later()
            sums += (d,)  # type: ignore[assignment]
            ahead = ahead[1:] + (one,)  # type: ignore[assignment] # noqa: RUF005
        d0, d1, d2, d3 = sums  # type: ignore[misc]
        four = tl.join(tl.join(d0, d2), tl.join(d1, d3))  # (J, 2, 2): row 2 a + b at [a, b]
        out = tl.sum(four, 0)
        at_row = r + tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(out_ptr + at_row, out.to(out_ptr.dtype.element_ty), mask=at_row < N)


@triton.jit
def gemv_codes_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """`_gemv_codes` of one weight, for each token."""
    token = tl.program_id(1)
    _gemv_codes(
        x_ptr + token * K, q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, out_ptr + token * N, N,
        tl.program_id(0), tl.num_programs(0), K, BITS, KIND, EXPONENT, SIGNED, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, J,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n0", "n1", "n2", "p0", "p1", "p2"])
def gemv_codes_joined_kernel(
    x_ptr, out_ptr, q0, scale0, zero0, table0, outer0, outer_zero0, n0, p0, q1, scale1, zero1, table1, outer1, outer_zero1,
    n1, p1, q2, scale2, zero2, table2, outer2, outer_zero2, n2, p2, K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, RG: tl.constexpr,
    NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """`_gemv_codes` of two or three weights one below the other, of n rows and with p programs each; of two, p2 is 0."""
    i = tl.program_id(0)
    first, second = p0, p0 + p1
    _gemv_codes(
        x_ptr, of_three(i, first, second, q0, q1, q2), of_three(i, first, second, scale0, scale1, scale2),
        of_three(i, first, second, zero0, zero1, zero2), of_three(i, first, second, outer0, outer1, outer2),
        of_three(i, first, second, outer_zero0, outer_zero1, outer_zero2),
        out_ptr + of_three(i, first, second, 0, n0, n0 + n1), of_three(i, first, second, n0, n1, n2),
        i - of_three(i, first, second, 0, first, second), of_three(i, first, second, p0, p1, p2), K, BITS, KIND, EXPONENT,
        SIGNED, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, J,
    )  # fmt: skip


def _gemv_constants(
    k: int, rows: Sequence[int], device: torch.device, tokens: int = 1
) -> tuple[list[int], dict[str, Any]]:
    """The programs of each weight (rows, k) of a launch and the tile of `_gemv_codes`. A multiprocessor has some 20 warps at a
    time. Where several `tokens` run side by side, each on its part of the GPU, the programs are those of one."""
    units = max(32, power_of_two(cdiv(k, 32)))
    warps = min(16, max(1, units // 32))
    tiles = [cdiv(n, 4) for n in rows]
    at_once = max(1, multiprocessors(device) * max(1, 20 // warps) // tokens)
    rounds = cdiv(sum(tiles), at_once)
    while sum(cdiv(t, rounds) for t in tiles) > max(
        at_once, len(tiles)
    ):  # each weight has a last program that is done sooner
        rounds += 1
    # More registers would be those of warps that are to be there at the same time.
    return [cdiv(t, rounds) for t in tiles], {"J": units, "num_warps": warps, "registers": 96 if warps <= 4 else 128}


def gemv_launch(reading: Reading, fields: Fields) -> Callable[[Tensor, Fields], Tensor]:
    """One token, for weights of the form of these, x (..., K) -> (..., N): what it decides is decided once."""
    if not reading.in_integers:
        return one_token_mma.gemv_launch(reading, fields)
    device, n = fields[0].device, reading.n
    programs, tile = _gemv_constants(reading.k, [n], device)
    start = Launch(gemv_codes_kernel, tuple(programs), **reading.constants(fields[2] is not None), **tile)

    def run(x: Tensor, fields: Fields) -> Tensor:
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
        start(device.index, x, *given(fields), out, n)
        return out

    return run


def gemv_each(x: Tensor, reading: Reading, fields: Fields) -> Tensor:
    """One token, or each of a few in one launch, for weights whose reading is `for_one_token`. x: (M, K) -> (M, N)."""
    if not reading.in_integers:
        return one_token_mma.gemv(x, reading, fields)
    m, n = x.shape[0], reading.n
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    (programs,), tile = _gemv_constants(reading.k, [n], x.device)
    launch(
        gemv_codes_kernel, (programs, m), x, *given(fields), out, n, **reading.constants(fields[2] is not None), **tile
    )  # fmt: skip
    return out


def gemv_joined(x: Tensor, reading: Reading, weights: Sequence[Fields]) -> Tensor:
    """One token and two or three weights in one launch, whose readings are the same but for n: x (1, K) -> (1, N) for the sum of
    their rows."""
    if not reading.in_integers:
        return one_token_mma.gemv_joined(x, reading, weights)
    rows = tuple(fields[0].shape[0] for fields in weights)
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
    programs, tile = _gemv_constants(reading.k, rows, device)
    constants = reading.constants(dtypes[3] is not None) | tile
    return Launch(gemv_codes_joined_kernel, (sum(programs),), **constants), programs
