"""From a plain model to one that trains in low precision, and back, in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ao.dtypes import QTensor

from .float8_config import Float8LinearConfig
from .gather import unwrapped
from .linear import LowPrecisionLinear
from .state_dict import as_it_is_in_state_dict
from .training_config import Filter, LayerConfig, convert_layers


def convert_to_float8_training(
    module: nn.Module, *, module_filter_fn: Filter | None = None, config: Float8LinearConfig | None = None
) -> nn.Module:
    """Let the linear layers of a model train with float8 products. See `convert_to_low_precision_training`.

    config: a `Float8LinearConfig`; None is the recipe "tensorwise".
    """
    return convert_to_low_precision_training(module, config or Float8LinearConfig(), module_filter_fn=module_filter_fn)


def convert_to_low_precision_training(
    module: nn.Module, config: LayerConfig, *, module_filter_fn: Filter | None = None
) -> nn.Module:
    """Let the linear layers of a model train by a config, in place; the model is returned.

    module: any module, also a single `nn.Linear`, also on the meta device. Layers stay the objects that they are, with their
        hooks, parameters and state dict. Convert before tensor parallelism, `fully_shard` and `torch.compile`, and, where
        weights change (int8 weight-only, gathers in low precision), before the optimizer is made.
    config: `Float8LinearConfig`, `Int8MixedPrecisionTrainingConfig`, `Int8WeightOnlyQuantizedTrainingConfig`,
        `BitNetTrainingConfig`, `MXFP8TrainingConfig`, `MXFP4TrainingConfig`, `NVFP4TrainingConfig`.
    module_filter_fn: `(module, fully qualified name) -> bool`, which layers to convert, of those whose class is `nn.Linear`
        itself: a subclass may do more than the product. Small layers get slower: `auto_module_filter` leaves them out.

    Every layer is checked before the first one changes. Raises ValueError where no layer is left, where a layer was converted
    or quantized before, where a shape does not fit (float8 takes multiples of 16 unless pad_inner_dim), and for tied weights
    where weights change; TypeError for what is no such config.
    """
    convert_layers(module, config, module_filter_fn)
    return module


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
        if isinstance(layer, LowPrecisionLinear) and not type(layer).__name__.startswith("FSDP"):
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
