"""Observers: what is remembered of the numbers that pass, in memory that does not grow with how many pass.

An observer sees the input of a layer, (..., K), batch after batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...dtypes import Spec
from ..algorithms.factor import Factored

RangeMethod = Literal["minmax", "moving_average", "percentile", "mse"]
"""How the largest magnitude that a static activation can represent is chosen."""


class MinMax:
    """The smallest and the largest number of all batches."""

    def __init__(self) -> None:
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """x: any shape."""
        lo, hi = (t.float() for t in torch.aminmax(x))
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def amax(self) -> Tensor:
        """The largest magnitude, a float32 scalar."""
        assert self.lo is not None and self.hi is not None
        return torch.maximum(self.lo.abs(), self.hi.abs())


class MovingAverage:
    """The average over batches of the largest magnitude: a_t = momentum * a_(t-1) + (1 - momentum) * max|x_t|."""

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self.value: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """x: any shape."""
        amax = x.abs().amax().float()
        self.value = amax if self.value is None else torch.lerp(amax, self.value, self.momentum)

    def amax(self) -> Tensor:
        """The average, a float32 scalar."""
        assert self.value is not None
        return self.value


class Histogram:
    """How often which magnitude occurs, in `bins` bins of one width; a larger number doubles the width and merges pairs."""

    def __init__(self, bins: int = 2048) -> None:
        self.bins = bins
        self.top = 0.0
        self.counts: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """x: any shape, finite."""
        x = x.detach().abs().float().flatten()
        largest = float(x.amax())
        if self.counts is None:
            self.counts = torch.zeros(self.bins, dtype=torch.float64, device="cpu")
        if not self.top:
            self.top = largest
        while largest > self.top:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self.top *= 2
        if self.top:
            self.counts += torch.histc(x, self.bins, 0.0, self.top).double().cpu()
        else:
            self.counts[0] += x.numel()

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, (bins,) float32."""
        return (torch.arange(self.bins, dtype=torch.float32, device="cpu") + 0.5) * (self.top / self.bins)

    def percentile(self, fraction: float) -> Tensor:
        """The magnitude below which `fraction` of the numbers lie, a float32 scalar."""
        assert self.counts is not None
        share = self.counts.cumsum(0) / self.counts.sum()
        index = int(torch.searchsorted(share, min(fraction, 1.0) - 1e-12))
        return torch.tensor((min(index, self.bins - 1) + 1) * self.top / self.bins, dtype=torch.float32, device="cpu")

    def best(self, spec: Spec, steps: int = 100) -> Tensor:
        """The largest magnitude to represent for which `spec`, per tensor, has the least mean squared error."""
        assert self.counts is not None
        weight, x = self.counts.float(), self.centers[None]
        tops = [self.top * i / steps for i in range(1, steps + 1)]
        errors = []
        for top in tops:
            qparams = spec.choose_qparams(torch.tensor([[top]], dtype=torch.float32, device="cpu"), (1, 1))
            errors.append(float(((spec.round(x, **qparams) - x)[0].square() * weight).sum()))
        return torch.tensor(tops[min(range(steps), key=errors.__getitem__)], dtype=torch.float32, device="cpu")


class Channels:
    """Per input channel: the largest and the mean magnitude, and the mean. (K,) float32 each."""

    def __init__(self) -> None:
        self.tokens = 0
        self.amax: Tensor | None = None
        self.total_abs: Tensor | None = None
        self.total: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """x: (..., K)."""
        rows = x.reshape(-1, x.shape[-1]).float()  # (tokens, K)
        amax = rows.abs().amax(0)
        if self.amax is None:
            self.amax, self.total_abs, self.total = amax, torch.zeros_like(amax), torch.zeros_like(amax)
        else:
            self.amax = torch.maximum(self.amax, amax)
        assert self.total_abs is not None and self.total is not None
        self.total_abs += rows.abs().sum(0)
        self.total += rows.sum(0)
        self.tokens += rows.shape[0]

    def scaled(self, factor: Tensor) -> Channels:
        """What would have been seen of inputs times `factor` (K,)."""
        made = Channels()
        made.tokens = self.tokens
        if self.amax is not None and self.total_abs is not None and self.total is not None:
            made.amax, made.total_abs = self.amax * factor.abs(), self.total_abs * factor.abs()
            made.total = self.total * factor
        return made

    @property
    def mean_abs(self) -> Tensor:
        """(K,)."""
        assert self.total_abs is not None
        return self.total_abs / self.tokens

    @property
    def mean(self) -> Tensor:
        """(K,)."""
        assert self.total is not None
        return self.total / self.tokens


