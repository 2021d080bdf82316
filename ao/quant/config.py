"""What a config is: it says what the weight becomes, by which recipe, and what the activation becomes, and is written to JSON
and back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..dtypes import Layout, Spec
from .algorithms.awq import AWQ
from .algorithms.bias_correction import BiasCorrection
from .algorithms.clip import Clip
from .algorithms.gptq import GPTQ
from .algorithms.hqq import HQQ
from .algorithms.pruning import Magnitude, Wanda
from .algorithms.recipe import Recipe, RoundToNearest
from .algorithms.smoothquant import SmoothQuant
from .algorithms.sparsegpt import SparseGPT
from .calibration.observers import RangeMethod
from .granularity import Granularity, MappingType, ZeroPointDomain
from .report import Report

RECIPES: tuple[type[Recipe], ...] = (
    *(RoundToNearest, Clip, HQQ, GPTQ, AWQ, SmoothQuant, BiasCorrection),
    *(Magnitude, Wanda, SparseGPT),
)
"""The recipes that have a name."""


@functools.cache
def parse_recipe(algorithm: str, who: str = "algorithm") -> Recipe:
    """A recipe by name ("rtn", "clip", "hqq", "gptq", "awq", "smoothquant", "bias_correction"), or several of them joined by "+"
    ("awq+gptq": scale the channels as AWQ does, round as GPTQ does).

    Raises ValueError for a name that is none, and for two recipes that cannot be joined.
    """
    named = {cls.name: cls for cls in RECIPES}
    parts = algorithm.lower().split("+")
    unknown = [part for part in parts if part not in named]
    if unknown:
        raise ValueError(f"{who} must be among {', '.join(sorted(named))}, or several joined by '+'; got {algorithm!r}")
    *outer, last = (named[part] for part in parts)
    recipe = last()
    for cls in reversed(outer):
        if "rounding" not in cls.__dataclass_fields__:
            raise ValueError(
                f"{who}: {cls.name!r} decides the codes, and must come last; in {algorithm!r} it is followed by "
                f"{type(recipe).name!r}"
            )
        recipe = cls(rounding=recipe)  # type: ignore[call-arg]
    return recipe


Allowed = Mapping[str, tuple[Any, ...]]
"""What parameters of a config may be, by name: values, and types of values. An `int` is the size of a group: 1 or more, or -1 for
the whole row. A `tuple` is a pair of the others, (of the activation, of the weight)."""


@dataclass(frozen=True)
class Config:
    """What `quantize_` does to the weight of a layer, and what that layer does to its input.

    algorithm: how the codes and qparams are found: "rtn" (round to nearest), "clip" (the best cut of each block's
        range, no data), "hqq" (better qparams still, no data), or with
        calibration "gptq", "awq", "smoothquant", "bias_correction", joined by "+" ("awq+gptq"), or a Recipe such as
        `GPTQ(damping=0.1)`.
    set_inductor_config: accepted because other libraries have it. `ao` never changes process-wide compiler settings.
    unsupported: what to do with a layer whose shape the format does not take: "raise", or "skip" and say so in the report.
    """

    algorithm: str | Recipe = field(default="rtn", kw_only=True)
    set_inductor_config: bool = field(default=False, kw_only=True)
    unsupported: Literal["raise", "skip"] = field(default="raise", kw_only=True)

    registry: ClassVar[dict[str, type[Config]]] = {}
    allowed: ClassVar[Allowed] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Config.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        self.recipe  # noqa: B018  which raises for a name that is none
        for name, allowed in self.allowed.items():
            value, is_size, is_pair = getattr(self, name), int in allowed, tuple in allowed
            kinds = tuple(a for a in allowed if isinstance(a, type) and a is not tuple)
            each = value if is_pair and isinstance(value, (tuple, list)) else (value, value)
            fits = len(each) == 2 and all(v in allowed or isinstance(v, kinds) for v in each)
            if fits and is_size and value is not None:
                fits = not isinstance(value, bool) and (value >= 1 or value == -1)
            if not fits:
                shown = ", ".join(a.__name__ if isinstance(a, type) else str(a) for a in allowed if a is not tuple)
                shown += ", or a pair of them for (activation, weight)" if is_pair else ""
                what = "a number such as 128, or -1 for the whole row" if is_size else f"one of {shown}"
                raise ValueError(f"{type(self).__name__}: {name} must be {what}, got {value!r}")

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The recipe that `algorithm` names, or is. Raises ValueError for a name that is none, TypeError for anything else."""
        who, algorithm = f"{type(self).__name__}: algorithm", self.algorithm
        if isinstance(algorithm, str):
            return parse_recipe(algorithm, who)
        if not isinstance(algorithm, Recipe):
            raise TypeError(f"{who} must be a name such as 'gptq' or a Recipe such as GPTQ(), got {algorithm!r}")
        return algorithm

    def with_recipe(self, algorithm: str | Recipe) -> Config:
        """The same config with another algorithm. Raises ValueError for a name that is none."""
        return dataclasses.replace(self, algorithm=algorithm)

    @property
    def quant_method(self) -> Any:
        """What transformers asks of its own configs. Raises AttributeError, which says what to give it."""
        name = type(self).__name__
        raise AttributeError(
            f"{name} is no config of transformers: import ao.integrations.transformers before from_pretrained, which then takes "
            f"quantization_config={name}(...), or give AoConfig({name}(...)) of that module"
        )

    def weight(self, shape: tuple[int, ...]) -> Spec:
        """The Spec of a weight of `shape`."""
        raise NotImplementedError

    def act(self) -> Spec | None:
        """The Spec of the activation, or None to leave it in floating point."""
        return None

    def act_scale(self) -> float | None:
        """The scale of a static activation, or None for one that is dynamic or found by calibration."""
        return None

    def act_range(self) -> RangeMethod | None:
        """How calibration finds the scale of a static activation, or None where there is nothing to find."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `Config.from_dict` reads. Values equal to the default are left out."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        return {"type": type(self).__name__, **{k: to_json(v) for k, v in values.items() if v != usual[k]}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Config | Spec:
        """The config, or the Spec, that `to_dict` wrote. Raises ValueError for what this version does not know."""
        name = data.get("type", "")
        if name in Spec.registry:
            return Spec.from_dict(data)
        cls = Config.registry.get(name)
        if cls is None:
            raise ValueError(f"unknown config type {name!r}; this version of ao knows {sorted(Config.registry)}")
        values = {k: from_json(v) for k, v in data.items() if k != "type"}
        unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"{name} has no parameter {sorted(unknown)}; a newer version of ao may have written this")
        return cls(**values)


_BASES = (Granularity, Layout, Recipe)

VALUES: dict[str, type] = {c.__name__: c for base in (Granularity, Layout) for c in (base, *base.__subclasses__())}
VALUES |= {c.__name__: c for c in RECIPES}
"""What a config of this library is made of, beside numbers and strings."""

ENUMS: dict[str, type[Enum]] = {e.__name__: e for e in (MappingType, ZeroPointDomain)}


def to_json(value: Any) -> Any:
    if isinstance(value, (Spec, Config)):
        return value.to_dict()
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Enum):
        return {"enum": type(value).__name__, "name": value.name}
    if VALUES.get(type(value).__name__) is type(value):
        return {"value": type(value).__name__, **{k: to_json(v) for k, v in vars(value).items()}}
    if isinstance(value, _BASES):
        fields = {k: to_json(v) for k, v in vars(value).items()}
        return {"module": type(value).__module__, "class": type(value).__qualname__, "fields": fields}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, Mapping):
        return {"map": [[k, to_json(v)] for k, v in value.items()]}
    return value


def from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, Mapping):
        return value
    if "class" in value:
        return _class_of(value["module"], value["class"])(**{k: from_json(v) for k, v in value["fields"].items()})
    if "type" in value:
        return Config.from_dict(value)
    if "value" in value:
        if value["value"] not in VALUES:
            raise ValueError(f"unknown {value['value']!r} in a config; this version of ao knows {sorted(VALUES)}")
        return VALUES[value["value"]](**{k: from_json(v) for k, v in value.items() if k != "value"})
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    if "enum" in value:
        return ENUMS[value["enum"]][value["name"]]
    if "map" in value:
        return {k: from_json(v) for k, v in value["map"]}
    raise ValueError(f"cannot read {value!r} in a config; a newer version of ao may have written this")


def _class_of(module: str, name: str) -> type:
    """A Recipe, Granularity or Layout that is defined elsewhere. Nothing is imported for a file's sake."""
    waiting: list[type] = list(_BASES)
    while waiting:
        cls = waiting.pop()
        if (cls.__module__, cls.__qualname__) == (module, name):
            return cls
        waiting += cls.__subclasses__()
    raise ValueError(f"a config has {name} of {module}, which is not imported; import {module} first")


def config_to_dict(config: Config | Spec) -> dict[str, Any]:
    """A JSON-able dict of a config or a Spec."""
    return config.to_dict()


def config_from_dict(data: Mapping[str, Any]) -> Config | Spec:
    """The inverse of `config_to_dict`. Raises ValueError for what this version does not know."""
    return Config.from_dict(data)


@dataclass(frozen=True)
class SpecConfig(Config):
    """Any Spec, with an algorithm: `SpecConfig(Intx(3, (1, 64)), algorithm="gptq")`.

    Raises TypeError for what is no Spec.
    """

    spec: Spec

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.spec, Spec):
            raise TypeError(f"SpecConfig: spec must be a Spec such as Intx(bits=3), got {self.spec!r}")

    def weight(self, shape: tuple[int, ...]) -> Spec:
        return self.spec


@dataclass(frozen=True)
class ModelConfig(Config):
    """What `quantize_` does to a model other than to quantize its weights: it prepares the model for training, or ends that.
    It cannot be one of the rules of `FqnToConfig`."""

    def apply(self, model: nn.Module, filter_fn: Any, batches: Sequence[Any] | None) -> Report:
        """What `quantize_` does in place of quantizing."""
        raise NotImplementedError
