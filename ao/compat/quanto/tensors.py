"""Tensors quantized with scales that are given, by quanto's names: `quantize_weight`, `WeightQBytesTensor.quantize`.

A class of quanto is what a tensor of ao holds: `isinstance(q, WeightQBitsTensor)` is true for fewer than 8 bits. What is made
here has quanto's attributes beside those of ao, its gradient passes to what it was made of, and operators that have no low-bit
form compute with its numbers, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ...dtypes import Float8, Float8Tensor, Intx, IntxTensor, QTensor, Spec, dense, pack, pack_dim
from .nn import affine_qparams
from .qtype import act_spec, qtype, qtypes, weight_spec

__all__ = [
    "ActivationQBytesTensor",
    "QBitsTensor",
    "QBytesTensor",
    "QTensor",
    "WeightQBitsTensor",
    "WeightQBytesTensor",
    "quantize_activation",
    "quantize_weight",
]


class _Quanto(QTensor):
    """The attributes of quanto, from those of ao."""

    spec: Any

    @property
    def qtype(self) -> qtype:
        """The format."""
        if isinstance(self.spec, Float8):
            return qtypes[{"e4m3": "qfloat8_e4m3fn", "e5m2": "qfloat8_e5m2"}[self.spec.format]]
        return qtypes[f"qint{self.spec.bits}"]

    @property
    def axis(self) -> int | None:
        """0 for a scale per row, -1 for one per element of the last dim, None for one in all."""
        if self._scale.numel() == 1:
            return None
        block = self.spec.block
        return -1 if block[-1] == 1 and block[0] != 1 else 0

    @property
    def _data(self) -> Tensor:
        return self.qdata  # type: ignore[attr-defined]

    @property
    def _scale(self) -> Tensor:
        scale: Tensor = dense(self.scale).to(self.dtype)  # type: ignore[attr-defined]
        return scale.reshape(()) if scale.numel() == 1 else scale

    @property
    def _shift(self) -> Tensor:
        scales: Any = self.scale  # type: ignore[attr-defined]
        return (dense(scales) * dense(self.zero_point)).to(self.dtype)  # type: ignore[attr-defined]

    def dequantize(self) -> Tensor:
        """The plain tensor, with its gradient."""
        return _FromQuantized.apply(self)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        try:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        except NotImplementedError:
            if func._schema.is_mutable:
                raise
            args, kwargs = tree_map_only(QTensor, lambda q: QTensor.dequantize(q), (args, kwargs or {}))
            return func(*args, **kwargs)


class QuantoIntx(_Quanto, IntxTensor):
    """Integers, with quanto's attributes."""


class QuantoFloat8(_Quanto, Float8Tensor):
    """float8, with quanto's attributes."""


def _classed(q: Any) -> Any:
    kind: Any = QuantoFloat8 if isinstance(q.spec, Float8) else QuantoIntx
    return kind(q.spec, q.dtype, q.shape, q.whole, **q.fields())


class _ToQuantized(torch.autograd.Function):
    """Quantize; gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, spec: Spec, qparams: dict[str, Tensor]) -> Tensor:
        return _classed(spec.quantize(t.detach(), **qparams))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g, None, None


class _FromQuantized(torch.autograd.Function):
    """Dequantize; gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        return QTensor.dequantize(q)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def quantize_weight(
    t: Tensor,
    qtype: qtype,
    axis: int | None,
    scale: Tensor,
    shift: Tensor | None = None,
    group_size: int | None = None,
    activation_qtype: qtype | None = None,
    optimized: bool = True,
) -> Any:
    """`t` with the given scales, and shifts below 8 bits, as a QTensor of ao.

    t: (N, K), or more dims.
    axis: 0, a scale per row, or group of it; or -1, per element of the last dim.
    scale, shift: of the form that the optimizers give.
    optimized: accepted: a QTensor has one form.

    Raises ValueError for another axis, for groups or shifts with 8 bits, for no shift below, and for axis=-1 below 8 bits with
    more than two dims.
    """
    if axis not in (0, -1):
        raise ValueError(f"axis must be 0 (the first) or -1 (the last), got {axis}")
    if qtype.bits == 8:
        if shift is not None or group_size is not None:
            raise ValueError(f"{qtype} takes a scale alone; leave out shift and group_size")
        return _bytes(t, qtype, axis, scale)
    if shift is None:
        raise ValueError(f"{qtype} takes a scale and a shift; got shift=None")
    spec = _bits_spec(qtype, axis, group_size, t.shape)
    return _ToQuantized.apply(t, spec, _bits_qparams(spec, axis, scale.detach(), shift.detach(), t.shape))


def _bits_spec(kind: qtype, axis: int, group_size: int | None, shape: torch.Size) -> Any:
    """The Spec for fewer than 8 bits; with axis=-1 groups run down the columns."""
    if axis == 0:
        return weight_spec(kind, group_size, shape)
    if axis != -1 or len(shape) != 2:
        raise ValueError(f"{kind} takes axis=0, or -1 with two dims, got axis={axis} and shape {tuple(shape)}")
    bits = kind.bits if any(n % 8 == 0 for n in shape) else 8
    return Intx(bits, (group_size or -1, 1), signed=False, symmetric=False, zero_point="float")


