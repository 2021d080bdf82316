"""Attention of a prompt to quantized keys and values on an NVIDIA GPU, by PyTorch's flash attention, a piece after the other.

With so many queries, decoding keys and values to bfloat16 is little beside the products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes.base import QTensor
from ..dtypes.tracing import is_eager
from ..dtypes.views import slice_
from .kernels.device import has_kernels
from .softmax_pieces import Sight, State, first_state

PROMPT = 2**23
"""Numbers of a piece of keys that is decoded for a prompt."""


def takes_prompt(q: Tensor, v: QTensor, sight: Sight, softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether PyTorch's flash attention does it, piece by piece: in eager mode, for causal attention without anything else."""
    plain = sight.mask is None and sight.window is None and sight.start == 0 and softcap is None and sinks is None
    halves = q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] == v.shape[3] <= 256 and q.shape[3] % 8 == 0
    return plain and halves and sight.end is not None and is_eager(q) and has_kernels(q.device)


def prompt(q: Tensor, k: QTensor, v: QTensor, sight: Sight, scale: float) -> State:
    """The softmax of T queries over what they see of `k` and `v`. Keys and values are decoded to q's dtype a piece at a time:
    what was there before, which all queries see, and then their own positions, where each sees those before it."""
    assert sight.end is not None
    (b, _, t, d), kv_heads, first = q.shape, k.shape[1], int(sight.end) - q.shape[2]
    stop = min(k.shape[2] if sight.stop is None else int(sight.stop), first + t)
    state = first_state(q, kv_heads, d, None)
    size = max(PROMPT // (b * kv_heads * d) // 64 * 64, 64)
    past = min(first, stop)
    for begin in range(0, past, size):
        state = _with(state, q, k, v, begin, min(begin + size, past), scale, False)
    if first < stop:
        # Queries from `stop` on have no position of their own here: they see all of these.
        own = stop - first
        new = _with(State(*(x[:, :, :, :own] for x in state)), q[:, :, :own], k, v, first, stop, scale, True)
        rest = State(*(x[:, :, :, own:] for x in state))
        if own < t:
            rest = _with(rest, q[:, :, own:], k, v, first, stop, scale, False)
            new = State(*(torch.cat(pair, 3) for pair in zip(new, rest)))
        state = new
    return state


def _with(state: State, q: Tensor, k: QTensor, v: QTensor, start: int, stop: int, scale: float, causal: bool) -> State:
    """`state` after the positions [start, stop)."""
    keys, values = (_decoded(a, start, stop, q.dtype) for a in (k, v))
    out, logs = torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, 0.0, causal, scale=scale)[:2]
    logs = logs[:, :, : q.shape[2]].unflatten(1, (k.shape[1], -1))
    top = torch.maximum(state.top, logs)
    kept, more = torch.exp(state.top - top), torch.exp(logs - top)
    out = out.unflatten(1, (k.shape[1], -1))
    return State(
        top, state.total * kept + more, torch.addcmul(state.out * kept[..., None], out.float(), more[..., None])
    )


def _decoded(a: QTensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Positions [start, stop) in `dtype`, (B, kv_heads, stop - start, head_dim)."""
    begin, end = start // 64 * 64, min(-(-stop // 64) * 64, a.shape[2])  # through no packed chunk or block of positions
    return slice_(a, 2, begin, end).decode(dtype)[:, :, start - begin : stop - begin]
