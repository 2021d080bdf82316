"""What a name of a format stands for: `read_format("int4-g128+gptq")` is a config."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..dtypes import Spec
from . import sparse_presets  # noqa: F401  the configs are known once they are defined
from .algorithms.recipe import Recipe
from .config import ENUMS, VALUES, Config, ModelConfig, SpecConfig
from .format_names import ALIASES, FORMATS, PLAIN, split_recipe
from .format_syntax import Parameter, problem_of_call


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
        config: Any = _made(config_classes()[_plain(head)], **(parameters or {}))
    else:
        try:
            config = _value(ast.parse(expression, mode="eval").body)
        except (SyntaxError, ValueError, TypeError) as error:
            if "(" in head:
                raise ValueError(f"{who}: format {name!r}: {error}") from None
            raise ValueError(
                f"{who}: unknown format {name!r}{_near(head)}: give one of {', '.join(FORMATS)}, the name of a config such as "
                f"'int8_weight_only', or an expression such as 'Int4WeightOnlyConfig(group_size=64)'"
            ) from None
        if not isinstance(config, (Config, Spec)):
            raise ValueError(f"{who}: the format {name!r} makes {config!r}, which is no config and no Spec")
        if parameters:
            config = _made(
                type(config), **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | dict(parameters)
            )
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


def _made(cls: type, *args: Any, **keywords: Any) -> Any:
    """`cls` of these arguments. Raises TypeError, which names the parameter that is wrong."""
    if dataclasses.is_dataclass(cls):
        parameters = [
            Parameter(p.name, p.default is p.empty, p.kind is not p.KEYWORD_ONLY)
            for p in inspect.signature(cls).parameters.values()
        ]
        problem = problem_of_call(cls.__name__, parameters, len(args), keywords)
        if problem:
            raise TypeError(problem)
    return cls(*args, **keywords)


def _named() -> dict[str, Spec]:
    """The Specs that are public by a name of their own, such as NF4."""
    return {name: spec for spec, name in Spec.named.items()}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        function = _value(node.func) if isinstance(node.func, ast.Name) else None
        if not isinstance(function, type):
            raise ValueError(f"{ast.unparse(node.func)} cannot be called here")
        keywords = {keyword.arg: _value(keyword.value) for keyword in node.keywords if keyword.arg is not None}
        return _made(function, *map(_value, node.args), **keywords)
    if isinstance(node, ast.Name):
        known = {**Config.registry, **Spec.registry, **VALUES, **ENUMS, **_named()}
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
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is neither a literal nor a name of ao or torch") from None
