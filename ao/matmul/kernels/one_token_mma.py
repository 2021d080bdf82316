"""The Triton kernel for one token by the tensor cores, for tables and small floats, which become float16: see f16_products.py.

A warp has some slices of K, 4 chunks of 32 elements each, of which x stays in registers, or in shared memory where there are too
few, and goes through tiles of 16 rows. Each lane reads whole chunks of two rows and gets the sums of these alone, or of those
with the same scale, which it multiplies with the scales that it has read itself. As soon as it has multiplied a chunk, it asks
for one of a later slice in the same registers, so that as many are always on their way.
x is multiplied with a power of two for the lanes whose sums are one, so that float16 holds it.
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
from .read_once import _fetched, _no_later, _scale
from .reading import Fields, Reading
from .several import of_three
from .template import _E4M3, _INTEGERS, _SCALED, _TABLE, _numbers, _scales, given

_OPERANDS = tl.constexpr(OPERANDS)
_TOP = tl.constexpr(14)
"""x is multiplied so that its largest is 2**14 or above, and less than 2**15."""


def _load_asm(bits: int, wide: bool) -> str:
    """The words of a chunk, of 8, if the last operand says so. Those of 4 bits are whole sectors of the cache; parts of one are
    kept for the other lanes."""
    at_once = {4: 4, 8: 4, 6: 2}.get(bits, 1) if wide else 1
    how = "@p ld.global.L1::no_allocate" if bits == 4 and wide else "@p ld.global.L1::evict_first"
    lines = ["{ .reg .pred p; setp.ne.b32 p, $9, 0;"]
    for i in range(0, bits, at_once):
        to = ", ".join(f"${i + j}" for j in range(at_once))
        kind, to = (f".v{at_once}.b32", f"{{{to}}}") if at_once > 1 else (".b32", to)
        lines.append(f"{how}{kind} {to}, [$8 + {4 * i}];")
    return " ".join([*lines, *(f"mov.b32 ${i}, 0;" for i in range(bits, 8)), "}"])


def _fill_asm(entries: int, threads: int) -> str:
    """An entry of a table to its copies. Operands: where the table begins, the thread, and the entry thread % entries."""
    each = max(1, entries * 8 // threads)
    lines = [f"{{ .reg .b32 e, a, q, t; and.b32 e, $2, {entries - 1}; mad.lo.u32 a, e, 128, $1; mov.b32 $0, 0;"]
    lines.append(f"shr.u32 q, $2, {entries.bit_length() - 1}; mad.lo.u32 q, q, {each}, e; shl.b32 q, q, 4;")
    for _ in range(each):
        lines.append("and.b32 t, q, 112; add.u32 t, t, a; st.shared.v4.b32 [t], {$3, $3, $3, $3}; add.u32 q, q, 16;")
    return " ".join([*lines, "}"])


_LOAD_ASM = tl.constexpr(tuple(_load_asm(bits, wide) for bits in range(9) for wide in (False, True)))
_TOP_ASM = tl.constexpr(
    """{ .reg .b32 a, b; and.b32 a, $1, 0x7fff7fff; and.b32 b, $2, 0x7fff7fff; max.NaN.bf16x2 a, a, b;
    max.NaN.bf16x2 $0, a, $3; }"""
)
"""The largest of four bfloat16 in two words and of those before, in either half."""
_OF_BOTH_ASM = tl.constexpr(
    """{ .reg .b32 a, b; .reg .f32 f, g; shl.b32 b, $1, 16; and.b32 a, $1, 0xffff0000; mov.b32 f, a; mov.b32 g, b;
    max.NaN.f32 $0, f, g; }"""
)
_ENTRIES = tl.constexpr((0, 0, 0, 0, 256, 32, 64, 128, 256))
_FILL_ASM = tl.constexpr(tuple(_fill_asm(n, 32 * warps) for n in _ENTRIES.value for warps in (8, 16)))
_TURN_ASM = tl.constexpr(("prmt.b32 $0, $1, $2, 0x5410;", "prmt.b32 $0, $1, $2, 0x7632;"))
_SHUFFLE_ASM = tl.constexpr(tuple(f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, 0xffffffff;" for mask in range(17)))


_PUT_ASM = tl.constexpr(
    tuple(
        f"""{{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.shared.v4.b32 [$1], {{$3, $4, $5, $6}};
        @p st.shared.v4.b32 [$1 + {128 * together}], {{$7, $8, $9, $10}}; mov.b32 $0, 0; }}"""
        for together in range(5)
    )
)
_TAKE_ASM = tl.constexpr(
    tuple(
        f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$8]; ld.shared.v4.b32 {{$4, $5, $6, $7}}, [$8 + {128 * together}];"
        for together in range(5)
    )
)
_ROOM = 48 * 1024
"""Bytes of shared memory that PTX itself may set apart."""


def _place_asm(size: int) -> str:
    return f"{{ .reg .b64 a; .shared .align 128 .b8 ao_room[{size}]; mov.u64 a, ao_room; cvt.u32.u64 $0, a; }}"


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
def _entry(table_ptr, thread, KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr):
    """The numbers of an entry of a table, and those of all codes."""
    entry = thread % _ENTRIES[BITS]
    low = _numbers(entry & 15 if BITS == 4 else entry, table_ptr, KIND, BITS, EXPONENT, False)
    high = _numbers(entry >> 4, table_ptr, KIND, BITS, EXPONENT, False) if BITS == 4 else low
    if KIND == _TABLE:
        return low, high, _numbers(tl.arange(0, 2**BITS), table_ptr, KIND, BITS, EXPONENT, False)
    else:
        return low, high, low


@triton.jit
def _table_of_lane(entry, place, thread, KIND: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr):
    """Puts a table into shared memory: where the copy of a lane begins, and what its numbers are to be multiplied with."""
    low, high, numbers = entry
    step = 1.0
    if KIND == _TABLE:
        power = _power(tl.max(tl.abs(numbers), 0))
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
def _two_kept(at):
    """Two words that are read again, at once."""
    return tl.inline_asm_elementwise(
        "ld.global.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [at], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
    )


@triton.jit
def _four_kept(at):
    """Four words that are read again."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _largest(words, TOGETHER: tl.constexpr):
    """Of the chunks of all lanes that have the same or are together, which each has four bfloat16 of, in two words."""
    both = words[0][0] * 0
    for i in tl.static_range(len(words)):
        both = tl.inline_asm_elementwise(
            _TOP_ASM, "=r,r,r,r", [words[i][0], words[i][1], both], dtype=tl.int32, is_pure=True, pack=1
        )
    top = tl.inline_asm_elementwise(_OF_BOTH_ASM, "=f,r", [both], dtype=tl.float32, is_pure=True, pack=1)
    for mask in tl.static_range(17):
        if mask == 4 or mask == 8 or mask == 16 or (mask == 1 and TOGETHER > 1) or (mask == 2 and TOGETHER > 2):
            top = tl.maximum(top, _from_lane(top, mask), propagate_nan=tl.PropagateNan.ALL)
    return top


