"""torchao.core.config: `AOBaseConfig`, and configs as JSON."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar

import torch

import ao
from ao import Config, Spec

__all__ = ["ALLOWED_AO_MODULES", "AOBaseConfig", "config_from_dict", "config_to_dict"]

ALLOWED_AO_MODULES = {__name__.removesuffix(".core.config")}
"""Packages whose configs are read from JSON. Add your own to read the configs that it defines."""


class AOBaseConfig(abc.ABC):  # noqa: B024  nothing is asked of a user's config but a handler
    """What `quantize_` takes. A config of your own is a subclass with a handler (`register_quantize_module_handler`).

    The configs of this package have `to_ao`, and need no handler.
    """

    version: ClassVar[int] = 1
    registry: ClassVar[dict[str, type[AOBaseConfig]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        AOBaseConfig.registry[cls.__name__] = cls


class Translated(AOBaseConfig):
    """A config whose meaning is a config or a Spec of `ao`."""

    def to_ao(self) -> Config | Spec:
        """The same in `ao`."""
        raise NotImplementedError


def config_to_dict(config: AOBaseConfig | Config | Spec) -> dict[str, Any]:
    """A JSON-able dict of a config: of ours, or of a dataclass that is derived from `AOBaseConfig`."""
    if isinstance(config, (Config, Spec)):
        return config.to_dict()
    if not dataclasses.is_dataclass(config) or not isinstance(config, AOBaseConfig):
        raise TypeError(f"config_to_dict takes a dataclass derived from AOBaseConfig, got {config!r}")
    values = {f.name: _to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return {"_type": type(config).__name__, "_version": getattr(config, "version", 1), "_data": values}


def config_from_dict(data: Mapping[str, Any]) -> Any:
    """The inverse of `config_to_dict`. Raises ValueError for a class that is not known, or not imported."""
    if "_type" not in data:
        return ao.config_from_dict(data)
    cls = AOBaseConfig.registry.get(data["_type"])
    if cls is None:
        raise ValueError(f"unknown config {data['_type']!r}; import the module that defines it first")
    if not any(f"{cls.__module__}.".startswith(f"{package}.") for package in ALLOWED_AO_MODULES):
        raise ValueError(f"{data['_type']} of {cls.__module__} is not read from a file; add that to ALLOWED_AO_MODULES")
    return cls(**{name: _from_json(value) for name, value in data["_data"].items()})


def _to_json(value: Any) -> Any:
    if isinstance(value, AOBaseConfig):
        return config_to_dict(value)
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"_type": "torch.Tensor", "_data": value.tolist(), "_dtype": dtype}
    if isinstance(value, torch.dtype):
        return {"_type": "torch.dtype", "_data": str(value).removeprefix("torch.")}
    if isinstance(value, Enum):
        return {"_type": type(value).__name__, "_data": value.name}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"_type": type(value).__name__, "_data": {k: _to_json(v) for k, v in zip(value._fields, value)}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}  # a PerBlock takes either
        return {"_type": type(value).__name__, "_data": {k: _to_json(v) for k, v in lists.items()}}
    if isinstance(value, Mapping):
        return {k: _to_json(v) for k, v in value.items()}
    if isinstance(value, tuple):
        raise ValueError(f"config_to_dict: {value!r} would come back as a list; give a list")
    return [_to_json(v) for v in value] if isinstance(value, list) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    kind = value.get("_type")
    if kind is None:
        return {k: _from_json(v) for k, v in value.items()}
    if kind in AOBaseConfig.registry:
        return config_from_dict(value)
    if kind == "torch.dtype":
        return getattr(torch, value["_data"])
    if kind == "torch.Tensor":
        return torch.tensor(value["_data"], dtype=getattr(torch, value["_dtype"]))
    from .. import quantization
    from ..quantization.quantize_ import common, workflows

    cls: Any = next((vars(m)[kind] for m in (quantization, common, workflows) if kind in vars(m)), None)
    if cls is None:
        raise ValueError(f"config_from_dict: unknown {kind!r}")
    if isinstance(cls, type) and issubclass(cls, Enum):
        return cls[value["_data"]]
    return cls(**{k: _from_json(v) for k, v in value["_data"].items()})
