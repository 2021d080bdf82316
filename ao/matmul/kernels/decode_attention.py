"""The Triton kernel for the attention of a few queries to quantized keys and values, split over the positions.

A warp works alone: on 32 positions at a time, whose codes go from memory straight into the fragments of tensor-core products of
16 x 8 x 16 numbers (PTX `mma.sync`), and become bfloat16 there, in registers. No shared memory is used, and nothing is exchanged
between warps. That works because the order of a sum is free: which number of head_dim is which step of k q^T, and which
position which step of v^T p^T, is chosen so that what a thread needs is contiguous in memory. With lane = 4 g + r:

    k q^T    rows are positions, 4 g + j of the 32 for j = 0 to 3, two of them in a product; columns are queries;
             thread r has a quarter of head_dim, in pieces of 16 bytes
    scores   in thread (g, r): queries 2 r and 2 r + 1 at positions 4 g to 4 g + 3, whose scales and zero points are neighbours
    v^T p^T  `movmatrix` gives thread (g, r) the probabilities of query g at positions 8 r + j and 8 r + 4 + j; rows are
             numbers of head_dim, of which thread g has an eighth at each of its positions

Queries are the columns, 8 of them, since those that share keys are often few: as rows they would be 16. Scales multiply scores
and probabilities, so that codes are multiplied as they are. Unsigned codes c of 4 bits are put into the mantissa of 16 + c, or of
128 + c where they are in their place already; these and the zero point are taken off the sums. Every warp gives a softmax that is
not normalized (attention.py tells how those are put together), and a second kernel merges them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import is_hopper, multiprocessors, on_its_device
from .launch import cdiv, launch, power_of_two

POSITIONS = 32
"""Of a step of a warp."""

_INT4, _INT8, _FLOAT8 = 0, 1, 2
KINDS = {"uint4": _INT4, "int8": _INT8, "float8": _FLOAT8}

_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32"


def _pairs_of_words(kind: int, name: str, word: str, out: list[str]) -> list[tuple[str, str]]:
    """Instructions that make the fragments of q k^T of a word of codes: pairs of bfloat16 beside each other in head_dim (or two
    apart, for 4 bits). Gives the registers of each step, (b0, b1)."""
    if kind == _INT4:
        names = [f"{name}{n}" for n in range(4)]
        for each, place in zip(names, (0, 8, 4, 12)):
            out.append(_nibbles(each, word, place))
        return [(names[0], names[1]), (names[2], names[3])]
    if kind == _INT8:
        # In float16: the mantissa of 1024 + 128 + code.
        out.append(f"xor.b32 x, {word}, 0x80808080;")
        for n, sel in enumerate((0x4140, 0x4342)):
            out.append(f"prmt.b32 t, x, 0x64646464, 0x{sel:04x}; sub.f16x2 {name}{n}, t, bias;")
        return [(f"{name}0", f"{name}1")]
    for n, sel in enumerate((0x1404, 0x3424)):
        out.append(f"prmt.b32 x, {word}, 0, 0x{sel:04x};")
        out += _float8(f"{name}{n}")
    return [(f"{name}0", f"{name}1")]


def _nibbles(name: str, word: str, place: int) -> str:
    """The codes at bits `place` and above of either half of a word, as bfloat16: the last bits of 128, or bits 3 to 6 of 16."""
    if place == 0:
        return f"lop3.b32 {name}, {word}, 0x000F000F, 0x43004300, 0xEA;"
    return f"shr.u32 t, {word}, {place - 3}; lop3.b32 {name}, t, 0x00780078, 0x41804180, 0xEA;"


def _float8(name: str) -> list[str]:
    """Two e4m3 in the high bytes of the halves of x, as bfloat16: bits in their places, and a power of two for the bias."""
    return [
        "shr.u32 t, x, 4; and.b32 t, t, 0x07F007F0;",
        f"lop3.b32 t, x, 0x80008000, t, 0xEA; fma.rn.bf16x2 {name}, t, big, nz;",
    ]


def _mma(
    c: tuple[str, ...], a: tuple[str, ...], b: tuple[str, str], start: tuple[str, ...], dtype: str = "bf16"
) -> str:
    """One product, c = a b + start. a: rows 0 to 7 and 8 to 15, then both further along K."""
    return f"{_MMA.format(dtype)} {{{', '.join(c)}}}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{', '.join(start)}}};"


_REGISTERS = (
    "{ .reg .b32 t, x, big, nz, bias, minus; "
    "mov.b32 big, 0x7B807B80; mov.b32 nz, 0x80008000; mov.b32 bias, 0x64806480; mov.b32 minus, 0xBF80BF80; "
)


def _scores_asm(kind: int, words: int) -> tuple[str, str]:
    """The scores of 4 positions of a lane with two queries. Operands: two sums of each position; the words of codes of each; two
    registers of queries per step. The four are two products, which take turns."""
    lines, steps = [], 2 if kind == _INT4 else 1
    dtype = "f16" if kind == _INT8 else "bf16"
    lines += [f"mov.f32 s{i}, 0f00000000;" for i in range(8)]
    for i in range(words):
        made = [_pairs_of_words(kind, f"k{four}", f"${8 + four * words + i}", lines) for four in range(4)]
        for step in range(steps):
            at = 8 + 4 * words + 2 * (i * steps + step)
            for two in range(2):
                sums = tuple(f"s{4 * two + n}" for n in range(4))
                (a0, a2), (a1, a3) = made[2 * two][step], made[2 * two + 1][step]
                lines.append(_mma(sums, (a0, a1, a2, a3), (f"${at}", f"${at + 1}"), sums, dtype))
    lines += [f"mov.f32 ${i}, s{i};" for i in range(8)]
    names = ", ".join(f"k{four}{n}" for four in range(4) for n in range(4))
    declared = f".reg .f32 {', '.join(f's{i}' for i in range(8))}; .reg .b32 {names}; "
    operands = ",".join(["=f"] * 8 + ["r"] * (4 * words + 2 * words * steps))
    return _REGISTERS + declared + " ".join(lines) + " }", operands


def _columns(kind: int, first: tuple[str, str], out: list[str], names: tuple[str, ...]) -> None:
    """Instructions that make pairs of bfloat16 of the same column of two positions, `first` being a word of each."""
    a, b = first
    if kind == _INT4:
        for half, sel in enumerate((0x5410, 0x7632)):
            out.append(f"prmt.b32 x, {a}, {b}, 0x{sel:04x};")
            out += [_nibbles(names[4 * half + n], "x", 4 * n) for n in range(4)]
    elif kind == _INT8:
        # The last 7 bits in the mantissa of 128, less 128, or 256 where there is a sign: both differ from it in one bit alone.
        for half, sel in enumerate((0x5140, 0x7362)):
            out.append(f"prmt.b32 x, {a}, {b}, 0x{sel:04x}; and.b32 y, x, 0x80808080; and.b32 x, x, 0x7F7F7F7F;")
            for n, pick in enumerate((0x4140, 0x4342)):
                name = names[2 * half + n]
                out.append(f"prmt.b32 {name}, x, 0x43434343, 0x{pick:04x}; prmt.b32 t, y, 0x43434343, 0x{pick:04x};")
                out.append(f"fma.rn.bf16x2 {name}, t, minus, {name};")
    else:
        for n in range(4):
            out.append(f"prmt.b32 x, {a}, {b}, 0x{4 + n:x}0{n}0; and.b32 x, x, 0xFF00FF00;")
            out += _float8(names[n])


def _values_asm(kind: int, words: int) -> tuple[str, str]:
    """32 more positions of v^T p^T. Operands: the sums, for two queries of each column; words of codes of the 8 positions of a
    lane, one after the other; four registers of probabilities; the sums before; and what to multiply those of either query by."""
    each = 8 if kind == _INT4 else 4  # columns of a word
    sums = 2 * words * each
    codes = [[f"${sums + p * words + w}" for w in range(words)] for p in range(8)]
    at = sums + 8 * words
    first, second = (f"${at}", f"${at + 1}"), (f"${at + 2}", f"${at + 3}")
    before, factor = at + 4, at + 4 + sums
    pairs = [tuple(f"p{n}_{i}" for i in range(each)) for n in range(4)]
    lines: list[str] = []
    for w in range(words):
        for n in range(4):
            _columns(kind, (codes[n][w], codes[n + 4][w]), lines, pairs[n])
        for j in range(0, each, 2):
            column = 2 * (w * each + j)
            lines += [f"mul.f32 c{i}, ${before + column + i}, ${factor + i % 2};" for i in range(4)]
            c = ("c0", "c1", "c2", "c3")
            lines.append(_mma(c, tuple(pairs[n][j + i] for n in (0, 1) for i in (0, 1)), first, c))
            done = tuple(f"${column + i}" for i in range(4))
            lines.append(_mma(done, tuple(pairs[n][j + i] for n in (2, 3) for i in (0, 1)), second, c))
    names = ", ".join(name for pair in pairs for name in pair)
    declared = f".reg .b32 y, {names}; .reg .f32 c0, c1, c2, c3; "
    operands = ["=f"] * sums + ["r"] * (8 * words + 4) + ["f"] * (sums + 2)
    return _REGISTERS + declared + " ".join(lines) + " }", ",".join(operands)


# By 9 * kind + words of codes.
_SCORES = [_scores_asm(kind, words or 1) for kind in KINDS.values() for words in range(9)]
_VALUES = [_values_asm(kind, min(words or 1, 4)) for kind in KINDS.values() for words in range(9)]
_SCORES_ASM, _SCORES_OPERANDS = (tl.constexpr(part) for part in zip(*_SCORES))
_VALUES_ASM, _VALUES_OPERANDS = (tl.constexpr(part) for part in zip(*_VALUES))
_FLOATS = tl.constexpr(tuple((tl.float32,) * n for n in range(129)))


_SHUFFLES = tl.constexpr({step: f"shfl.sync.bfly.b32 $0, $1, {step}, 0x1f, 0xffffffff;" for step in (1, 2, 4, 8, 16)})


@triton.jit
def _other_lane(x, STEP: tl.constexpr):
    """x (float32) of the lane whose number differs in the bit STEP."""
    return tl.inline_asm_elementwise(_SHUFFLES[STEP], "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _of_lane(x, lane):
    """x (float32) of a lane of the warp."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [x, lane], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _sum4(x):
    """The sum over the four lanes of the same g."""
    x += _other_lane(x, 1)
    return x + _other_lane(x, 2)


