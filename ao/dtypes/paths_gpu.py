"""The products of an activation and a quantized weight that are fast on a GPU (see paths.py)."""

from __future__ import annotations

from torch import Tensor

from .base import QTensor
from .bits import CHUNK, packed_dim
from .float8 import Float8Tensor
from .intx import IntxTensor
from .paths import compiling


def gemv_accepts(x: Tensor, w: QTensor) -> bool:
    return (
        x.device.type == "cuda"
        and x.shape[0] == 1
        and compiling()
        and w.spec.act is None
        and (isinstance(w, Float8Tensor) or (isinstance(w, IntxTensor) and w.spec.bits in (4, 8)))
        and w.scale.shape[0] in (1, w.shape[0])
        and x.shape[1] % _gemv_group(w) == 0
        and _gemv_group(w) % CHUNK == 0
        and packed_dim(w.qdata.shape, w.shape) == 1
    )


def _gemv_group(w: IntxTensor | Float8Tensor) -> int:
    """The elements that are summed before a scale is applied: a group, or a piece of a row that is a short reduction."""
    return w.shape[1] // w.scale.shape[1] if w.scale.shape[1] > 1 else 128


def gemv(x: Tensor, w: QTensor) -> Tensor:
    """sum over groups of (sum over the group of x * (q - z)) * scale: two reductions, of which the first is short.

    One reduction over the whole row would load scale and zero point once per element.
    """
    assert isinstance(w, (IntxTensor, Float8Tensor))
    n, group = w.shape[0], _gemv_group(w)
    xs = x.float().view(-1, group)  # (K / group, group)
    zero: Tensor | int = 0
    if isinstance(w, IntxTensor) and w.spec.bits == 4:
        # Both halves of a byte from one load: (N, K / group, chunks of a group, 16), see bits.py.
        pairs = w.qdata.view(n, -1, group // CHUNK, CHUNK // 2)
        low, high = xs.view(-1, group // CHUNK, 2, CHUNK // 2).unbind(2)
        sums = ((pairs & 15).float() * low + (pairs >> 4).float() * high).sum((-1, -2))  # (N, K / group)
        zero = 8 if w.spec.signed else 0  # signed codes are stored with an offset
    else:
        sums = (w.qdata.view(n, -1, group).float() * xs).sum(-1)
    if isinstance(w, IntxTensor) and w.zero_point is not None:
        zero = w.zero_point.float() + zero
    if not isinstance(zero, int) or zero:
        sums = sums - zero * xs.sum(-1)
    return (sums * w.scale.float()).sum(-1).unsqueeze(0).to(x.dtype)
