"""Triton kernels for what Inductor does not fuse: products of a few tokens with a weight that stays packed.

For any NVIDIA GPU since Ampere; hopper_kernels.py has those for its tensor cores. They are imported when a path of
paths_gpu.py first runs, since Triton comes with GPU builds of PyTorch only. The planar packing of bits.py is what makes them
short: 4 bytes in a register are 4 low and 4 high nibbles, each 4 neighbours of the row.

No tile has fewer than 8 rows: Triton 3.6 stores a reduced tile of 4 rows wrongly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton
from triton.language.extra.cuda import gdc_wait

# Decoding, 4 bytes of a register at a time.


@triton.jit
def _low(q):
    """uint8 -> int8: the low nibble."""
    return tl.inline_asm_elementwise("and.b32 $0, $1, 0x0f0f0f0f;", "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _high(q):
    """uint8 -> int8: the high nibble."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }",
        "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _low_bf16(q):
    """uint8 -> bfloat16: 128 + the low nibble, whose bits are the last of the mantissa."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 t; and.b32 t, $2, 0x0f0f0f0f;
        prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342; }""",
        "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _high_bf16(q):
    """uint8 -> bfloat16: 128 + the high nibble."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 t; shr.u32 t, $2, 4; and.b32 t, t, 0x0f0f0f0f;
        prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342; }""",
        "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _e4m3_bf16(q):
    """float8 e4m3, as uint8 -> bfloat16: the bits moved into place, times 2**120, the difference of the exponent biases.

    The hardware's conversion goes through float16 and runs at an eighth of the rate.
    """
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, k; mov.b32 k, 0x7B807B80; prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;
        shr.u32 c, a, 4; and.b32 c, c, 0x07F007F0; and.b32 a, a, 0x80008000; or.b32 a, a, c; mul.rn.bf16x2 $0, a, k;
        shr.u32 c, b, 4; and.b32 c, c, 0x07F007F0; and.b32 b, b, 0x80008000; or.b32 b, b, c; mul.rn.bf16x2 $1, b, k; }""",
        "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


# One token.


@triton.jit
def _round(x, f):
    """round(x * f) as int32, for |x * f| < 2**21."""
    return (x * f + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def magnitude(x):
    """|x| as an integer of the same order, so that the largest of a group is NaN where there is one, and makes the sum NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _high_byte(i):
    return ((i + 128) >> 8).to(tl.int8)


@triton.jit
def _low_byte(i):
    return (((i + 128) & 255) - 128).to(tl.int8)


