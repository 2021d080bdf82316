"""SmoothQuant: move what is hard to quantize from the activation to the weight.

For formats that quantize activations (arXiv:2211.10438, equation 4): channels of the activation with outliers are divided by

    s_k = max|x_k|**alpha / max|w_k|**(1 - alpha)

and the weight's columns multiplied by as much. All s_k share a power of two, with which sqrt(min s * max s) is near 1, so that
neither side leaves the range of its dtype. Cost: as of AWQ, a `pre_scale` per input channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ...dtypes import Spec
from ..calibration.observers import Channels
from ..calibration.statistics import Statistics
from .hqq import magnitude
from .recipe import Recipe, Rounded, RoundToNearest, scaled_statistics


@dataclass(frozen=True)
class SmoothQuant(Recipe):
    """A `pre_scale` that balances activation and weight, then another recipe on the scaled weight.

    rounding: that recipe, such as `GPTQ()`.
    alpha: 0 leaves all the difficulty with the activation, 1 moves all of it to the weight.

    Raises ValueError for a format that leaves the activation in floating point.
    """

    rounding: Recipe = field(default_factory=RoundToNearest)
    alpha: float = 0.5

    name: ClassVar[str] = "smoothquant"
    observes: ClassVar[frozenset[str]] = frozenset({"channels"})

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"SmoothQuant: alpha must be between 0 and 1, got {self.alpha}")

    @property
    def scales(self) -> bool:
        return True

    @property
    def wants_target(self) -> bool:
        return self.rounding.wants_target

    def check(self, spec: Spec, shape: Sequence[int]) -> None:
        if len(shape) != 2:
            raise ValueError(f"SmoothQuant takes a weight of two dims, and this one has shape {tuple(shape)}")
        if spec.act is None:
            raise ValueError(
                f"SmoothQuant is for formats that quantize activations, and {spec} does not; use 'awq' for it, or a "
                "config such as Int8DynamicActivationInt8WeightConfig"
            )
        self.rounding.check(spec, shape)

    def quantize(self, weight: Tensor, spec: Spec, seen: Statistics | None) -> Rounded:
        assert seen is not None
        if not seen.calls:
            return self.rounding.quantize(weight, spec, seen).noted("not smoothed: no data came to it")
        weight = weight.float()
        channels: Channels = seen.observers["channels"]
        assert channels.amax is not None
        x, w = channels.amax, weight.abs().amax(0)
        if not (x > 0).any() or not (w > 0).any():
            what = "its weight" if (x > 0).any() else "all that came to it"
            return self.rounding.quantize(weight, spec, seen).noted(f"not smoothed: {what} is zero")
        x, w = x.clamp(min=float(x.max()) * 1e-5), w.clamp(min=float(w.max()) * 1e-5)
        scale = x**self.alpha / w ** (1 - self.alpha)
        scale = scale / magnitude((scale.max() * scale.min()).sqrt()[None, None], (1, 1))[0, 0]
        found = self.rounding.quantize(weight * scale, spec, scaled_statistics(seen, 1 / scale))
        return found.scaled(1 / scale)
