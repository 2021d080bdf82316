"""`Sparse24`: of four numbers that follow each other along the last dim, two are stored, and which two.

What is stored of the two is any format: `Sparse24(Intx(4, (1, 128)))` has 4-bit values in groups. Which two they are takes 4 bits
per group of four, first + 4 * second, as NVIDIA's sparse units count them. Cost per element: half of the values' bits, and one.
Of int4 with 16-bit scales for 128 elements that is 3.125 bits, of int8 5, of bfloat16 9.

Three of the six patterns would fit in a byte, a third of a bit per element less; no shift and mask would find them again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Elements, QTensor, Spec
from .operand import Operand
from .pairs import UNIT, largest, pack_codes, spread, taken, unpack_codes
from .rounding import narrow
from .tracing import is_eager


class LeavesOutZeros:
    """What formats that leave out zeros share; it comes before `Spec` among their bases.

    values: how the numbers are stored, None for plain ones, which have the dtype of the data where it has 16 or 32 bits.

    part: the field of the QTensor that holds them.
    """

    values: Spec | None
    part: ClassVar[str]

    def check_values(self) -> None:
        """Raise TypeError for `values` that is no Spec, ValueError for one that quantizes activations."""
        name = type(self).__name__
        if self.values is not None and not isinstance(self.values, Spec):
            raise TypeError(f"{name}: values must be a Spec such as Intx(8), or None, got {self.values!r}")
        if self.values is not None and self.values.act is not None:
            raise ValueError(f"{name}: give act={self.values.act} to {name} rather than to its values")

    def check_range(self, x: Tensor) -> None:
        """As the format of the values does."""
        if self.values is not None:
            self.values.check_range(x)

    def wrap(self, fields: Any, dtype: torch.dtype, shape: Any, **common: Any) -> QTensor:
        """The QTensor over `fields`; plain values are stored in `dtype`."""
        values = fields[self.part]
        if self.values is None and values.dtype != dtype and dtype.itemsize < 8:
            fields = {**fields, self.part: values.to(dtype)}
        return super().wrap(fields, dtype, shape, **common)  # type: ignore[misc]


def numbers(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as `dtype`, whether they are quantized or plain."""
    return values.decode(dtype) if isinstance(values, QTensor) else narrow(values.float(), dtype)


