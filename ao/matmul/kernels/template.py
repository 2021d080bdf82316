"""Triton kernels for a weight in any format that has an operand: a decoder to memory, and what such kernels share.

ampere.py and hopper.py are for integers of 4 and 8 bits and float8, in which each step is laid out by hand. Here, for one token
in one_token.py and one_token_mma.py and for a few in slices_of_k.py and few_tokens.py, are the same products for codes of 1 to 8
bits of every kind, integers, small floats and tables, with scales per group of 16 or more, per row, per block of rows or for all,
and scales that are quantized themselves. What a format is comes in as constants, a `Reading` (reading.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .joint_words import scale_number, zero_number
from .launch import Launch, cdiv, launch, power_of_two
from .reading import KINDS, NESTED, Fields, Reading

_AFFINE, _TABLE, _MINIFLOAT, _FLOAT, _FIXED = (tl.constexpr(i) for i in range(len(KINDS)))
_PLAIN, _E4M3, _SCALED, _POWER, _INTEGERS = (tl.constexpr(i) for i in range(len(NESTED)))


def given(fields: Fields) -> list[Tensor]:
    """The fields as a kernel takes them: the codes in the place of what is not there."""
    return [fields[0] if t is None else t for t in fields]


# Codes and scales, to numbers.


@triton.jit
def _column_of(chunk, code, K: tl.constexpr, BITS: tl.constexpr):
    """The column of a code of a chunk, and whether it is there.

    Of half a chunk at the end of rows of K % 32 == 16 the words are the first ones of a chunk: 16 codes of 8 bits, or of 4 bits
    eight and those that go above them, where a whole chunk has 16 to 23 (bits.py).
    """
    if K % 32 == 0:
        return chunk * 32 + code, chunk < K // 32
    else:
        half = chunk == K // 32
        first = code < 16 if BITS == 8 else code % 16 < 8
        place = code if BITS == 8 else tl.where(half, code // 16 * 8 + code % 8, code)
        return chunk * 32 + place, (chunk < K // 32) | (half & first)


@triton.jit
def _section(q_ptr, row, chunk, there, K: tl.constexpr, BITS: tl.constexpr, S: tl.constexpr, FIRST: tl.constexpr):
    """S bits of the codes of chunks of rows, which are bits FIRST and above of them: (R, 32 C) int32.

    Element e of a chunk is in word e // 4 % S of the section, in byte e % 4 of that, at bit e // 4 // S * S (bits.py). So
    each bit of e, from the highest on, doubles the tensor by another word or another shift: all within a thread.
    """
    R: tl.constexpr = row.shape[0]
    C: tl.constexpr = chunk.shape[0]
    at = q_ptr + ((row * (K * BITS // 32))[:, None] + (chunk * BITS + FIRST)[None, :])
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
        if K % 32 == 0:
            mask = mask[:, :, None]
        else:
            mask = (chunk * S)[None, :, None] + tl.arange(0, S)[None, None, :] < K * S // 32
        w = tl.load(at[:, :, None] + tl.arange(0, S)[None, None, :], mask=mask, other=0)
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
    elif KIND == _FIXED:
        # Likewise, where the last place of a float is that of the numbers.
        SIGN: tl.constexpr = 2 ** (BITS - 1)
        LAST: tl.constexpr = 24 - BITS + EXPONENT
        base = (code ^ SIGN) | ((127 + LAST) << 23)
        return base.to(tl.float32, bitcast=True) - (2.0**LAST + 2.0**EXPONENT)
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
    return _scale_of(scale, _outer(scale2_ptr, zero2_ptr, row, group, NG, NESTED, RG2, NG2), NESTED)


@triton.jit
def _outer(
    scale2_ptr, zero2_ptr, row, group, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr
):  # fmt: skip
    """The scale of scales, and their zero point, as they are stored. group: may be beyond the last."""
    if NESTED == _SCALED:
        return (tl.load(scale2_ptr),)
    elif NESTED == _INTEGERS:
        outer = row // RG2 * NG2
        if NG2 > 1:
            outer += tl.minimum(group, NG - 1) // (NG // NG2)
        return tl.load(scale2_ptr + outer), tl.load(zero2_ptr + outer)
    else:
        return (0,)


@triton.jit
def _scale_of(scale, outer, NESTED: tl.constexpr):
    """Scales as they are stored -> float32. outer: of `_outer`."""
    if NESTED == _PLAIN:
        return scale_number(scale)
    elif NESTED == _POWER:
        code = scale.to(tl.int32)
        return (tl.where(code == 0, 1 << 22, code << 23) | (code == 255)).to(tl.float32, bitcast=True)
    elif NESTED == _E4M3:
        return _e4m3(scale.to(tl.int32))
    elif NESTED == _SCALED:
        return _e4m3(scale.to(tl.int32)) * outer[0].to(tl.float32)
    else:
        return (scale.to(tl.float32) - outer[1].to(tl.float32)) * outer[0].to(tl.float32)


@triton.jit
def _zeros(
    zero_ptr, row, group, there, BITS: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """What to take off the codes of groups of rows, float32."""
    if ZERO:
        return zero_number(tl.load(zero_ptr + (row // RG * NG + group), mask=there, other=0), BITS) + OFFSET
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
    value = _numbers(
        _codes(q_ptr, row, chunk, chunk < (K + 31) // 32, K, BITS), table_ptr, KIND, BITS, EXPONENT, SIGNED
    )
    run = first + tl.arange(0, BK // RUN) * RUN
    group = (run // (K // NG))[None, :]
    there = (run < (K + 31) // 32 * 32)[None, :]
    if K % 32 != 0:
        group = tl.minimum(group, NG - 1)
    value = tl.reshape(value, (BN, BK // RUN, RUN))
    if ZERO or OFFSET != 0:
        value -= _zeros(zero_ptr, row[:, None], group, there, BITS, RG, NG, ZERO, OFFSET)[:, :, None]
    value *= _scales(scale_ptr, scale2_ptr, zero2_ptr, row[:, None], group, there, RG, NG, NESTED, RG2, NG2)[:, :, None]
    k = first + tl.arange(0, BK)
    out = tl.reshape(value, (BN, BK)).to(out_ptr.dtype.element_ty)
    IN_PLACE: tl.constexpr = K // 32 * 32 if BITS == 4 else K
    tl.store(out_ptr + rn[:, None] * K + k[None, :], out, mask=(rn < N)[:, None] & (k < IN_PLACE)[None, :])
    if IN_PLACE < K:  # noqa: SIM102
        if first + BK > IN_PLACE:
            column, in_row = _column_of(k // 32, k % 32, K, BITS)
            of_half = in_row & (k >= IN_PLACE)
            tl.store(out_ptr + rn[:, None] * K + column[None, :], out, mask=(rn < N)[:, None] & of_half[None, :])


def _run(reading: Reading, most: int) -> int:
    """How many elements from a multiple of that many on are in one group: a power of two, `most` or less."""
    return most if reading.by_row else min(most, reading.group & -reading.group)


def decoded(reading: Reading, fields: Fields, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) as `dtype`."""
    out = torch.empty(reading.n, reading.k, dtype=dtype, device=fields[0].device)
    if out.numel():
        grid, constants = _decode_kernel(reading, fields)
        launch(decode_any_kernel, grid, *given(fields), out, reading.n, **constants)
    return out


def _decode_kernel(reading: Reading, fields: Fields) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid and the constants of `decode_any_kernel`."""
    wide = max(32, min(512, power_of_two(reading.k)))
    height = 4096 // wide
    known = reading.constants(fields[2] is not None)
    return (cdiv(reading.n, height), cdiv(reading.k, wide)), {
        **known, "BN": height, "BK": wide, "RUN": _run(reading, wide), "num_warps": 8,
    }  # fmt: skip


def decode_launch(dtype: torch.dtype, reading: Reading, fields: Fields) -> Callable[..., Tensor]:
    """x @ decoded(w).T + bias for weights of the form of these and x of `dtype`, the kernel being decided once."""
    device, n, k = fields[0].device, reading.n, reading.k
    grid, constants = _decode_kernel(reading, fields)
    start = Launch(decode_any_kernel, grid, **constants)

    def run(x: Tensor, fields: Fields, bias: Tensor | None = None) -> Tensor:
        w = torch.empty(n, k, dtype=dtype, device=device)
        start(device.index, *given(fields), w, n)
        return F.linear(x, w, None if bias is None else bias.to(dtype))

    return run