@triton.jit
def _sum8(x):
    """The sum over the eight lanes of the same r."""
    x += _other_lane(x, 4)
    x += _other_lane(x, 8)
    return x + _other_lane(x, 16)


@triton.jit
def _max8(a, b, even):
    """The largest a and the largest b over the eight lanes of the same r: half of them go on with either. even: whether g is."""
    mine = tl.where(even, a, b)
    mine = tl.maximum(mine, _other_lane(tl.where(even, b, a), 4))
    mine = tl.maximum(mine, _other_lane(mine, 8))
    mine = tl.maximum(mine, _other_lane(mine, 16))
    other = _other_lane(mine, 4)
    return tl.where(even, mine, other), tl.where(even, other, mine)


@triton.jit
def _transposed(word):
    """8 x 8 numbers of 16 bits, of which lane 4 g + r has row g at columns 2 r and 2 r + 1: of their columns the same."""
    return tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _pair(a, b):
    """Two float32 as bfloat16 in a word, and what they are then."""
    word = tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [b, a], dtype=tl.int32, is_pure=True, pack=1
    )
    return word, (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _two(p):
    """(N, 2) -> two of (N,)."""
    return tl.split(p)


@triton.jit
def _four(p):
    """(N, 4) -> four of (N,)."""
    even, odd = tl.split(tl.reshape(p, (p.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _load4(at, there):
    """Four numbers beside each other from each of the addresses (N,)."""
    return tl.load(at[:, None] + tl.arange(0, 4)[None, :], mask=there[:, None], other=0)


@triton.jit
def _floats(p):
    """(N, 4) -> four of (N,), float32."""
    return _four(p.to(tl.float32))


@triton.jit
def _words(at, there, WORDS: tl.constexpr, APART: tl.constexpr):
    """WORDS words from each of the addresses (N,); the second four of eight are APART words after the first."""
    if WORDS == 1:
        return (tl.load(at, mask=there, other=0),)
    elif WORDS == 2:
        return _two(tl.load(at[:, None] + tl.arange(0, 2)[None, :], mask=there[:, None], other=0))
    elif WORDS == 4:
        return _four(tl.load(at[:, None] + tl.arange(0, 4)[None, :], mask=there[:, None], other=0))
    else:
        first = _four(tl.load(at[:, None] + tl.arange(0, 4)[None, :], mask=there[:, None], other=0))
        return first + _four(tl.load(at[:, None] + APART + tl.arange(0, 4)[None, :], mask=there[:, None], other=0))


@triton.jit
def _tile(
    k_ptr, v_ptr, ks_ptr, kz_ptr, vs_ptr, vz_ptr, base, g, r, length, KIND_K: tl.constexpr, KIND_V: tl.constexpr,
    D: tl.constexpr, KW: tl.constexpr, VW: tl.constexpr,
):  # fmt: skip
    """All that a warp reads of the 32 positions from `base` on; nothing of those past the end."""
    mine, four = base + 8 * r, base + 4 * g
    inside, there = mine < length, four < length
    at_k = k_ptr + four.to(tl.int64) * (4 * KW) + r * min(KW, 4)
    k0 = _words(at_k, there, KW, D // 8)
    k1 = _words(at_k + 1 * (4 * KW), there, KW, D // 8)
    k2 = _words(at_k + 2 * (4 * KW), there, KW, D // 8)
    k3 = _words(at_k + 3 * (4 * KW), there, KW, D // 8)
    ks = _load4(ks_ptr + four, there)
    kz = _load4(kz_ptr + four, there) if KIND_K == 0 else ks
    vs = _load4(vs_ptr + four, there)
    vz = _load4(vz_ptr + four, there) if KIND_V == 0 else vs
    at_v = v_ptr + mine.to(tl.int64) * (8 * VW) + g * VW
    v0 = _words(at_v, inside, VW, 0)
    v1 = _words(at_v + 1 * (8 * VW), inside, VW, 0)
    v2 = _words(at_v + 2 * (8 * VW), inside, VW, 0)
    v3 = _words(at_v + 3 * (8 * VW), inside, VW, 0)
    v4 = _words(at_v + 4 * (8 * VW), inside, VW, 0)
    v5 = _words(at_v + 5 * (8 * VW), inside, VW, 0)
    v6 = _words(at_v + 6 * (8 * VW), inside, VW, 0)
    v7 = _words(at_v + 7 * (8 * VW), inside, VW, 0)
    return k0 + k1 + k2 + k3, v0 + v1 + v2 + v3 + v4 + v5 + v6 + v7, (ks, kz, vs, vz)


@triton.jit
def _numbers(word, HALF: tl.constexpr):
    """Both halves of words, float16 or bfloat16, as float32."""
    if HALF:
        a = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return a, (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _halves(a, b):
    """Two float32 as float16 in a word; what is too large is the largest."""
    a, b = tl.clamp(a, -65504.0, 65504.0), tl.clamp(b, -65504.0, 65504.0)
    return tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [b, a], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _queries(q_ptr, r, there, D: tl.constexpr, KIND: tl.constexpr, KW: tl.constexpr, HALF: tl.constexpr):
    """The fragments of a query per 4 lanes: two words of each step, in turn; the sum of what they hold, over a thread's part, and
    the sum of that times what the codes are put into the mantissa of.

    q_ptr: addresses (N,) of words, of two 16-bit floats each.
    """
    total = tl.zeros(r.shape, tl.float32)
    based = total
    words = ()
    for w in tl.static_range(KW):
        if KIND == 0:
            byte = r * (4 * KW) + 4 * w
            first = byte // 16 * 32 + byte % 16
        elif KW == 8:
            first = r * 16 + w % 4 * 4 + w // 4 * (D // 2)
        else:
            first = r * (4 * KW) + 4 * w
        for half in tl.static_range(2 if KIND == 0 else 1):
            at = q_ptr + (first + 16 * half) // 2
            a0, a1 = _numbers(tl.load(at, mask=there, other=0), HALF)
            b0, b1 = _numbers(tl.load(at + 1, mask=there, other=0), HALF)
            if KIND == 1:
                words += (_halves(a0, a1), _halves(b0, b1))  # type: ignore[assignment]
            elif KIND == 0:
                # Codes two apart are in a word.
                even, a0, b0 = _pair(a0, b0)
                odd, a1, b1 = _pair(a1, b1)
                total += a0 + b0 + a1 + b1
                based += 16.0 * (a1 + b1) + (16.0 if half else 128.0) * (a0 + b0)
                words += (even, odd)  # type: ignore[assignment]
            else:
                words += (_pair(a0, a1)[0], _pair(b0, b1)[0])  # type: ignore[assignment]
    return words, total, based


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, ks_ptr, kz_ptr, vs_ptr, vz_ptr, mask_ptr, stop_ptr, end_ptr, out_ptr, top_ptr, total_ptr,
    kv_heads, queries, length, start, splits, k_batch, k_head, v_batch, v_head, ks_batch, ks_head, vs_batch, vs_head,
    mask_batch, mask_head, mask_query, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, KIND_K: tl.constexpr, KIND_V: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, KW: tl.constexpr, VW: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr, FROM: tl.constexpr,
    SEVERAL: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A softmax per warp that is not normalized, over a part of the positions: out (rows, pieces, D), top and total
    (rows, pieces), float32, in base 2; rows are (B, kv_heads, blocks of 8).

    The grid is (splits, B * kv_heads, blocks), and there are W warps. Row i of a key head is head i % GROUP of query i / GROUP.
    q: (B, heads, queries, D) bfloat16, or float16 if HALF, as words. k, v: (B, kv_heads, length, 16 KW or 32 VW bytes), as words,
    with their strides; scales and zero points, one for each position, in numbers. length is a multiple of 8. stop and end:
    int64, as in `Sight`. SCALE: times log2(e). FROM: whether start is not 0. SEVERAL: queries.
    AHEAD: load what the next step needs before this one computes. EARLY: `merge_kernel` may start before this one ends.
    """
    split, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    lanes = tl.arange(0, 32 * W)
    warp, g, r = lanes // 32, lanes % 32 // 4, lanes % 4
    row = tl.program_id(2) * 8 + g
    there = row < GROUP * queries
    query, own_head = row // GROUP, head * GROUP + row % GROUP
    at_q = ((batch * kv_heads * GROUP + own_head) * queries + query) * (D // 2)
    words, total_q, based_q = _queries(q_ptr + at_q, r, there, D, KIND_K, KW, HALF)
    # From here on a lane has queries 2 r and 2 r + 1 of the block, "a" and "b".
    even, lane = g % 2 == 0, 8 * r
    total_q, based_q = _sum4(total_q), _sum4(based_q)
    total_a, total_b = _of_lane(total_q, lane), _of_lane(total_q, lane + 4)
    based_a, based_b = _of_lane(based_q, lane), _of_lane(based_q, lane + 4)
    row_a = tl.program_id(2) * 8 + 2 * r
    row_b = row_a + 1
    query_a, query_b = row_a // GROUP, row_b // GROUP
    there_a, there_b = row_a < GROUP * queries, row_b < GROUP * queries

    stop = tl.minimum(tl.load(stop_ptr).to(tl.int32), length)
    first_query = tl.load(end_ptr).to(tl.int32) - queries
    begin = start
    if CAUSAL:
        stop = tl.minimum(stop, first_query + queries)
        if WINDOW > 0:
            begin = tl.maximum(begin, first_query - (WINDOW - 1))
    begin = begin // 32 * 32
    tiles = tl.cdiv(tl.maximum(stop - begin, 0), 32 * W)
    last_a, last_b = first_query + query_a, first_query + query_b

    k_ptr += batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
    v_ptr += batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
    ks_ptr += batch * ks_batch + head * ks_head
    kz_ptr += batch * ks_batch + head * ks_head
    vs_ptr += batch * vs_batch + head * vs_head
    vz_ptr += batch * vs_batch + head * vs_head
    mask_ptr += batch.to(tl.int64) * mask_batch
    mask_a = mask_ptr + (head * GROUP + row_a % GROUP) * mask_head + query_a * mask_query
    mask_b = mask_ptr + (head * GROUP + row_b % GROUP) * mask_head + query_b * mask_query

    zero = tl.zeros((32 * W,), tl.float32)
    top_a, top_b = zero - 1e30, zero - 1e30
    sum_a, sum_b, taken_a, taken_b, weight_a, weight_b = zero, zero, zero, zero, zero, zero
    out = (zero, zero)
    COLUMNS: tl.constexpr = D // 8
    for _ in tl.static_range(COLUMNS - 1):
        out += (zero, zero)  # type: ignore[assignment]
    first, last = split * tiles // splits, (split + 1) * tiles // splits
    base = begin + (first * W + warp) * 32
    if AHEAD:
        k, v, scales = _tile(
            k_ptr, v_ptr, ks_ptr, kz_ptr, vs_ptr, vz_ptr, base, g, r, tl.where(first < last, length, 0), KIND_K, KIND_V, D, KW, VW
        )  # fmt: skip
    for tile in tl.range(first, last):
        mine = base + 4 * g
        if AHEAD:
            now_k, now_v, now_scales = k, v, scales
            base += 32 * W
            k, v, scales = _tile(
                k_ptr, v_ptr, ks_ptr, kz_ptr, vs_ptr, vz_ptr, base, g, r, tl.where(tile + 1 < last, length, 0), KIND_K, KIND_V,
                D, KW, VW,
            )  # fmt: skip
        else:
            now_k, now_v, now_scales = _tile(
                k_ptr, v_ptr, ks_ptr, kz_ptr, vs_ptr, vz_ptr, base, g, r, length, KIND_K, KIND_V, D, KW, VW
            )
            base += 32 * W
        sums = _scores(now_k, words, KIND_K, KW)
        ks = _floats(now_scales[0])
        kz = _floats(now_scales[1]) if KIND_K == 0 else ks
        vs = _floats(now_scales[2])
        vz = _floats(now_scales[3]) if KIND_V == 0 else vs
        scores = ()
        best_a, best_b = top_a, top_b
        for j in tl.static_range(4):
            a, b = sums[2 * j], sums[2 * j + 1]
            if KIND_K == 0:
                a -= kz[j] * total_a + based_a
                b -= kz[j] * total_b + based_b
            a = _capped(a * (ks[j] * SCALE), SOFTCAP)
            b = _capped(b * (ks[j] * SCALE), SOFTCAP)
            position = mine + j
            seen = position < stop
            if FROM:
                seen = seen & (position >= start)
            seen_a, seen_b = seen, seen
            if CAUSAL:
                if SEVERAL:
                    seen_a, seen_b = seen_a & (position <= last_a), seen_b & (position <= last_b)
                if WINDOW > 0:
                    seen_a, seen_b = seen_a & (position > last_a - WINDOW), seen_b & (position > last_b - WINDOW)
            if MASK:
                seen_a = seen_a & (tl.load(mask_a + position, mask=seen_a & there_a, other=0) != 0)
                seen_b = seen_b & (tl.load(mask_b + position, mask=seen_b & there_b, other=0) != 0)
            a = tl.where(seen_a, a, -float("inf"))
            b = tl.where(seen_b, b, -float("inf"))
            scores += (a, b)  # type: ignore[assignment]
            best_a, best_b = tl.maximum(best_a, a), tl.maximum(best_b, b)
        best_a, best_b = _max8(best_a, best_b, even)
        kept_a, kept_b = tl.exp2(top_a - best_a), tl.exp2(top_b - best_b)
        top_a, top_b = best_a, best_b
        sum_a, sum_b = sum_a * kept_a, sum_b * kept_b
        if KIND_V == 0:
            taken_a, taken_b, weight_a, weight_b = (
                taken_a * kept_a,
                taken_b * kept_b,
                weight_a * kept_a,
                weight_b * kept_b,
            )
        weights = ()
        for j in tl.static_range(4):
            a, b = tl.exp2(scores[2 * j] - top_a), tl.exp2(scores[2 * j + 1] - top_b)
            sum_a += a
            sum_b += b
            word, a, b = _pair(a * vs[j], b * vs[j])
            if KIND_V == 0:
                taken_a += a * vz[j]
                taken_b += b * vz[j]
                weight_a += a
                weight_b += b
            weights += (_transposed(word),)  # type: ignore[assignment]
        out = _values(now_v, weights, out, (kept_a, kept_b), KIND_V, VW, COLUMNS)

    if EARLY:
        gdc_launch_dependents()
    sum_a, sum_b = _sum8(sum_a), _sum8(sum_b)
    taken_a, taken_b = _sum8(taken_a), _sum8(taken_b)
    weight_a, weight_b = _sum8(weight_a), _sum8(weight_b)
    first_row = pair * tl.num_programs(2) * 8
    at_a, at_b = ((first_row + row_a) * splits + split) * W + warp, ((first_row + row_b) * splits + split) * W + warp
    tl.store(top_ptr + at_a, top_a, mask=there_a & (g == 0))
    tl.store(top_ptr + at_b, top_b, mask=there_b & (g == 0))
    tl.store(total_ptr + at_a, sum_a, mask=there_a & (g == 0))
    tl.store(total_ptr + at_b, sum_b, mask=there_b & (g == 0))
    out_a, out_b = out_ptr + at_a.to(tl.int64) * D, out_ptr + at_b.to(tl.int64) * D
    for j in tl.static_range(COLUMNS):
        if KIND_V == 0:
            byte = g * (4 * VW) + j // 8 * 4 + j % 8 // 4 * 2 + j % 4 // 2
            column = byte // 16 * 32 + byte % 16 + j % 2 * 16
            tl.store(out_a + column, _out_of(out, j, 0) - taken_a - _base_of(j) * weight_a, mask=there_a)
            tl.store(out_b + column, _out_of(out, j, 1) - taken_b - _base_of(j) * weight_b, mask=there_b)
        else:
            tl.store(out_a + g * (4 * VW) + j, _out_of(out, j, 0), mask=there_a)
            tl.store(out_b + g * (4 * VW) + j, _out_of(out, j, 1), mask=there_b)


@triton.jit
def _out_of(out, j: tl.constexpr, query: tl.constexpr):
    """The sum of column j for query "a", 0, or "b", 1: a product gives two columns, query after query."""
    return out[j // 2 * 4 + j % 2 * 2 + query]


@triton.jit
def _base_of(j: tl.constexpr):
    """What codes of 4 bits of column j are put into the mantissa of."""
    return 128.0 if j % 4 == 0 else 16.0


@triton.jit
def _capped(s, SOFTCAP: tl.constexpr):
    if SOFTCAP > 0:
        # softcap * tanh(x / softcap), in base 2
        return (SOFTCAP * 1.4426950408889634) * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 / SOFTCAP))))
    else:
        return s


@triton.jit
def merge_kernel(
    out_ptr, top_ptr, total_ptr, sinks_ptr, merged_ptr, logs_ptr, kv_heads, queries, blocks, PIECES: tl.constexpr,
    P: tl.constexpr, SINKS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """merged (B, heads, queries, D) and the logarithm of its total, (B, heads, queries) float32, of what `decode_kernel` gives.

    The grid is (B * heads * queries, D / BD). P: a power of two, PIECES or more. sinks: (heads,), as in `attend`.
    """
    i = tl.program_id(0)
    query, head, batch = i % queries, i // queries % (kv_heads * GROUP), i // queries // (kv_heads * GROUP)
    row = (batch * kv_heads + head // GROUP) * blocks * 8 + query * GROUP + head % GROUP
    piece = tl.arange(0, P)
    if EARLY:
        gdc_wait()
    tops = tl.load(top_ptr + row * PIECES + piece, mask=piece < PIECES, other=-1e30)
    totals = tl.load(total_ptr + row * PIECES + piece, mask=piece < PIECES, other=0.0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    at = (row.to(tl.int64) * PIECES + piece[:, None]) * D + column[None, :]
    outs = tl.load(out_ptr + at, mask=(piece < PIECES)[:, None], other=0.0)
    top = tl.max(tops, 0)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    weight = tl.exp2(tops - top)
    total = tl.sum(totals * weight, 0)
    if SINKS:
        total += tl.exp2(sink - top)
    out = tl.sum(outs * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(merged_ptr + i * D + column, out.to(merged_ptr.dtype.element_ty))
    log = tl.where(total == 0.0, -float("inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(logs_ptr + i, log, mask=tl.program_id(1) == 0)


@triton.jit
def _scores(k, q, KIND: tl.constexpr, KW: tl.constexpr):
    """The scores of 32 positions, eight in a lane."""
    return tl.inline_asm_elementwise(
        _SCORES_ASM[9 * KIND + KW], _SCORES_OPERANDS[9 * KIND + KW], k + q, dtype=_FLOATS[8], is_pure=True, pack=1
    )


@triton.jit
def _values(v, weights, out, kept, KIND: tl.constexpr, VW: tl.constexpr, COLUMNS: tl.constexpr):
    """`out`, times `kept`, and 32 more positions."""
    return tl.inline_asm_elementwise(
        _VALUES_ASM[9 * KIND + VW], _VALUES_OPERANDS[9 * KIND + VW], v + weights + out + kept, dtype=_FLOATS[2 * COLUMNS],
        is_pure=True, pack=1,
    )  # fmt: skip


class Tile(NamedTuple):
    """How `decode_kernel` runs: warps of a program, programs on a multiprocessor at a time, whether it loads ahead, and the most
    registers of a thread, if there is a limit."""

    warps: int = 4
    programs: int = 3
    ahead: bool = False
    registers: int | None = None


TILE_OF_KIND = {"uint4": Tile(4, 3, True, 168), "int8": Tile(2, 4, True, 255), "float8": Tile(2, 6, True, 168)}
"""By the kind of the keys' codes."""


def splits_of(pairs: int, length: int, device: torch.device, tile: Tile) -> int:
    """Into how many parts to cut the positions, for so many programs of each: the GPU is full once, and no part is empty."""
    full = multiprocessors(device) * tile.programs // pairs
    return max(1, min(full, cdiv(length, POSITIONS * tile.warps), 1024 // tile.warps))


@on_its_device
def decode(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    k_zero: Tensor | None,
    v: Tensor,
    v_scale: Tensor,
    v_zero: Tensor | None,
    kind_k: str,
    kind_v: str,
    start: int,
    stop: Tensor,
    end: Tensor | None,
    window: int | None,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention (B, heads, T, D) in q's dtype, and the logarithm of the sum of exp of the scores, (B, heads, T) float32.

    q: (B, heads, T, D), D 64 or 128. k, v: bytes of codes, (B, kv_heads, L, D or D / 2), L a multiple of 8, a position after the
    other. Scales and zero points: (B, kv_heads, L, 1). kind_k, kind_v: of `KINDS`. The others: as in `Sight` and `attend`; the
    mask is bool.
    """
    b, h, t, d = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    group = h // kv_heads
    blocks = cdiv(group * t, 8)
    tile = TILE_OF_KIND[kind_k] if tile is None else tile
    splits = splits_of(b * kv_heads * blocks, length, q.device, tile)
    pieces, rows = splits * tile.warps, b * kv_heads * blocks * 8
    out, top, total = (torch.empty(rows, pieces, n, dtype=torch.float32, device=q.device) for n in (d, 1, 1))
    merged = torch.empty(b, h, t, d, dtype=q.dtype, device=q.device)
    logs = torch.empty(b, h, t, dtype=torch.float32, device=q.device)
    words = [x.view(torch.uint8).view(torch.int32) for x in (q.contiguous(), k, v)]
    none, early = top, is_hopper(q.device)
    mask_strides = (0, 0, 0)
    if mask is not None:
        batch, head, query, one = mask.stride()
        mask = mask.view(torch.uint8) if one == 1 else mask.contiguous().view(torch.uint8)
        batch, head, query, _ = mask.stride()
        mask_strides = batch * (mask.shape[0] > 1), head * (mask.shape[1] > 1), query * (mask.shape[2] > 1)
    launch(
        decode_kernel, (splits, b * kv_heads, blocks), *words, k_scale, k_scale if k_zero is None else k_zero, v_scale,
        v_scale if v_zero is None else v_zero, none if mask is None else mask, stop, stop if end is None else end, out,
        top, total, kv_heads, t, length, start, splits, *words[1].stride()[:2], *words[2].stride()[:2],
        *k_scale.stride()[:2], *v_scale.stride()[:2], *mask_strides, SCALE=scale * math.log2(math.e),
        SOFTCAP=softcap or 0.0, WINDOW=window or 0, CAUSAL=end is not None, MASK=mask is not None,
        KIND_K=KINDS[kind_k], KIND_V=KINDS[kind_v], GROUP=group, D=d, KW=words[1].shape[3] // 4, VW=words[2].shape[3] // 8,
        W=tile.warps, HALF=q.dtype == torch.float16,
        FROM=start > 0, SEVERAL=t > 1, AHEAD=tile.ahead, EARLY=early, num_warps=tile.warps, registers=tile.registers,
    )  # fmt: skip
    width = min(d, 32)
    launch(
        merge_kernel, (b * h * t, d // width), out, top, total, none if sinks is None else sinks, merged, logs, kv_heads, t,
        blocks, PIECES=pieces, P=power_of_two(pieces), SINKS=sinks is not None, GROUP=group, D=d, BD=width,
        EARLY=early, early=early,
    )  # fmt: skip
    return merged, logs