class Hessian:
    """H = sum over tokens of x x^T, (K, K) float32: half the second derivative of |X W^T - X Q^T|**2 in each row of Q."""

    def __init__(self) -> None:
        self.tokens = 0
        self.total: Tensor | None = None
        self.form: tuple[tuple[bool, float], Factored] | None = None

    def observe(self, x: Tensor) -> None:
        """x: (..., K)."""
        rows = x.reshape(-1, x.shape[-1]).float()  # (tokens, K)
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1]) if self.form is None else self.matrix()
            self.form = None
        self.total.addmm_(rows.t(), rows)
        self.tokens += rows.shape[0]

    def scaled(self, factor: Tensor) -> Hessian:
        """What would have been seen of inputs times `factor` (K,)."""
        made = Hessian()
        made.tokens = self.tokens
        if self.tokens:
            made.total = (self.matrix() * factor).mul_(factor[:, None])
        return made

    def matrix(self) -> Tensor:
        """H; not to be written to."""
        if self.total is None:
            assert self.form is not None
            return self.form[1].matrix()
        return self.total

    def diagonal(self) -> Tensor:
        """The sum of the squares of each input, (K,), made anew."""
        if self.total is not None:
            return self.total.diagonal().clone()
        assert self.form is not None
        factored = self.form[1]
        return torch.empty_like(factored.diagonal).index_copy_(0, factored.order, factored.diagonal - factored.damp)

    def factored(self, by_size: bool, damping: float) -> Factored | None:
        """H with its factor, in the memory of H, or None where it has none. by_size: columns by falling diagonal."""
        if self.form is None or self.form[0] != (by_size, damping):
            h, self.total, self.form = self.matrix(), None, None
            order = torch.arange(h.shape[0], device=h.device)
            if by_size:
                order = torch.argsort(h.diagonal(), descending=True, stable=True)
            factored = Factored(h, order)
            if not factored.factor(damping):
                self.total = factored.matrix()
                return None
            self.form = (by_size, damping), factored
        return self.form[1]


class Target:
    """sum over tokens of y x^T, (N, K) float32: y what the original layer makes of the original input, x the input now.

    With it and the Hessian H of x, the error of a weight Q is |Y - X Q^T|**2 = tr(Q H Q^T) - 2 tr(total Q^T) + |Y|**2.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.total: Tensor | None = None
        self.outputs: Tensor | None = None

    def observe(self, original: Tensor, x: Tensor, weight: Tensor) -> None:
        """original, x: (..., K), of as many tokens. weight: (N, K)."""
        rows = x.reshape(-1, x.shape[-1]).float()
        y = original.reshape(rows.shape).float() @ weight.t().float()  # (tokens, N)
        if self.total is None or self.outputs is None:
            self.total = rows.new_zeros(y.shape[1], rows.shape[1])
            self.outputs = rows.new_zeros(y.shape[1])
        self.total.addmm_(y.t(), rows)
        self.outputs += y.sum(0)
        self.tokens += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        """The mean of y, (N,)."""
        assert self.outputs is not None
        return self.outputs / self.tokens

    def scaled(self, factor: Tensor) -> Target:
        """What would have been seen of inputs x times `factor` (K,)."""
        made = Target()
        made.tokens, made.outputs = self.tokens, self.outputs
        made.total = None if self.total is None else self.total * factor
        return made
