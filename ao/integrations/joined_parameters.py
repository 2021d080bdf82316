"""Parameters that transformers puts together from several of a checkpoint as it loads them: the experts of a mixture.

Its own operations do it, on quantized tensors: stacking and joining moves codes and scales, and rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..dtypes import Intx, QTensor


class Store(Protocol):
    """Where quantized tensors are stored."""

    def make(self, name: str, get: Callable[[str], Tensor], dtype: torch.dtype, shape: Any) -> Tensor:
        """The tensor called `name`. get: what is stored under a name. shape: None where it is not known."""


@dataclass
class Joined:
    """What a parameter of the model is made of.

    names: in the checkpoint, in the order in which transformers joins them.
    patterns: of each, the pattern of `converter` that it fits.
    converter: how they are joined; None for a parameter that is one tensor in the checkpoint too.
    """

    converter: WeightConverter | None = None
    names: list[str] = field(default_factory=list)
    patterns: list[str | None] = field(default_factory=list)

    def make(self, parameter: str, model: Any, store: Store, get: Callable[[str], Tensor]) -> Tensor:
        """The parameter called so in the model. get: what is stored under a name.

        Raises ValueError, with the names, for tensors that cannot be joined, or not to the parameter's shape.
        """
        place = model.get_parameter_or_buffer(parameter)
        if self.converter is None:
            return store.make(self.names[0], get, place.dtype, place.shape)
        made = alike([without_activation(store.make(name, get, place.dtype, None)) for name in self.names])
        collected: dict[str, Any] = {}
        for pattern, t in zip(self.patterns, made):
            collected.setdefault(str(pattern), []).append(t)
        patterns = {
            "source_patterns": self.converter.source_patterns,
            "target_patterns": self.converter.target_patterns,
        }
        try:
            for operation in self.converter.operations:
                collected = operation.convert(
                    collected,
                    **patterns,
                    full_layer_name=parameter,
                    config=model.config,
                    model=model,
                    missing_keys=None,
                )
            (joined,) = collected.values()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{parameter}: {self.names[0]} and {len(self.names) - 1} more cannot be joined as they are stored: {error}"
            ) from error
        if joined.shape != place.shape:
            raise ValueError(
                f"{parameter}: {self.names[0]} and {len(self.names) - 1} more make a tensor of shape {tuple(joined.shape)}, and "
                f"the model's is {tuple(place.shape)}"
            )
        return joined


def joined_parameters(names: Iterable[str], conversions: Sequence[Any], model: Any) -> dict[str, Joined]:
    """Full name of a parameter of the model -> what it is made of; without names that are of no part of this model.

    names: of the quantized parameters of a checkpoint. conversions: of transformers, for this model.
    """
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known = model.state_dict()
    found: dict[str, Joined] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            continue  # the loader reports it
        joined = found.setdefault(target, Joined(None if pattern is None else by_pattern[pattern]))
        joined.names.append(name)
        joined.patterns.append(pattern)
    return found


def without_activation(t: Tensor) -> Tensor:
    """The same weight, which quantizes no activation: experts do not."""
    if not isinstance(t, QTensor) or t.spec.act is None:
        return t
    fields = {name: f for name, f in t.fields().items() if name != "act_scale"}
    return replace(t.spec, act=None).wrap(fields, t.dtype, t.shape)


def alike(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors, with zero points in all integers where some have them: a tensor whose zero points are all in the middle
    stores none."""
    specs = [t.spec for t in tensors if isinstance(t, QTensor) and isinstance(t.spec, Intx)]
    wanted = next((spec for spec in specs if not spec.symmetric), None)
    if wanted is None or all(spec == wanted for spec in specs):
        return tensors
    return [_with_zero_points(t, wanted) for t in tensors]


def _with_zero_points(t: Tensor, wanted: Intx) -> Tensor:
    if not isinstance(t, QTensor) or not isinstance(t.spec, Intx) or not t.spec.symmetric:
        return t
    spec = replace(t.spec, symmetric=False, signed=wanted.signed)
    fields = t.fields()
    unsigned = t.spec.signed and not wanted.signed
    if unsigned and spec.bits == 8:
        fields["qdata"] = fields["qdata"].view(torch.uint8) ^ 128
    zero = torch.full_like(fields["scale"], 2 ** (spec.bits - 1) if unsigned else 0)
    fields["zero_point"] = zero.to(torch.int8 if wanted.signed else torch.uint8)
    return spec.wrap(fields, t.dtype, t.shape)
