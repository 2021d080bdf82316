"""Attention to quantized keys and values on an NVIDIA GPU: the kernel for a few queries, and PyTorch's own for a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes.base import QTensor
from ..dtypes.operand import Operand
from ..dtypes.pieces import is_eager
from ..dtypes.views import slice_
from .kernels.device import has_kernels
from .softmax_pieces import Sight, State, first_state

QUERIES = 16
"""Of the kernel, at most. Beyond, decoding keys and values to bfloat16 is little beside the products."""

PROMPT = 2**23
"""Numbers of a piece of keys that is decoded for a prompt."""


def code_kind(a: Operand | None, width: int) -> str | None:
    """How the kernel reads codes of (..., width) with one scale per position; None where it does not."""
    if a is None or a.codes.dim() != 4 or type(a.scale) is not Tensor or a.scale.shape != (*a.codes.shape[:3], 1):
        return None
    per_byte = {8: 1, 4: 2}.get(a.bits, 0)
    row = width // max(per_byte, 1)
    laid_out = a.codes.shape[3] == row and a.codes.stride()[2:] == (row, 1) and a.scale.stride(2) == 1
    if not per_byte or not laid_out or a.codes.shape[2] % 8 or a.codes.shape[2] == 0:
        return None
    if a.kind == "float":
        return "float8" if a.codes.dtype == torch.float8_e4m3fn else None
    if a.kind != "affine" or a.offset:
        return None
    if a.bits == 8:
        return "int8" if a.codes.dtype == torch.int8 and a.zero_point is None else None
    zero = a.zero_point
    fits = type(zero) is Tensor and zero.shape == a.scale.shape and zero.stride() == a.scale.stride()
    return "uint4" if fits else None


def decodes(q: Tensor, k: QTensor, v: QTensor, mask: Tensor | None) -> tuple[str, str] | None:
    """How the kernel reads the codes of `k` and `v`; None where it cannot."""
    d = q.shape[3]
    fits = q.shape[2] <= QUERIES and d in (64, 128) and v.shape[3] == d and q.dtype in (torch.bfloat16, torch.float16)
    if not fits or not has_kernels(q.device) or not (mask is None or mask.dtype == torch.bool):
        return None
    kinds = code_kind(k.spec.operand(k), d), code_kind(v.spec.operand(v), d)
    return None if kinds[0] is None or kinds[1] is None else (kinds[0], kinds[1])


def decode(
    q: Tensor,
    k: QTensor,
    v: QTensor,
    kinds: tuple[str, str],
    sight: Sight,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention (B, heads, T, head_dim) in q's dtype, and the logarithm of the sum of exp of scores, (B, heads, T) float32."""
    from .kernels.decode_attention import decode_operator

    a, b = k.spec.operand(k), v.spec.operand(v)
    assert a is not None and b is not None
    stop = _on(q, k.shape[2] if sight.stop is None else sight.stop)
    offset = None if sight.offset is None else _on(q, sight.offset)
    start, window, mask = sight.start, sight.window, sight.mask
    return decode_operator(
        q, a.codes, a.scale, a.zero_point, b.codes, b.scale, b.zero_point, *kinds, start, stop, offset, window, mask, scale,
        softcap, sinks,
    )  # fmt: skip


def _on(q: Tensor, n: Tensor | int) -> Tensor:
    return n if isinstance(n, Tensor) else torch.full((), n, dtype=torch.int64, device=q.device)


def state_of(out: Tensor, logs: Tensor, kv_heads: int) -> State:
    """The softmax of which `out` is the result, for more pieces to come."""
    top = logs.unflatten(1, (kv_heads, -1))
    return State(top, torch.isfinite(top).float(), out.float().unflatten(1, (kv_heads, -1)))


def takes_prompt(q: Tensor, v: QTensor, sight: Sight, softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether PyTorch's flash attention does it, piece by piece: in eager mode, for causal attention without anything else."""
    plain = sight.mask is None and sight.window is None and sight.start == 0 and softcap is None and sinks is None
    halves = q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] == v.shape[3] <= 256 and q.shape[3] % 8 == 0
    return plain and halves and sight.offset is not None and is_eager(q) and has_kernels(q.device)


def prompt(q: Tensor, k: QTensor, v: QTensor, sight: Sight, scale: float) -> State:
    """The softmax of T queries over what they see of `k` and `v`. Keys and values are decoded to q's dtype a piece at a time:
    what was there before, which all queries see, and then their own positions, where each sees those before it."""
    assert sight.offset is not None
    (b, _, t, d), kv_heads, first = q.shape, k.shape[1], int(sight.offset)
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
