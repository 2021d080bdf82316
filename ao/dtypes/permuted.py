"""`Permuted`: a weight whose columns are stored in another order, as GPTQ leaves them that quantizes the important ones first.

Groups along K are then groups of neighbours in that order. A product takes the columns of the activation in the same order,
x @ w.T = x[:, order] @ qdata.T, and decodes as the stored weight does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Opaque, QTensor, Spec, dense
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
        order = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        return {"qdata": self.inner.wrap(fields, torch.float32, x.shape), "order": order}

    def rearranged(self, x: Tensor, q: Any) -> tuple[Tensor, QTensor] | None:
        """The columns of the activation in the stored order, and the weight as it is stored."""
        return (x.index_select(-1, q.order), q.qdata) if self.act is None else None


class PermutedTensor(QTensor, spec=Permuted):
    """x[..., order] = qdata.

    qdata: a QTensor of the shape of the tensor.
    order: (K,) int32, the column that each stored column is.
    """

    qdata: Opaque
    order: Opaque

    spec: Permuted

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return narrow(dense(self.qdata)[..., torch.argsort(self.order)], dtype)
