"""HQQ: qparams that suit all numbers of a block rather than its extremes, without any data.

Round-to-nearest lays the codes from the smallest number of a block to the largest, which leaves most numbers wide steps for
the sake of two. Half-quadratic quantization (Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog) looks for

    argmin over scale, zero_point of  sum |W - D(Q(W))|**p

This file minimizes the same sum in two steps. First, a search: the range of each block is cut at fractions of its ends, and
the best cut is kept, block by block. Then, in turns, numbers are rounded under the qparams, and qparams are fitted to the
codes by least squares, weighted by |error|**(p - 2) where p < 2; the best qparams ever met are kept.

Cost: a few dozen roundings of the weight. No calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...dtypes import Spec, dense, expand, in_blocks, to_blocks
from ..calibration.statistics import Statistics
from .recipe import Recipe, Rounded

Qparams = dict[str, Tensor]

CUTS = tuple(1 - 0.05 * i for i in range(13))
"""Fractions of an end of the range, 1 to 0.4."""

WIDER = (1.2, 1.5, 2.0)
"""Multiples of a scale that is less than the largest number asks for, such as a power of two below."""


@dataclass(frozen=True)
class HQQ(Recipe):
    """Qparams of the least sum |W - D(Q(W))|**p per block, found from the weight alone.

    p: 2 is the mean squared error. The authors take 0.7, which gives up the largest weights, and those cost a language
        model most: the larger the blocks, the larger a p pays.
    steps: alternations of rounding and fitting.

    Integers take a scale and a zero point, symmetric ones and other formats a scale only. Raises ValueError for a format
    that has neither.
    """

    p: float = 2.4
    steps: int = 20

    name: ClassVar[str] = "hqq"

    def __post_init__(self) -> None:
        if not 0 < self.p <= 8 or self.steps < 0:
            raise ValueError(f"HQQ: p must be in (0, 8] and steps at least 0, got p={self.p}, steps={self.steps}")

    def check(self, spec: Spec, shape: tuple[int, ...]) -> None:  # type: ignore[override]
        check_scaled(spec, shape, "HQQ")

    def quantize(self, weight: Tensor, spec: Spec, seen: Statistics | None) -> Rounded:
        weight = weight.float()
        qparams = search(weight, spec, p=self.p)
        qparams = refine(weight, spec, qparams, self.p, self.steps)
        return Rounded(spec.round(weight, **qparams), qparams)


def check_scaled(spec: Spec, shape: tuple[int, ...], who: str) -> None:
    """Raise ValueError unless the qparams of `spec` are a scale and perhaps a zero point per block."""
    qparams = spec.choose_qparams(torch.empty(shape, dtype=torch.float32, device="meta"), spec.grid(shape))
    if not {"scale"} <= qparams.keys() <= {"scale", "zero_point"}:
        raise ValueError(f"{who} finds scales, and {spec} has none; use algorithm='rtn'")


def block_sum(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The sum over each block of data `x`: float32 of shape `grid`."""
    blocks = to_blocks(x, grid)
    return blocks.sum(tuple(range(1, blocks.dim(), 2)))


def magnitude(weight: Tensor, grid: tuple[int, ...]) -> Tensor:
    """About the largest magnitude of each block, a power of two, of shape `grid`; 1 for a block of zeros.

    Errors are taken relative to it: powers and sums of them then stay within the range of float32, whatever the weight's, and
    nothing is rounded.
    """
    blocks = to_blocks(weight, grid)
    largest = torch.frexp(blocks.abs().amax(tuple(range(1, blocks.dim(), 2))))
    size = torch.ldexp(torch.ones_like(largest.mantissa), largest.exponent.clamp(-126, 126))
    return torch.where(largest.mantissa == 0, 1.0, size)