@dataclass(frozen=True, repr=False)
class Sparse24(LeavesOutZeros, Spec):
    """Two of four along the last dim.

    values: how the two are stored, with `block` in elements of the whole tensor; None for numbers in its dtype (a 16-bit one or
        float32).
    prune: what becomes of data that is not 2:4. False, the default: ValueError, which counts the groups. True keeps the two of
        the largest magnitude, the first of equal ones: for training and for weights that are changed in place.
    decay: in `fake_quantize`, what is pruned gets this times itself for a gradient, beside the one that passes straight through
        (SR-STE, arXiv:2102.04010).

    Scales are chosen for the two alone. Traced code, which cannot look at numbers, keeps the largest in either case. Raises
    ValueError for a last dim that is no multiple of 16, for a block that is no multiple of 4 along it, and for `act` in values.
    """

    values: Spec | None = None
    prune: bool = False
    decay: float = 0.0

    part = "pairs"

    def __post_init__(self) -> None:
        self.check_values()
        if self.values is not None and self.values.block[-1] != -1 and self.values.block[-1] % 4:
            raise ValueError(
                f"Sparse24: the block of values must be a multiple of 4 along the last dim, or -1, got {self.values.block}"
            )

    @property
    def block(self) -> tuple[int, ...]:
        """Of the values, in elements of the whole tensor."""
        return (1, 4) if self.values is None else self.values.block

    @property
    def inner(self) -> Spec | None:
        """The Spec of the tensor of values, which is half as long."""
        if self.values is None or self.values.block[-1] == -1:
            return self.values
        *others, last = self.values.block
        return replace(self.values, block=(*others, last // 2))  # type: ignore[call-arg]

    def grid(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the qparams. Raises ValueError where the last dim is no multiple of 16."""
        if not shape or shape[-1] % 16:
            raise ValueError(
                f"{self}: the last dim of shape {tuple(shape)} is not a multiple of 16, in which two of four are packed; "
                "leave this tensor out"
            )
        return super().grid(shape)

    def grid_of(self, q: Any) -> tuple[int, ...]:
        """The shape of the qparams of `q`."""
        return self.grid(q.shape) if self.inner is None else self.inner.grid_of(q.pairs)

    def check_range(self, x: Tensor) -> None:
        """Raise ValueError for data that is not 2:4, unless it is to be pruned, and where the values' format does."""
        if not self.prune:
            self._check(x)
        super().check_range(x)

    def _check(self, x: Tensor) -> None:
        groups = x.detach().reshape(-1, 4)
        more = int(((groups != 0).sum(1) > 2).sum())
        if more:
            raise ValueError(
                f"{self}: {more:,} of the {groups.shape[0]:,} groups of four have more than two numbers that are not zero; prune "
                "the weight first, ao.sparsity.prune_(model, 'magnitude', sparsity='2:4'), or have prune=True do it"
            )

    def quantize(self, x: Tensor, **given: Any) -> QTensor:
        """As `Spec.quantize`. Raises ValueError for data that is not 2:4, with how many groups are not."""
        if not self.prune and not isinstance(x, QTensor) and is_eager(x) and x.is_floating_point():
            self.grid(x.shape)
            self._check(x)
        return super().quantize(x, **given)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """As `Spec.fake_quantize`, with the decay of what is pruned."""
        out = super().fake_quantize(x)
        return out + _Decay.apply(x, self.decay) if self.decay and x.requires_grad and torch.is_grad_enabled() else out

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Those of the two of four; none for plain values."""
        return {} if self.inner is None else self.inner.choose_qparams(taken(x, largest(x)), grid)

    def stored(self, **qparams: Any) -> dict[str, Tensor]:
        """As of the values."""
        return qparams if self.inner is None else self.inner.stored(**qparams)

    def encode(self, x: Tensor, **qparams: Any) -> dict[str, Tensor | None]:
        """Codes of which two, and the two, of `x` (float32)."""
        if not self.prune and is_eager(x):
            self._check(x)
        codes = largest(x)
        values = taken(x, codes)
        if self.inner is not None:
            values = self.inner.wrap(self.inner.encode(values, **qparams), torch.float32, values.shape)
        return {"places": pack_codes(codes), "pairs": values}

    def unfolded(self, q: Any) -> Tensor | None:
        """The zeros beside the two, in the values' format where it has an exact zero; None where it has not."""
        decoded = q.decode()
        if self.values is None:
            return decoded.to(q.dtype)
        spec = replace(self.values, act=self.act)
        part = q.pairs
        qparams = {name: t for name, t in part.fields().items() if part.roles[name] == "per_block"}
        if part.dim() != 2 or not qparams or q.dim_of_groups != 1:
            return None
        fields = spec.encode(decoded, **qparams)
        made = spec.wrap(fields, q.dtype, q.shape, act_scale=q.act_scale)
        return made if torch.equal(made.decode(), decoded) else None

    def operand(self, q: Any) -> Operand | None:
        """The codes of which two, and the two."""
        return Operand(q.places, q.places, None, "sparse24", 4, part=q.pairs)


class _Decay(torch.autograd.Function):
    """0, whose gradient is that of decay / 2 * (x**2, summed over what two of four leave out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.decay = decay
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        codes = largest(x)
        return ctx.decay * (x - spread(taken(x, codes), codes)), None


class Sparse24Tensor(QTensor, spec=Sparse24):
    """Two of four, and zeros.

    places: (..., K / 8) uint8, two groups of four in a byte.
    pairs: (..., K / 2), the two: a QTensor, or plain.
    """

    places: Elements
    pairs: Elements

    spec: Sparse24
    unit: ClassVar[int] = UNIT
    grain: ClassVar[int] = 16
    turns: ClassVar[bool] = False

    @property
    def dim_of_groups(self) -> int:
        """The dim along which two of four are stored: the last one, unless the tensor was turned; an empty one of nothing."""
        differ = [d for d in range(self.dim()) if self.places.shape[d] != self.shape[d]]
        return (differ or [d for d in range(self.dim()) if not self.shape[d]])[-1]

    def codes(self) -> Tensor:
        """Which two of each four, first + 4 * second, with the sparse dim last: (..., K / 4) uint8."""
        return unpack_codes(self.places.movedim(self.dim_of_groups, -1))

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        dim = self.dim_of_groups
        return spread(numbers(self.pairs, dtype).movedim(dim, -1), self.codes()).movedim(-1, dim)
