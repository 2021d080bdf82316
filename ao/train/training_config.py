"""`TrainingConfig`: what the configs of this folder have in common: `quantize_(model, config)` takes each of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


class TrainingConfig:
    """A config of low-precision training. `convert_to_low_precision_training` and `quantize_` take it."""

    def convert_layers(self, model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> list[str]:
        """Let the layers of `model` that the filter takes train by this config, in place. Returns their names.

        Raises what `convert_to_low_precision_training` raises.
        """
        from .convert import convert_layers  # which knows the configs

        return convert_layers(model, self, filter_fn)  # type: ignore[arg-type]