def _total(error: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The sum over each block, with infinity for qparams that make no number of it."""
    return block_sum(error, grid).nan_to_num_(nan=torch.inf, posinf=torch.inf)


def search(
    weight: Tensor,
    spec: Spec,
    importance: Tensor | None = None,
    p: float = 2.0,
    cuts: tuple[float, ...] = CUTS,
) -> Qparams:
    """The qparams, among those that `spec` chooses for a weight cut at fractions of the ends of each block, of the least
    sum of importance * |error|**p.

    weight: float32. importance: broadcasts to the weight; None for 1.

    First both ends are cut alike; then, where there is a zero point, each end alone around what was best, else larger scales.
    """
    grid = spec.grid(weight.shape)
    blocks = to_blocks(weight, grid)
    inside = tuple(range(1, blocks.dim(), 2))
    lo, hi = blocks.amin(inside, keepdim=True), blocks.amax(inside, keepdim=True)
    best = torch.full(grid, torch.inf, dtype=torch.float32, device=weight.device)
    qparams = {name: dense(t).clone() for name, t in spec.choose_qparams(weight, grid).items()}
    low, high = torch.ones_like(best), torch.ones_like(best)
    unit = expand(1 / magnitude(weight, grid), weight.shape)

    def attempt(below: Tensor, above: Tensor) -> None:
        nonlocal low, high
        cut = blocks.clamp(lo * in_blocks(below), hi * in_blocks(above)).reshape(weight.shape)
        better = weigh(spec.choose_qparams(cut, grid))
        low, high = torch.where(better, below, low), torch.where(better, above, high)

    def weigh(stored: Qparams) -> Tensor:
        nonlocal best
        tried = {name: dense(t) for name, t in stored.items()}
        error = (spec.round(weight, **tried) - weight).mul_(unit).abs_().pow_(p)
        total = _total(error if importance is None else error * importance, grid)
        better = total < best
        best = torch.where(better, total, best)
        for name, t in tried.items():
            qparams[name] = torch.where(better, t, qparams[name])
        return better

    chosen = qparams["scale"].float()
    for cut in cuts:
        attempt(torch.full_like(best, cut), torch.full_like(best, cut))
    if "zero_point" in qparams:
        step = cuts[0] - cuts[1]
        for _ in range(2):
            for move in (-2, -1, 1, 2):
                attempt(low + move * step, high)
            for move in (-2, -1, 1, 2):
                attempt(low, high + move * step)
    else:
        for factor in WIDER:
            weigh(spec.stored(scale=chosen * factor))
    return spec.stored(**qparams)


def refine(weight: Tensor, spec: Spec, qparams: Qparams, p: float = 2.0, steps: int = 10) -> Qparams:
    """Round under the qparams and fit the qparams to the codes, in turns; the best of each block. weight: float32."""
    grid = spec.grid(weight.shape)
    size = magnitude(weight, grid)
    unit = expand(1 / size, weight.shape)
    best: Tensor | None = None
    kept = {name: dense(t).clone() for name, t in qparams.items()}
    tried = dict(kept)
    for step in range(steps + 1):
        values = spec.round(weight, **tried)
        error = (values - weight).mul_(unit).abs_()
        total = _total(error**p, grid)
        if best is None:
            best = total
        else:
            better = total < best
            best = torch.where(better, total, best)
            kept = {name: torch.where(better, tried[name], t) for name, t in kept.items()}
        if step < steps:
            share = None if p == 2 else error.clamp(min=1e-12) ** (p - 2)
            fitted = spec.stored(**fit(spec, weight, values, tried, size, share))
            tried = {name: dense(t) for name, t in fitted.items()}
    return spec.stored(**kept)


def fit(spec: Spec, weight: Tensor, values: Tensor, qparams: Qparams, size: Tensor, share: Tensor | None) -> Qparams:
    """Scale and zero point of least squares for the codes of `values`, by blocks, weighted by `share` (None for 1).

    With unit u = values / scale = q - zero_point: scale alone is <u, w> / <u, u>. With a zero point, the slope of w over u
    is the scale, and the line's crossing of w = 0 moves the zero point; it is that for the scale as it will be stored.

    size: `magnitude` of the weight.
    """
    grid = tuple(size.shape)
    scale = qparams["scale"].float()
    unit = (to_blocks(values, grid) * in_blocks(_inverse(scale))).reshape(weight.shape)
    weight = weight * expand(1 / size, weight.shape)

    def mean(x: Tensor) -> Tensor:
        return block_sum(x if share is None else x * share, grid)

    if "zero_point" not in qparams:
        return {"scale": _ratio(mean(unit * weight), mean(unit * unit), scale / size) * size}
    n, su, sw = mean(torch.ones_like(unit)), mean(unit), mean(weight)
    slope = _ratio(n * mean(unit * weight) - su * sw, n * mean(unit * unit) - su * su, scale / size)
    slope = dense(spec.stored(**{**qparams, "scale": slope * size})["scale"]).float()
    shift = (su - sw * size * _inverse(slope)) / n.clamp(min=1e-30)  # u at which the line crosses w = 0
    return {"scale": slope, "zero_point": qparams["zero_point"].float() + shift}


def _ratio(a: Tensor, b: Tensor, otherwise: Tensor) -> Tensor:
    """a / b where that is a positive number, else what was there."""
    ratio = a / b
    return torch.where((b > 0) & (ratio > 0) & ratio.isfinite(), ratio, otherwise)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1 / x)
