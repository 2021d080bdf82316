"""torchao.quantization.smoothquant: SmoothQuant by swapping layers, in two steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import ao

from ..recording import Recorded, finish, recording_of, start
from .quant_api import _is_linear

__all__ = [
    "SmoothFakeDynQuantMixin",
    "SmoothFakeDynamicallyQuantizedLinear",
    "get_scale",
    "set_smooth_fq_attribute",
    "smooth_fq_linear_to_inference",
    "swap_linear_with_smooth_fq_linear",
]


def get_scale(X_absmax: Tensor, W_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """What the input is divided by and the weight multiplied with, per channel: X**alpha / W**(1 - alpha)."""
    return X_absmax.pow(alpha) / W_absmax.pow(1.0 - alpha)


class SmoothFakeDynQuantMixin(Recorded):
    """A layer that waits for data."""


class SmoothFakeDynamicallyQuantizedLinear(SmoothFakeDynQuantMixin):
    """A linear layer that waits for data. `from_float` makes one.

    layer.to_inference() quantizes it; without smoothing where layer.debug_skip_scaling is True.
    """

    @staticmethod
    def from_float(mod: nn.Module, alpha: float = 0.5) -> nn.Module:
        """Have a layer remember what it is called with."""
        start(mod, lambda m, _: m is mod, alpha=alpha)
        mod.__dict__ |= {"debug_skip_scaling": False, "to_inference": functools.partial(_to_inference, mod)}
        return mod


def _to_inference(layer: nn.Module) -> None:
    smooth_fq_linear_to_inference(layer, debug_skip_calibration=layer.__dict__["debug_skip_scaling"])
    for name in ("debug_skip_scaling", "to_inference"):
        del layer.__dict__[name]


def swap_linear_with_smooth_fq_linear(
    model: nn.Module, skip_fqn_list: Sequence[str] | None = None, cur_fqn: str = "", alpha: float = 0.5
) -> None:
    """Prepare the linear layers of a model, other than those of `skip_fqn_list`. Then call it with data."""
    skipped = set(skip_fqn_list or ())
    start(model, lambda m, name: _is_linear(m) and name not in skipped, alpha=alpha)


def smooth_fq_linear_to_inference(model: nn.Module, debug_skip_calibration: bool = False) -> None:
    """Quantize the prepared layers to int8 weights and activations. debug_skip_calibration: as they are, without data."""
    recording = recording_of(model)
    if recording is None:
        raise ValueError("smooth_fq_linear_to_inference: call swap_linear_with_smooth_fq_linear(model) first")
    recipe: Any = "rtn" if debug_skip_calibration else ao.SmoothQuant(alpha=recording.settings["alpha"])
    config = ao.Int8DynamicActivationInt8WeightConfig(algorithm=recipe, unsupported="skip")
    finish(model, config, None, None, "smooth_fq_linear_to_inference")


def set_smooth_fq_attribute(model: nn.Module, attribute_name: str, new_attribute_val: Any) -> None:
    """Set `alpha` of a model that was prepared; other attributes have no effect."""
    recording = recording_of(model)
    if recording is not None and attribute_name in recording.settings:
        recording.settings[attribute_name] = new_attribute_val
