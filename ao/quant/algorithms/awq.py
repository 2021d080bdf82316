"""AWQ: scale up the input channels that matter before the weight is rounded, and the activation down by as much.

Activation-aware weight quantization (arXiv:2306.00978): with s per input channel, W x = (W s) (x / s), and W s is what is
rounded, so that the error of channel k is 1 / s_k of what it was. For a range of alpha,

    s_k = (mean|x_k|)**alpha, scaled so that sqrt(min s * max s) = 1

and the alpha of the least error of the layer's output is kept, alpha = 0 (no scaling) among them. The output's error is
tr(E H E^T), with H = sum x x^T over the calibration tokens, so that no activations are kept.

Cost: `steps` roundings of the weight and products with H per layer; 4 bytes per input channel, and one multiplication of the
activation at each call (the `pre_scale` of the QTensor, 1 / s).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...dtypes import Spec
from ..calibration.observers import Channels, Hessian
from ..calibration.statistics import Statistics
from .hqq import check_scaled, magnitude
from .recipe import Recipe, Rounded, RoundToNearest, scaled_statistics


@dataclass(frozen=True)
class AWQ(Recipe):
    """A `pre_scale` of the least output error, then another recipe on the scaled weight.

    rounding: that recipe, such as `GPTQ()`.
    steps: values of alpha, from 0 to 1.
    """

    rounding: Recipe = field(default_factory=RoundToNearest)
    steps: int = 20

    name: ClassVar[str] = "awq"
    observes: ClassVar[frozenset[str]] = frozenset({"channels", "hessian"})

    @property
    def scales(self) -> bool:
        return True

    @property
    def wants_target(self) -> bool:
        return self.rounding.wants_target

    def check(self, spec: Spec, shape: Sequence[int]) -> None:
        if len(shape) != 2:
            raise ValueError(f"AWQ takes a weight of two dims, and this one has shape {tuple(shape)}; use 'hqq' for it")
        check_scaled(spec, tuple(shape), "AWQ")
        self.rounding.check(spec, shape)

    def quantize(self, weight: Tensor, spec: Spec, seen: Statistics | None) -> Rounded:
        assert seen is not None
        if not seen.calls:
            return self.rounding.quantize(weight, spec, seen).noted("not scaled: no data came to it")
        if not seen.observers["channels"].amax.any():
            return self.rounding.quantize(weight, spec, seen).noted("not scaled: all that came to it is zero")
        weight = weight.float()
        scale = self.scale(weight, spec, seen.observers["channels"], seen.observers["hessian"])
        if scale is None:
            return self.rounding.quantize(weight, spec, seen)
        found = self.rounding.quantize(weight * scale, spec, scaled_statistics(seen, 1 / scale))
        return found.scaled(1 / scale)

    def scale(self, weight: Tensor, spec: Spec, channels: Channels, hessian: Hessian) -> Tensor | None:
        """The best s, (K,) float32, or None for 1."""
        h = hessian.matrix()
        grid = spec.grid(weight.shape)
        best, least = None, torch.inf
        size = channels.mean_abs
        size = size.clamp(min=float(size.max()) * 1e-8)
        unit = 1 / magnitude(weight, (1, 1))  # so that squares stay within the range of float32
        for step in range(self.steps):
            s = size ** (step / self.steps)
            s = s / (s.max() * s.min()).sqrt()
            scaled = weight * s
            error = spec.round(scaled, **spec.choose_qparams(scaled, grid)) / s - weight
            error *= unit
            loss = float(((error @ h) * error).sum())
            if loss < least:
                best, least = (s if step else None), loss
        return best
