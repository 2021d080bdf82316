"""Bias correction: give back the mean of the error of a layer's output.

For inputs x of the quantized layer and outputs y that it should have, bias += E[y - Q x] (arXiv:1906.04721, section 4.2).
y is what the original layer makes of x or, where `quantize_` knows it, of the original model's input at this place.
Layers without a bias get one. Cost: one addition per output, and 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...dtypes import Spec
from ..calibration.statistics import Statistics
from .recipe import Recipe, Rounded, RoundToNearest


@dataclass(frozen=True)
class BiasCorrection(Recipe):
    """Another recipe, and a bias that makes up for the mean of its error.

    rounding: that recipe, such as `GPTQ()`.
    """

    rounding: Recipe = field(default_factory=RoundToNearest)

    name: ClassVar[str] = "bias_correction"
    observes: ClassVar[frozenset[str]] = frozenset({"channels"})

    @property
    def wants_target(self) -> bool:
        return True

    def check(self, spec: Spec, shape: Sequence[int]) -> None:
        if len(shape) != 2:
            raise ValueError(f"bias correction takes a weight of two dims, and this one has shape {tuple(shape)}")
        self.rounding.check(spec, shape)

    def quantize(self, weight: Tensor, spec: Spec, seen: Statistics | None) -> Rounded:
        assert seen is not None
        if not seen.calls:
            return self.rounding.quantize(weight, spec, seen).noted("its bias is not corrected: no data came to it")
        if not seen.observers["channels"].amax.any():
            return self.rounding.quantize(weight, spec, seen).noted(
                "its bias is not corrected: all that came to it is zero"
            )
        mean = seen.observers["channels"].mean
        # Taken before the recipe, which may write over the target's sum.
        expected = weight.float() @ mean if seen.target is None else seen.target.mean
        found = self.rounding.quantize(weight, spec, seen)
        scaled = mean if found.pre_scale is None else mean * found.pre_scale[0]
        bias = expected - found.values @ scaled
        return Rounded(found.values, found.qparams, found.pre_scale, torch.as_tensor(bias), found.notes)
