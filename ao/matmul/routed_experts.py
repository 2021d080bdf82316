"""The products of experts: weights (E, N, K), side by side, of which each row of an activation meets one.

Libraries spell them in two ways. `grouped_mm` gets rows that are sorted by expert, and where those of each end. `bmm` gets for
each row a copy of its expert, gathered by `w[experts]`. On a GPU that has the kernels of kernels/routed.py, few rows read the
packed codes of the experts that they were routed to where they lie; a graph does not even gather them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dtypes.base import QTensor
from ..dtypes.lattice import lattice
from ..dtypes.ops import gathered_from
from ..dtypes.tracing import known

FEW = 64
"""Rows up to which each one reads its expert by itself. Of more, many are of one expert, which is better decoded once."""


def grouped(x: Tensor, w: QTensor, ends: Tensor) -> Tensor | None:
    """Rows of x (R, K), sorted by expert, times w (E, N, K), by the kernels for few rows; None where they are not for these.

    ends: (E,) int32, where the rows of each expert end; rows after the last become zero. -> (R, N)
    """
    if w.dim() != 3 or x.dim() != 2 or _computes_derivatives(x, w):
        return None
    few = known(x.shape[0] <= FEW) and ends.dtype == torch.int32
    return _routed(x, w, ends.contiguous(), True) if few else None


def batched(a: Tensor, b: Tensor) -> Tensor | None:
    """a @ b by the same kernels, where one is a QTensor: w (R, N, K) times x (R, K, 1), or x (R, 1, K) times w (R, K, N)."""
    turned = isinstance(b, QTensor)
    w, x = (b, a) if turned else (a, b.mT)
    assert isinstance(w, QTensor)
    if w.dim() != 3 or x.dim() != 3 or _computes_derivatives(x, w):
        return None
    if not (known(x.shape[1] == 1) and known(x.shape[0] == w.shape[0])):
        return None
    w, where = gathered_from(w) or (w, torch.arange(w.shape[0], device=w.device))
    out = _routed(x.squeeze(1), w.mT if turned else w, where, False)  # type: ignore[arg-type]
    return None if out is None else out.unsqueeze(1 if turned else 2)


def _routed(x: Tensor, w: QTensor, where: Tensor, ends: bool) -> Tensor | None:
    if x.device != w.device or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    if w.pre_scale is not None or 0 in w.shape or x.shape[-1] != w.shape[-1]:
        return None
    if torch.compiler.is_exporting() or torch.is_autocast_enabled(x.device.type):
        return None
    from .kernels import operators, routed  # Triton is there only with a GPU build of PyTorch
    from .kernels.reading import fields_of, reading_of

    if not _lie_apart(w) or w.spec.rearranged(first := w[0]) is not None:
        return None
    read = reading_of(first)  # type: ignore[arg-type]
    if read is None or not routed.takes(read[0]):
        return None
    return operators.routed_rows(x.contiguous(), where, ends, *fields_of(w), read[0].text)


def _lie_apart(w: QTensor) -> bool:
    """Whether each field has a part for each expert, or one for all."""
    if "opaque" in (w.roles[name] for name in w.fields()):
        return False
    places = lattice(w, 0)
    return places.chunk == 1 and all(b == places.size for b in places.blocks)


def _computes_derivatives(x: Tensor, w: QTensor) -> bool:
    recorded = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    return recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
