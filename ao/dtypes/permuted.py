"""`Permuted`: a weight whose columns are stored in another order, as GPTQ leaves them that quantizes the important ones first.

Groups along K are then groups of neighbours in that order. A product takes the columns of the activation in the same order,
x @ w.T = x[:, order] @ qdata.T, and decodes as the stored weight does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import OPS, Opaque, QTensor, Spec, dense
from .rounding import narrow


@dataclass(frozen=True, repr=False)
class Permuted(Spec):
    """Another Spec, over the columns of a weight (N, K) in another order. Quantizing anew keeps the order 0, 1, 2, ..."""

    inner: Spec

    @property
    def block(self) -> tuple[int, ...]:
        """Of the Spec under it."""
        return self.inner.block

    def grid(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Of the Spec under it."""
        return self.inner.grid(shape)

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Those of the Spec under it."""
        return self.inner.choose_qparams(x, grid)

    def stored(self, **qparams: Any) -> dict[str, Tensor]:
        """As of the Spec under it."""
        return self.inner.stored(**qparams)

    def round(self, x: Tensor, **qparams: Any) -> Tensor:
        """As of the Spec under it."""
        return self.inner.round(x, **qparams)

    def encode(self, x: Tensor, **qparams: Any) -> dict[str, Tensor | None]:
        """The values, in the order of `x`."""
        fields = self.inner.encode(x, **qparams)
        order = torch.arange(x.shape[-1], device=x.device)
        return {"qdata": self.inner.wrap(fields, torch.float32, x.shape), "order": stored_order(order)}

    def rearranged(self, q: Any) -> tuple[QTensor, Tensor] | None:
        """The weight as it is stored, and the order; None where its rows are in another order."""
        return (q.qdata, q.order) if self.act is None and q.order.dim() == 1 else None


def stored_order(order: Tensor) -> Tensor:
    """An order of columns, (K,), in the dtype in which it is stored: every program of a kernel reads all of it."""
    return order.to(torch.int16 if order.shape[0] <= 2**15 else torch.int32)


class PermutedTensor(QTensor, spec=Permuted):
    """x[..., order] = qdata.

    qdata: a QTensor of the shape of the tensor.
    order: (K,) int16, or int32 beyond 32768 columns and in older files: the column that each stored column is; (K, 1) where the
        last two dims are exchanged, and it is the rows.
    """

    qdata: Opaque
    order: Opaque

    spec: Permuted
    alike = ("order",)
    own_ops: ClassVar[dict[Any, Callable[..., Any]]] = {}

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        back = torch.argsort(self.order.flatten())
        return narrow(dense(self.qdata).index_select(self.dim_of_order, back), dtype)

    @property
    def dim_of_order(self) -> int:
        """The dim whose order is another."""
        return -1 if self.order.dim() == 1 else -2


aten = torch.ops.aten


def _turned(q: PermutedTensor) -> QTensor:
    """The transpose of a matrix."""
    return _transpose(q, 0, -1)


def _transpose(q: PermutedTensor, a: int, b: int) -> Any:
    """Two dims exchanged. The order goes with the columns, which stay among the last two dims."""
    a, b, ordered = a % q.dim(), b % q.dim(), q.dim_of_order % q.dim()
    if a == b:
        return OPS[aten.alias.default](q)
    order = q.order
    if {a, b} == {q.dim() - 2, q.dim() - 1}:
        order = order.unsqueeze(-1) if order.dim() == 1 else order.squeeze(-1)
    elif ordered in (a, b):
        raise NotImplementedError(
            f"transpose({a}, {b}) of a {type(q).__name__} of shape {tuple(q.shape)}: the columns are stored in another order and "
            "stay in one of the last two dims; exchange these two, or call dequantize() first"
        )
    fields = {
        name: t if name == "act_scale" else t.transpose(a, b) for name, t in q.fields().items() if name != "order"
    }
    shape = list(q.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return q.like(tuple(shape), q.dtype, {**fields, "order": order})


def _permute(q: PermutedTensor, dims: Sequence[int]) -> Any:
    return _transpose(q, 0, dims[0]) if q.dim() == 2 else OPS[aten.permute.default](q, dims)


def _copy(target: PermutedTensor, source: Any, non_blocking: bool = False) -> Any:
    """The values in the order that is there; what is unchanged stays as it is."""
    same = isinstance(source, PermutedTensor) and source.spec == target.spec
    if same and source.order.dtype != target.order.dtype:  # of an older file
        fields = {**source.fields(), "order": source.order.to(target.order.dtype)}
        source = source.like(source.shape, source.dtype, fields, source.whole)
    if target.pre_scale is not None or same:
        out = OPS[aten.copy_.default](target, source, non_blocking)
        if (told := target.__dict__.get("on_new_data")) is not None:  # graphs have a copy of the order
            told(target)
        return out
    values = source.decode_scaled() if isinstance(source, QTensor) else source
    values = values.to(target.device, torch.float32).expand(target.shape)
    stored = target.qdata
    assert isinstance(stored, QTensor)
    stored = stored.like(stored.shape, target.dtype, stored.fields(), stored.whole)  # which tells what is unchanged
    stored.copy_(values.index_select(target.dim_of_order, target.order.flatten().int()))
    return target


PermutedTensor.own_ops.update(
    {
        aten.t.default: _turned,
        aten.transpose.int: _transpose,
        aten.permute.default: _permute,
        aten.copy_.default: _copy,
    }
)
