"""The Triton kernel for one token by the tensor cores, for tables and small floats, which become float16: see f16_products.py.

A warp has some slices of K, 4 chunks of 32 elements each, of which x stays in registers, and goes through tiles of 16 rows. Each
lane reads whole chunks of two rows and gets the sums of these alone, which it multiplies with the scales that it has read itself.
x is multiplied with a power of two for each lane, so that float16 holds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import has_float8, multiprocessors
from .f16_products import LOOKED_UP, OPERANDS, power_of, products_asm, way_of
from .launch import Launch, cdiv, launch
from .read_once import _scale
from .reading import Fields, Reading
from .several import of_three
from .template import _E4M3, _INTEGERS, _SCALED, _TABLE, _numbers, _scales, given

_OPERANDS = tl.constexpr(OPERANDS)
_TOP = tl.constexpr(14)
"""x is multiplied so that its largest is 2**14 or above, and less than 2**15."""


def _load_asm(bits: int, wide: bool) -> str:
    """The words of a chunk, of 8. Those of 4 bits are whole sectors of the cache; parts of one are kept for the other lanes."""
    at_once = {4: 4, 8: 4, 6: 2}.get(bits, 1) if wide else 1
    how = "ld.global.L1::no_allocate" if bits == 4 and wide else "ld.global.L1::evict_first"
    lines = []
    for i in range(0, bits, at_once):
        to = ", ".join(f"${i + j}" for j in range(at_once))
        kind, to = (f".v{at_once}.b32", f"{{{to}}}") if at_once > 1 else (".b32", to)
        lines.append(f"{how}{kind} {to}, [$8 + {4 * i}];")
    return " ".join([*lines, *(f"mov.b32 ${i}, 0;" for i in range(bits, 8))])


def _top_asm() -> str:
    """The largest of 32 bfloat16 in 16 words."""
    lines = ["{ .reg .b32 a, b; .reg .f32 f, g; and.b32 a, $1, 0x7fff7fff;"]
    lines += [f"and.b32 b, ${i}, 0x7fff7fff; max.NaN.bf16x2 a, a, b;" for i in range(2, 17)]
    return " ".join(
        [*lines, "shl.b32 b, a, 16; and.b32 a, a, 0xffff0000; mov.b32 f, a; mov.b32 g, b; max.NaN.f32 $0, f, g; }"]
    )


def _fill_asm(entries: int, threads: int) -> str:
    """An entry of a table to its copies. Operands: where the table begins, the thread, and the entry thread % entries."""
    each = max(1, entries * 8 // threads)
    lines = [f"{{ .reg .b32 e, a, q, t; and.b32 e, $2, {entries - 1}; mad.lo.u32 a, e, 128, $1; mov.b32 $0, 0;"]
    lines.append(f"shr.u32 q, $2, {entries.bit_length() - 1}; mad.lo.u32 q, q, {each}, e; shl.b32 q, q, 4;")
    for _ in range(each):
        lines.append("and.b32 t, q, 112; add.u32 t, t, a; st.shared.v4.b32 [t], {$3, $3, $3, $3}; add.u32 q, q, 16;")
    return " ".join([*lines, "}"])


_LOAD_ASM = tl.constexpr(tuple(_load_asm(bits, wide) for bits in range(9) for wide in (False, True)))
_TOP_ASM = tl.constexpr(_top_asm())
_ENTRIES = tl.constexpr((0, 0, 0, 0, 256, 32, 64, 128, 256))
_FILL_ASM = tl.constexpr(tuple(_fill_asm(n, 32 * warps) for n in _ENTRIES.value for warps in (8, 16)))
_PLACE_ASM = tl.constexpr(
    tuple(
        f"{{ .reg .b64 a; .shared .align 128 .b8 ao_table[{128 * n}]; mov.u64 a, ao_table; cvt.u32.u64 $0, a; }}"
        for n in _ENTRIES.value
    )
)
_TURN_ASM = tl.constexpr(("prmt.b32 $0, $1, $2, 0x5410;", "prmt.b32 $0, $1, $2, 0x7632;"))
_SHUFFLE_ASM = tl.constexpr(tuple(f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, 0xffffffff;" for mask in range(3)))
_ROUNDS = tl.constexpr(8)
"""Tiles of which the sums of all warps stay in shared memory, until they are added."""
_SUMS_ASM = tl.constexpr(
    tuple(
        f"{{ .reg .b64 a; .shared .align 128 .b8 ao_sums[{64 * _ROUNDS.value * warps}]; mov.u64 a, ao_sums; cvt.u32.u64 $0, a; }}"
        for warps in (8, 16)
    )
)


@triton.jit
def _power(top):
    """A positive float -> the power of two below it, as bits, so that neither it nor its inverse leaves the normal numbers."""
    return tl.minimum(tl.maximum(top.to(tl.int32, bitcast=True) & 0x7F800000, 16 << 23), 254 << 23)


@triton.jit
def _f16_pair(low, high):
    return tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _table_of_lane(
    table_ptr, thread, KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Puts a table into shared memory: where the copy of a lane begins, and what its numbers are to be multiplied with."""
    E: tl.constexpr = _ENTRIES[BITS]
    place = tl.inline_asm_elementwise(_PLACE_ASM[BITS], "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    entry = thread % E
    low = _numbers(entry & 15 if BITS == 4 else entry, table_ptr, KIND, BITS, EXPONENT, False)
    high = _numbers(entry >> 4, table_ptr, KIND, BITS, EXPONENT, False) if BITS == 4 else low
    step = 1.0
    if KIND == _TABLE:
        power = _power(tl.max(tl.abs(_numbers(tl.arange(0, 2**BITS), table_ptr, KIND, BITS, EXPONENT, False)), 0))
        inverse = ((254 << 23) - power).to(tl.float32, bitcast=True)
        step = power.to(tl.float32, bitcast=True)
        low *= inverse
        high *= inverse
    tl.inline_asm_elementwise(
        _FILL_ASM[BITS * 2 + WARPS // 16], "=r,r,r,r", [place + thread * 0, thread, _f16_pair(low, high)], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()
    # After the barrier, so that what depends on it is, too.
    at = tl.inline_asm_elementwise(
        "{ .reg .b32 l; mov.u32 l, %laneid; shl.b32 l, l, 2; add.u32 $0, $1, l; }", "=r,r", [place + thread * 0],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return at, step


@triton.jit
def _four_kept(at):
    """Four words that are read again."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _largest(x_ptr, chunk):
    """Of a chunk of bfloat16."""
    at = x_ptr + chunk * 16
    w = _four_kept(at) + _four_kept(at + 4) + _four_kept(at + 8) + _four_kept(at + 12)
    return tl.inline_asm_elementwise(
        _TOP_ASM, "=f" + ",r" * 16,
        [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15]],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _met(x_ptr, chunk, here, part, factor, TURNED: tl.constexpr, HALF: tl.constexpr):
    """What codes of a part of a chunk meet, times a factor: 8 words, zero where not `here`. TURNED: as both codes of a byte go
    together."""
    at = x_ptr + chunk * 16
    if TURNED:
        first, second = _four_kept(at + part * 4), _four_kept(at + part * 4 + 8)
    else:
        first, second = _four_kept(at + part * 8), _four_kept(at + part * 8 + 4)
    words = ()
    for i in tl.static_range(8):
        if TURNED:
            word = tl.inline_asm_elementwise(
                _TURN_ASM[i % 2], "=r,r,r", [first[i // 2], second[i // 2]], dtype=tl.int32, is_pure=True, pack=1
            )
        elif i < 4:
            word = first[i]
        else:
            word = second[i - 4]
        if not HALF:
            low = (word << 16).to(tl.float32, bitcast=True)
            word = _f16_pair(low * factor, (word & -65536).to(tl.float32, bitcast=True) * factor)
        words += (tl.where(here, word, 0),)  # type: ignore[assignment]
    return words


@triton.jit
def _both_scales(at, FLOAT8: tl.constexpr):
    """Two float8 e4m3 at addresses that are multiples of two, float32."""
    if FLOAT8:
        return tl.inline_asm_elementwise(
            """{ .reg .b16 t, l, h; .reg .b32 p; cvt.u16.u32 t, $2; cvt.rn.f16x2.e4m3x2 p, t; mov.b32 {l, h}, p;
            cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }""",
            "=f,=f,r", [at], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return _scale((at & 255,), _E4M3), _scale((at >> 8,), _E4M3)


@triton.jit
def _early(at):
    """What is at these addresses, of one byte, two or four. `_no_later` holds such loads."""
    if at.dtype.element_ty.primitive_bitwidth == 8:
        if at.dtype.element_ty == tl.int8:
            return tl.inline_asm_elementwise(
                "ld.global.s8 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "ld.global.u8 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
            )
    elif at.dtype.element_ty == tl.uint16:
        return tl.inline_asm_elementwise("ld.global.u16 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)
    elif at.dtype.element_ty.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "ld.global.b16 $0, [$1];", "=h,l", [at], dtype=at.dtype.element_ty, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [at.to(tl.pointer_type(tl.int32), bitcast=True)], dtype=tl.int32,
            is_pure=False, pack=1,
        ).to(at.dtype.element_ty, bitcast=True)  # fmt: skip


@triton.jit
def _no_later():
    """The loads before this stay before it: the assembler would put them off to where their registers are free."""
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _rows_at(
    q_ptr, scale_ptr, zero2_ptr, row, K: tl.constexpr, BITS: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr,
    NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr,
):  # fmt: skip
    """For rows and those 8 on: where codes and scales begin, and the zero point of the scales, or at which of these it begins."""
    W: tl.constexpr = K // 32 * BITS
    codes = q_ptr + row * W
    scales = scale_ptr + row // RG * NG
    scales1 = scales + 8 * NG if RG == 1 else scale_ptr + (row + 8) // RG * NG
    outer = row // RG2 * NG2
    outer1 = (row + 8) // RG2 * NG2
    if NESTED == _INTEGERS and NG > 1 and NG2 == 1:
        return (codes, scales, _early(zero2_ptr + outer)), (codes + 8 * W, scales1, _early(zero2_ptr + outer1))
    else:
        return (codes, scales, outer), (codes + 8 * W, scales1, outer1)


@triton.jit
def _scale_at(
    at, scale2_ptr, zero2_ptr, chunk0, S: tl.constexpr, H: tl.constexpr, K: tl.constexpr, NG: tl.constexpr,
    NESTED: tl.constexpr, NG2: tl.constexpr, PAIRS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """What is stored of the scale of a half of the chunk of slice S of a row, or of both, and of that scale's own.

    A row whose scales share one of their own is multiplied with that at last."""
    G: tl.constexpr = K // NG // 16  # halves of chunks in a group
    FIRST: tl.constexpr = S * WARPS * 8
    group = (chunk0 * 2 + (FIRST + H)) // G
    if K < (FIRST + WARPS * 8) * 16:  # the last slice has chunks that are not there
        group = tl.minimum(group, NG - 1 - PAIRS)
        scale_at = at[1] + group
    elif FIRST % G == 0:
        scale_at = at[1] + (chunk0 * 2 + H) // G + FIRST // G
    else:
        scale_at = at[1] + group
    if PAIRS:
        return (_early(scale_at.to(tl.pointer_type(tl.uint16), bitcast=True)),)
    else:
        scale = _early(scale_at)
        if NESTED != _INTEGERS:
            return scale, scale, scale, scale
        elif NG2 == 1:
            return scale, scale, 1.0, at[2]
        else:
            outer = at[2] + group // (NG // NG2)
            return scale, scale, _early(scale2_ptr + outer), _early(zero2_ptr + outer)


@triton.jit
def _ahead(
    at, scale2_ptr, zero2_ptr, chunk0, S: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, NG: tl.constexpr,
    NESTED: tl.constexpr, NG2: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The words of the chunk of slice S of a row, and what is stored of the scales of its halves. at: of `_row_at`."""
    U: tl.constexpr = K // 32
    FIRST: tl.constexpr = S * WARPS * 4
    words_at = at[0] + chunk0 * BITS
    if U < FIRST + WARPS * 4:
        words_at = at[0] + tl.minimum(chunk0 + FIRST, U - 1) * BITS
    else:
        words_at += FIRST * BITS
    words = tl.inline_asm_elementwise(
        _LOAD_ASM[BITS * 2 + WIDE], "=r,=r,=r,=r,=r,=r,=r,=r,l", [words_at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    if NG == 1:
        return words, (0,), (0,)
    else:
        first = _scale_at(at, scale2_ptr, zero2_ptr, chunk0, S, 0, K, NG, NESTED, NG2, PAIRS, WARPS)
        second = first
        if not PAIRS and K // NG % 32 != 0:
            second = _scale_at(at, scale2_ptr, zero2_ptr, chunk0, S, 1, K, NG, NESTED, NG2, PAIRS, WARPS)
        return words, first, second


@triton.jit
def _number(stored, NESTED: tl.constexpr):
    """Of a scale, without the one that the scales of a weight or of a row may share."""
    if NESTED == _INTEGERS:
        return (stored[0].to(tl.float32) - stored[3].to(tl.float32)) * stored[2]
    else:
        return _scale(stored, NESTED)


@triton.jit
def _summed(
    c0, c1, first, second, total, HALVES: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, PAIRS: tl.constexpr,
    FLOAT8: tl.constexpr,
):  # fmt: skip
    """The sums of both parts of a chunk, with scales, added to those of the chunks before."""
    if NG == 1:
        return total + (c0 + c1)
    elif PAIRS:
        scale0, scale1 = _both_scales(first[0], FLOAT8)
        return total + c0 * scale0 + c1 * scale1
    elif HALVES:
        return total + c0 * _number(first, NESTED) + c1 * _number(second, NESTED)
    else:
        return total + (c0 + c1) * _number(first, NESTED)


@triton.jit
def _from_lane(value, MASK: tl.constexpr):
    """What another lane of the warp has."""
    return tl.inline_asm_elementwise(_SHUFFLE_ASM[MASK], "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _put_sums(total0, total1, place, slot, thread, WARPS: tl.constexpr):
    """Adds what four lanes have of two rows, and puts it where the sums of all warps over rows of tile `slot` are gathered."""
    odd = thread % 2 == 1
    total = tl.where(odd, total1, total0) + _from_lane(tl.where(odd, total0, total1), 1)
    total += _from_lane(total, 2)
    row = thread % 32 // 4 + thread % 2 * 8
    at = (
        place + ((slot * 16 + row) * WARPS + (thread // 32 + row) % WARPS) * 4
    )  # in other banks than those of other rows
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.b32 $0, 0;", "=r,r,f", [at, total], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def _gathered(place, thread, WARPS: tl.constexpr):
    """The sums of all warps, of which WARPS / 4 threads have the same."""
    a, b, c, d = tl.inline_asm_elementwise(
        "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r", [place + thread * 16],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip
    total = (a + b) + (c + d)
    total += _from_lane(total, 1)
    if WARPS > 8:
        total += _from_lane(total, 2)
    return total


@triton.jit
def _gemv_halves(
    x_ptr, q_ptr, scale_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, first, programs, K: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr, EXPONENT: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr,
    NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, ASM: tl.constexpr, POWER: tl.constexpr,
    LOOKUP: tl.constexpr, TURNED: tl.constexpr, FLOAT8: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr,
    SLICES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over groups of (sum over the group of x * number[n]) * scale[n], by program `first` of `programs`.
    N: at least 16.

    ASM: of `products_asm`. POWER: of two, for what its sums are multiplied with. LOOKUP: whether there is a table in shared
    memory. TURNED: whether that is of both codes of a byte. WIDE: whether codes and scales begin at multiples of 16 bytes.
    SLICES: of a warp. AHEAD: how many of them codes are read ahead, as many or fewer.
    """
    U: tl.constexpr = K // 32
    HALVES: tl.constexpr = NG > 1 and K // NG % 32 != 0
    PAIRS: tl.constexpr = WIDE and NG > 1 and K // NG == 16 and (NESTED == _SCALED or NESTED == _E4M3)  # noqa: SIM109
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    thread = tl.arange(0, 32 * WARPS)
    g = thread % 32 // 4
    chunk0 = thread // 32 * 4 + thread % 4
    row = tl.minimum(first * 16, N - 16) + g  # the last tile may have rows of the one before
    at0, at1 = _rows_at(q_ptr, scale_ptr, zero2_ptr, row, K, BITS, RG, NG, NESTED, RG2, NG2)
    ahead = ()
    for s in tl.static_range(AHEAD):
        ahead += (  # type: ignore[assignment]
            _ahead(at0, scale2_ptr, zero2_ptr, chunk0, s, K, BITS, NG, NESTED, NG2, WIDE, PAIRS, WARPS),
            _ahead(at1, scale2_ptr, zero2_ptr, chunk0, s, K, BITS, NG, NESTED, NG2, WIDE, PAIRS, WARPS),
        )
    _no_later()
    inverse = 1.0
    step = 1.0
    if not HALF:
        top = tl.zeros((32 * WARPS,), tl.float32)
        for s in tl.static_range(SLICES):
            found = _largest(x_ptr, tl.minimum(s * WARPS * 4 + chunk0, U - 1))
            top = tl.maximum(top, found, propagate_nan=tl.PropagateNan.ALL)
        power = _power(top) - (_TOP << 23)
        inverse = ((254 << 23) - power).to(tl.float32, bitcast=True)
        step = tl.where(top < float("inf"), power.to(tl.float32, bitcast=True), float("nan"))
    met = ()
    for s in tl.static_range(SLICES):
        chunk = s * WARPS * 4 + chunk0
        here = (g // 2 == thread % 4) & (chunk < U)
        met += (  # type: ignore[assignment]
            _met(x_ptr, tl.minimum(chunk, U - 1), here, g % 2, inverse, TURNED, HALF),
        )
    place = tl.inline_asm_elementwise(_SUMS_ASM[WARPS // 16], "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    table = thread
    factor = 2.0**POWER
    if LOOKUP:
        table, of_table = _table_of_lane(table_ptr, thread, KIND, BITS, EXPONENT, WARPS)
        factor *= of_table
    if NESTED == _SCALED and NG > 1:
        factor *= tl.load(scale2_ptr).to(tl.float32)

    tiles = tl.cdiv(N, 16)
    slot = 0
    for tile in tl.range(first, tiles, programs):
        total0 = tl.zeros((32 * WARPS,), tl.float32)
        total1 = tl.zeros((32 * WARPS,), tl.float32)
        for s in tl.static_range(SLICES):
            if s + AHEAD == SLICES:
                after = tl.minimum((tile + programs) * 16, N - 16) + g
                at0, at1 = _rows_at(q_ptr, scale_ptr, zero2_ptr, after, K, BITS, RG, NG, NESTED, RG2, NG2)
            ahead += (  # type: ignore[assignment]
                _ahead(
                    at0, scale2_ptr, zero2_ptr, chunk0, (s + AHEAD) % SLICES, K, BITS, NG, NESTED, NG2, WIDE, PAIRS, WARPS
                ),
                _ahead(
                    at1, scale2_ptr, zero2_ptr, chunk0, (s + AHEAD) % SLICES, K, BITS, NG, NESTED, NG2, WIDE, PAIRS, WARPS
                ),
            )  # fmt: skip
            _no_later()
            a, b = ahead[0], ahead[1]  # type: ignore[misc]
            ahead = ahead[2:]
            w, v, x = a[0], b[0], met[s]  # type: ignore[var-annotated]
            c0, c1, c2, c3 = tl.inline_asm_elementwise(
                ASM, _OPERANDS,
                [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], x[0], x[1],
                 x[2], x[3], x[4], x[5], x[6], x[7], table],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
            )  # fmt: skip
            total0 = _summed(c0, c1, a[1], a[2], total0, HALVES, NG, NESTED, PAIRS, FLOAT8)
            total1 = _summed(c2, c3, b[1], b[2], total1, HALVES, NG, NESTED, PAIRS, FLOAT8)
        _put_sums(total0 * step, total1 * step, place, slot, thread, WARPS)
        slot += 1
        if (slot == _ROUNDS) | (tile + programs >= tiles):
            tl.debug_barrier()
            of_slot = thread // (4 * WARPS)
            of_tile = tl.minimum((tile - (slot - 1 - of_slot) * programs) * 16, N - 16)
            row = of_tile + thread // (WARPS // 4) % 16
            there = of_slot < slot
            out = _gathered(place, thread, WARPS) * factor
            if NG == 1:
                out *= _scales(scale_ptr, scale2_ptr, zero2_ptr, row, 0, there, RG, NG, NESTED, RG2, NG2)
            elif NESTED == _INTEGERS and NG2 == 1:
                out *= tl.load(scale2_ptr + row // RG2, mask=there, other=0).to(tl.float32)
            tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=there & (thread % (WARPS // 4) == 0))
            tl.debug_barrier()
            slot = 0


@triton.jit
def gemv_halves_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr,
    RG2: tl.constexpr, NG2: tl.constexpr, ASM: tl.constexpr, POWER: tl.constexpr, LOOKUP: tl.constexpr,
    TURNED: tl.constexpr, FLOAT8: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr, SLICES: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """`_gemv_halves` of one weight, for each token."""
    token = tl.program_id(1)
    _gemv_halves(
        x_ptr + token * K, q_ptr, scale_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr + token * N, N, tl.program_id(0),
        tl.num_programs(0), K, BITS, KIND, EXPONENT, RG, NG, NESTED, RG2, NG2, ASM, POWER, LOOKUP, TURNED, FLOAT8, WIDE,
        WARPS, SLICES, AHEAD,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n0", "n1", "n2", "p0", "p1", "p2"])
def gemv_halves_joined_kernel(
    x_ptr, out_ptr, q0, scale0, zero0, table0, outer0, outer_zero0, n0, p0, q1, scale1, zero1, table1, outer1, outer_zero1,
    n1, p1, q2, scale2, zero2, table2, outer2, outer_zero2, n2, p2, K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    EXPONENT: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr,
    NG2: tl.constexpr, ASM: tl.constexpr, POWER: tl.constexpr, LOOKUP: tl.constexpr, TURNED: tl.constexpr,
    FLOAT8: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr, SLICES: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """`_gemv_halves` of two or three weights one below the other, of n rows and with p programs each; of two, p2 is 0."""
    i = tl.program_id(0)
    first, second = p0, p0 + p1
    _gemv_halves(
        x_ptr, of_three(i, first, second, q0, q1, q2), of_three(i, first, second, scale0, scale1, scale2),
        of_three(i, first, second, table0, table1, table2), of_three(i, first, second, outer0, outer1, outer2),
        of_three(i, first, second, outer_zero0, outer_zero1, outer_zero2),
        out_ptr + of_three(i, first, second, 0, n0, n0 + n1), of_three(i, first, second, n0, n1, n2),
        i - of_three(i, first, second, 0, first, second), of_three(i, first, second, p0, p1, p2), K, BITS, KIND, EXPONENT,
        RG, NG, NESTED, RG2, NG2, ASM, POWER, LOOKUP, TURNED, FLOAT8, WIDE, WARPS, SLICES, AHEAD,
    )  # fmt: skip


class Tile(NamedTuple):
    """How the product is cut: warps of a program, 8 or 16, programs of a multiprocessor at a time, registers of a thread at most,
    and slices read ahead."""

    warps: int
    programs: int
    registers: int | None
    ahead: int


def tile_of(k: int) -> Tile:
    """For rows of k elements: enough warps for all slices of 128, up to 16."""
    return Tile(8, 2, 128, 2) if k <= 2048 else Tile(16, 1, 128, 2)


def programs_of(rows: Sequence[int], tile: Tile, device: torch.device, tokens: int = 1) -> list[int]:
    """The programs of each weight of a launch; of one of `tokens` that run side by side."""
    tiles = [cdiv(n, 16) for n in rows]
    at_once = max(1, multiprocessors(device) * tile.programs // tokens)
    rounds = cdiv(sum(tiles), at_once)
    while sum(cdiv(t, rounds) for t in tiles) > max(at_once, len(tiles)):
        rounds += 1  # each weight has a last program that is done sooner
    return [cdiv(t, rounds) for t in tiles]


def constants_of(reading: Reading, tile: Tile, wide: bool, device: torch.device) -> dict[str, Any]:
    """Those of the kernels, in the order of their parameters; wide: whether codes and scales begin at multiples of 16 bytes."""
    float8, slices = has_float8(device), cdiv(reading.k, 128 * tile.warps)
    halves = not reading.by_row and reading.group % 32 != 0
    way = way_of(reading.kind, reading.bits, reading.exponent, halves, float8)
    known = reading.constants(False)
    return {
        **{name: known[name] for name in ("K", "BITS", "KIND", "EXPONENT", "RG", "NG", "NESTED", "RG2", "NG2")},
        "ASM": products_asm(way, reading.bits, reading.exponent), "POWER": power_of(way, reading.exponent),
        "LOOKUP": way in LOOKED_UP, "TURNED": way == "pairs", "FLOAT8": float8, "WIDE": wide, "WARPS": tile.warps,
        "SLICES": slices, "AHEAD": min(tile.ahead, slices),
    }  # fmt: skip


def is_wide(weights: Sequence[Fields]) -> bool:
    """Whether codes and scales begin at multiples of 16 bytes."""
    return not any(t.data_ptr() % 16 for fields in weights for t in fields[:2] if t is not None)


def aligned(x: Tensor) -> Tensor:
    """x that begins at a multiple of 16 bytes."""
    return x.clone() if x.data_ptr() % 16 else x


def gemv(x: Tensor, reading: Reading, fields: Fields, tile: Tile | None = None) -> Tensor:
    """One token, or each of a few in one launch. x: (M, K) -> (M, N)."""
    m, n = x.shape[0], reading.n
    tile = tile or tile_of(reading.k)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    (programs,) = programs_of([n], tile, x.device, m)
    launch(
        gemv_halves_kernel, (programs, m), aligned(x), *given(fields), out, n, num_warps=tile.warps,
        registers=tile.registers, **constants_of(reading, tile, is_wide([fields]), x.device),
    )  # fmt: skip
    return out


def gemv_launch(reading: Reading, fields: Fields) -> Callable[[Tensor, Fields], Tensor]:
    """One token, for weights of the form of these, x (..., K) -> (..., N): what it decides is decided once."""
    device, n, tile = fields[0].device, reading.n, tile_of(reading.k)
    start = Launch(
        gemv_halves_kernel, tuple(programs_of([n], tile, device)), num_warps=tile.warps, registers=tile.registers,
        **constants_of(reading, tile, True, device),
    )  # fmt: skip

    def run(x: Tensor, fields: Fields) -> Tensor:
        if (x.data_ptr() | fields[0].data_ptr() | fields[1].data_ptr()) % 16:
            return gemv(x.reshape(1, reading.k), reading, fields).view(*x.shape[:-1], n)
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
        start(device.index, x, *given(fields), out, n)
        return out

    return run


def gemv_joined(x: Tensor, reading: Reading, weights: Sequence[Fields]) -> Tensor:
    """One token and two or three weights in one launch, whose readings are the same but for n: x (1, K) -> (1, N) for the sum of
    their rows."""
    rows = [fields[0].shape[0] for fields in weights]
    tile = tile_of(reading.k)
    programs = programs_of(rows, tile, x.device)
    out = torch.empty(1, sum(rows), dtype=x.dtype, device=x.device)
    parts = [(*given(fields), n, p) for fields, n, p in zip(weights, rows, programs)]
    if len(parts) == 2:
        parts.append((*given(weights[1]), 0, 0))
    launch(
        gemv_halves_joined_kernel, (sum(programs),), aligned(x), out, *itertools.chain(*parts), num_warps=tile.warps,
        registers=tile.registers, **constants_of(reading, tile, is_wide(weights), x.device),
    )  # fmt: skip
    return out
