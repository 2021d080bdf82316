"""Attention of a few queries to quantized keys and values on a CPU, by compiled functions (kernels/cpu_attention.py).

One gives the scores of all heads, and one their softmax and the sum of values; what a query does not see is taken out between
them. Nothing is decoded into memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernels.built import DTYPES, SCALES, Kind
from .kernels.cpu_attention import Heads, attention

_KINDS = {"int8": Kind("signed", 8), "uint4": Kind("unsigned", 4), "float8": Kind("e4m3", 8)}


def can(width: int, kinds: tuple[str, str]) -> bool:
    """Whether there are compiled functions for keys and values of these kinds; they are made now, if no process has done so."""
    return width % 32 == 0 and all(attention(_KINDS[kind]) is not None for kind in kinds)


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
) -> tuple[Tensor, Tensor]:
    """As the function of that name in kernels/decode_attention.py."""
    (b, h, t, d), kv_heads, first = q.shape, k.shape[1], 0 if end is None else int(end) - q.shape[2]
    last = min(int(stop), k.shape[2])
    if end is not None:
        last = min(last, first + t)
        if window is not None:
            start = max(start, first - window + 1)
    last = max(last, 0)
    begin = min(start, last)
    of_k, of_v = attention(_KINDS[kind_k]), attention(_KINDS[kind_v])
    assert of_k is not None and of_v is not None
    keys, values = _heads(k, *_readable(k_scale, k_zero), d), _heads(v, *_readable(v_scale, v_zero), d)
    queries = (q if q.dtype in SCALES else q.float()).contiguous()
    threads, rows = torch.get_num_threads(), h // kv_heads * t
    scores = torch.empty(b, h, t, last - begin, dtype=torch.float32, device="cpu")
    of_k.scores(keys, queries.data_ptr(), SCALES[queries.dtype], scale, rows, begin, last, scores.data_ptr(), threads)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if end is not None and (t > 1 or window is not None):
        positions, own = torch.arange(begin, last, device="cpu"), torch.arange(first, first + t, device="cpu")[:, None]
        seen = positions <= own
        if window is not None:
            seen = seen & (positions > own - window)
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[..., begin:last], -math.inf)
    scores = scores.contiguous()
    # One for each row of each key head.
    others = None if sinks is None else sinks.float().repeat_interleave(t)
    out = torch.empty(b, h, t, d, dtype=q.dtype if q.dtype in DTYPES else torch.float32, device="cpu")
    logs = torch.empty(b, h, t, dtype=torch.float32, device="cpu")
    of_v.values(
        values, scores.data_ptr(), None if others is None else others.data_ptr(), rows, begin, last, out.data_ptr(),
        DTYPES[out.dtype], logs.data_ptr(), threads,
    )  # fmt: skip
    return out.to(q.dtype), logs


def _heads(codes: Tensor, scale: Tensor, zero: Tensor | None, width: int) -> Heads:
    dtypes = [SCALES[t.dtype] if t is not None else 0 for t in (scale, zero)]
    size = codes.element_size()
    return Heads(
        codes.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr(), *codes.shape[:2], width,
        *(n * size for n in (codes.stride(2), codes.stride(0), codes.stride(1))), *scale.stride()[:2], *dtypes,
    )  # fmt: skip


def _readable(scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """In dtypes that the compiled functions read."""
    if scale.dtype in SCALES and (zero is None or zero.dtype in SCALES):
        return scale, zero
    return scale.float(), None if zero is None else zero.float()
