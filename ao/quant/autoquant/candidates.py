"""The formats that `autoquant` tries: configs, Specs, and named sets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from ...dtypes import Spec
from ...matmul import has_float8
from ..config import Config
from ..granularity import PerRow, PerTensor
from ..presets import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)
from ..rules import FqnToConfig

Candidates = str | Config | Spec | Sequence[str | Config | Spec]

DEFAULT_AUTOQUANT_CLASS_LIST: list[Config | Spec] = [Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()]
"""The set "default": int8, which costs little accuracy."""

DEFAULT_INT4_AUTOQUANT_CLASS_LIST: list[Config | Spec] = [*DEFAULT_AUTOQUANT_CLASS_LIST, Int4WeightOnlyConfig()]
"""The set "int4": the default ones, and int4 weights."""

OTHER_AUTOQUANT_CLASS_LIST: list[Config | Spec] = [
    Float8WeightOnlyConfig(),
    Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()),
]
"""The set "float8"."""

ALL_AUTOQUANT_CLASS_LIST: list[Config | Spec] = [*DEFAULT_INT4_AUTOQUANT_CLASS_LIST, *OTHER_AUTOQUANT_CLASS_LIST]
"""The set "all"."""

SETS = {
    "default": DEFAULT_AUTOQUANT_CLASS_LIST,
    "int4": DEFAULT_INT4_AUTOQUANT_CLASS_LIST,
    "float8": OTHER_AUTOQUANT_CLASS_LIST,
    "all": ALL_AUTOQUANT_CLASS_LIST,
}


def check_candidates(candidates: Candidates) -> list[str | Config | Spec]:
    """The candidates as a list. Raises ValueError for a name of no set, TypeError for what is no config."""
    asked = [candidates] if isinstance(candidates, (str, Config, Spec)) else list(candidates)
    for candidate in asked:
        _check(candidate)
    return asked


def candidates_on(asked: Sequence[str | Config | Spec], device: torch.device) -> dict[str, Config | Spec]:
    """Label -> config, for what is worth a try on a device. Raises ValueError when nothing is."""
    named: dict[str, Config | Spec] = {}
    for candidate in asked:
        if isinstance(candidate, str):
            named |= {label(c): c for c in SETS[candidate] if _has_arithmetic(c, device)}
        else:
            named[label(candidate)] = candidate
    if not named:
        raise ValueError(f"autoquant: candidates={asked!r} has no format that {device} has arithmetic for")
    return named


def label(config: Config | Spec) -> str:
    """A config in a few words: its name, and what differs from its defaults."""
    if isinstance(config, Spec):
        return repr(config)
    common = {f.name for f in fields(Config)}
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in common}
    usual = {f.name: f.default for f in fields(config)}
    shown = [f"{k}={v!r}" for k, v in values.items() if v != usual[k]]
    return type(config).__name__.removesuffix("Config") + (f"({', '.join(shown)})" if shown else "")


def _check(candidate: Any) -> None:
    if isinstance(candidate, str) and candidate not in SETS:
        raise ValueError(
            f"autoquant: candidates must be configs, Specs or names of {', '.join(SETS)}, got {candidate!r}"
        )
    if isinstance(candidate, FqnToConfig) or not isinstance(candidate, (str, Config, Spec)):
        raise TypeError(
            f"autoquant: candidates must be configs such as Int8WeightOnlyConfig(), Specs, or names of sets, got {candidate!r}"
            + ("; call it first" if isinstance(candidate, type) else "")
        )


def _has_arithmetic(config: Config | Spec, device: torch.device) -> bool:
    """Whether a format of a named set is worth trying on a device: float8 is not, where it can only be emulated."""
    if not isinstance(config, (Float8WeightOnlyConfig, Float8DynamicActivationFloat8WeightConfig)):
        return True
    if device.type != "cuda":
        return config.act() is None
    return has_float8(device)
