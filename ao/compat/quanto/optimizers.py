"""How scales are found: `AbsmaxOptimizer` for 8 bits, `MaxOptimizer` and `HqqOptimizer` below.

A scale is m = max|x| over a row, divided by the largest number of the format. A scale and a shift stand for
x = scale * code - shift, with codes from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...dtypes import Intx, dense
from ...quant import HQQ
from .qtype import qint8, qtype


def absmax_scale(base: Tensor, qtype: qtype = qint8, axis: int | None = None) -> Tensor:
    """max|base| / max(qtype), of `base`'s dtype: a scalar, or one per index of `axis` (0 or -1), kept as dims of 1."""
    largest = base.abs()
    largest = largest.amax() if axis is None else largest.amax(dim=_others(base, axis), keepdim=True)
    return largest / qtype.qmax


def _others(base: Tensor, axis: int) -> list[int]:
    return list(range(1, base.dim()) if axis == 0 else range(base.dim() - 1))


def _check_axis(axis: int | None, allowed: tuple[int | None, ...]) -> None:
    if axis not in allowed:
        raise ValueError(f"axis must be 0 (the first) or -1 (the last), got {axis}")


def group(base: Tensor, axis: int, group_size: int) -> Tensor:
    """`base` as rows (axis 0) or columns (axis -1) of `group_size` elements that follow one another along the other dims.

    Raises ValueError where `group_size` does not divide them.
    """
    _check_axis(axis, (0, -1))
    if base.numel() // base.shape[axis] % group_size:
        raise ValueError(f"group_size must divide {base.numel() // base.shape[axis]}, got {group_size}")
    if axis == 0:
        return base.reshape(-1, group_size)
    return base.reshape(-1, group_size, base.shape[-1]).transpose(0, 1).reshape(group_size, -1)


class Optimizer:
    """Finds the scales of a tensor: `optimizer(base, qtype, axis, ...)`."""


class SymmetricOptimizer(Optimizer):
    """One scale, and 0 stays 0. `optimize` says how; a subclass may be one's own."""

    def __call__(self, base: Tensor, qtype: qtype, axis: int | None = None) -> Tensor:
        """The scale, of `base`'s dtype: per index of `axis`, or one for all."""
        _check_axis(axis, (None, 0, -1))
        return self.optimize(base, qtype, None if axis is None or base.shape[axis] == 1 else axis)

    def optimize(self, base: Tensor, qtype: qtype, axis: int | None = None) -> Tensor:
        """The scale."""
        raise NotImplementedError


class AbsmaxOptimizer(SymmetricOptimizer):
    """scale = max|x| / max(qtype)."""

    def optimize(self, base: Tensor, qtype: qtype, axis: int | None = None) -> Tensor:
        """The scale."""
        return absmax_scale(base, qtype, axis)


class AffineOptimizer(Optimizer):
    """A scale and a shift. `optimize` says how; a subclass may be one's own."""

    def __call__(
        self, base: Tensor, qtype: qtype, axis: int = 0, group_size: int | None = None, zeropoint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(scale, shift) of `base`'s dtype, per group. zeropoint: give the shift as a code, uint8, so that 0 is exact."""
        _check_axis(axis, (0, -1))
        if group_size is not None:
            base = group(base, axis, group_size)
        scale, shift = self.optimize(base, qtype, axis)
        if zeropoint:
            shift = (shift / scale).round().clamp(0, 2**qtype.bits - 1).to(torch.uint8)
        return scale, shift

    def optimize(self, base: Tensor, qtype: qtype, axis: int) -> tuple[Tensor, Tensor]:
        """(scale, shift), of dims of 1 but for `axis`."""
        raise NotImplementedError


class MaxOptimizer(AffineOptimizer):
    """scale = (max x - min x) / (2**bits - 1), shift = -min x."""

    def optimize(self, base: Tensor, qtype: qtype, axis: int) -> tuple[Tensor, Tensor]:
        """(scale, shift)."""
        dims = _others(base, axis)
        lo, hi = base.amin(dim=dims, keepdim=True), base.amax(dim=dims, keepdim=True)
        return (hi - lo) / (2**qtype.bits - 1), -lo


class HqqOptimizer(MaxOptimizer):
    """Half-quadratic quantization: the `HQQ` of ao, which moves the zero points.

    lp_norm: the p of |W - D(Q(W))|**p. iters: steps. beta, kappa: accepted; ao's way to the minimum has neither. verbose:
        accepted; nothing is printed.
    """

    def __init__(
        self,
        lp_norm: float = 0.7,
        beta: float = 10.0,
        kappa: float = 1.01,
        iters: int = 20,
        verbose: bool = False,
    ) -> None:
        self.recipe = HQQ(p=lp_norm, steps=iters)

    def optimize(self, base: Tensor, qtype: qtype, axis: int) -> tuple[Tensor, Tensor]:
        """(scale, shift)."""
        rows = (base if axis == 0 else base.t()).reshape(base.shape[axis], -1)
        spec = Intx(qtype.bits, (1, -1), signed=False, symmetric=False, zero_point="float")
        found = self.recipe.quantize(rows, spec, None).qparams
        scale, zero = dense(found["scale"]).float(), dense(found["zero_point"]).float()
        shape = [-1] + [1] * (base.dim() - 1) if axis == 0 else [1] * (base.dim() - 1) + [-1]
        return scale.reshape(shape).to(base.dtype), (zero * scale).reshape(shape).to(base.dtype)
