"""From a plain model to one that trains in low precision, and back, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from ao.dtypes import QTensor, Spec, blank
from ao.matmul import layer_class

from .float8_config import Float8LinearConfig
from .gather import CastOnGather, unwrapped
from .linear import LowPrecisionLinear
from .placement import is_dtensor
from .recipe import Recipe
from .state_dict import as_it_is_in_state_dict, plain_in_state_dict, rounded_to_nearest

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


TrainingConfig = RecipeConfig | WeightConfig


def convert_to_float8_training(
    module: nn.Module, *, module_filter_fn: Filter | None = None, config: Float8LinearConfig | None = None
) -> nn.Module:
    """Let the linear layers of a model train with float8 products. See `convert_to_low_precision_training`.

    config: a `Float8LinearConfig`; None is the recipe "tensorwise".
    """
    return convert_to_low_precision_training(module, config or Float8LinearConfig(), module_filter_fn=module_filter_fn)


def convert_to_low_precision_training(
    module: nn.Module, config: TrainingConfig, *, module_filter_fn: Filter | None = None
) -> nn.Module:
    """Let the linear layers of a model train by a config, in place; the model is returned.

    module: any module, also a single `nn.Linear`, also on the meta device. Layers stay the objects that they are, with their
        hooks, parameters and state dict. Convert before tensor parallelism, `fully_shard` and `torch.compile`, and, where
        weights change (int8 weight-only, gathers in low precision), before the optimizer is made.
    config: `Float8LinearConfig`, `Int8MixedPrecisionTrainingConfig`, `Int8WeightOnlyQuantizedTrainingConfig`,
        `BitNetTrainingConfig`.
    module_filter_fn: `(module, fully qualified name) -> bool`, which layers to convert, of those whose class is `nn.Linear`
        itself: a subclass may do more than the product. Small layers get slower: `auto_module_filter` leaves them out.

    Every layer is checked before the first one changes. Raises ValueError where no layer is left, where a layer was converted
    or quantized before, where a shape does not fit (float8 takes multiples of 16 unless pad_inner_dim), and for tied weights
    where weights change; TypeError for what is no such config.
    """
    convert_layers(module, config, module_filter_fn)
    return module


def convert_layers(module: nn.Module, config: TrainingConfig, module_filter_fn: Filter | None = None) -> list[str]:
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


def convert_from_low_precision_training(module: nn.Module) -> nn.Module:
    """Make plain `nn.Linear` layers of those that were converted, in place; the model is returned.

    Weights that are int8 and trained become plain ones of their dtype, in new parameters. Frozen ones stay quantized.
    """
    done: dict[int, nn.Parameter] = {}
    for layer in module.modules():
        weight = layer._parameters.get("weight")
        if isinstance(layer, nn.Linear) and weight is not None:
            plain = unwrapped(weight)
            trained = isinstance(weight, QTensor) and weight.requires_grad
            if trained or plain is not weight:
                if id(weight) not in done:
                    values = weight.detach().dequantize() if trained else plain.detach()
                    done[id(weight)] = nn.Parameter(values, requires_grad=weight.requires_grad)
                layer._parameters["weight"] = done[id(weight)]
        as_it_is_in_state_dict(layer)
        if type(layer) is LowPrecisionLinear:
            del layer.recipe
            layer.__class__ = nn.Linear  # type: ignore[assignment]
    return module


def auto_module_filter(recipe: str = "tensorwise", exclude: Sequence[str] = ()) -> Filter:
    """A `module_filter_fn` that leaves out the layers which would get slower, or do not fit.

    recipe: "tensorwise", "rowwise", "rowwise_with_gw_hp" or "blockwise"; any other training config counts as "rowwise".
    exclude: parts of names, such as "lm_head"; layers whose name has one of them are left out.

    With K inputs and N outputs, a layer is left out when K or N is no multiple of 16 (128 for blockwise) or, as measured on an
    H100 by torchao, whose thresholds these are: tensorwise, K <= 4096 and N <= 1024; else, N <= 2048, or K <= 1024, or
    N <= 4096 and K <= 2048.
    """
    multiple = 128 if recipe == "blockwise" else 16

    def keeps(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or any(part in name for part in exclude):
            return False
        k, n = module.in_features, module.out_features
        if k % multiple or n % multiple:
            return False
        if recipe == "tensorwise":
            return not (k <= 4096 and n <= 1024)
        return not (n <= 2048 or k <= 1024 or (n <= 4096 and k <= 2048))

    return keeps


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
    if spec is None:
        return
    if is_dtensor(weight):
        raise ValueError(f"{name}: the weight is a DTensor already; convert the model before it is sharded")
    if len(holders[id(weight)]) > 1:
        raise ValueError(
            f"{name}: the weight is tied ({', '.join(holders[id(weight)])}), and would be untied; leave the layer out with "
            "module_filter_fn"
        )
    try:
        blank(spec, (n, k))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
