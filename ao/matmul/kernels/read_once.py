"""How the kernels for a few tokens read a weight: by loads without a layout of their own, which take that of what they feed."""

from __future__ import annotations

import triton
import triton.language as tl

from .joint_words import scale_number, zero_number
from .template import _AFFINE, _INTEGERS, _PLAIN, _POWER, _TABLE, _e4m3

_FETCH_ASM = tl.constexpr(
    tuple(f"ld.global{how}.{kind} $0, [$1];" for how in (".nc", "") for kind in ("s8", "u8", "u16", "b16", "b32"))
)

_WORDS_ASM = tl.constexpr(
    tuple(
        f"ld.global{how}{hint}.{form};"
        for form in ("b32 $0, [$1]", "v2.b32 {$0, $1}, [$2]", "v4.b32 {$0, $1, $2, $3}, [$4]")
        for hint in (".L1::no_allocate", "")
        for how in (".nc", "")
    )
)
"""Loads of one, two and four words, by `FLAGS`: 1 before `_no_later`, 2 to be kept in the first cache."""


@triton.jit
def _fetched(at, EARLY: tl.constexpr = False):
    """What is at these addresses: of one byte, two or four. EARLY: before `_no_later` where that is asked for after it."""
    FIRST: tl.constexpr = 5 if EARLY else 0
    if at.dtype.element_ty == tl.int8:
        return tl.inline_asm_elementwise(_FETCH_ASM[FIRST], "=r,l", [at], dtype=tl.int32, is_pure=not EARLY, pack=1)
    elif at.dtype.element_ty.primitive_bitwidth == 8:
        return tl.inline_asm_elementwise(_FETCH_ASM[FIRST + 1], "=r,l", [at], dtype=tl.int32, is_pure=not EARLY, pack=1)
    elif at.dtype.element_ty == tl.uint16:
        return tl.inline_asm_elementwise(_FETCH_ASM[FIRST + 2], "=r,l", [at], dtype=tl.int32, is_pure=not EARLY, pack=1)
    elif at.dtype.element_ty.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            _FETCH_ASM[FIRST + 3], "=h,l", [at], dtype=at.dtype.element_ty, is_pure=not EARLY, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            _FETCH_ASM[FIRST + 4], "=r,l", [at.to(tl.pointer_type(tl.int32), bitcast=True)], dtype=tl.int32,
            is_pure=not EARLY, pack=1,
        ).to(at.dtype.element_ty, bitcast=True)  # fmt: skip


@triton.jit
def _no_later():
    """The loads before this stay before it: the assembler would put them off to where their registers are free."""
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _word(at, FLAGS: tl.constexpr = 0):
    """A word of the weight. FLAGS: of `_words`."""
    return tl.inline_asm_elementwise(
        _WORDS_ASM[FLAGS], "=r,l", [at], dtype=tl.int32, is_pure=FLAGS % 2 == 0, pack=1
    )  # fmt: skip


@triton.jit
def _two_words(at, WIDE: tl.constexpr, FLAGS: tl.constexpr = 0):
    """The word at each address, and the next. WIDE: addresses are multiples of theirs."""
    if WIDE:
        return tl.inline_asm_elementwise(
            _WORDS_ASM[4 + FLAGS], "=r,=r,l", [at], dtype=(tl.int32, tl.int32), is_pure=FLAGS % 2 == 0, pack=1
        )
    else:
        return _word(at, FLAGS), _word(at + 1, FLAGS)


@triton.jit
def _four_words(at, WIDE: tl.constexpr, FLAGS: tl.constexpr = 0):
    if WIDE:
        return tl.inline_asm_elementwise(
            _WORDS_ASM[8 + FLAGS], "=r,=r,=r,=r,l", [at], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=FLAGS % 2 == 0, pack=1,
        )  # fmt: skip
    else:
        return _word(at, FLAGS), _word(at + 1, FLAGS), _word(at + 2, FLAGS), _word(at + 3, FLAGS)


