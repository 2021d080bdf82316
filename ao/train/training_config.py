"""From a plain model to one that trains in low precision, layer by layer, and what all configs of that have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from torch import nn

from ao.dtypes import QTensor, Spec, blank
from ao.matmul import layer_class

from .gather import CastOnGather
from .linear import LowPrecisionLinear
from .placement import is_dtensor
from .recipe import Recipe
from .state_dict import plain_in_state_dict, rounded_to_nearest

Filter = Callable[[nn.Module, str], bool]


@runtime_checkable
class RecipeConfig(Protocol):
    """A config that says how the products of a linear layer are computed."""

    def recipe(self) -> Recipe:
        """The recipe of the layers."""


@runtime_checkable
class WeightConfig(Protocol):
    """A config that says how the trained weights of a linear layer are stored."""

    def weight(self) -> Spec:
        """The Spec of the weights."""


LayerConfig = RecipeConfig | WeightConfig
"""What says how layers train."""


class TrainingConfig:
    """A config of low-precision training: `convert_to_low_precision_training` and `quantize_` take it.

    One of your own is a subclass with `recipe()`, which returns a Recipe, or `weight()`, which returns the Spec that the
    weights are stored in.
    """

    def convert_layers(self, model: nn.Module, filter_fn: Filter | None = None) -> list[str]:
        """Let the layers of `model` that the filter takes train by this config, in place. Returns their names.

        Raises what `convert_to_low_precision_training` raises.
        """
        return convert_layers(model, self, filter_fn)  # type: ignore[arg-type]


def convert_layers(module: nn.Module, config: LayerConfig, module_filter_fn: Filter | None = None) -> list[str]:
    """`convert_to_low_precision_training`, which returns the names of the layers."""
    if not isinstance(config, (RecipeConfig, WeightConfig)) or isinstance(config, type):
        raise TypeError(
            f"a training config is Float8LinearConfig(), Int8MixedPrecisionTrainingConfig() or the like, got {config!r}"
        )
    layers = []
    for name, layer in _linears(module):
        if module_filter_fn is None or module_filter_fn(layer, name):
            layers.append((name, layer))
    if not layers:
        raise ValueError(
            "no layer to convert: the model has no nn.Linear"
            + ("" if module_filter_fn is None else " that module_filter_fn takes")
        )
    recipe = config.recipe() if isinstance(config, RecipeConfig) else None
    spec = recipe.gather if recipe else config.weight()  # type: ignore[union-attr]
    holders = _holders(module)
    for name, layer in layers:
        _check(name or "the module", layer, recipe, spec, holders)
    for _, layer in layers:
        if recipe is not None:
            layer.__class__ = LowPrecisionLinear
            layer.recipe = recipe  # type: ignore[assignment]
        if spec is not None:
            weight = layer.weight.detach()
            new = rounded_to_nearest(weight, spec) if recipe is None else CastOnGather(weight, spec)
            layer.weight = nn.Parameter(new, requires_grad=layer.weight.requires_grad)
            if recipe is None:
                plain_in_state_dict(layer)
    return [name for name, _ in layers]


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Layers that compute `F.linear` and nothing else; a subclass may do more."""
    for name, layer in module.named_modules():
        if layer_class(layer) in (nn.Linear, LowPrecisionLinear) or type(layer).__name__ == "FSDPLinear":
            yield name, layer


def _holders(module: nn.Module) -> dict[int, list[str]]:
    holders: dict[int, list[str]] = {}
    for prefix, layer in module.named_modules():
        for name, p in layer._parameters.items():
            if p is not None:
                holders.setdefault(id(p), []).append(f"{prefix}.{name}" if prefix else name)
    return holders


def _check(
    name: str, layer: nn.Linear, recipe: Recipe | None, spec: Spec | None, holders: dict[int, list[str]]
) -> None:
    weight = layer.weight
    if type(layer) is LowPrecisionLinear:
        raise ValueError(f"{name} trains in low precision already; call convert_from_low_precision_training first")
    if layer_class(layer) is not nn.Linear:
        raise ValueError(f"{name} is a {type(layer).__name__}; convert the model before fully_shard")
    if isinstance(weight, QTensor) or (is_dtensor(weight) and isinstance(weight._local_tensor, QTensor)):  # type: ignore[attr-defined]
        raise ValueError(f"{name}: the weight is quantized already; call ao.dequantize_ first, or leave it out")
    n, k = weight.shape
    if recipe is not None and recipe.uses_float8 and not recipe.pad and (n % 16 or k % 16):
        raise ValueError(
            f"{name}: float8 products need multiples of 16, and the weight has shape {(n, k)}; leave the layer out with "
            "module_filter_fn, or use pad_inner_dim=True"
        )
    try:
        if recipe is not None and recipe.pad and not is_dtensor(weight):
            for each, shape in ((recipe.output.b, (n, k)), (recipe.grad_input.b, (k, n))):
                _ = None if each is None else blank(each, shape)
        if spec is not None:
            blank(spec, (n, k))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if spec is None:
        return
    if is_dtensor(weight):
        raise ValueError(f"{name}: the weight is a DTensor already; convert the model before it is sharded")
    if len(holders[id(weight)]) > 1:
        raise ValueError(
            f"{name}: the weight is tied ({', '.join(holders[id(weight)])}), and would be untied; leave the layer out with "
            "module_filter_fn"
        )
