"""Tensors quantized with scales that are given: `quantize_weight`, `quantize_activation`."""

from __future__ import annotations

from torch import Tensor

from ...dtypes import Float8, Intx, IntxTensor, QTensor, Spec
from .nn import affine_qparams
from .qtype import act_spec, qtype, weight_spec

QBitsTensor = WeightQBitsTensor = IntxTensor
QBytesTensor = WeightQBytesTensor = ActivationQBytesTensor = QTensor


def quantize_weight(
    t: Tensor,
    qtype: qtype,
    axis: int | None,
    scale: Tensor,
    shift: Tensor | None = None,
    group_size: int | None = None,
    activation_qtype: qtype | None = None,
    optimized: bool = True,
) -> QTensor:
    """`t` with the given scales, and shifts below 8 bits, as a QTensor of ao.

    t: (N, K), or more dims.
    axis: 0, a scale per row; or -1, per element of the last dim, for 8 bits.
    scale, shift: of the form that the optimizers give.
    optimized: accepted: a QTensor has one form.

    Raises ValueError for another axis, for groups or shifts with 8 bits and for none below, and for axis=-1 below 8 bits.
    """
    if axis not in (0, -1):
        raise ValueError(f"axis must be 0 (the first) or -1 (the last), got {axis}")
    if qtype.bits == 8:
        if shift is not None or group_size is not None:
            raise ValueError(f"{qtype} takes a scale alone; leave out shift and group_size")
        spec: Spec = weight_spec(qtype, None, t.shape)
        if axis == -1:
            block = (*[-1] * (t.dim() - 1), 1)
            spec = Float8(spec.format, block) if isinstance(spec, Float8) else Intx(8, block, narrow=True)
        return _marked(spec.quantize(t, scale=scale.detach().float().expand(spec.grid(t.shape)).contiguous()), qtype)
    if shift is None or axis != 0:
        raise ValueError(f"{qtype} takes a scale and a shift, and axis=0; got shift={shift} and axis={axis}")
    spec = weight_spec(qtype, group_size, t.shape)
    return _marked(spec.quantize(t, **affine_qparams(scale.detach(), shift.detach(), spec.grid(t.shape))), qtype)


def quantize_activation(t: Tensor, qtype: qtype, scale: Tensor) -> QTensor:
    """`t` with one scale, a scalar, as a QTensor of ao. Raises ValueError for more than one scale."""
    if scale.numel() != 1:
        raise ValueError(f"an activation has one scale, got {scale.numel()}")
    spec = act_spec(qtype)
    return _marked(spec.quantize(t, scale=scale.detach().float().reshape([1] * t.dim())), qtype)


def _marked(q: QTensor, kind: qtype) -> QTensor:
    q.qtype = kind  # type: ignore[attr-defined]
    return q
