"""The attention of queries to keys and values that are quantized: softmax_pieces.py says what it is, and this picks how."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dtypes.base import QTensor
from . import attention_gpu
from .softmax_pieces import Exact, Sight, check_heads, finish, plain, rows_of, step


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
    kinds = attention_gpu.decodes(q, k, v, sight.mask) if q.is_cuda else None
    if kinds is not None:
        out, logs = attention_gpu.decode(q, k, v, kinds, sight, scale, softcap, sinks)
        if not exact:
            return out
        state = attention_gpu.state_of(out, logs, k.shape[1])
    elif q.is_cuda and attention_gpu.takes_prompt(q, v, sight, softcap, sinks):
        state = attention_gpu.prompt(q, k, v, sight, scale)
    else:
        state = plain(q, k, v, sight, scale, softcap, sinks)
    for keys, values, positions in exact:
        rows = rows_of(q, k.shape[1])
        state = step(state, rows, keys.float(), values.float(), positions, sight, scale, softcap, False)
    return finish(state, q.dtype)