@triton.jit
def _dot_nibbles(wl, wh, lh, hh, ll, hl):
    """4 + 4 codes times 16-bit numbers given as bytes: the sum in the first of 4 elements, 0 in the others."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 t; dp4a.s32.s32 t, $4, $6, 0; dp4a.s32.s32 t, $5, $7, t; shl.b32 t, t, 8;
        dp4a.s32.s32 t, $4, $8, t; dp4a.s32.s32 $0, $5, $9, t; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }""",
        "=r,=r,=r,=r,r,r,r,r,r,r", [wl, wh, lh, hh, ll, hl], dtype=tl.int32, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _dot_bytes(w, h, l, SIGNED: tl.constexpr):  # noqa: E741
    """4 codes times 16-bit numbers given as bytes: the sum in the first of 4 elements, 0 in the others."""
    if SIGNED:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t; dp4a.s32.s32 t, $4, $5, 0; shl.b32 t, t, 8; dp4a.s32.s32 $0, $4, $6, t;
            mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }""",
            "=r,=r,=r,=r,r,r,r", [w, h, l], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t; dp4a.u32.s32 t, $4, $5, 0; shl.b32 t, t, 8; dp4a.u32.s32 $0, $4, $6, t;
            mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }""",
            "=r,=r,=r,=r,r,r,r", [w, h, l], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def gemv_int_kernel(
    x_ptr, q_ptr, scale_ptr, zero_ptr, out_ptr, N, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    SIGNED: tl.constexpr, ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over groups of (sum over the group of x * (q[n] - zero[n]) * scale[n]), BN rows a program.

    x becomes 16-bit fixed point, with a step of max|x| / 32512 of each group, so that the sum of a group is exact in
    integers: two 4-way byte products for 4 weights.
    """
    NG: tl.constexpr = K // G
    B: tl.constexpr = G * BITS // 8  # bytes of a group
    SG: tl.constexpr = 1 if ROW else NG
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    group = tl.arange(0, BG)
    byte = tl.arange(0, B)
    k = group[:, None] * G + ((byte // 16 * 32 + byte % 16) if BITS == 4 else byte)[None, :]
    weights = q_ptr + row[:, None, None] * (NG * B) + group[None, :, None] * B + byte[None, None, :]
    acc = tl.zeros((BN, BG), tl.float32)
    for g0 in range(0, NG, BG):
        g = g0 + group
        there = g < NG
        if NG % BG == 0:
            q = tl.load(weights + g0 * B)
            x = tl.load(x_ptr + g0 * G + k).to(tl.float32)  # (BG, B)
        else:
            q = tl.load(weights + g0 * B, mask=there[None, :, None], other=0)
            x = tl.load(x_ptr + g0 * G + k, mask=there[:, None], other=0.0).to(tl.float32)
        if BITS == 4:
            if NG % BG == 0:
                y = tl.load(x_ptr + g0 * G + k + 16).to(tl.float32)
            else:
                y = tl.load(x_ptr + g0 * G + k + 16, mask=there[:, None], other=0.0).to(tl.float32)
            top = tl.max(tl.maximum(magnitude(x), magnitude(y)), 1).to(tl.float32, bitcast=True)
            f = tl.where(top > 0, 32512.0 / top, 0.0)[:, None]
            i = _round(x, f)
            j = _round(y, f)
            dots = _dot_nibbles(
                _low(q), _high(q), _high_byte(i)[None, :, :], _high_byte(j)[None, :, :], _low_byte(i)[None, :, :],
                _low_byte(j)[None, :, :],
            )  # fmt: skip
            total = tl.sum(i + j, 1).to(tl.float32)
        else:
            top = tl.max(magnitude(x), 1).to(tl.float32, bitcast=True)
            i = _round(x, tl.where(top > 0, 32512.0 / top, 0.0)[:, None])
            dots = _dot_bytes(q, _high_byte(i)[None, :, :], _low_byte(i)[None, :, :], SIGNED)
            total = tl.sum(i, 1).to(tl.float32)
        d = tl.sum(dots, 2).to(tl.float32)  # (BN, BG)
        step = (top * (1 / 32512))[None, :]
        if ROW:
            if ZERO:
                z = tl.load(zero_ptr + row).to(tl.float32) + OFFSET
                d -= z[:, None] * total[None, :]
            elif OFFSET:
                d -= OFFSET * total[None, :]
            acc += d * step
        else:
            s = tl.load(scale_ptr + row[:, None] * SG + g[None, :], mask=there[None, :], other=0.0).to(tl.float32)
            if ZERO:
                z = tl.load(zero_ptr + row[:, None] * SG + g[None, :], mask=there[None, :], other=0).to(tl.float32)
                d -= (z + OFFSET) * total[None, :]
            elif OFFSET:
                d -= OFFSET * total[None, :]
            acc += d * (s * step)
    out = tl.sum(acc, 1)
    if ROW:
        out *= tl.load(scale_ptr + row).to(tl.float32)
    tl.store(out_ptr + rn, out.to(out_ptr.dtype.element_ty), mask=rn < N)


@triton.jit
def gemv_float_kernel(x_ptr, q_ptr, scale_ptr, out_ptr, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out[n] = scale[n] * sum of x * q[n], in float32, BN rows a program. q: float8."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    k = tl.arange(0, BK)
    acc = tl.zeros((BN, BK // 16), tl.float32)
    for k0 in range(0, K, BK):
        if K % BK == 0:
            q = tl.load(q_ptr + row[:, None] * K + (k0 + k)[None, :]).to(tl.float32)
            x = tl.load(x_ptr + k0 + k).to(tl.float32)
        else:
            there = k0 + k < K
            q = tl.load(q_ptr + row[:, None] * K + (k0 + k)[None, :], mask=there[None, :]).to(tl.float32)
            q = tl.where(there[None, :], q, 0.0)
            x = tl.load(x_ptr + k0 + k, mask=there, other=0.0).to(tl.float32)
        acc += tl.sum(tl.reshape(q * x[None, :], (BN, BK // 16, 16)), 2)
    out = tl.sum(acc, 1) * tl.load(scale_ptr + row).to(tl.float32)
    tl.store(out_ptr + rn, out.to(out_ptr.dtype.element_ty), mask=rn < N)


# A few tokens.


@triton.jit
def _column(t, u: tl.constexpr, U: tl.constexpr):
    """Column u of (BN, U)."""
    return tl.sum(tl.where(tl.arange(0, U)[None, :] == u, t, 0.0), 1)


@triton.jit
def _dots(acc, x_ptr, mask, wl, wh, BITS: tl.constexpr):
    acc = tl.dot(tl.load(x_ptr, mask=mask, other=0).to(tl.bfloat16), wl, acc)
    if BITS == 4:
        acc = tl.dot(tl.load(x_ptr + 16, mask=mask, other=0).to(tl.bfloat16), wh, acc)
    return acc


@triton.jit
def fused_kernel(
    x_ptr, row_ptr, q_ptr, scale_ptr, zero_ptr, out_ptr, M, N, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    E4M3: tl.constexpr, ACT: tl.constexpr, ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, MB: tl.constexpr, BN: tl.constexpr, U: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum of x[m] * decode(q)[n], the weights decoded in registers on their way to the tensor cores.

    A program has MB (1 or 2) blocks of BM tokens, BN rows of the weight, and 1 / SPLIT of K, for which it writes a sum of
    its own. A step covers U groups, whose scales and zero points are loaded one step ahead. (q - zero) is exact in bfloat16;
    a scale per group multiplies it there, a scale per row multiplies the float32 sum. ACT: x is int8 times row[m].
    """
    NG: tl.constexpr = K // G
    B: tl.constexpr = G * BITS // 8  # bytes of a group
    T: tl.constexpr = NG // U
    TS: tl.constexpr = (T + SPLIT - 1) // SPLIT
    SG: tl.constexpr = 1 if ROW else NG
    BASE: tl.constexpr = OFFSET + (128.0 if BITS == 4 else 0.0)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rn, N - 1)
    rm = tl.program_id(1) * (BM * MB) + tl.arange(0, BM)
    t0 = tl.program_id(2) * TS
    t1 = tl.minimum(t0 + TS, T)
    byte = tl.arange(0, B)
    k = (byte // 16 * 32 + byte % 16) if BITS == 4 else byte
    mask0 = (rm < M)[:, None]
    mask1 = (rm + BM < M)[:, None]
    acc0 = tl.zeros((BM, BN), tl.float32)
    acc1 = acc0
    x = x_ptr + rm[:, None] * K + k[None, :]
    weights = q_ptr + row[None, :] * (NG * B) + byte[:, None]
    u0 = tl.arange(0, U)
    scales = scale_ptr + row[:, None] * SG + u0[None, :]
    zeros = zero_ptr + row[:, None] * SG + u0[None, :]
    if ROW:
        if ZERO:
            zero = (tl.load(zero_ptr + row).to(tl.float32) + BASE).to(tl.bfloat16)[None, :]
    else:
        s_next = tl.load(scales + t0 * U).to(tl.float32)
        if ZERO:
            z_next = tl.load(zeros + t0 * U).to(tl.float32)
    for t in tl.range(t0, t1, num_stages=STAGES):
        if not ROW:
            s_now = s_next
            ahead = tl.minimum(t + 1, t1 - 1) * U
            s_next = tl.load(scales + ahead).to(tl.float32)
            if ZERO:
                z_now = z_next
                z_next = tl.load(zeros + ahead).to(tl.float32)
        for u in tl.static_range(U):
            q = tl.load(weights + (t * U + u) * B)
            if BITS == 4:
                wl = _low_bf16(q)
                wh = _high_bf16(q)
            elif E4M3:
                wl = _e4m3_bf16(q)
                wh = wl
            else:
                wl = q.to(tl.bfloat16)
                wh = wl
            if ZERO:
                if not ROW:
                    zero = (_column(z_now, u, U) + BASE).to(tl.bfloat16)[None, :]
                wl -= zero
                wh -= zero
            elif BASE != 0:
                wl -= tl.full((1, 1), BASE, tl.bfloat16)
                wh -= tl.full((1, 1), BASE, tl.bfloat16)
            if not ROW:
                scale = _column(s_now, u, U).to(tl.bfloat16)[None, :]
                wl *= scale
                wh *= scale
            xt = x + (t * U + u) * G
            acc0 = _dots(acc0, xt, mask0, wl, wh, BITS)
            if MB == 2:
                acc1 = _dots(acc1, xt + BM * K, mask1, wl, wh, BITS)
    if ROW:
        scale = tl.load(scale_ptr + row).to(tl.float32)[None, :]
        acc0 *= scale
        acc1 *= scale
    if ACT:
        acc0 *= tl.load(row_ptr + rm, mask=rm < M, other=0.0)[:, None]
        acc1 *= tl.load(row_ptr + rm + BM, mask=rm + BM < M, other=0.0)[:, None]
    out = out_ptr + (tl.program_id(2) * M + rm[:, None]) * N + rn[None, :]
    tl.store(out, acc0.to(out_ptr.dtype.element_ty), mask=mask0 & (rn < N)[None, :])
    if MB == 2:
        tl.store(out + BM * N, acc1.to(out_ptr.dtype.element_ty), mask=mask1 & (rn < N)[None, :])


@triton.jit
def sum_kernel(parts_ptr, out_ptr, size, SPLIT: tl.constexpr, B: tl.constexpr, EARLY: tl.constexpr):
    """out = sum of the SPLIT float32 parts, in order. EARLY: launched before the parts are there, so wait for them."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    if EARLY:
        gdc_wait()
    acc = tl.zeros((B,), tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts_ptr + part * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def scale_kernel(total_ptr, row_ptr, column_ptr, out_ptr, N, B: tl.constexpr):
    """out[m, n] = total[m, n] * row[m] * column[n]."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * B + tl.arange(0, B)
    there = n < N
    total = tl.load(total_ptr + row * N + n, mask=there, other=0).to(tl.float32)
    total = total * tl.load(row_ptr + row) * tl.load(column_ptr + n, mask=there, other=0.0)
    tl.store(out_ptr + row * N + n, total.to(out_ptr.dtype.element_ty), mask=there)


# Launches.


@torch.library.triton_op("ao::gemv", mutates_args={})
def gemv(x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int) -> Tensor:
    """x: (1, K), qdata: (N, K) one-byte or (N, K / 2) 4-bit, scale: (N, K / group) or (N, 1), zero_point alike -> (1, N)."""
    n, k = qdata.shape[0], x.shape[1]
    out = torch.empty(1, n, dtype=x.dtype, device=x.device)
    if qdata.dtype.is_floating_point:
        wrap_triton(gemv_float_kernel)[(triton.cdiv(n, 8),)](x, qdata, scale, out, n, K=k, BN=8, BK=1024, num_warps=4)
        return out
    bits = 8 * qdata.shape[1] // k
    by_row = scale.shape[1] == 1
    group = 128 if by_row else k // scale.shape[1]
    rows = 16 if bits == 4 and n > 4096 else 8
    groups = max(1, (2048 if bits == 4 or n <= 4096 else 1024) // group)
    wrap_triton(gemv_int_kernel)[(triton.cdiv(n, rows),)](
        x, qdata, scale, scale if zero_point is None else zero_point, out, n,
        K=k, G=group, BITS=bits, SIGNED=qdata.dtype == torch.int8, ROW=by_row, ZERO=zero_point is not None, OFFSET=offset,
        BN=rows, BG=groups, num_warps=4,
    )  # fmt: skip
    return out


def fused(
    x: Tensor, rows: Tensor | None, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """x @ decode(qdata).T as `dtype`. x: (M, K) bfloat16, or int8 times rows (M, 1); the rest as in `gemv`."""
    (m, k), n = x.shape, qdata.shape[0]
    bits = 8 * qdata.shape[1] // k
    by_row = scale.shape[1] == 1
    group = 128 if by_row else k // scale.shape[1]
    steps = k // group
    unroll = 1
    while not by_row and unroll * 2 * group <= 256 and steps % (unroll * 2) == 0:
        unroll *= 2
    tokens, blocks = (16, 1) if m <= 16 else (32, 1) if m <= 32 else (32, 2)
    height = 128 if m > 32 or n >= 16384 or (bits == 4 and m > 16) else 64
    tiles = triton.cdiv(n, height) * triton.cdiv(m, tokens * blocks)
    split = max(1, min(8, round(256 / tiles), steps // unroll // 4))
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    parts = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    e4m3 = qdata.dtype == torch.float8_e4m3fn
    fused_kernel[(triton.cdiv(n, height), triton.cdiv(m, tokens * blocks), split)](
        x, scale if rows is None else rows, qdata.view(torch.uint8) if e4m3 else qdata, scale,
        scale if zero_point is None else zero_point, parts, m, n, K=k, G=group, BITS=bits, E4M3=e4m3,
        ACT=rows is not None, ROW=by_row, ZERO=zero_point is not None, OFFSET=offset, BM=tokens, MB=blocks, BN=height,
        U=unroll, SPLIT=split, STAGES=4 if by_row and m <= 16 else 3, num_warps=4,
    )  # fmt: skip
    if split > 1:
        sum_kernel[(triton.cdiv(m * n, 1024),)](parts, out, m * n, SPLIT=split, B=1024, EARLY=False, num_warps=4)
    return out


def scaled(total: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype, tokens: int) -> Tensor:
    """The first `tokens` rows of total (M, N), times rows (M, 1) and columns (N, 1), as `dtype`."""
    n = total.shape[1]
    out = torch.empty(tokens, n, dtype=dtype, device=total.device)
    scale_kernel[(tokens, triton.cdiv(n, 1024))](total, rows, columns, out, n, B=1024, num_warps=4)
    return out