@triton.jit
def _met(
    x_ptr, i, chunk0, thread, factor, U: tl.constexpr, TURNED: tl.constexpr, HALF: tl.constexpr, TOGETHER: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """What codes meet of the slices from i * TOGETHER on, as many: 8 words (`places` of f16_products.py), times a factor.
    TURNED: as both codes of a byte go together."""
    g = thread % 32 // 4
    if TOGETHER == 1:
        slice, part = i, g % 2
    elif TOGETHER == 2:
        slice, part = i * 2 + g % 2, g // 2 % 2
    else:
        slice, part = i * 4 + g // 2, g % 2
    chunk = slice * (WARPS * 4) + chunk0
    at = x_ptr + tl.minimum(chunk, U - 1) * 16
    mine = _mine(thread, TOGETHER) & (chunk < U)
    if TURNED:
        first, second = _four_kept(at + part * 4), _four_kept(at + part * 4 + 8)
    else:
        first, second = _four_kept(at + part * 8), _four_kept(at + part * 8 + 4)
    words = ()
    for j in tl.static_range(8):
        if TURNED:
            word = tl.inline_asm_elementwise(
                _TURN_ASM[j % 2], "=r,r,r", [first[j // 2], second[j // 2]], dtype=tl.int32, is_pure=True, pack=1
            )
        elif j < 4:
            word = first[j]
        else:
            word = second[j - 4]
        if not HALF:
            low = (word << 16).to(tl.float32, bitcast=True)
            word = _f16_pair(low * factor, (word & -65536).to(tl.float32, bitcast=True) * factor)
        words += (tl.where(mine, word, 0),)  # type: ignore[assignment]
    return words


@triton.jit
def _mine(thread, TOGETHER: tl.constexpr):
    """Whether a lane has other than zeros of x."""
    return thread % 32 // (8 * TOGETHER) == thread % 4 // TOGETHER


@triton.jit
def _room_of_lane(place, thread, SETS: tl.constexpr, TOGETHER: tl.constexpr, WARPS: tl.constexpr):
    """Where the words of a lane are, of sets that are SIZE bytes apart: its own, or the zeros that all have. Of eight lanes that
    follow each other, no two meet in a bank."""
    SIZE: tl.constexpr = 256 * TOGETHER
    place_of_zeros = place + WARPS * SETS * SIZE
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.u32 p, $2, $3; @p st.shared.v4.b32 [$1], {$4, $4, $4, $4}; mov.b32 $0, 0; }",
        "=r,r,r,r,r", [place_of_zeros + thread * 16, thread, SETS * SIZE // 16, 0], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    g, t = thread % 32 // 4, thread % 4
    own = place + thread // 32 * (SETS * SIZE) + (g * TOGETHER + t % TOGETHER) * 16
    return tl.where(_mine(thread, TOGETHER), own, place_of_zeros + (g // 2 + 1) * 2 * TOGETHER % 8 * 16)


@triton.jit
def _put(words, at, thread, TOGETHER: tl.constexpr):
    """Words of x to shared memory, of the lanes that have other than zeros."""
    tl.inline_asm_elementwise(
        _PUT_ASM[TOGETHER], "=r,r,r,r,r,r,r,r,r,r,r",
        [at, _mine(thread, TOGETHER).to(tl.int32), words[0], words[1], words[2], words[3], words[4], words[5], words[6],
         words[7]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _taken(at, TOGETHER: tl.constexpr):
    """8 words of x from shared memory."""
    return tl.inline_asm_elementwise(
        _TAKE_ASM[TOGETHER], "=&r,=&r,=&r,=&r,=r,=r,=r,=r,r", [at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


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
def _first_group(chunk0, K: tl.constexpr, NG: tl.constexpr):
    """The group of the first half of a chunk."""
    return chunk0 * 2 // (K // NG // 16) if NG > 1 else chunk0 * 0


@triton.jit
def _rows_at(
    q_ptr, scale_ptr, row, g, chunk0, K: tl.constexpr, BITS: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr,
    RG2: tl.constexpr, NG2: tl.constexpr,
):  # fmt: skip
    """For rows g from `row` on and those 8 on: where codes and scales of the first chunk of a lane are, and at which of the
    scales of scales these begin."""
    W: tl.constexpr = K // 32 * BITS
    group = _first_group(chunk0, K, NG)
    # What lanes differ in is apart from where the tile is, which a register of all lanes has.
    codes = q_ptr + (row * W + (g * W + chunk0 * BITS))
    if RG == 1:
        scales = scale_ptr + (row * NG + (g * NG + group))
        scales1 = scales + 8 * NG
    else:
        scales = scale_ptr + ((row + g) // RG * NG + group)
        scales1 = scale_ptr + ((row + g + 8) // RG * NG + group)
    outer = (row + g) // RG2 * NG2
    outer1 = (row + g + 8) // RG2 * NG2
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
        scale_at = at[1] + (group - _first_group(chunk0, K, NG))
    elif FIRST % G == 0 and (H == 0 or G == 1):
        scale_at = at[1] + (FIRST // G + H)
    else:
        scale_at = at[1] + (group - _first_group(chunk0, K, NG))
    if PAIRS:
        return (_fetched(scale_at.to(tl.pointer_type(tl.uint16), bitcast=True), EARLY=True),)
    else:
        scale = _fetched(scale_at, EARLY=True)
        if NESTED != _INTEGERS:
            return scale, scale, scale, scale
        elif NG2 == 1:
            return scale, scale, 1.0, _fetched(zero2_ptr + at[2], EARLY=True)
        else:
            outer = at[2] + group // (NG // NG2)
            return scale, scale, _fetched(scale2_ptr + outer, EARLY=True), _fetched(zero2_ptr + outer, EARLY=True)


@triton.jit
def _ahead(
    at, there, scale2_ptr, zero2_ptr, chunk0, S: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, NG: tl.constexpr,
    NESTED: tl.constexpr, NG2: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The words of the chunk of slice S of a row, if it is `there`, and what is stored of the scales of its halves. at: of
    `_rows_at`."""
    U: tl.constexpr = K // 32
    FIRST: tl.constexpr = S * WARPS * 4
    words_at = at[0] + (FIRST if U >= FIRST + WARPS * 4 else tl.minimum(U - 1 - chunk0, FIRST)) * BITS
    words = tl.inline_asm_elementwise(
        _LOAD_ASM[BITS * 2 + WIDE], "=r,=r,=r,=r,=r,=r,=r,=r,l,r", [words_at, there],
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
    total, c0, c1, first, second, HALVES: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, PAIRS: tl.constexpr,
    FLOAT8: tl.constexpr,
):  # fmt: skip
    """The sums of both parts of a chunk, with scales, added to those before."""
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
def _added(
    total, p0, p1, q0, q1, stored, thread, S: tl.constexpr, TOGETHER: tl.constexpr, HALVES: tl.constexpr, NG: tl.constexpr,
    NESTED: tl.constexpr, PAIRS: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """What a lane has of the sums of a row and slice S, with scales, added to those before. p, q: both columns of either part."""
    if TOGETHER == 1:
        return _summed(total, p0, q1, stored[1], stored[2], HALVES, NG, NESTED, PAIRS, FLOAT8)
    elif TOGETHER == 2:
        part = tl.where(thread % 2 == 1, q0 if S % 2 == 0 else q1, p0 if S % 2 == 0 else p1)
        return total + part * _number(stored[1], NESTED)
    else:
        added = _summed(total, p0, q1, stored[1], stored[2], HALVES, NG, NESTED, PAIRS, FLOAT8)
        return tl.where(thread % 4 == S % 4, added, total)


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
def _gathered(place, thread, ROUNDS: tl.constexpr, WARPS: tl.constexpr):
    """The sums of all warps, of which WARPS / 4 threads have the same."""
    thread %= ROUNDS * 4 * WARPS
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
    SLICES: tl.constexpr, TOGETHER: tl.constexpr, KEPT: tl.constexpr, AHEAD: tl.constexpr, APART: tl.constexpr,
    UNROLL: tl.constexpr, ROUNDS: tl.constexpr, PLACE_ASM: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over groups of (sum over the group of x * number[n]) * scale[n], by program `first` of `programs`.
    N: at least 16.

    ASM: of `products_asm`. POWER: of two, for what its sums are multiplied with. LOOKUP: whether there is a table in shared
    memory. TURNED: whether that is of both codes of a byte. WIDE: whether codes and scales begin at multiples of 16 bytes.
    SLICES: of a warp. TOGETHER: lanes whose chunks have the same scale, of which x has so many slices in a set of 8 words.
    KEPT: sets in registers; the others are in shared memory, from where each lane gets its own. AHEAD: chunks of rows that are
    on their way. APART: whether slices are multiplied one after the other. UNROLL: tiles of a turn of the loop, in which chunks
    of rows are a multiple of those ahead, or registers would be moved and wait for what they get.
    ROUNDS: tiles of which the sums of all warps stay in shared memory, until they are added.
    """
    U: tl.constexpr = K // 32
    HALVES: tl.constexpr = NG > 1 and K // NG % 32 != 0
    PAIRS: tl.constexpr = WIDE and NG > 1 and K // NG == 16 and (NESTED == _SCALED or NESTED == _E4M3)  # noqa: SIM109
    HALF: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    SETS: tl.constexpr = (SLICES + TOGETHER - 1) // TOGETHER
    OF_TABLE: tl.constexpr = 64 * WARPS * ROUNDS  # where the table is in shared memory, after the sums
    OF_X: tl.constexpr = OF_TABLE + (128 * _ENTRIES[BITS] if LOOKUP else 0)
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    thread = tl.arange(0, 32 * WARPS)
    g = thread % 32 // 4
    chunk0 = thread // 32 * 4 + thread % 4
    tiles = tl.cdiv(N, 16)

    # What is needed first is asked for first.
    seen = ()
    if not HALF:
        for s in tl.static_range(SLICES):
            at = x_ptr + tl.minimum(s * WARPS * 4 + chunk0, U - 1) * 16 + g * 2
            seen += (_two_kept(at),)  # type: ignore[assignment]
    entry = (0.0, 0.0, 0.0)
    if LOOKUP:
        entry = _entry(table_ptr, thread, KIND, BITS, EXPONENT)
    ahead = ()
    for i in tl.static_range(AHEAD):
        if i % (2 * SLICES) == 0:
            tile = first + i // (2 * SLICES) * programs
            there = (tile < tiles).to(tl.int32)
            row = tl.minimum(tile * 16, N - 16)  # the last tile may have rows of the one before
            at0, at1 = _rows_at(q_ptr, scale_ptr, row, g, chunk0, K, BITS, RG, NG, RG2, NG2)
        ahead += (  # type: ignore[assignment]
            _ahead(
                at0 if i % 2 == 0 else at1, there, scale2_ptr, zero2_ptr, chunk0, i % (2 * SLICES) // 2, K, BITS, NG, NESTED,
                NG2, WIDE, PAIRS, WARPS,
            ),
        )  # fmt: skip
    _no_later()

    inverse = 1.0
    step = 1.0
    if not HALF:
        top = tl.zeros((32 * WARPS,), tl.float32)
        if N > 0:  # it is: the assembler would wait for x before it asks for the weight
            top = _largest(seen, TOGETHER)
        power = _power(top) - (_TOP << 23)
        inverse = ((254 << 23) - power).to(tl.float32, bitcast=True)
        step = tl.where(top < float("inf"), power.to(tl.float32, bitcast=True), float("nan"))
    place = tl.inline_asm_elementwise(PLACE_ASM, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    room = thread
    if SETS > KEPT:
        room = _room_of_lane(place + OF_X, thread, SETS - KEPT, TOGETHER, WARPS)
    met = ()
    for i in tl.static_range(SETS):
        words = _met(x_ptr, i, chunk0, thread, inverse, U, TURNED, HALF, TOGETHER, WARPS)
        if i < KEPT:
            met += (words,)  # type: ignore[assignment]
        else:
            _put(words, room + (i - KEPT) * (256 * TOGETHER), thread, TOGETHER)
    table = thread
    step *= 2.0**POWER
    if LOOKUP:
        table, of_table = _table_of_lane(entry, place + OF_TABLE, thread, KIND, BITS, WARPS)
        step *= of_table
    if SETS > KEPT:
        tl.debug_barrier()
    factor = 1.0
    if NESTED == _SCALED and NG > 1:
        factor = tl.load(scale2_ptr).to(tl.float32)

    slot = 0
    for tile in tl.range(first, tiles, programs, loop_unroll_factor=UNROLL):
        total0 = tl.zeros((32 * WARPS,), tl.float32)
        total1 = tl.zeros((32 * WARPS,), tl.float32)
        for s in tl.static_range(SLICES):
            a, b = ahead[0], ahead[1]  # type: ignore[misc]
            # It always is. With N, which the assembler does not know, that is done with a slice before it begins with the next.
            if s < (N if APART else SLICES):
                w, v = a[0], b[0]
                if s // TOGETHER < KEPT:
                    x = met[s // TOGETHER]  # type: ignore[var-annotated]
                else:
                    x = _taken(room + (s // TOGETHER - KEPT) * (256 * TOGETHER), TOGETHER)
                p0, p1, p2, p3, q0, q1, q2, q3 = tl.inline_asm_elementwise(
                    ASM, _OPERANDS,
                    [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], x[0], x[1],
                     x[2], x[3], x[4], x[5], x[6], x[7], table],
                    dtype=(
                        tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32
                    ), is_pure=False, pack=1,
                )  # fmt: skip
                total0 = _added(total0, p0, p1, q0, q1, a, thread, s, TOGETHER, HALVES, NG, NESTED, PAIRS, FLOAT8)
                total1 = _added(total1, p2, p3, q2, q3, b, thread, s, TOGETHER, HALVES, NG, NESTED, PAIRS, FLOAT8)
                for i in tl.static_range(2):
                    if (2 * s + i + AHEAD) % (2 * SLICES) == 0:
                        after = tile + (2 * s + i + AHEAD) // (2 * SLICES) * programs
                        there = (after < tiles).to(tl.int32)
                        row = tl.minimum(after * 16, N - 16)
                        at0, at1 = _rows_at(q_ptr, scale_ptr, row, g, chunk0, K, BITS, RG, NG, RG2, NG2)
                    read = _ahead(
                        at0 if (i + AHEAD) % 2 == 0 else at1, there, scale2_ptr, zero2_ptr, chunk0,
                        (2 * s + i + AHEAD) % (2 * SLICES) // 2, K, BITS, NG, NESTED, NG2, WIDE, PAIRS, WARPS,
                    )  # fmt: skip
                    if i == 0:
                        a = read
                    else:
                        b = read
                _no_later()
            ahead = ahead[2:] + (a, b)  # type: ignore[assignment] # noqa: RUF005
        _put_sums(total0 * step, total1 * step, place, slot, thread, WARPS)
        slot += 1
        if (slot == ROUNDS) | (tile + programs >= tiles):
            tl.debug_barrier()
            of_slot = thread // (4 * WARPS)
            of_tile = tl.minimum((tile - (slot - 1 - of_slot) * programs) * 16, N - 16)
            to = of_tile + thread // (WARPS // 4) % 16
            mine = of_slot < slot
            out = _gathered(place, thread, ROUNDS, WARPS) * factor
            if NG == 1:
                out *= _scales(scale_ptr, scale2_ptr, zero2_ptr, to, 0, mine, RG, NG, NESTED, RG2, NG2)
            elif NESTED == _INTEGERS and NG2 == 1:
                out *= tl.load(scale2_ptr + to // RG2, mask=mine, other=0).to(tl.float32)
            tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=mine & (thread % (WARPS // 4) == 0))
            tl.debug_barrier()
            slot = 0


@triton.jit
def gemv_halves_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr,
    RG2: tl.constexpr, NG2: tl.constexpr, ASM: tl.constexpr, POWER: tl.constexpr, LOOKUP: tl.constexpr,
    TURNED: tl.constexpr, FLOAT8: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr, SLICES: tl.constexpr,
    TOGETHER: tl.constexpr, KEPT: tl.constexpr, AHEAD: tl.constexpr, APART: tl.constexpr, UNROLL: tl.constexpr,
    ROUNDS: tl.constexpr, PLACE_ASM: tl.constexpr,
):  # fmt: skip
    """`_gemv_halves` of one weight, for each token."""
    token = tl.program_id(1)
    _gemv_halves(
        x_ptr + token * K, q_ptr, scale_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr + token * N, N, tl.program_id(0),
        tl.num_programs(0), K, BITS, KIND, EXPONENT, RG, NG, NESTED, RG2, NG2, ASM, POWER, LOOKUP, TURNED, FLOAT8, WIDE,
        WARPS, SLICES, TOGETHER, KEPT, AHEAD, APART, UNROLL, ROUNDS, PLACE_ASM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n0", "n1", "n2", "p0", "p1", "p2"])
def gemv_halves_joined_kernel(
    x_ptr, out_ptr, q0, scale0, zero0, table0, outer0, outer_zero0, n0, p0, q1, scale1, zero1, table1, outer1, outer_zero1,
    n1, p1, q2, scale2, zero2, table2, outer2, outer_zero2, n2, p2, K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    EXPONENT: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr,
    NG2: tl.constexpr, ASM: tl.constexpr, POWER: tl.constexpr, LOOKUP: tl.constexpr, TURNED: tl.constexpr,
    FLOAT8: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr, SLICES: tl.constexpr, TOGETHER: tl.constexpr,
    KEPT: tl.constexpr, AHEAD: tl.constexpr, APART: tl.constexpr, UNROLL: tl.constexpr, ROUNDS: tl.constexpr,
    PLACE_ASM: tl.constexpr,
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
        RG, NG, NESTED, RG2, NG2, ASM, POWER, LOOKUP, TURNED, FLOAT8, WIDE, WARPS, SLICES, TOGETHER, KEPT,
        AHEAD, APART, UNROLL, ROUNDS, PLACE_ASM,
    )  # fmt: skip


class Tile(NamedTuple):
    """How the product is cut: warps of a program, 8 or 16, programs of a multiprocessor at a time, registers of a thread at most,
    chunks of rows read ahead at most, sets of words of x in registers at most, and whether slices are multiplied one after the
    other, which takes fewer registers."""

    warps: int
    programs: int
    registers: int | None
    ahead: int
    kept: int
    apart: bool


def tile_of(reading: Reading, device: torch.device, tokens: int = 1) -> Tile:
    """For a weight, or all rows of a launch: enough warps for all slices of 128, up to 16. More bits and scales take more
    registers. tokens: that run side by side."""
    words = reading.bits + (0 if reading.by_row else 1 if reading.group % 32 == 0 else 2)
    apart = reading.k > (8192 if words < 9 else 4096)
    ahead = 8 if apart and words < 9 else 4
    kept = 4 if words < 6 or ahead == 4 else 2
    tile = Tile(16, 1, 128, ahead, kept, apart)
    half = tile._replace(warps=8, programs=2)
    if reading.k <= 2048:
        return half
    # Where lanes share a scale, two programs of half as many warps are the faster, if they have no tile more to do.
    if _together(reading) > 1 and 3072 < reading.k <= 4096:
        halves, wholes = (_rounds([reading.n], each, device, tokens) for each in (half, tile))
        return half if 2 * halves <= wholes else tile
    return tile


def _ring(slices: int, most: int) -> tuple[int, int]:
    """How many chunks of rows are ahead, `most` or fewer, and minus how many tiles there are in a turn of the loop."""
    turns = [t for t in (4, 2, 1) if t == 1 or slices * t <= 8]
    return max((n, -t) for n in range(1, most + 1) for t in turns if 2 * slices * t % n == 0)


def _together(reading: Reading) -> int:
    """Lanes of which neighbours have the same scale, in every slice."""
    if reading.by_row:
        return 4
    return next(n for n in (4, 2, 1) if n == 1 or reading.group % (32 * n) == 0)


def _at_once(tile: Tile, device: torch.device, tokens: int) -> int:
    """The programs of one of `tokens` that run side by side."""
    return max(1, multiprocessors(device) * tile.programs // tokens)


def _rounds(rows: Sequence[int], tile: Tile, device: torch.device, tokens: int) -> int:
    """The tiles of a program, if each has as many."""
    return cdiv(sum(cdiv(n, 16) for n in rows), _at_once(tile, device, tokens))


def programs_of(rows: Sequence[int], tile: Tile, device: torch.device, tokens: int = 1) -> list[int]:
    """The programs of each weight of a launch; of one of `tokens` that run side by side."""
    tiles, at_once = [cdiv(n, 16) for n in rows], _at_once(tile, device, tokens)
    rounds = _rounds(rows, tile, device, tokens)
    while sum(cdiv(t, rounds) for t in tiles) > max(at_once, len(tiles)):
        rounds += 1  # each weight has a last program that is done sooner
    return [cdiv(t, rounds) for t in tiles]


def constants_of(reading: Reading, tile: Tile, wide: bool, device: torch.device) -> dict[str, Any]:
    """Those of the kernels, in the order of their parameters; wide: whether codes and scales begin at multiples of 16 bytes."""
    float8, slices, together = has_float8(device), cdiv(reading.k, 128 * tile.warps), _together(reading)
    halves = not reading.by_row and reading.group % 32 != 0
    way = way_of(reading.kind, reading.bits, reading.exponent, halves, float8)
    known = reading.constants(False)
    sets, lookup = cdiv(slices, together), way in LOOKED_UP
    table = 128 * _ENTRIES.value[reading.bits] if lookup else 0
    size = 256 * together * (tile.warps + 1)  # of a set of words of x in shared memory
    sums = 64 * tile.warps  # of a tile
    room = (_ROOM - table - 2 * sums) // size
    kept = min(sets, max(tile.kept, sets - room))
    others = size * (sets - kept)
    rounds = next(r for r in (8, 4, 2) if r * sums + table + others <= _ROOM)
    ahead, turns = _ring(slices, tile.ahead)
    return {
        **{name: known[name] for name in ("K", "BITS", "KIND", "EXPONENT", "RG", "NG", "NESTED", "RG2", "NG2")},
        "ASM": products_asm(way, reading.bits, reading.exponent), "POWER": power_of(way, reading.exponent), "LOOKUP": lookup,
        "TURNED": way == "pairs", "FLOAT8": float8, "WIDE": wide, "WARPS": tile.warps, "SLICES": slices,
        "TOGETHER": together, "KEPT": kept, "AHEAD": ahead, "APART": tile.apart, "UNROLL": -turns, "ROUNDS": rounds,
        "PLACE_ASM": _place_asm(rounds * sums + table + others),
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
    tile = tile or tile_of(reading, x.device, m)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    (programs,) = programs_of([n], tile, x.device, m)
    launch(
        gemv_halves_kernel, (programs, m), aligned(x), *given(fields), out, n, num_warps=tile.warps,
        registers=tile.registers, **constants_of(reading, tile, is_wide([fields]), x.device),
    )  # fmt: skip
    return out


def gemv_launch(reading: Reading, fields: Fields) -> Callable[[Tensor, Fields], Tensor]:
    """One token, for weights of the form of these, x (..., K) -> (..., N): what it decides is decided once."""
    device, n = fields[0].device, reading.n
    tile = tile_of(reading, device)
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
    tile = tile_of(reading._replace(n=sum(rows)), x.device)
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
