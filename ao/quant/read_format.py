"""What a name of a format stands for: `read_format("int4-g128+gptq")` is a config."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import torch

from ..dtypes import FP6, MXFP4, MXFP6, MXFP8, MXINT8, NF4, NVFP4, Spec
from .algorithms.recipe import Recipe
from .config import ENUMS, VALUES, Config, ModelConfig, SpecConfig
from .format_names import ALIASES, FORMATS, PLAIN, split_recipe
from .presets import Int4WeightOnlyConfig  # noqa: F401  the configs are known once they are defined


def read_format(name: str, parameters: Mapping[str, Any] | None = None, who: str = "quantize_") -> Config | Spec:
    """The config or Spec called `name`.

    name: one of `ao formats` ("int4-g128"), the name of a config with or without capitals, underscores and "Config"
        ("int4_weight_only"), what other libraries call it ("int4", "int8wo", "qint8"), or an expression such as
        "Intx(bits=3, block=(1, 64))" over the public names of `ao` and the dtypes of torch, with literals as arguments.
        "+" and recipes may follow: "int4-g128+awq+gptq".
    who: what the message of an error begins with.
    parameters: of the config, in place of those that the name stands for.

    Raises ValueError for another name, with those that are near, and for one of what is not quantized ("bf16").
    """
    head, recipe = split_recipe(name)
    expression = _expression(head)
    if expression is None:
        config: Any = config_classes()[_plain(head)](**(parameters or {}))
    else:
        try:
            config = _value(ast.parse(expression, mode="eval").body)
        except (SyntaxError, ValueError, TypeError) as error:
            raise ValueError(
                f"{who}: unknown format {name!r}{_near(head)}: give one of {', '.join(FORMATS)}, the name of a config such as "
                f"'int8_weight_only', or an expression such as 'Int4WeightOnlyConfig(group_size=64)'"
                + (f" ({error})" if "(" in head else "")
            ) from None
        if not isinstance(config, (Config, Spec)):
            raise ValueError(f"{who}: the format {name!r} makes {config!r}, which is no config and no Spec")
        if parameters:
            config = dataclasses.replace(config, **parameters)
    return with_recipe(config, recipe) if recipe else config


def with_recipe(config: Config | Spec, recipe: str | Recipe) -> Config:
    """The same config, or Spec, or rules, with a recipe by name. Raises ValueError for a name that is none."""
    return SpecConfig(config, algorithm=recipe) if isinstance(config, Spec) else config.with_recipe(recipe)


def config_classes() -> dict[str, type[Config]]:
    """The configs that say how to quantize a weight, by their names without capitals, underscores and "Config"."""
    kinds = {name: cls for name, cls in Config.registry.items() if name not in ("FqnToConfig", "SpecConfig")}
    return {_plain(name): cls for name, cls in kinds.items() if not issubclass(cls, ModelConfig)}


def _plain(name: str) -> str:
    return name.lower().replace("_", "").removesuffix("config")


def _expression(name: str) -> str | None:
    """What a name stands for; None for the name of a config."""
    name = name if "(" in name else ALIASES.get(name.lower(), name)
    if name.lower() in FORMATS:
        return FORMATS[name.lower()].expression
    return None if _plain(name) in config_classes() else name


def _near(name: str) -> str:
    if name in PLAIN:
        return ", since nothing is quantized by it"
    near = difflib.get_close_matches(name, [*FORMATS, *ALIASES], 2)
    return f", and near to {' and '.join(near)}" if near else ""


_NAMED = {"FP6": FP6, "MXFP4": MXFP4, "MXFP6": MXFP6, "MXFP8": MXFP8, "MXINT8": MXINT8, "NF4": NF4, "NVFP4": NVFP4}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        function = _value(node.func)
        if not isinstance(function, type):
            raise ValueError(f"{ast.unparse(node.func)} cannot be called here")
        keywords = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg is not None}
        return function(*map(_value, node.args), **keywords)
    if isinstance(node, ast.Name):
        known = {**Config.registry, **Spec.registry, **VALUES, **ENUMS, **_NAMED}
        if node.id not in known:
            raise ValueError(f"ao has no {node.id} that says how to quantize")
        return known[node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = torch if node.value.id == "torch" else _value(node.value)
        value = getattr(owner, node.attr, None)
        if value is None:
            raise ValueError(f"there is no {ast.unparse(node)}")
        return value
    if isinstance(node, ast.Tuple):
        return tuple(map(_value, node.elts))
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(k): _value(v) for k, v in zip(node.keys, node.values) if k is not None}
    return ast.literal_eval(node)
