"""The Triton kernels for attention with decomposed relative positions, which are added on the way and never fill a mask.

Tokens are those of an image of H rows and W columns, row after row. With kh(k) and kw(k) the row and the column of key k,

    scores[q, k] = scale q.k + q.table_h[kh(q) - kh(k) + H - 1] + q.table_w[kw(q) - kw(k) + W - 1]

The products of the queries with all rows of a table, q.table^T, are one product of a tile each; what a query needs of its row
is a part of it, in reverse order, from a place that follows from where the query is.

- `rows_kernel`, for images of many columns: a tile of keys is a row of the image, so that the part of the columns is the same
  for all tiles and stays in registers. That of the rows is one number of a query for each tile. It joins what is subtracted
  before the exponential. These numbers wait in memory, (B, heads, H, T), where threads find them by query.
- `window_kernel`, for windows of up to 16 x 16: a tile of keys is some rows of 16 columns, of which those past the end count
  nothing. The part of the columns is as before. That of the rows, 16 numbers of a query, is multiplied by which key is in which
  row, ones and zeros, on the tensor cores: one step more of q.k.

Queries, keys and values are read where the projection has put them, and the output is written as the next one reads it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..relative_positions import WINDOW, halves
from .launch import cdiv, launch, power_of_two


class Tile(NamedTuple):
    """Queries of a program, its warps, tiles of keys on their way, registers of a thread at most, rows of a window in a tile."""

    queries: int
    warps: int
    stages: int
    registers: int | None = None
    rows: int = 1


IN_ROWS = Tile(64, 4, 3, registers=168)
IN_WINDOWS = Tile(64, 4, 3, registers=168, rows=4)
"""Of the two kernels."""

LARGE = Tile(64, 4, 2, rows=4)
"""Of either, for more numbers in a tile of keys than `SMALL`: 168 registers are too few for these."""

SMALL = 64 * 96

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(ptr, rows, there, stride, START: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Columns START to START + SIZE of `rows`."""
    at = ptr + rows[:, None] * stride + (START + tl.arange(0, SIZE))[None, :]
    if MASKED:
        return tl.load(at, mask=there[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _place(heads, T: tl.constexpr, BM: tl.constexpr):
    """Which image, head, and tile of BM of its T queries a program is for."""
    TILES: tl.constexpr = (T + BM - 1) // BM
    part = tl.program_id(0) // TILES
    return part // heads, part % heads, tl.program_id(0) % TILES * BM + tl.arange(0, BM)


@triton.jit
def _scores(
    q_low, q_high, ptr, rows, there, stride, LOW: tl.constexpr, HIGH: tl.constexpr, HIGH_TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Products of all queries and `rows` -> (BM, N) float32."""
    acc = tl.dot(q_low, tl.trans(_tile(ptr, rows, there, stride, 0, LOW, MASKED)))
    if HIGH > 0:
        acc = tl.dot(q_high, tl.trans(_tile(ptr, rows, there, stride, LOW, HIGH_TILE, MASKED)), acc)
    return acc


@triton.jit
def rows_kernel(
    qkv_ptr, table_h_ptr, table_w_ptr, by_row_ptr, out_ptr, heads, stride, H: tl.constexpr, W: tl.constexpr,
    SCALE: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, HIGH_TILE: tl.constexpr,
    SPAN_H: tl.constexpr, SPAN_W: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of BM queries of a head, and all keys, one row of the image at a time.

    by_row: (B, heads, H, H * W), for the program's own use. COLUMNS: W, rounded up to a power of two. SPAN: the rows of a table,
    2 H - 1 or 2 W - 1, alike.
    """
    T: tl.constexpr = H * W
    MASKED: tl.constexpr = COLUMNS != W
    ragged: tl.constexpr = T % BM != 0
    image, head, query = _place(heads, T, BM)
    qkv_ptr += image.to(tl.int64) * T * stride + head * D
    inside = query < T
    q_low = _tile(qkv_ptr, query, inside, stride, 0, LOW, ragged)
    q_high = _tile(qkv_ptr, query, inside, stride, D - HIGH_TILE, HIGH_TILE, ragged)

    span = tl.arange(0, SPAN_H)
    products = _scores(q_low, q_high, table_h_ptr, span, span < 2 * H - 1, D, LOW, HIGH, HIGH_TILE, True)
    row = (query // W)[:, None] + (H - 1) - span[None, :]
    by_row_ptr += (image * heads + head).to(tl.int64) * H * T
    needed = (row >= 0) & (row < H) & inside[:, None]
    by_row = (products * _LOG2E).to(by_row_ptr.dtype.element_ty)
    tl.store(by_row_ptr + row * T + query[:, None], by_row, mask=needed)

    span = tl.arange(0, SPAN_W)
    products = _scores(q_low, q_high, table_w_ptr, span, span < 2 * W - 1, D, LOW, HIGH, HIGH_TILE, True)
    key = tl.arange(0, COLUMNS)
    place = tl.maximum((query % W)[:, None] + (W - 1) - key[None, :], 0)
    by_column = tl.gather(products, place, 1) * _LOG2E
    if MASKED:
        by_column = tl.where((key < W)[None, :], by_column, float("-inf"))
    tl.debug_barrier()  # what other threads of this program have stored is read from here on

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out_low = tl.zeros([BM, LOW], tl.float32)
    out_high = tl.zeros([BM, HIGH_TILE], tl.float32)
    there = key < W
    k_ptr = qkv_ptr + heads * D
    v_ptr = qkv_ptr + 2 * heads * D
    of_row_ptr = by_row_ptr + query
    of_row = tl.load(of_row_ptr, mask=inside, other=0.0)
    for i in tl.range(0, H, num_stages=STAGES):
        rows = i * W + key
        scores = _scores(q_low, q_high, k_ptr, rows, there, stride, LOW, HIGH, HIGH_TILE, MASKED)
        scores = scores * (SCALE * _LOG2E) + by_column
        shift = of_row.to(tl.float32)
        of_row_ptr += T
        of_row = tl.load(of_row_ptr, mask=inside & (i + 1 < H), other=0.0)
        new = tl.maximum(top, tl.max(scores, 1) + shift)
        p = tl.exp2(scores - (new - shift)[:, None])
        kept = tl.exp2(top - new)
        top = new
        total = total * kept + tl.sum(p, 1)
        p = p.to(qkv_ptr.dtype.element_ty)
        out_low = tl.dot(p, _tile(v_ptr, rows, there, stride, 0, LOW, MASKED), out_low * kept[:, None])
        if HIGH > 0:
            v_high = _tile(v_ptr, rows, there, stride, LOW, HIGH_TILE, MASKED)
            out_high = tl.dot(p, v_high, out_high * kept[:, None])
    _store(out_ptr, out_low, out_high, total, query, inside, image, head, heads, T, D, LOW, HIGH, HIGH_TILE)


@triton.jit
def _store(
    out_ptr, out_low, out_high, total, query, inside, image, head, heads, T: tl.constexpr, D: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, HIGH_TILE: tl.constexpr,
):  # fmt: skip
    """out (B, T, heads * D): the sums of a tile of queries over their totals."""
    out_ptr += image.to(tl.int64) * T * heads * D + head * D
    one = (1.0 / total)[:, None]
    at = out_ptr + query[:, None] * (heads * D)
    dtype = out_ptr.dtype.element_ty
    tl.store(at + tl.arange(0, LOW)[None, :], (out_low * one).to(dtype), mask=inside[:, None])
    if HIGH > 0:
        at += LOW + tl.arange(0, HIGH_TILE)[None, :]
        tl.store(at, (out_high * one).to(dtype), mask=inside[:, None])


@triton.jit
def window_kernel(
    qkv_ptr, table_h_ptr, table_w_ptr, out_ptr, heads, stride, H: tl.constexpr, W: tl.constexpr, SCALE: tl.constexpr,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, HIGH_TILE: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of BM queries of a head, and all keys of its window, ROWS rows of 16 columns at a time. H and W are at most 16."""
    T: tl.constexpr = H * W
    dtype = qkv_ptr.dtype.element_ty
    image, head, query = _place(heads, T, BM)
    qkv_ptr += image.to(tl.int64) * T * stride + head * D
    inside = query < T
    q_low = _tile(qkv_ptr, query, inside, stride, 0, LOW, True)
    q_high = _tile(qkv_ptr, query, inside, stride, D - HIGH_TILE, HIGH_TILE, True)

    # Of the rows: numbers of the tensor cores, over the scale, which sums are multiplied by. Rows past the end are far off.
    span = tl.arange(0, 32)
    row = tl.arange(0, 16)[None, :]
    products = _scores(q_low, q_high, table_h_ptr, span, span < 2 * H - 1, D, LOW, HIGH, HIGH_TILE, True)
    place = tl.minimum(tl.maximum((query // W)[:, None] + (H - 1) - row, 0), 31)
    by_row = tl.gather(products, place, 1) * (1.0 / SCALE)
    by_row = tl.where(row < H, by_row, -60000.0).to(dtype)
    none = tl.zeros([BM, 16], dtype)

    products = _scores(q_low, q_high, table_w_ptr, span, span < 2 * W - 1, D, LOW, HIGH, HIGH_TILE, True)
    key = tl.arange(0, 16 * ROWS)
    key_row, key_column = key // 16, key % 16
    place = tl.maximum((query % W)[:, None] + (W - 1) - key_column[None, :], 0)
    by_column = tl.gather(products, place, 1) * _LOG2E
    by_column = tl.where((key_column < W)[None, :], by_column, float("-inf"))

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out_low = tl.zeros([BM, LOW], tl.float32)
    out_high = tl.zeros([BM, HIGH_TILE], tl.float32)
    of_rows = ((tl.arange(0, 16) % ROWS)[:, None] == key_row[None, :]).to(dtype)
    k_ptr = qkv_ptr + heads * D
    v_ptr = qkv_ptr + 2 * heads * D
    for i in tl.range(0, (H + ROWS - 1) // ROWS, num_stages=STAGES):
        keys = (i * ROWS + key_row) * W + key_column
        there = (key_column < W) & (i * ROWS + key_row < H)
        scores = _scores(q_low, q_high, k_ptr, keys, there, stride, LOW, HIGH, HIGH_TILE, True)
        scores = tl.dot(tl.where(row // ROWS == i, by_row, none), of_rows, scores)
        scores = scores * (SCALE * _LOG2E) + by_column
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        kept = tl.exp2(top - new)
        top = new
        total = total * kept + tl.sum(p, 1)
        p = p.to(dtype)
        out_low = tl.dot(p, _tile(v_ptr, keys, there, stride, 0, LOW, True), out_low * kept[:, None])
        if HIGH > 0:
            v_high = _tile(v_ptr, keys, there, stride, LOW, HIGH_TILE, True)
            out_high = tl.dot(p, v_high, out_high * kept[:, None])
    _store(out_ptr, out_low, out_high, total, query, inside, image, head, heads, T, D, LOW, HIGH, HIGH_TILE)


def relative_attention(
    qkv: Tensor, table_h: Tensor, table_w: Tensor, heads: int, height: int, width: int, scale: float
) -> Tensor:
    """softmax(scores) v -> (B, H * W, heads * D), of the dtype of qkv, on the current device.

    qkv: (B, H * W, 3 * heads * D), bfloat16 or float16, contiguous: queries, keys and values of all heads.
    table_h, table_w: (2 H - 1, D) and (2 W - 1, D), of its dtype, contiguous.
    """
    b, tokens, features = qkv.shape
    d = features // (3 * heads)
    low, high = halves(d)
    out = torch.empty(b, tokens, heads * d, dtype=qkv.dtype, device=qkv.device)
    in_windows = max(height, width) <= WINDOW
    keys = 64 if in_windows else _span(width)
    tile = LARGE if keys * d > SMALL else IN_WINDOWS if in_windows else IN_ROWS
    grid = (cdiv(tokens, tile.queries) * heads * b,)
    sizes: dict[str, Any] = {
        "H": height, "W": width, "SCALE": scale, "D": d, "LOW": low, "HIGH": high, "HIGH_TILE": high or 16,
    }  # fmt: skip
    if in_windows:
        launch(
            window_kernel, grid, qkv, table_h, table_w, out, heads, features, **sizes, BM=tile.queries, ROWS=tile.rows,
            STAGES=tile.stages, num_warps=tile.warps, registers=tile.registers,
        )  # fmt: skip
        return out
    by_row = torch.empty(b, heads, height, tokens, dtype=qkv.dtype, device=qkv.device)
    launch(
        rows_kernel, grid, qkv, table_h, table_w, by_row, out, heads, features, **sizes,
        SPAN_H=_span(2 * height - 1), SPAN_W=_span(2 * width - 1), COLUMNS=keys, BM=tile.queries, STAGES=tile.stages,
        num_warps=tile.warps, registers=tile.registers,
    )  # fmt: skip
    return out


def _span(size: int) -> int:
    """A power of two that the tensor cores take, `size` or more."""
    return max(power_of_two(size), 16)
