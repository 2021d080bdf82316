"""The products of an activation and a quantized weight that are fast on a CPU (see paths.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import QTensor
from .intx import IntxTensor
from .paths import quantized_act

# The floating-point products that this CPU does in hardware.
_FLOATS = {torch.float32, torch.float64}
if torch.backends.mkldnn.is_available():
    _FLOATS |= {torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set()
    _FLOATS |= {torch.float16} if torch.ops.mkldnn._is_mkldnn_fp16_supported() else set()


def int8pack_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.shape[0] == 1
        and isinstance(w, IntxTensor)
        and w.spec.act is None
        and w.qdata.dtype == torch.int8
        and w.zero_point is None
        and w.scale.shape == (w.shape[0], 1)
    )


def int8pack(x: Tensor, w: QTensor) -> Tensor:
    """ATen's int8 weight-only product, in float32. Fast for one token only: it reads the weight once per token."""
    assert isinstance(w, IntxTensor)
    return torch._weight_int8pack_mm(x.float(), w.qdata, w.scale.flatten().float()).to(x.dtype)


def pieces_accepts(x: Tensor, w: QTensor) -> bool:
    return x.device.type == "cpu" and (x.dtype not in _FLOATS or _pieces(w) > 1)


def pieces(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T, a large weight in row pieces: a piece that stays in cache from its decoding to its use saves a round
    trip through memory. Computed in float32 on a CPU without products of x's dtype."""
    rows = quantized_act(x, w)
    dtype = x.dtype if x.dtype in _FLOATS else torch.float32
    rows = rows.to(dtype)
    if (count := _pieces(w)) == 1:
        return F.linear(rows, w.decode(dtype)).to(x.dtype)
    parts: Any = w.chunk(count)
    return torch.cat([F.linear(rows, part.decode(dtype)) for part in parts], -1).to(x.dtype)


def _pieces(w: QTensor) -> int:
    """Into how many row pieces to cut a large weight on a CPU. More than eight would only cost compile time."""
    size = w.shape[0] * w.shape[1]
    roles = type(w).roles
    blocks = [t.shape[0] for name, t in w.fields().items() if roles[name] in ("elements", "per_block")]
    if size < 2**22 or "opaque" in roles.values() or any(f not in (1, w.shape[0]) for f in blocks):
        return 1
    return 4 if size <= 2**24 else 8
