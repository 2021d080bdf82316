"""The attention of a few queries to keys and values that are quantized, piece by piece: no dense copy of all of them is made.

    out[i] = sum_j softmax_j(q[i] . k[j] * scale) v[j]        over the positions j that query i sees

Positions come in pieces, whose softmax is put together as it goes (arXiv:1805.02867): with the running maximum m, the sum l of
exp(s - m) and the sum a of exp(s - m) * v, a new piece of scores s with maximum n turns them into exp(m - max(m, n)) times
themselves, plus its own. Heads that share keys ride on the rows of one product; nothing is repeated.

This file is the definition, in plain PyTorch. attention_gpu.py computes the same on an NVIDIA GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes.base import QTensor
from ..dtypes.tracing import is_eager
from ..dtypes.views import slice_

SCORES = 2**22
"""Scores of a piece, at most, where that leaves it 64 positions."""

PIECES = 8
"""Pieces of a cache in a traced graph, at most."""


class Exact(NamedTuple):
    """Keys and values that are kept in floating point, at positions of their own.

    keys, values: (B, kv_heads, n, head_dim). positions: (n,) integers; a negative one is no position.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor


class Sight(NamedTuple):
    """Which positions a query sees.

    start, stop: the positions that quantized keys answer for, [start, stop). stop: an integer, a tensor of one, or None for all.
    end: the position after that of the last query; each sees its own and those before it. None where all see all.
    window: how many positions a query sees, its own among them.
    mask: (B or 1, heads or 1, T, positions), bool, True for what is seen, or a number to add to the scores.
    """

    start: int = 0
    stop: Tensor | int | None = None
    end: Tensor | int | None = None
    window: int | None = None
    mask: Tensor | None = None


class State(NamedTuple):
    """A softmax that is not done: (B, kv_heads, group, T) maximum and total, float32, and the sum (..., head_dim)."""

    top: Tensor
    total: Tensor
    out: Tensor


def plain(
    q: Tensor,
    k: QTensor,
    v: QTensor,
    sight: Sight,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> State:
    """The softmax of queries over what they see of `k` and `v`; the arguments are those of `attention.attend`."""
    state = first_state(q, k.shape[1], v.shape[-1], sinks)
    rows = rows_of(q, k.shape[1])
    for start, stop in pieces(q, k.shape[2], sight):
        positions = torch.arange(start, stop, device=q.device)
        keys, values = (slice_(a, 2, start, stop).decode() for a in (k, v))
        state = step(state, rows, keys, values, positions, sight, scale, softcap, True)
    return state


def rows_of(q: Tensor, kv_heads: int) -> Tensor:
    """(B, heads, T, head_dim) -> (B, kv_heads, group * T, head_dim) float32."""
    return q.float().reshape(q.shape[0], kv_heads, -1, q.shape[3])


def check_heads(q: Tensor, k: Tensor) -> int:
    """How many query heads share a key. Raises ValueError unless they are a multiple."""
    queries, keys = q.shape, k.shape
    if len(queries) != 4 or len(keys) != 4 or queries[1] % keys[1] or queries[3] != keys[3]:
        raise ValueError(
            "attention: q must be (B, heads, T, head_dim) and k (B, kv_heads, L, head_dim), with heads a multiple of kv_heads, "
            f"got q {tuple(queries)} and k {tuple(keys)}"
        )
    return queries[1] // keys[1]


def first_state(q: Tensor, kv_heads: int, width: int, sinks: Tensor | None) -> State:
    """Before the first piece. width: of a value."""
    b, h, t, _ = q.shape
    shape = (b, kv_heads, h // kv_heads, t)
    out = torch.zeros(*shape, width, dtype=torch.float32, device=q.device)
    if sinks is None:
        return State(
            torch.full(shape, -math.inf, dtype=torch.float32, device=q.device),
            torch.zeros(shape, dtype=torch.float32, device=q.device),
            out,
        )
    top = sinks.float().reshape(1, kv_heads, -1, 1).expand(shape)
    return State(top, torch.ones(shape, dtype=torch.float32, device=q.device), out)


def pieces(q: Tensor, length: int, sight: Sight) -> Iterator[tuple[int, int]]:
    """[start, stop) of each piece of the quantized positions. In eager mode those alone that may be seen."""
    b, h, t, _ = q.shape
    size = max(64, SCORES // (b * h * t) // 64 * 64)
    start, last = sight.start, length
    if is_eager(q):
        last = length if sight.stop is None else min(int(sight.stop), length)
        if sight.end is not None:
            last = min(last, int(sight.end))
            if sight.window is not None:
                start = max(start, int(sight.end) - t - sight.window + 1)
    else:
        size = max(size, -(-length // PIECES))
    # At multiples of 64, so that a packed chunk or a block of positions is never cut.
    for begin in range(start // 64 * 64, last, size):
        yield begin, min(begin + size, length)


def step(
    state: State,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    sight: Sight,
    scale: float,
    softcap: float | None,
    quantized: bool,
) -> State:
    """`state` after one more piece.

    rows: (B, kv_heads, group * T, head_dim) float32. keys, values: (B, kv_heads, n, head_dim) float32. positions: (n,).
    """
    b, hk, g, t = state.top.shape
    s = (rows @ keys.mT * scale).view(b, hk, g, t, -1)  # (B, kv_heads, group, T, n)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    seen = positions >= (sight.start if quantized else 0)
    if quantized and sight.stop is not None:
        seen = seen & (positions < sight.stop)
    seen = seen.expand(t, -1)  # (T, n)
    if sight.end is not None:
        own = torch.arange(-t, 0, device=s.device)[:, None] + sight.end
        seen = seen & (positions <= own)
        if sight.window is not None:
            seen = seen & (positions > own - sight.window)
    if sight.mask is not None:
        mask = sight.mask.index_select(-1, positions.clamp(0, sight.mask.shape[-1] - 1))
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (hk, g))
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            s = s + mask
    s = torch.where(seen, s, -math.inf)
    top = torch.maximum(state.top, s.amax(-1))
    base = torch.where(top == -math.inf, 0.0, top)  # of a query that has seen nothing yet
    p = torch.exp(s - base[..., None])
    kept = torch.exp(state.top - base)
    more = (p.view(b, hk, g * t, -1) @ values).view(b, hk, g, t, -1)
    return State(top, state.total * kept + p.sum(-1), state.out * kept[..., None] + more)


def finish(state: State, dtype: torch.dtype) -> Tensor:
    """out / total, (B, heads, T, head_dim)."""
    total = state.total[..., None]
    return torch.where(total == 0, 0.0, state.out / total).flatten(1, 2).to(dtype)