@triton.jit
def _words(at, BITS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr = False):
    """The words of chunks; those beyond BITS are the first. EARLY: as of `_fetched`."""
    # Of a chunk that takes more than one load each sector of memory is read by several: the first cache keeps it for them.
    FLAGS: tl.constexpr = (1 if EARLY else 0) + (0 if BITS == 4 or BITS == 2 else 2)
    if BITS == 8:
        w0, w1, w2, w3 = _four_words(at, WIDE, FLAGS)
        w4, w5, w6, w7 = _four_words(at + 4, WIDE, FLAGS)
    elif BITS == 4:
        w0, w1, w2, w3 = _four_words(at, WIDE, FLAGS)
        w4, w5, w6, w7 = w0, w0, w0, w0
    elif BITS == 6:
        w0, w1 = _two_words(at, WIDE, FLAGS)
        w2, w3 = _two_words(at + 2, WIDE, FLAGS)
        w4, w5 = _two_words(at + 4, WIDE, FLAGS)
        w6, w7 = w0, w0
    elif BITS == 2:
        w0, w1 = _two_words(at, WIDE, FLAGS)
        w2, w3, w4, w5, w6, w7 = w0, w0, w0, w0, w0, w0
    else:
        w0 = _word(at, FLAGS)
        w1 = _word(at + 1, FLAGS) if BITS > 1 else w0
        w2 = _word(at + 2, FLAGS) if BITS > 2 else w0
        w3 = _word(at + 3, FLAGS) if BITS > 3 else w0
        w4 = _word(at + 4, FLAGS) if BITS > 4 else w0
        w5 = _word(at + 5, FLAGS) if BITS > 5 else w0
        w6 = _word(at + 6, FLAGS) if BITS > 6 else w0
        w7 = w0
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _words_of_chunk(
    at, chunk, K: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr = False
):  # fmt: skip
    """`_words` of a chunk of rows of K. Half a chunk at their end has its own words in place of those of the next row: there x is
    zero."""
    if K % 32 == 0:
        return _words(at, BITS, WIDE, EARLY)
    rest = at + tl.where(chunk == K // 32, 0, BITS // 2)
    FLAGS: tl.constexpr = 3 if EARLY else 2
    if BITS == 8:
        w0, w1, w2, w3 = _four_words(at, WIDE, FLAGS)
        w4, w5, w6, w7 = _four_words(rest, WIDE, FLAGS)
    else:  # every second row begins between multiples of 16 bytes
        w0, w1 = _two_words(at, WIDE, FLAGS)
        w2, w3 = _two_words(rest, WIDE, FLAGS)
        w4, w5, w6, w7 = w0, w0, w0, w0
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _group_of_half(half, K: tl.constexpr, NG: tl.constexpr):
    """The group of a half of a chunk of rows of K; of one that is not there, that of the other."""
    group = half // (K // 16 // NG)
    return group if K % 32 == 0 else tl.minimum(group, NG - 1)


# Scales and zero points, to what the codes are multiplied with and what is added to them.


@triton.jit
def _stored(
    scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, group, ZERO: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr,
    NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Scales and zero points of groups of rows as they are stored, and the scales and zero points of the scales."""
    at = row // RG * NG + group
    scale = _fetched(scale_ptr + at, EARLY)
    zero = _fetched(zero_ptr + at, EARLY) if ZERO else scale
    if NESTED == _INTEGERS:
        outer = row // RG2 * NG2
        if NG2 > 1:
            outer += group // (NG // NG2)
        return scale, zero, _fetched(scale2_ptr + outer, EARLY), _fetched(zero2_ptr + outer, EARLY)
    else:
        return scale, zero, scale, scale


@triton.jit
def _scale(stored, NESTED: tl.constexpr):
    """float32, without the one scale that the scales may share."""
    scale = stored[0]
    if NESTED == _POWER:
        return (tl.where(scale == 0, 1 << 22, scale << 23) | (scale == 255)).to(tl.float32, bitcast=True)
    elif NESTED == _INTEGERS:
        return (scale.to(tl.float32) - stored[3].to(tl.float32)) * stored[2].to(tl.float32)
    elif NESTED == _PLAIN:
        return scale_number(scale)
    else:
        return _e4m3(scale)


@triton.jit
def _pair(value):
    """float32 -> a pair of the bfloat16 that is nearest."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", [value], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _factor_and_term(
    stored, BITS: tl.constexpr, KIND: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, SCALED: tl.constexpr, NESTED: tl.constexpr, SHIFT: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """What codes are multiplied with and what is added to them, as `pairs` takes both. SCALED: whether with the scales."""
    if SCALED:
        scale = _scale(stored, NESTED)
    else:
        scale = tl.full(stored[0].shape, 1.0, tl.float32)
    if KIND == _AFFINE:
        zero = zero_number(stored[1], BITS) + OFFSET if ZERO else tl.full(stored[0].shape, OFFSET, tl.float32)
        if SHIFT is None:
            term = (zero + (32896.0 if SIGNED else 32768.0)) * -scale
            return scale.to(tl.int32, bitcast=True), term.to(tl.int32, bitcast=True)
        else:
            return _pair(scale * 2.0**-SHIFT), _pair(-128.0 - zero * 2.0**SHIFT)
    else:
        factor = _pair(scale * 2.0**POWER)
        return factor, factor


@triton.jit
def _table_words(table_ptr, KIND: tl.constexpr, BITS: tl.constexpr):
    """A table as bfloat16: 4 words of the high bytes, 4 of the low ones. Of one with more than 16 numbers, its address."""
    if KIND != _TABLE:
        return 0, 0, 0, 0, 0, 0, 0, 0
    elif BITS > 4:
        at = table_ptr.to(tl.int64)
        low, high = at.to(tl.int32), (at >> 32).to(tl.int32)
        return low, high, low, low, low, low, low, low
    else:
        number = tl.load(table_ptr + tl.arange(0, 16) % 2**BITS)
        low = number.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        high = low >> 8
        return (
            _four_bytes(high, 0), _four_bytes(high, 1), _four_bytes(high, 2), _four_bytes(high, 3),
            _four_bytes(low, 0), _four_bytes(low, 1), _four_bytes(low, 2), _four_bytes(low, 3),
        )  # fmt: skip


@triton.jit
def _four_bytes(value, i: tl.constexpr):
    """The last bytes of values 4 i to 4 i + 3 of 16, as a word."""
    at = tl.arange(0, 16)
    return tl.sum(tl.where(at // 4 == i, (value & 255) << (at % 4 * 8), 0), 0)
