"""Triton kernels that cast a matrix to 8 bits, as it is or transposed on the way, and the operators that call them.

The product for a weight's gradient sums over tokens, and 8-bit tensor cores want the sum to run along memory: both operands
must be turned. A compiler fuses the turning with whatever else reads the same rows, and then writes byte by byte, a row apart;
a tile that is turned in registers reads and writes whole lines. The operators are opaque to the compiler, which has another
use: it keeps what they make for backward, one byte per number, and does not compute it again. A cast without a turn is left
to the compiler, except where nothing is compiled: FSDP2's hooks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_its_device
from .launch import cdiv, launch

TILE = 128
"""Rows and columns of a tile. Blocks of scales along the sum must be multiples of it."""


@triton.jit
def _codes(x, scale, LOW: tl.constexpr, HIGH: tl.constexpr, FORMAT: tl.constexpr):
    """cast(clamp(x / scale, LOW, HIGH)), as bytes."""
    # As rounding.reciprocal has it, to the bit.
    inverse = tl.where(tl.abs(scale) < 1.1754943508222875e-38, 0.0, (1.0 / scale.to(tl.float64)).to(tl.float32))
    y = x.to(tl.float32) * inverse
    if tl.int8 == FORMAT:
        # Half to even, by a sum that has no bits to the right of the point.
        bits = (tl.clamp(y, LOW - 1.0, HIGH + 1.0) + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        codes = tl.minimum(tl.maximum(bits, tl.cast(LOW, tl.int32)), tl.cast(HIGH, tl.int32)).to(tl.int8)
        return codes.to(tl.uint8, bitcast=True)
    else:
        return tl.clamp(y, LOW, HIGH).to(FORMAT).to(tl.uint8, bitcast=True)


@triton.jit
def cast_kernel(
    x_ptr, scale_ptr, out_ptr, size, LOW: tl.constexpr, HIGH: tl.constexpr, FORMAT: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """out = cast(clamp(x / scale, LOW, HIGH)), as bytes, for one scale."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=i < size, other=0)
    scale = tl.load(scale_ptr + tl.zeros((1,), tl.int32))
    tl.store(out_ptr + i, _codes(x, scale, LOW, HIGH, FORMAT), mask=i < size)