def _bits_qparams(spec: Any, axis: int, scale: Tensor, shift: Tensor, shape: torch.Size) -> dict[str, Tensor]:
    grid = spec.grid(shape)
    if axis == 0:
        return affine_qparams(scale, shift, grid)
    turned = affine_qparams(scale, shift, grid[::-1])  # columns, and the groups of each
    return {name: t.t().contiguous() for name, t in turned.items()}


def quantize_activation(t: Tensor, qtype: qtype, scale: Tensor) -> Any:
    """`t` with one scale, a scalar, as a QTensor of ao. Raises ValueError for more than one scale."""
    if scale.numel() != 1:
        raise ValueError(f"an activation has one scale, got {scale.numel()}")
    return _ToQuantized.apply(t, act_spec(qtype), {"scale": scale.detach().float().reshape([1] * t.dim())})


def _byte_spec(kind: qtype, axis: int | None, dims: int) -> Spec:
    spec = weight_spec(kind, None, (1,) * dims)
    if axis == 0:
        return spec
    block = (-1,) * dims if axis is None else (*(-1,) * (dims - 1), 1)
    return Float8(spec.format, block) if isinstance(spec, Float8) else Intx(8, block, narrow=True)


def _bytes(t: Tensor, kind: qtype, axis: int | None, scale: Tensor) -> Any:
    spec = _byte_spec(kind, axis, t.dim())
    return _ToQuantized.apply(t, spec, {"scale": scale.detach().float().expand(spec.grid(t.shape)).contiguous()})


class _Class(type):
    """A class of quanto: what a tensor holds, and, called with quanto's arguments, a tensor of parts."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, QTensor) and bool(cls.holds(instance))  # type: ignore[attr-defined]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.of_parts(*args, **kwargs)  # type: ignore[attr-defined]


class QBytesTensor(metaclass=_Class):
    """8 bits per number."""

    @staticmethod
    def holds(q: QTensor) -> bool:
        """Whether `q` is one."""
        return isinstance(q.spec, Float8) or (isinstance(q.spec, Intx) and q.spec.bits == 8)

    @staticmethod
    def of_parts(
        qtype: qtype,
        axis: int | None,
        size: Sequence[int],
        stride: Any,
        data: Tensor,
        scale: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The tensor of these codes and scales."""
        spec = _byte_spec(qtype, axis, len(size))
        fields = {"qdata": data, "scale": scale.float().expand(spec.grid(torch.Size(size))).contiguous()}
        return _classed(spec.wrap(fields, scale.dtype, torch.Size(size)))


class WeightQBytesTensor(QBytesTensor):
    """A weight of 8 bits per number."""

    @staticmethod
    def quantize(
        base: Tensor,
        qtype: qtype,
        axis: int | None,
        scale: Tensor,
        activation_qtype: Any = None,
        optimized: bool = True,
    ) -> Any:
        """`base` with the given scales."""
        return _bytes(base, qtype, axis, scale)


class ActivationQBytesTensor(QBytesTensor):
    """An activation of 8 bits per number, with one scale."""

    @staticmethod
    def quantize(base: Tensor, qtype: qtype, scale: Tensor) -> Any:
        """`base` with the given scale."""
        return quantize_activation(base, qtype, scale)

    @staticmethod
    def of_parts(qtype: qtype, size: Sequence[int], stride: Any, data: Tensor, scale: Tensor, *args: Any) -> Any:  # type: ignore[override]
        """The tensor of these codes and this scale."""
        return QBytesTensor.of_parts(qtype, None, size, stride, data, scale)


class QBitsTensor(metaclass=_Class):
    """Fewer than 8 bits per number, in groups with a shift."""

    @staticmethod
    def holds(q: QTensor) -> bool:
        """Whether `q` is one."""
        return isinstance(q.spec, Intx) and q.spec.bits < 8

    @staticmethod
    def of_parts(
        qtype: qtype, axis: int, group_size: int | None, size: Sequence[int], stride: Any, data: Tensor, scale: Tensor,
        shift: Tensor, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The tensor of these codes, (groups, group_size), or (group_size, groups) with axis=-1, their scales and shifts."""
        shape = torch.Size(size)
        spec = _bits_spec(qtype, axis, group_size, shape)
        grouped = group_size is not None and axis == -1
        codes = data.reshape(group_size, shape[1], -1).permute(2, 0, 1) if grouped else data  # type: ignore[arg-type]
        codes = codes.reshape(shape)
        packed = codes if spec.bits == 8 else pack(codes, spec.bits, pack_dim(shape, spec.bits, spec))
        fields = {"qdata": packed, **_bits_qparams(spec, axis, scale, shift, shape)}
        return _classed(spec.wrap(fields, scale.dtype, shape))


class WeightQBitsTensor(QBitsTensor):
    """A weight of fewer than 8 bits per number."""

    @staticmethod
    def quantize(
        base: Tensor,
        qtype: qtype,
        axis: int,
        group_size: int | None,
        scale: Tensor,
        shift: Tensor,
        optimized: bool = True,
    ) -> Any:
        """`base` with the given scales and shifts."""
        return quantize_weight(base, qtype, axis, scale, shift, group_size)
