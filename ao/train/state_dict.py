"""Trained weights that are quantized, as plain ones in a state dict: what saves, loads and compares checkpoints knows no others.

Loading rounds to nearest, whatever the rounding of the weight: the numbers of a checkpoint are those of its codes.
With `keep_vars=True` a state dict holds the parameters themselves, as it does for `ao.save`; sharded weights stay quantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping
from typing import Any, TypeGuard

from torch import Tensor, nn

from ao.dtypes import QTensor, Spec


def rounded_to_nearest(weight: Tensor, spec: Spec) -> QTensor:
    """A QTensor of `spec` whose codes are the nearest ones, whatever the rounding of `spec`."""
    q = dataclasses.replace(spec, rounding="nearest").quantize(weight)  # type: ignore[call-arg]
    return spec.wrap(q.fields(), q.dtype, q.shape)


def plain_in_state_dict(layer: nn.Module) -> None:
    """Let the state dict of `layer` hold the values of its quantized weight, and loading take them."""
    layer.register_state_dict_post_hook(_decode)
    layer.register_load_state_dict_pre_hook(_encode)


def as_it_is_in_state_dict(layer: nn.Module) -> None:
    """Take back what `plain_in_state_dict` did, if anything."""
    for hooks, ours in ((layer._state_dict_hooks, _decode), (layer._load_state_dict_pre_hooks, _encode)):
        for key, hook in list(hooks.items()):
            if ours in (hook, getattr(hook, "hook", None)):
                del hooks[key]


def _is_trained(weight: Any) -> TypeGuard[QTensor]:
    """Not one that was quantized for inference since."""
    return isinstance(weight, QTensor) and getattr(weight.spec, "rounding", "") == "stochastic"


def _decode(layer: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Any) -> None:
    weight = state_dict.get(f"{prefix}weight")
    if _is_trained(weight) and not isinstance(weight, nn.Parameter):
        state_dict[f"{prefix}weight"] = weight.dequantize()


def _encode(layer: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *unused: Any) -> None:
    """Before the copy: as codes, which are then copied as they are."""
    weight, new = layer._parameters.get("weight"), state_dict.get(f"{prefix}weight")
    if _is_trained(weight) and isinstance(new, Tensor) and not isinstance(new, QTensor) and new.shape == weight.shape:
        state_dict[f"{prefix}weight"] = rounded_to_nearest(new.detach().to(weight.device, weight.dtype), weight.spec)