@triton.jit
def transpose_kernel(
    x_ptr, scale_ptr, same_ptr, out_ptr, M, N, STEP, SCALES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    FORMAT: tl.constexpr, BOTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[n, m] = cast(clamp(x[m, n] / scale, LOW, HIGH)), or x[m, n] where SCALES is 0. x: (M, N). out: bytes.

    SCALES: 1 for one scale, 2 for scale[n, m / STEP], where STEP is a multiple of BM. FORMAT: the 8-bit float, or int8.
    BOTH: write the codes to same[m, n] too.
    """
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    there = (rm < M)[:, None] & (rn < N)[None, :]
    place = rm[:, None].to(tl.int64) * N + rn[None, :]
    x = tl.load(x_ptr + place, mask=there, other=0)
    if SCALES == 0:
        codes = x
    else:
        if SCALES == 1:
            scale = tl.load(scale_ptr + tl.zeros((1, 1), tl.int32))
        else:
            scale = tl.load(scale_ptr + rn * tl.cdiv(M, STEP) + tl.program_id(1) * BM // STEP, mask=rn < N, other=0.0)
            scale = scale[None, :]
        codes = _codes(x, scale, LOW, HIGH, FORMAT)
    if BOTH:
        tl.store(same_ptr + place, codes, mask=there)
    out = out_ptr + rn[:, None].to(tl.int64) * M + rm[None, :]
    tl.store(out, tl.trans(codes), mask=(rn < N)[:, None] & (rm < M)[None, :])


_FORMATS = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5, torch.int8: tl.int8}


@on_its_device
def _run(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, low: float = 0.0, high: float = 0.0, same: Tensor | None = None
) -> Tensor:
    """The transpose. same: (M, N) bytes, for the codes as they are."""
    x = x.contiguous()
    m, n = x.shape
    out = torch.empty(n, m, dtype=torch.uint8, device=x.device)
    if scale is None:
        x = x.view(torch.uint8)
        scales, step = 0, TILE
    else:
        scale = scale.float().contiguous()  # (1, 1), (N, 1) or (N, M / block)
        scales = 1 if scale.numel() == 1 else 2
        step = m // scale.shape[1] if scale.shape[1] > 1 else max(cdiv(m, TILE), 1) * TILE
    if out.numel():
        launch(
            transpose_kernel, (cdiv(n, TILE), cdiv(m, TILE)), x, x if scale is None else scale,
            out if same is None else same, out, m, n, step, SCALES=scales, LOW=low, HIGH=high, FORMAT=_FORMATS[dtype],
            BOTH=same is not None, BM=TILE, BN=TILE, num_warps=8,
        )  # fmt: skip
    return out.view(dtype)


@on_its_device
def cast(x: Tensor, scale: Tensor, dtype: torch.dtype, low: float, high: float) -> Tensor:
    """cast(clamp(x / scale, low, high)) of `dtype`, outside of any graph. scale: one number; the rest as `cast_transposed`."""
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    if out.numel():
        launch(
            cast_kernel, (cdiv(x.numel(), 4096),), x.contiguous(), scale.float(), out, x.numel(), LOW=low,
            HIGH=high, FORMAT=_FORMATS[dtype], B=4096, num_warps=8,
        )  # fmt: skip
    return out.view(dtype)


def _transposed(q: Tensor) -> Tensor:
    return _run(q, None, q.dtype)


def _cast_both(x: Tensor, scale: Tensor, dtype: torch.dtype, low: float, high: float) -> tuple[Tensor, Tensor]:
    same = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    out = _run(x, scale, dtype, low, high, same)
    return same.view(dtype), out


def _define(name: str, schema: str, function: Callable[..., object], fake: Callable[..., object]) -> None:
    torch.library.define(f"ao::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"ao::{name}", "CUDA", function)
    torch.library.register_fake(f"ao::{name}", fake)


_define("transposed", "(Tensor q) -> Tensor", _transposed, lambda q: q.new_empty(q.shape[1], q.shape[0]))
_define(
    "cast_transposed",
    "(Tensor x, Tensor scale, ScalarType dtype, float low, float high) -> Tensor",
    _run,
    lambda x, scale, dtype, low, high: x.new_empty(x.shape[1], x.shape[0], dtype=dtype),
)
_define(
    "cast_both",
    "(Tensor x, Tensor scale, ScalarType dtype, float low, float high) -> (Tensor, Tensor)",
    _cast_both,
    lambda x, scale, dtype, low, high: (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[1], x.shape[0], dtype=dtype),
    ),
)


def transposed(q: Tensor) -> Tensor:
    """q.t() in memory of its own. q: (M, N), one byte per element -> (N, M)."""
    return torch.ops.ao.transposed.default(q)


def cast_transposed(x: Tensor, scale: Tensor, dtype: torch.dtype, low: float, high: float) -> Tensor:
    """cast(clamp(x.t() / scale, low, high)) -> (N, M) of `dtype`. x: (M, N).

    scale: (1, 1), (N, 1) or (N, M / block), block a multiple of `TILE`.
    dtype: torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8; to the bit what `Float8` and `Intx(8)` encode.
    """
    return torch.ops.ao.cast_transposed.default(x, scale, dtype, low, high)


def cast_both(x: Tensor, scale: Tensor, dtype: torch.dtype, low: float, high: float) -> tuple[Tensor, Tensor]:
    """cast(clamp(x / scale, low, high)) and its transpose, by one reading of x: (M, N) and (N, M). scale: (1, 1)."""
    return torch.ops.ao.cast_both.default(x, scale, dtype, low, high)
