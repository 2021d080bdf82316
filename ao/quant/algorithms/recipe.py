"""`Recipe`: how the codes and qparams of a weight are found, where round-to-nearest is not good enough.

A recipe knows Specs, not formats: it asks a Spec for qparams (`choose_qparams`) and for what a number becomes under given
ones (`round`). What it returns is stored by `encode`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...dtypes import QTensor, Spec
from ..calibration.statistics import Statistics


@dataclass
class Rounded:
    """What a recipe makes of a weight of shape (N, K), or of any shape for recipes that need no data.

    values: the dequantized weight, float32; of `weight / pre_scale` if there is one.
    qparams: of which `spec.round(values, **qparams)` is `values` again.
    pre_scale: (1, K), what the activation is multiplied by; None for 1.
    bias: (N,), what is to be added to the layer's bias; None for nothing.
    notes: what the user should know, such as a fallback.
    """

    values: Tensor
    qparams: dict[str, Tensor]
    pre_scale: Tensor | None = None
    bias: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    def noted(self, note: str) -> Rounded:
        """The same with one more note."""
        return replace(self, notes=[*self.notes, note])

    def scaled(self, pre_scale: Tensor) -> Rounded:
        """The same, of a weight that was divided by `pre_scale` (K,) beforehand."""
        before = 1.0 if self.pre_scale is None else self.pre_scale
        return replace(self, pre_scale=(pre_scale * before).reshape(1, -1))


def scaled_statistics(seen: Statistics, factor: Tensor) -> Statistics:
    """What would have been seen of an input that is multiplied by `factor` (K,)."""
    made = Statistics(calls=seen.calls)
    for name, observer in seen.observers.items():
        if hasattr(observer, "scaled"):
            made.observers[name] = observer.scaled(factor)
    made.target = None if seen.target is None else seen.target.scaled(factor)
    return made


@dataclass(frozen=True)
class Recipe:
    """How to quantize a weight. A frozen dataclass made of literals, and of other recipes. Configs that hold one defined
    elsewhere are written and read as all are, where its module has been imported."""

    observes: ClassVar[frozenset[str]] = frozenset()
    """What it needs to know of the layer's input: names of `statistics.OBSERVERS`. Only `nn.Linear` layers have that."""
    name: ClassVar[str]
    """What `algorithm=` calls it."""
    prunes: ClassVar[bool] = False
    """Whether it makes zeros, so that a format which leaves out zeros takes what it makes of any weight."""

    @functools.cached_property
    def needs(self) -> frozenset[str]:
        """What it and the recipes it is made of need to know of the layer's input."""
        rounding = getattr(self, "rounding", None)
        return self.observes if rounding is None else self.observes | rounding.needs

    @functools.cached_property
    def label(self) -> str:
        """Its name, with those of the recipes it is made of."""
        rounding = getattr(self, "rounding", None)
        return self.name if rounding is None or rounding.name == "rtn" else f"{self.name}+{rounding.label}"

    @property
    def scales(self) -> bool:
        """Whether it may give a `pre_scale`."""
        rounding = getattr(self, "rounding", None)
        return rounding is not None and rounding.scales

    @property
    def wants_target(self) -> bool:
        """Whether it makes use of the original model's outputs, where `quantize_` can give them."""
        return False

    def check(self, spec: Spec, shape: Sequence[int]) -> None:
        """Raise ValueError where this recipe cannot serve a weight of `shape` in this format."""

    def quantize(self, weight: Tensor, spec: Spec, seen: Statistics | None) -> Rounded:
        """Quantize `weight`, of any floating-point dtype. seen: has at least what `needs` says."""
        raise NotImplementedError


@dataclass(frozen=True)
class RoundToNearest(Recipe):
    """The Spec's own rule."""

    name: ClassVar[str] = "rtn"

    def quantize(self, weight: Tensor, spec: Spec, seen: Statistics | None) -> Rounded:
        weight = weight.float()
        qparams = spec.choose_qparams(weight, spec.grid(weight.shape))
        return Rounded(spec.round(weight, **qparams), qparams)


def assemble(rounded: Rounded, spec: Spec, dtype: torch.dtype, act_scale: Tensor | None) -> QTensor:
    """The QTensor of what a recipe found, which dequantizes to `dtype`."""
    fields = spec.encode(rounded.values, **rounded.qparams)
    common = {"pre_scale": rounded.pre_scale, "act_scale": act_scale}
    return spec.wrap(fields, dtype, rounded.values.shape, **common)
