"""The attention of queries to keys and values that are quantized: softmax_pieces.py says what it is, and this picks how."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes.base import QTensor
from . import attention_gpu
from .attention_kinds import decode_operator, kinds_of
from .softmax_pieces import Exact, Sight, State, check_heads, finish, plain, rows_of, step


def attend(
    q: Tensor,
    k: QTensor,
    v: QTensor,
    sight: Sight = Sight(),  # noqa: B008
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    exact: Sequence[Exact] = (),
) -> Tensor:
    """softmax(q k^T * scale) v -> (B, heads, T, head_dim) in q's dtype, computed in float32.

    q: (B, heads, T, head_dim). k, v: (B, kv_heads, L, head_dim); heads is a multiple of kv_heads.
    scale: head_dim**-0.5 if None. softcap: scores become softcap * tanh(scores / softcap).
    sinks: (heads,), a score of each head that takes part in the softmax and has no value.
    exact: what else is seen besides `k` and `v`.

    A query that sees nothing gets zeros. Raises ValueError where the heads do not fit.
    """
    check_heads(q, k)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    kinds = kinds_of(q, k, v, sight.mask)
    if kinds is not None:
        out, logs = _decode(q, k, v, kinds, sight, scale, softcap, sinks)
        if not exact:
            return out
        top = logs.unflatten(1, (k.shape[1], -1))
        state = State(top, (top > -math.inf).float(), out.float().unflatten(1, (k.shape[1], -1)))
    elif q.is_cuda and attention_gpu.takes_prompt(q, v, sight, softcap, sinks):
        state = attention_gpu.prompt(q, k, v, sight, scale)
    else:
        state = plain(q, k, v, sight, scale, softcap, sinks)
    for keys, values, positions in exact:
        rows = rows_of(q, k.shape[1])
        state = step(state, rows, keys.float(), values.float(), positions, sight, scale, softcap, False)
    return finish(state, q.dtype)


def _decode(
    q: Tensor,
    k: QTensor,
    v: QTensor,
    kinds: tuple[str, str],
    sight: Sight,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `decode_operator` gives."""
    a, b = k.spec.operand(k), v.spec.operand(v)
    assert a is not None and b is not None

    def on(n: Tensor | int) -> Tensor:
        return n if isinstance(n, Tensor) else torch.full((), n, dtype=torch.int64, device=q.device)

    stop, end = on(k.shape[2] if sight.stop is None else sight.stop), sight.end
    return decode_operator(
        q, a.codes, a.scale, a.zero_point, b.codes, b.scale, b.zero_point, *kinds, sight.start, stop,
        None if end is None else on(end), sight.window, sight.mask, scale, softcap, sinks,
    )  # fmt: skip
