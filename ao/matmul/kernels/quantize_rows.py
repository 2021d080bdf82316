"""Triton kernels that quantize an activation to int8 or float8 e4m3, a scale for each row or one for all, on Hopper.

Memory bounds them only if little is done to a number and much is on its way: numbers are kept as they come, two of 16 bits in a
word, and each warp has as much of a row as fits in few registers.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import multiprocessors
from .launch import Launch, cdiv

FUNCTIONS = {
    "gelu": (1.59268828, 0.0757802666, -9.80643607e-4, 8.83877912e-6),
    "gelu_tanh": (1.5957691216, 0.0713548162726),
    "quick_gelu": (1.702,),
    "silu": (1.0,),
}
"""What may be done to an activation before it is quantized: f(x) = x / (1 + exp(-p(x))), by the odd coefficients of p.

That of GELU is fitted to log(Phi(x) / Phi(-x)), Phi being the normal distribution: f is right to 1.3e-3 of itself where x > -4,
and to 1.6e-4 everywhere. (Rounding to bfloat16 loses as much as 2e-3.) That of its approximation by tanh is exact.
"""

_LARGEST_ASM = tl.constexpr("{ .reg .b32 t; and.b32 t, $2, 0x7fff7fff; max.u16x2 $0, $1, t; }")
"""The larger ones of two numbers each, without their signs; NaN is the largest."""


def _two(half: bool, a: str, b: str, word: str) -> str:
    """Both numbers of a word as float32."""
    if half:
        return f"mov.b32 {{h0, h1}}, {word}; cvt.f32.f16 {a}, h0; cvt.f32.f16 {b}, h1;"
    return f"shl.b32 t, {word}, 16; mov.b32 {a}, t; and.b32 t, {word}, 0xffff0000; mov.b32 {b}, t;"


def _hex(number: float) -> str:
    """A float32 in PTX."""
    return "0f" + struct.pack(">f", number).hex()


@functools.cache
def _function_asm(half: bool, function: str, gated: bool) -> str:
    """f of both numbers of word $1, times those of word $2 where it is gated."""
    lines = ["{ .reg .f32 a, b, c, d, s, p; .reg .b32 t; .reg .b16 h0, h1;", _two(half, "a", "b", "$1")]
    last, *others = (_hex(-c / math.log(2)) for c in reversed(FUNCTIONS[function]))
    for x in "ab":
        if others:
            lines.append(f"mul.f32 s, {x}, {x}; mov.f32 p, {last};")
            lines += [f"fma.rn.f32 p, p, s, {c};" for c in others]
            lines.append(f"mul.f32 p, p, {x};")
        else:
            lines.append(f"mul.f32 p, {x}, {last};")
        lines.append(
            f"ex2.approx.ftz.f32 p, p; add.f32 p, p, 0f3F800000; rcp.approx.ftz.f32 p, p; mul.f32 {x}, {x}, p;"
        )
    if gated:
        lines += [_two(half, "c", "d", "$2"), "mul.f32 a, a, c; mul.f32 b, b, d;"]
    return " ".join([*lines, f"cvt.rn.{'f16x2' if half else 'bf16x2'}.f32 $0, b, a; }}"])


@functools.cache
def _codes_asm(half: bool, float8: bool) -> str:
    """The four codes of the numbers of words $1 and $2, times $3: of int8 rounded half to even, by a sum that has no bits to the
    right of the point."""
    lines = [
        "{ .reg .f32 a, b, c, d; .reg .b32 t; .reg .b16 h0, h1;",
        _two(half, "a", "b", "$1"),
        _two(half, "c", "d", "$2"),
    ]
    lines += [f"mul.f32 {x}, {x}, $3;" for x in "abcd"]
    if float8:
        lines.append(
            "cvt.rn.satfinite.e4m3x2.f32 h0, b, a; cvt.rn.satfinite.e4m3x2.f32 h1, d, c; mov.b32 $0, {h0, h1}; }"
        )
        return " ".join(lines)
    lines += [f"min.f32 {x}, {x}, {_hex(127.0)}; add.f32 {x}, {x}, {_hex(12582912.0)};" for x in "abcd"]
    lines.append(".reg .b32 u, v, w, z; mov.b32 u, a; mov.b32 v, b; mov.b32 w, c; mov.b32 z, d;")
    lines.append("prmt.b32 u, u, v, 0x0040; prmt.b32 w, w, z, 0x0040; prmt.b32 $0, u, w, 0x5410; }")
    return " ".join(lines)


@triton.jit
def _number(magnitude, HALF: tl.constexpr):
    """What `_LARGEST_ASM` has found in the lower half of a word, as float32."""
    if HALF:
        number = magnitude.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        number = (magnitude << 16).to(tl.float32, bitcast=True)
    return number


@triton.jit
def _larger(top, words):
    """The larger ones of magnitudes, two in a word, and of numbers."""
    return tl.inline_asm_elementwise(_LARGEST_ASM, "=r,r,r", [top, words], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["SIZE"])
def largest_kernel(words_ptr, top_ptr, SIZE, B: tl.constexpr):
    """The largest magnitude of the program's share of SIZE times four words of two numbers, as an integer of 16 bits."""
    gdc_launch_dependents()
    at = tl.arange(0, B)
    top = tl.zeros((B,), tl.int32)
    for start in tl.range(tl.program_id(0).to(tl.int64) * B, SIZE * 4, tl.num_programs(0) * B, loop_unroll_factor=4):
        top = _larger(top, tl.load(words_ptr + start + at, mask=start // 4 + at // 4 < SIZE, other=0))
    tl.store(top_ptr + tl.program_id(0), tl.max(tl.maximum(top & 0xFFFF, (top >> 16) & 0xFFFF), 0))


@triton.jit
def _words(row, at, FIRST: tl.constexpr, LAST: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr):
    """Of the WORDS words of rows, WIDTH at a time, those from FIRST to LAST, and zeros for the others. row: where word 0 is or
    would be, (ROWS, 1). at: (1, WIDTH)."""
    words = ()
    for i in tl.static_range((WORDS + WIDTH - 1) // WIDTH):
        if WIDTH * i >= FIRST and WIDTH * (i + 1) <= LAST:
            word = tl.load(row + (WIDTH * i + at))
        elif WIDTH * i >= FIRST:
            word = tl.load(row + (WIDTH * i + at), mask=at < LAST - WIDTH * i, other=0)
        else:
            there = (at >= FIRST - WIDTH * i) & (at < LAST - WIDTH * i)
            word = tl.load(row + (WIDTH * i + at), mask=there, other=0)
        words += (word,)  # type: ignore[assignment]
    return words


@triton.jit
def _largest(words, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The largest magnitude of each of ROWS rows, as `largest_kernel` gives it. words: of the rows, WIDTH at a time."""
    tops = tl.zeros((ROWS, WIDTH), tl.int32)
    for i in tl.static_range(len(words)):
        tops = _larger(tops, words[i])
    return tl.max(tl.maximum(tops & 0xFFFF, (tops >> 16) & 0xFFFF), 1)


@triton.jit
def _store_codes(
    words, top, codes_ptr, scale_ptr, M, WORDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, FLOAT: tl.constexpr,
    HALF: tl.constexpr, CODES_ASM: tl.constexpr,
):  # fmt: skip
    """The codes and scales of the ROWS rows of a program, whose largest magnitudes are `top`."""
    m = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), M - 1)[:, None]
    at = tl.arange(0, WIDTH)[None, :]
    row = m.to(tl.int64)
    scale = _number(top, HALF) * (1 / 448 if FLOAT else 1 / 127.5)
    inverse = tl.where(scale < 1.1754943508222875e-38, 0.0, (1.0 / scale.to(tl.float64)).to(tl.float32))[:, None]
    for i in tl.static_range(len(words)):
        codes = tl.inline_asm_elementwise(
            CODES_ASM, "=r,r,r,f,f", [words[i], inverse], dtype=tl.int16, is_pure=True, pack=2
        )
        to = codes_ptr + row * WORDS + (WIDTH * i + at)
        if WIDTH * (i + 1) <= WORDS:
            tl.store(to, codes)
        else:
            tl.store(to, codes, mask=at < WORDS - WIDTH * i)
    tl.store(scale_ptr + tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), M - 1), scale)


@triton.jit(do_not_specialize=["M", "TOPS"])
def quantize_kernel(
    words_ptr, other_ptr, before_ptr, top_ptr, codes_ptr, scale_ptr, M, TOPS, WORDS: tl.constexpr, BEFORE: tl.constexpr,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, FLOAT: tl.constexpr, HALF: tl.constexpr,
    WHOLE: tl.constexpr, GATED: tl.constexpr, FUNCTION_ASM: tl.constexpr, CODES_ASM: tl.constexpr,
):  # fmt: skip
    """ROWS rows of f(x), times `other` where it is GATED, as `Intx(8)` or `Float8()` quantizes them: codes (M, K), scale (M,).

    A row has WORDS words of two numbers, WIDTH of which are loaded at a time: BEFORE of them are those of `before`, then those of
    f(x). A row of x and of `other` is STRIDE words after the row before. FUNCTION_ASM: f, or nothing.
    WHOLE: with one scale for all of x, from the TOPS (at most 1024) numbers of `largest_kernel`.
    """
    PIECES: tl.constexpr = (WORDS + WIDTH - 1) // WIDTH
    gdc_launch_dependents()
    m = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), M - 1)[:, None]  # the last row may be done twice
    at = tl.arange(0, WIDTH)[None, :]
    row = m.to(tl.int64)
    words = _words(words_ptr + (row * STRIDE - BEFORE), at, BEFORE, WORDS, WORDS, WIDTH)
    others = words
    if GATED:
        others = _words(other_ptr + (row * STRIDE - BEFORE), at, BEFORE, WORDS, WORDS, WIDTH)
    if FUNCTION_ASM != "":
        first = words
        if BEFORE > 0:
            first = _words(before_ptr + row * BEFORE, at, 0, BEFORE, WORDS, WIDTH)
        done = ()
        for i in tl.static_range(PIECES):
            if WIDTH * (i + 1) <= BEFORE:
                word = first[i]
            else:
                word = tl.inline_asm_elementwise(
                    FUNCTION_ASM, "=r,r,r", [words[i], others[i]], dtype=tl.int32, is_pure=True, pack=1
                )
                if WIDTH * i < BEFORE:
                    word |= first[i]  # f(0) is 0
            done += (word,)  # type: ignore[assignment]
        words = done
    if WHOLE:
        i = tl.arange(0, 1024)
        gdc_wait()
        top = tl.zeros((ROWS,), tl.int32) + tl.max(tl.load(top_ptr + i, mask=i < TOPS, other=0), 0)
    else:
        top = _largest(words, ROWS, WIDTH)
    _store_codes(words, top, codes_ptr, scale_ptr, M, WORDS, ROWS, WIDTH, FLOAT, HALF, CODES_ASM)


def quantized(
    x: Tensor,
    dtype: torch.dtype,
    whole: bool,
    function: str = "",
    other: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (M, K) of 16 bits, K % 8 == 0, quantized to int8 or float8 e4m3, as `Intx(8)` or `Float8()` do.

    Returns the codes (M, K) and the scales (M, 1).

    whole: with one scale for all of x, which is then the scale of every row.
    function: one of `FUNCTIONS`; not "": f(x), times `other` (M, K) if there is one, rounded to x's dtype, is quantized, and then
        not as a whole. Both may be columns of a larger matrix.
    before: (M, J), J % 8 == 0, of x's dtype; rows of both, one after the other, (M, J + K), are quantized. With a function.
    """
    m, k = x.shape
    device = x.device.index
    given = (x,) if other is None else (x, other)
    stride = x.stride(0) if m > 1 else k
    apart = any(t.data_ptr() % 16 or t.stride(1) != 1 or (m > 1 and t.stride(0) != stride) for t in given)
    if apart or stride % 8 or (whole and stride != k):
        x, *others = (t.clone(memory_format=torch.contiguous_format) for t in given)
        other, stride = (others[0] if others else None), k
    first = 0 if before is None else before.shape[1]
    if before is not None and (before.data_ptr() % 16 or not before.is_contiguous()):
        before = before.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(m, first + k, dtype=dtype, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    largest, quantize, count = _launches(
        m, k, stride, first, dtype, x.dtype, whole, function, other is not None, device
    )
    tops = scale
    if whole:
        tops = torch.empty(count, dtype=torch.int32, device=x.device)
        largest(device, x, tops, m * k // 8)
    quantize(device, x, x if other is None else other, x if before is None else before, tops, codes, scale, m, count)
    return codes, scale


class Share(NamedTuple):
    """rows, warps: of a program, as many warps for each row. width: words of a row that are loaded at a time, four a thread."""

    rows: int
    warps: int
    width: int


@functools.cache
def share_of(words: int) -> Share:
    """For rows of so many words: as few warps for a row as have 20 words of it or fewer in each thread."""
    each = 1
    while each < 16 and words > 5 * 128 * each:
        each *= 2
    return Share(max(1, 4 // each), max(4, each), 128 * each)


@functools.lru_cache(4096)
def _launches(
    m: int, k: int, stride: int, before: int, dtype: torch.dtype, x: torch.dtype, whole: bool, function: str, gated: bool,
    device: int,
) -> tuple[Launch, Launch, int]:  # fmt: skip
    block = 2048
    count = min(cdiv(m * k, 2 * block), 4 * multiprocessors(torch.device("cuda", device)), 1024) if whole else 0
    largest = Launch(largest_kernel, (count,), num_warps=8, views={0: torch.int32}, B=block)
    words = (before + k) // 2
    half, float8, share = x == torch.float16, dtype.is_floating_point, share_of(words)
    quantize = Launch(
        quantize_kernel, (cdiv(m, share.rows),), num_warps=share.warps, early=whole,
        views={0: torch.int32, 1: torch.int32, 2: torch.int32, 4: torch.int16}, WORDS=words, BEFORE=before // 2,
        STRIDE=stride // 2, ROWS=share.rows, WIDTH=share.width, FLOAT=float8, HALF=half, WHOLE=whole, GATED=gated,
        FUNCTION_ASM=_function_asm(half, function, gated) if function else "", CODES_ASM=_codes_asm(half, float8),
    )  # fmt: skip
    return largest, quantize, count
