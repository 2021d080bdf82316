"""The Triton kernel for up to 16 tokens (8 of float16) and a weight in any format that has an operand: see template.py.

Each warp of a program has slices of K, of 4 chunks of 32 elements, one for every four lanes, and keeps x of these in registers,
where the tensor cores of every GPU take both sides from (pair_products.py). It goes through tiles of 16 rows, whose words are on
their way long before. The sums of the warps meet in shared memory, once per block of rows: no second kernel is needed, and there
is a program for each multiprocessor, which begins to read the weight before the kernel before is done. More tokens of a small
weight are groups of so many, each for programs of its own.

Tensors have one dim with an element for each thread: Triton gives thread i element i.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .bf16_pairs import decoding
from .device import is_hopper, multiprocessors
from .launch import Launch, cdiv, launch
from .pair_products import operands, products_asm
from .read_once import _factor_and_term, _group_of_half, _scale, _stored, _table_words, _words_of_chunk
from .reading import Fields, Reading
from .several import cut, of_three
from .template import _SCALED, _numbers, given

_OPERANDS = tl.constexpr(("", operands(1), operands(2)))

_HALVES_ASM = tl.constexpr(
    """{ .reg .b16 h, i; .reg .f32 a, b, c; .reg .b32 w, t; mov.b32 {h, i}, $2; cvt.f32.f16 a, h; cvt.f32.f16 b, i;
    cvt.rn.bf16x2.f32 w, b, a; shl.b32 t, w, 16; mov.b32 c, t; sub.f32 a, a, c; and.b32 t, w, 0xffff0000; mov.b32 c, t;
    sub.f32 b, b, c; cvt.rn.bf16x2.f32 $1, b, a; mov.b32 $0, w; }"""
)
"""Two float16, as the sums of two bfloat16 each."""

_SLICE = tl.constexpr(4)
"""Chunks of a slice."""

_ROOM = 48 * 1024
"""Bytes of shared memory that PTX itself may set apart."""


_TABLE_BYTES = 256 * 128
"""Of a table of both codes of a byte, with a copy for each lane."""


def _place_asm(size: int) -> str:
    return f"{{ .reg .b64 a; .shared .align 128 .b8 ao_room[{size}]; mov.u64 a, ao_room; cvt.u32.u64 $0, a; }}"


def _fill_asm(warps: int) -> str:
    """A word of a table to its copies, 16 bytes at a time, each thread to other banks than its neighbours.

    Operands: where the table begins, the thread, and the word of byte thread % 256."""
    threads = 32 * warps
    lines = ["{ .reg .b32 e, a, q, t; and.b32 e, $2, 255; mad.lo.u32 a, e, 128, $1; mov.b32 $0, 0;"]
    lines.append(f"shr.b32 q, $2, 8; mad.lo.u32 q, q, {8 * 256 // threads}, e; shl.b32 q, q, 4;")
    for _ in range(max(1, 8 * 256 // threads)):
        lines.append("and.b32 t, q, 112; add.u32 t, t, a; st.shared.v4.b32 [t], {$3, $3, $3, $3}; add.u32 q, q, 16;")
    return " ".join([*lines, "}"])


@functools.cache
def _sum_asm(warps: int, size: int) -> str:
    """The sum of a number of each warp, which are `size` bytes apart."""
    lines = ["{ .reg .f32 a, b; ld.shared.f32 a, [$1];"]
    lines += [f"ld.shared.f32 b, [$1 + {size * i}]; add.f32 a, a, b;" for i in range(1, warps)]
    return " ".join([*lines, "mov.f32 $0, a; }"])


@triton.jit
def _ahead(
    q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, chunk, K: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The words of a chunk of a row, and what is stored of the groups of both halves."""
    words = _words_of_chunk(q_ptr + (row * (K * BITS // 32) + chunk * BITS), chunk, K, BITS, WIDE)
    G: tl.constexpr = K // 16 // NG  # halves of chunks in a group
    first = _stored(
        scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, 0 if NG == 1 else chunk * 2 // G, ZERO, RG, NG, NESTED, RG2, NG2
    )  # fmt: skip
    second = first
    if G % 2 != 0:
        group = _group_of_half(chunk * 2 + 1, K, NG)
        second = _stored(scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, group, ZERO, RG, NG, NESTED, RG2, NG2)
    return words, first, second


@triton.jit
def _held(ahead, none, BITS: tl.constexpr):
    """What was read ahead, where something comes after each load of words: the assembler puts a load without that last, and the
    next step would wait for it. none: 0, which the compiler must not know."""
    held = ()
    for i in tl.static_range(len(ahead)):
        words = ()
        for j in tl.static_range(8):
            word = ahead[i][0][j]
            if j < BITS and (j % 4 == 0 or (BITS != 4 and BITS != 8 and (j % 2 == 0 or (BITS != 2 and BITS != 6)))):
                word = tl.inline_asm_elementwise(
                    "xor.b32 $0, $1, $2;", "=r,r,r", [word, none], dtype=tl.int32, is_pure=True, pack=1
                )
            words += (word,)  # type: ignore[assignment]
        held += ((words, ahead[i][1], ahead[i][2]),)  # type: ignore[assignment]
    return held


@triton.jit
def _block_ahead(
    q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, block, part, N, s: tl.constexpr, K: tl.constexpr,
    BITS: tl.constexpr, ZERO: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr,
    NG2: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr, SLICES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`_ahead` of slice s of a part of K, of both rows of each tile of a block."""
    lane = tl.arange(0, 32 * WARPS) % 32
    chunk = tl.minimum(_chunk(part, s, WARPS, SLICES), (K + 31) // 32 - 1)
    ahead = ()
    for tile in tl.static_range(2 * TILES):
        row = tl.minimum(block * (16 * TILES) + tile * 8 + lane // 4, N - 1)
        ahead += (  # type: ignore[assignment]
            _ahead(
                q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, row, chunk, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2, WIDE
            ),
        )  # fmt: skip
    return ahead


@triton.jit
def _chunk(part, s: tl.constexpr, WARPS: tl.constexpr, SLICES: tl.constexpr):
    """Which chunk each thread has of slice s of a part of K; may be beyond the last."""
    thread = tl.arange(0, 32 * WARPS)
    return (part * (WARPS * SLICES) + thread // 32 * SLICES + s) * _SLICE + thread % 4


@triton.jit
def _met(
    x_ptr, part, M, s: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr, SLICES: tl.constexpr,
    BLOCKS: tl.constexpr, HALVES: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The 16 words of x that each thread has of slice s of a part of K, for each block of 8 tokens.

    HALVES: of float16, which are the sums of two bfloat16 each: those of the first block and of the second.
    TURNED: as codes that are looked up, e and e + 16 in a word, so that words n and n + 8 become two others."""
    U: tl.constexpr = (K + 31) // 32
    chunk = _chunk(part, s, WARPS, SLICES)
    words = ()
    rest = ()
    for block in tl.static_range(1 if HALVES else BLOCKS):
        token = tl.minimum(block * 8 + tl.arange(0, 32 * WARPS) % 32 // 4, M - 1)
        at = x_ptr + (token * (K // 2) + tl.minimum(chunk, U - 1) * 16)
        for i in tl.static_range(4):
            if K % 32 == 0:
                eight = at + 4 * i
            else:  # of half a chunk two eights are there
                eight = at + tl.where(chunk < K // 32, 4 * i, 4 * (i % 2 if BITS == 8 else i // 2))
            # Not pure: it must stay behind the wait for the kernel that wrote x.
            four = tl.inline_asm_elementwise(
                "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [eight],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
            )  # fmt: skip
            for j in tl.static_range(4):
                word = four[j]
                if K % 32 != 0 and (i // 2 if BITS == 8 else i % 2) == 1:
                    word = tl.where(chunk < K // 32, word, 0)
                elif U % (_SLICE * WARPS * SLICES) != 0:
                    word = tl.where(chunk < U, word, 0)
                if HALVES:
                    word, low = tl.inline_asm_elementwise(
                        _HALVES_ASM, "=r,=r,r", [word], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
                    )
                    rest += (low,)  # type: ignore[assignment]
                words += (word,)  # type: ignore[assignment]
    if HALVES:
        words += rest
    if TURNED:
        turned = ()
        for i in tl.static_range(8 * BLOCKS):
            first, second = tl.inline_asm_elementwise(
                "{ .reg .b32 t; prmt.b32 t, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632; mov.b32 $0, t; }", "=r,=r,r,r",
                [words[i // 8 * 16 + i % 8], words[i // 8 * 16 + i % 8 + 8]], dtype=(tl.int32, tl.int32), is_pure=True,
                pack=1,
            )  # fmt: skip
            turned += first, second  # type: ignore[assignment]
        return turned
    else:
        return words


@triton.jit
def _table_of_lane(
    table_ptr, place, KIND: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr,
    FILL_ASM: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Puts the numbers of both codes of each byte in shared memory: where the copy of a lane is."""
    thread = tl.arange(0, 32 * WARPS)
    byte = thread % 256
    low = _numbers(byte & 15, table_ptr, KIND, BITS, EXPONENT, SIGNED)
    high = _numbers(byte >> 4, table_ptr, KIND, BITS, EXPONENT, SIGNED)
    word = tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.inline_asm_elementwise(
        FILL_ASM, "=r,r,r,r", [place + thread * 0, thread, word], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()
    # After the barrier, so that what depends on it is, too.
    return tl.inline_asm_elementwise(
        "mad.lo.u32 $0, $2, 4, $1;", "=r,r,r", [place + thread * 0, thread % 32], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _times(
    c, w, v, f, x, table, ASM: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """c and the sums of words w and v of two rows times x. f: factors and terms."""
    if BLOCKS == 1:
        return tl.inline_asm_elementwise(
            ASM, _OPERANDS[1],
            [c[0], c[1], c[2], c[3], w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], v[0], v[1], v[2], v[3], v[4], v[5],
             v[6], v[7], f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], table[0], table[1], table[2], table[3],
             table[4], table[5], table[6], table[7], x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9],
             x[10], x[11], x[12], x[13], x[14], x[15]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            ASM, _OPERANDS[2],
            [c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], v[0], v[1],
             v[2], v[3], v[4], v[5], v[6], v[7], f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], table[0], table[1],
             table[2], table[3], table[4], table[5], table[6], table[7], x[0], x[1], x[2], x[3], x[4], x[5], x[6],
             x[7], x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15], x[16], x[17], x[18], x[19], x[20], x[21],
             x[22], x[23], x[24], x[25], x[26], x[27], x[28], x[29], x[30], x[31]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _added(
    acc, one, other, x, table, K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, SIGNED: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, SHIFT: tl.constexpr,
    POWER: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The sums of a tile, and those of a slice. one, other: what was read of both rows."""
    f0, z0 = _factor_and_term(one[1], BITS, KIND, SIGNED, ZERO, OFFSET, SCALED, NESTED, SHIFT, POWER)
    g0, y0 = _factor_and_term(other[1], BITS, KIND, SIGNED, ZERO, OFFSET, SCALED, NESTED, SHIFT, POWER)
    f1, z1, g1, y1 = f0, z0, g0, y0
    if K // NG % 32 != 0:
        f1, z1 = _factor_and_term(one[2], BITS, KIND, SIGNED, ZERO, OFFSET, SCALED, NESTED, SHIFT, POWER)
        g1, y1 = _factor_and_term(other[2], BITS, KIND, SIGNED, ZERO, OFFSET, SCALED, NESTED, SHIFT, POWER)
    factors = (f0, z0, f1, z1, g0, y0, g1, y1)
    if NG == 1 or SCALED:
        return _times(acc, one[0], other[0], factors, x, table, ASM, BLOCKS)
    else:  # a slice is in one group
        none = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        c = _times(none, one[0], other[0], factors, x, table, ASM, BLOCKS)
        scale0, scale1 = _scale(one[1], NESTED), _scale(other[1], NESTED)
        added = ()
        for i in tl.static_range(4 * BLOCKS):
            added += (acc[i] + c[i] * (scale0 if i % 4 < 2 else scale1),)  # type: ignore[assignment]
        return added


@triton.jit
def _sliced(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, M, N, first, programs,
    K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr,
    NG2: tl.constexpr, SHIFT: tl.constexpr, POWER: tl.constexpr, LAST_POWER: tl.constexpr, SCALED: tl.constexpr,
    ASM: tl.constexpr, SUM_ASM: tl.constexpr, PLACE_ASM: tl.constexpr, LOOKUP: tl.constexpr, FILL_ASM: tl.constexpr,
    WIDE: tl.constexpr, WARPS: tl.constexpr, SLICES: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr,
    BUFFERS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum of x[m] * w[n], rows n by program `first` of `programs`.

    SCALED: whether scales multiply the numbers; otherwise the sums of groups of whole slices. LOOKUP: as `looks_up_pairs` says.
    WARPS: of a program, K is cut among them and in SLICES each at a time. TILES: of 16 rows, in a block of rows. BLOCKS: of 8
    tokens, or of the two halves of 8 in float16. BUFFERS: of sums in shared memory, one or two. EARLY: whether it begins before
    the kernel before is done, and the next too.
    """
    PARTS: tl.constexpr = ((K + 31) // 32 + _SLICE * WARPS * SLICES - 1) // (_SLICE * WARPS * SLICES)
    HALVES: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    OUT: tl.constexpr = 1 if HALVES else BLOCKS
    SIZE: tl.constexpr = 512 * TILES * OUT  # bytes of the sums of a warp
    if EARLY:
        gdc_launch_dependents()
    before = tl.program_id(1) * (8 * OUT)  # tokens of other programs
    x_ptr += before * K
    out_ptr += before * N
    M = tl.minimum(M - before, 8 * OUT)
    x_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    # A lane puts its four sums, of token pair t and row pair g, where lanes with the same t follow each other, so that
    # reading one token of 16 rows meets all banks, as writing does.
    to = thread // 32 * SIZE + (lane % 4 * 8 + (lane // 4 ^ (lane % 4 * 2))) * 16
    place = tl.inline_asm_elementwise(PLACE_ASM, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    ahead = ()
    for s in tl.static_range(SLICES):
        ahead += (  # type: ignore[assignment]
            _block_ahead(
                q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, first, 0, N, s, K, BITS, ZERO, RG, NG, NESTED, RG2, NG2,
                WIDE, WARPS, SLICES, TILES,
            ),
        )  # fmt: skip
    if LOOKUP:
        own = _table_of_lane(table_ptr, place, KIND, BITS, EXPONENT, SIGNED, FILL_ASM, WARPS)
        table = (own, own, own, own, own, own, own, own)
        place += 256 * 128
    else:
        table = _table_words(table_ptr, KIND, BITS)
    if EARLY:
        gdc_wait()
    met = ()
    for s in tl.static_range(SLICES):
        met += (_met(x_ptr, 0, M, s, K, BITS, WARPS, SLICES, BLOCKS, HALVES, LOOKUP),)  # type: ignore[assignment]

    turn = 0
    for block in tl.range(first, tl.cdiv(N, 16 * TILES), programs):
        acc = ()
        for _ in tl.static_range(TILES):
            zeros = ()
            for _ in tl.static_range(4 * BLOCKS):
                zeros += (tl.zeros((32 * WARPS,), tl.float32),)  # type: ignore[assignment]
            acc += (zeros,)  # type: ignore[assignment]
        for part in tl.range(0, PARTS):
            next_part = 0 if PARTS == 1 else (part + 1) % PARTS
            next_block = block + programs if PARTS == 1 else tl.where(next_part == 0, block + programs, block)
            later = ()
            later_met = ()
            for s in tl.static_range(SLICES):
                more = ()
                for tile in tl.static_range(TILES):
                    more += (  # type: ignore[assignment]
                        _added(
                            acc[tile], ahead[s][2 * tile], ahead[s][2 * tile + 1], met[s], table, K, BITS, KIND, SIGNED,
                            ZERO, OFFSET, NG, NESTED, SHIFT, POWER, SCALED, ASM, BLOCKS,
                        ),
                    )  # fmt: skip
                acc = more
                later += (  # type: ignore[assignment]
                    _block_ahead(
                        q_ptr, scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, next_block, next_part, N, s, K, BITS, ZERO, RG,
                        NG, NESTED, RG2, NG2, WIDE, WARPS, SLICES, TILES,
                    ),
                )  # fmt: skip
                if PARTS > 1:
                    later_met += (  # type: ignore[assignment]
                        _met(x_ptr, next_part, M, s, K, BITS, WARPS, SLICES, BLOCKS, HALVES, LOOKUP),
                    )  # fmt: skip
            ahead = ()
            for s in tl.static_range(SLICES):
                ahead += (_held(later[s], M >> 31, BITS),)  # type: ignore[assignment]
            if PARTS > 1:
                met = later_met

        base = place + turn * (WARPS * SIZE)
        for tile in tl.static_range(TILES):
            for b in tl.static_range(OUT):
                c = acc[tile]  # type: ignore[var-annotated]
                if HALVES:
                    c = (c[0] + c[4], c[1] + c[5], c[2] + c[6], c[3] + c[7])  # type: ignore[assignment]
                tl.inline_asm_elementwise(
                    "st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;", "=r,r,f,f,f,f",
                    [base + to + (tile * OUT + b) * 512, c[4 * b], c[4 * b + 1], c[4 * b + 2], c[4 * b + 3]],
                    dtype=tl.int32, is_pure=False, pack=1,
                )  # fmt: skip
        tl.debug_barrier()
        r = tl.arange(0, 128 * TILES * OUT)
        g, t = r % 8, r // 32 % 4
        at = r // 128 * 512 + (t * 8 + (g ^ (t * 2))) * 16 + r % 16 // 8 * 8 + r // 16 % 2 * 4
        out = tl.inline_asm_elementwise(SUM_ASM, "=f,r", [base + at], dtype=tl.float32, is_pure=False, pack=1)
        if BUFFERS == 2:
            turn ^= 1
        else:
            tl.debug_barrier()
        row = block * (16 * TILES) + r // (128 * OUT) * 16 + r % 16
        token = r // 128 % OUT * 8 + r // 16 % 8
        if NG == 1:
            of_rows = _stored(
                scale_ptr, zero_ptr, scale2_ptr, zero2_ptr, tl.minimum(row, N - 1), 0, False, RG, NG, NESTED, RG2, NG2
            )  # fmt: skip
            out *= _scale(of_rows, NESTED)
        if NESTED == _SCALED:
            out *= tl.load(scale2_ptr).to(tl.float32)
        if LAST_POWER != 0:
            out *= 2.0**LAST_POWER
        tl.store(out_ptr + token * N + row, out.to(out_ptr.dtype.element_ty), mask=(row < N) & (token < M))


@triton.jit(do_not_specialize=["M"])
def sliced_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, M, N, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, SHIFT: tl.constexpr,
    POWER: tl.constexpr, LAST_POWER: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr, SUM_ASM: tl.constexpr,
    PLACE_ASM: tl.constexpr, LOOKUP: tl.constexpr, FILL_ASM: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr,
    SLICES: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, BUFFERS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`_sliced` of one weight."""
    _sliced(
        x_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, M, N, tl.program_id(0),
        tl.num_programs(0), K, BITS, KIND, EXPONENT, SIGNED, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, SHIFT, POWER,
        LAST_POWER, SCALED, ASM, SUM_ASM, PLACE_ASM, LOOKUP, FILL_ASM, WIDE, WARPS, SLICES, TILES, BLOCKS, BUFFERS, EARLY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "n0", "n1", "n2", "p0", "p1", "p2"])
def sliced_joined_kernel(
    x_ptr, out_ptr, q0, scale0, zero0, table0, outer0, outer_zero0, n0, p0, q1, scale1, zero1, table1, outer1, outer_zero1,
    n1, p1, q2, scale2, zero2, table2, outer2, outer_zero2, n2, p2, M, K: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, SHIFT: tl.constexpr,
    POWER: tl.constexpr, LAST_POWER: tl.constexpr, SCALED: tl.constexpr, ASM: tl.constexpr, SUM_ASM: tl.constexpr,
    PLACE_ASM: tl.constexpr, LOOKUP: tl.constexpr, FILL_ASM: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr,
    SLICES: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, BUFFERS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`_sliced` of two or three weights one below the other, of n rows and with p programs each; of two, p2 is 0."""
    i = tl.program_id(0)
    first, second = p0, p0 + p1
    _sliced(
        x_ptr, of_three(i, first, second, q0, q1, q2), of_three(i, first, second, scale0, scale1, scale2),
        of_three(i, first, second, zero0, zero1, zero2), of_three(i, first, second, table0, table1, table2),
        of_three(i, first, second, outer0, outer1, outer2), of_three(i, first, second, outer_zero0, outer_zero1, outer_zero2),
        out_ptr + M * of_three(i, first, second, 0, n0, n0 + n1), M, of_three(i, first, second, n0, n1, n2),
        i - of_three(i, first, second, 0, first, second), of_three(i, first, second, p0, p1, p2), K, BITS, KIND, EXPONENT,
        SIGNED, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, SHIFT, POWER, LAST_POWER, SCALED, ASM, SUM_ASM, PLACE_ASM, LOOKUP,
        FILL_ASM, WIDE, WARPS, SLICES, TILES, BLOCKS, BUFFERS, EARLY,
    )  # fmt: skip


class Cut(NamedTuple):
    """How a product is cut.

    warps: of a program, 8 or 16, among which K is cut. slices: of a warp at a time. tiles: of 16 rows, in a block of rows; a
    power of two. programs: at a time on a multiprocessor.
    """

    warps: int
    slices: int
    tiles: int
    programs: int = 1


def takes(reading: Reading, m: int, half: bool) -> bool:
    """Whether `sliced` is for m tokens. half: whether they are float16."""
    if m <= 8:
        return True
    # Shared memory does not hold a table and the sums of two tiles of more tokens, and K in many parts wants two tiles.
    if not half and m <= 16 and (reading.k <= 8192 or not reading.looks_up_pairs):
        return True
    # One launch in place of three, where groups of tokens find room on the GPU beside each other.
    return m <= MANY and cdiv(reading.n, 16) * cdiv(m, _tokens(half)) * cdiv(reading.k, 2048) <= ROUNDS * 132


MANY = 128
"""Tokens beyond which no weight is small enough."""

ROUNDS = 4
"""Of programs with 2048 columns on 132 multiprocessors, in which three launches are done too."""


def _tokens(half: bool) -> int:
    """Of a program, at most."""
    return 8 if half else 16


@functools.cache
def cut_for(reading: Reading, m: int, half: bool, device: torch.device) -> Cut:
    """For m tokens. reading: of all rows of a launch. half: whether they are float16, which takes as much as twice the tokens."""
    slices = cdiv(reading.k, 128)
    warps = 16 if slices >= 16 else 8
    programs = 16 // warps
    each = cdiv(slices, warps)
    # x of one more slice costs registers, of which more tokens and codes of more bits leave fewer, and codes whose words are
    # loaded one by one.
    odd = reading.bits in (3, 5, 7)
    more = m > 8 or half or odd
    at_once = 2 if (each == 2 if more else each % 2 == 0) else 1
    one_tile = (at_once == 2 and (more or reading.bits > 4)) or m > 16 or (m > 8 and reading.looks_up_pairs)
    if odd and m <= 8 and not one_tile:
        return Cut(warps, at_once, 2, programs)  # as many of their loads are on the way as of the others with one
    places = multiprocessors(device) * programs
    tiles = 1 if one_tile else min((2, 1), key=lambda t: cdiv(cdiv(reading.n, 16 * t), places) * t)
    return Cut(warps, at_once, tiles, programs)


@functools.cache
def _constants(
    reading: Reading, zero: torch.dtype | None, wide: bool, m: int, half: bool, cut: Cut, early: bool
) -> Mapping[str, Any]:
    scaled = reading.groups > 1 and reading.group % 128 != 0
    constants, how = decoding(reading, zero, scaled, in_shared=True)
    lookup = how[0] == "lookup"
    sums = 2 if m > 8 and not half else 1  # blocks of 8 tokens
    blocks = 2 if half else sums
    size, table = 512 * cut.tiles * sums, _TABLE_BYTES if lookup else 0
    buffers = 2 if table + 2 * size * cut.warps <= _ROOM else 1
    return {
        **constants, "SCALED": scaled, "ASM": products_asm(*how, blocks), "SUM_ASM": _sum_asm(cut.warps, size),
        "PLACE_ASM": _place_asm(table + buffers * size * cut.warps), "LOOKUP": lookup,
        "FILL_ASM": _fill_asm(cut.warps), "WIDE": wide, "WARPS": cut.warps, "SLICES": cut.slices,
        "TILES": cut.tiles, "BLOCKS": blocks, "BUFFERS": buffers, "EARLY": early,
    }  # fmt: skip


def _programs(rows: Sequence[int], cut: Cut, device: torch.device, groups: int = 1) -> list[int]:
    """The programs for each weight of a launch: as many rounds for each, and a program for each place if possible."""
    blocks = [cdiv(n, 16 * cut.tiles) for n in rows]
    places = max(1, multiprocessors(device) * cut.programs // groups)
    rounds = cdiv(sum(blocks), places)
    while sum(cdiv(b, rounds) for b in blocks) > max(places, len(blocks)):
        rounds += 1
    return [cdiv(b, rounds) for b in blocks]


def _registers(cut: Cut) -> int:
    return 65536 // (32 * cut.warps * cut.programs)


def sliced(x: Tensor, reading: Reading, weights: Sequence[Fields], how: Cut | None = None) -> list[Tensor]:
    """The products of x with one, two or three weights in one launch, whose readings are the same but for n.

    x: (M, K), contiguous, bfloat16 with M up to 16, or float16 with M up to 8 -> (M, N) of each.
    """
    m, fields = x.shape[0], weights[0]
    rows = [each[0].shape[0] for each in weights]
    half = x.dtype == torch.float16
    how = how or cut_for(reading._replace(n=sum(rows)), m, half, x.device)
    if x.data_ptr() % 16:
        x = x.clone()
    out = torch.empty(m * sum(rows), dtype=x.dtype, device=x.device)
    groups = max(1, cdiv(m, _tokens(half)))
    programs, early = _programs(rows, how, x.device, groups), is_hopper(x.device)
    zero = None if fields[2] is None else fields[2].dtype
    wide = all(each[0].data_ptr() % 16 == 0 for each in weights)
    constants = _constants(reading, zero, wide, m, half, how, early)
    if len(weights) == 1:
        kernel, args = sliced_kernel, [x, *given(fields), out, m, rows[0]]
    else:
        parts = [(*given(each), n, p) for each, n, p in zip(weights, rows, programs)]
        if len(parts) == 2:
            parts.append((*given(weights[1]), 0, 0))
        kernel, args = sliced_joined_kernel, [x, out, *itertools.chain(*parts), m]
    launch(
        kernel, (sum(programs) if m else 0, groups), *args, num_warps=how.warps, early=early, registers=_registers(how),
        **constants,
    )  # fmt: skip
    return cut(out, m, rows)


def sliced_launch(m: int, half: bool, reading: Reading, fields: Fields) -> Callable[[Tensor, Fields], Tensor]:
    """`sliced` of m tokens for weights of the form of these, x (..., K) -> (..., N): what it decides is decided once.

    half: whether the tokens are float16."""
    device, n = fields[0].device, reading.n
    how, early = cut_for(reading, m, half, device), is_hopper(device)
    zero = None if fields[2] is None else fields[2].dtype
    groups = max(1, cdiv(m, _tokens(half)))
    start = Launch(
        sliced_kernel, (*_programs([n], how, device, groups), groups), num_warps=how.warps, early=early,
        registers=_registers(how), views={1: torch.int32}, **_constants(reading, zero, True, m, half, how, early),
    )  # fmt: skip

    def run(x: Tensor, fields: Fields) -> Tensor:
        if fields[0].data_ptr() % 16 or x.data_ptr() % 16:
            (out,) = sliced(x.reshape(m, reading.k), reading, [(fields[0].view(torch.int32), *fields[1:])])
            return out.view(*x.shape[:-1], n)
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=device)
        start(device.index, x, *given(fields), out, m, n)
        return out

    return run
