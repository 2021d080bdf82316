"""torchao.float8.float8_linear_utils: from a plain model to one that trains with float8 products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import nn

from ao.train import Float8LinearConfig, Float8LinearRecipeName, auto_module_filter
from ao.train import convert_to_float8_training as convert

__all__ = ["convert_to_float8_training", "swap_linear_layers"]

Filter = Callable[[nn.Module, str], bool]


def convert_to_float8_training(
    module: nn.Module, *, module_filter_fn: Filter | None = None, config: Float8LinearConfig | None = None
) -> nn.Module:
    """`ao.train.convert_to_float8_training`, to layers of `Float8Linear`.

    A model without a layer to convert stays as it is. Where the sizes of a layer are no multiples of 16, products are padded, as
    with pad_inner_dim=True. Raises AssertionError for a linear layer with layers in it.
    """
    from .float8_linear import Float8Linear

    config = config or Float8LinearConfig()
    if isinstance(module, nn.Linear) and list(module.children()):
        raise AssertionError(
            "Does not support a root nn.Linear with children: convert the children, or the module around it"
        )

    def takes(layer: nn.Module, name: str) -> bool:
        return type(layer) is nn.Linear and (module_filter_fn is None or module_filter_fn(layer, name))

    layers = [layer for name, layer in module.named_modules() if takes(layer, name)]
    if layers:
        ragged = any(size % 16 for layer in layers for size in (layer.in_features, layer.out_features))
        convert(
            module, module_filter_fn=takes, config=dataclasses.replace(config, pad_inner_dim=True) if ragged else config
        )
    for layer in layers:
        layer.__class__ = Float8Linear
        layer.config = config
    return module


def swap_linear_layers(
    module: nn.Module,
    from_float_func: Callable[[nn.Linear], nn.Linear],
    *,
    module_filter_fn: Filter | None = None,
) -> nn.Module:
    """Put `from_float_func(layer)` in the place of each linear layer that the filter takes, also of the module itself."""
    if isinstance(module, nn.Linear) and (module_filter_fn is None or module_filter_fn(module, "")):
        return from_float_func(module)
    for name, layer in list(module.named_modules()):
        if name and isinstance(layer, nn.Linear) and (module_filter_fn is None or module_filter_fn(layer, name)):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, from_float_func(layer))
    return module


def _auto_filter_for_recipe(recipe: Float8LinearRecipeName | str, filter_fqns: Sequence[str]) -> Filter:
    """`ao.train.auto_module_filter`."""
    name = recipe.value if isinstance(recipe, Float8LinearRecipeName) else recipe
    known = [each.value for each in Float8LinearRecipeName]
    if name not in known:
        raise ValueError(f"_auto_filter_for_recipe: recipe must be one of {', '.join(known)}, got {recipe!r}")
    if name == "rowwise_with_gw_hp":
        raise NotImplementedError("_auto_filter_for_recipe: rowwise_with_gw_hp was not measured; use 'rowwise'")
    return auto_module_filter(name, filter_fqns)


def _auto_filter_for_rowwise(mod: nn.Module, fqn: str, filter_fqns: Sequence[str]) -> bool:
    return auto_module_filter("rowwise", filter_fqns)(mod, fqn)


def _auto_filter_for_tensorwise(mod: nn.Module, fqn: str, filter_fqns: Sequence[str]) -> bool:
    return auto_module_filter("tensorwise", filter_fqns)(mod, fqn)
