"""Attention of a few queries to quantized keys and values on a CPU, by the compiled functions of a product (kernels/built.py).

Scores are a product with the keys of a head as its weight, the output sums rows of values, and the softmax between them is
PyTorch's. Nothing is decoded into memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dtypes.cpp import cpp_compiler
from .kernels.built import IN_FLOATS, SCALES, Kind, Level, Library, Weight, library

_KINDS = {"int8": Kind("signed", 8), "uint4": Kind("unsigned", 4), "float8": Kind("e4m3", 8)}


def can(width: int, kinds: tuple[str, str]) -> bool:
    """Whether there are compiled functions for keys and values of these kinds; they are made now, if no process has done so."""
    if cpp_compiler() is None or width % 32:
        return False
    return all(library(_KINDS[kind]) is not None for kind in kinds)


def _head(codes: Tensor, scale: Tensor, zero: Tensor | None, b: int, h: int, length: int, width: int) -> Weight:
    """The first `length` positions of a head as a weight (length, width) of one scale per row."""

    def at(t: Tensor | None) -> int | None:
        return None if t is None else t.data_ptr() + (b * t.stride(0) + h * t.stride(1)) * t.element_size()

    levels = [Level() if t is None else Level(at(t), None, None, length, 0, 0, SCALES[t.dtype]) for t in (scale, zero)]
    row_bytes = codes.stride(2) * codes.element_size()
    return Weight(at(codes), None, *levels, length, width, row_bytes, 1, 0.0, int(zero is not None), 0)


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
    b, h, t, d = q.shape
    kv_heads, first = k.shape[1], 0 if end is None else int(end) - t
    last = min(int(stop), k.shape[2])
    if end is not None:
        last = min(last, first + t)
    of_k, of_v = library(_KINDS[kind_k]), library(_KINDS[kind_v])
    assert of_k is not None and of_v is not None
    (k_scale, k_zero), (v_scale, v_zero) = (_readable(s, z) for s, z in ((k_scale, k_zero), (v_scale, v_zero)))
    group = h // kv_heads
    rows = (q.float() * scale).reshape(b, kv_heads, group * t, d).contiguous()
    scores = _scores(of_k, rows, k, k_scale, k_zero, last).view(b, h, t, last)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(last)
    seen = (positions >= start).expand(t, -1)
    if end is not None:
        own = torch.arange(first, first + t)[:, None]
        seen = seen & (positions <= own)
        if window is not None:
            seen = seen & (positions > own - window)
    if mask is not None:
        seen = seen & mask[..., :last]
    if t > 1 or start or window is not None or mask is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    logs = torch.logsumexp(scores, -1) if last else scores.new_full((b, h, t), -math.inf)
    if sinks is not None:
        logs = torch.logaddexp(logs, sinks.float()[:, None])
    p = torch.exp(scores - torch.where(logs == -math.inf, 0.0, logs)[..., None])
    p = p.view(b, kv_heads, group * t, last) * v_scale[:, :, None, :last, 0].float()
    out = _sums(of_v, p.contiguous(), v, v_scale, last, d)
    if v_zero is not None:
        out -= p @ v_zero[:, :, :last].float()
    return out.view(b, h, t, d).to(q.dtype), logs


def _readable(scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """In dtypes that the compiled functions read."""
    if scale.dtype in SCALES and (zero is None or zero.dtype in SCALES):
        return scale, zero
    return scale.float(), None if zero is None else zero.float()


def _scores(compiled: Library, rows: Tensor, k: Tensor, scale: Tensor, zero: Tensor | None, last: int) -> Tensor:
    b, kv_heads, m, d = rows.shape
    out = torch.empty(b, kv_heads, m, last)
    if not last:
        return out
    for i in range(b):
        for j in range(kv_heads):
            weight = _head(k, scale, zero, i, j, last, d)
            x, y = rows[i, j].data_ptr(), out[i, j].data_ptr()
            compiled.product(weight, x, 0, None, y, 0, m, IN_FLOATS, torch.get_num_threads())
    return out


def _sums(compiled: Library, p: Tensor, v: Tensor, scale: Tensor, last: int, d: int) -> Tensor:
    b, kv_heads, m, _ = p.shape
    out = torch.zeros(b, kv_heads, m, d)
    for i in range(b if last else 0):
        for j in range(kv_heads):
            weight = _head(v, scale, None, i, j, last, d)
            compiled.columns(weight, 0, last, p[i, j].data_ptr(), m, out[i, j].data_ptr(), torch.get_num_threads())
    return out
