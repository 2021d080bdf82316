"""torchao.prototype.smoothquant: `ao.SmoothQuant` in two steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ao
from ao import Config

from ...core.config import AOBaseConfig
from ...quantization.quant_api import Int8DynamicActivationInt8WeightConfig, _is_linear
from ...quantization.quantize_.common import QuantizationStep
from ...recording import Recorded, finish, prepare_for_loading, recording_of, start, stop, with_algorithm
from .observers import RunningAbsMaxSmoothQuantObserver, SmoothQuantObserver

__all__ = [
    "RunningAbsMaxSmoothQuantObserver",
    "SmoothQuantConfig",
    "SmoothQuantObservedLinear",
    "SmoothQuantObserver",
    "SmoothQuantStep",
    "insert_smooth_quant_observer_",
    "load_smooth_quant_recipe",
    "save_smooth_quant_recipe",
    "smooth_quant",
]

SmoothQuantStep = QuantizationStep


class SmoothQuantObservedLinear(Recorded):
    """A linear layer of a model that is prepared."""


@dataclass
class SmoothQuantConfig(AOBaseConfig):
    """`quantize_(m, SmoothQuantConfig(base, step="prepare"))`, call the model with data, and the same with step="convert".

    base_config: a config that quantizes activations. alpha: how much of the spread moves to the weight; None for 0.5.
    use_running_absmax: accepted and without effect.
    """

    base_config: Any = None
    step: QuantizationStep | str = QuantizationStep.PREPARE
    alpha: float | None = 0.5
    use_running_absmax: bool = False

    def __post_init__(self) -> None:
        self.step = QuantizationStep(str(getattr(self.step, "value", self.step)).lower())
        if self.base_config is None:
            self.base_config = Int8DynamicActivationInt8WeightConfig()
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"SmoothQuantConfig: alpha must be between 0 and 1, got {self.alpha}")

    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Any:
        """Do the step."""
        if self.step is QuantizationStep.PREPARE_FOR_LOADING:
            return prepare_for_loading(model, with_algorithm(self.base_config, ao.SmoothQuant()), filter_fn)
        if self.step is not QuantizationStep.CONVERT:
            recording = recording_of(model)
            if recording is not None and recording.batches and "quant_mode" in recording.settings:
                return _SmoothQuant().replace_in(
                    model, filter_fn, device
                )  # the step after insert_smooth_quant_observer_
            return start(model, filter_fn)
        recipe = ao.SmoothQuant(alpha=0.5 if self.alpha is None else self.alpha)
        chosen = None if filter_fn is _is_linear else filter_fn
        return finish(model, with_algorithm(self.base_config, recipe), chosen, device, "SmoothQuantConfig")


def insert_smooth_quant_observer_(model: nn.Module, alpha: float | None = 0.5, quant_mode: str = "dynamic") -> None:
    """Prepare the linear layers of a model.

    alpha: None does not smooth. quant_mode: "dynamic" or "static" activations. Raises ValueError for another one.
    """
    if quant_mode not in ("dynamic", "static"):
        raise ValueError(f"insert_smooth_quant_observer_: quant_mode must be 'dynamic' or 'static', got {quant_mode!r}")
    start(model, _is_linear, alpha=alpha, quant_mode=quant_mode)


def _config(settings: dict[str, Any]) -> Config:
    alpha = settings["alpha"]
    recipe: Any = "rtn" if alpha is None else ao.SmoothQuant(alpha=alpha)
    if settings["quant_mode"] == "static":
        return ao.Int8StaticActivationInt8WeightConfig(algorithm=recipe, unsupported="skip")
    return ao.Int8DynamicActivationInt8WeightConfig(algorithm=recipe, unsupported="skip")


class _SmoothQuant(AOBaseConfig):
    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Any:
        recording = recording_of(model)
        settings = {"alpha": 0.5, "quant_mode": "dynamic"} if recording is None else recording.settings
        return finish(model, _config(settings), filter_fn, device, "smooth_quant")


def smooth_quant(
    smoothing_factor: torch.Tensor | None = None,
    act_scales: torch.Tensor | None = None,
    wei_scales: torch.Tensor | None = None,
) -> AOBaseConfig:
    """The second step: `quantize_(model, smooth_quant(), lambda m, name: isinstance(m, SmoothQuantObservedLinear))`.

    Raises NotImplementedError for factors and scales that are given: they are found from what the model was called with.
    """
    if smoothing_factor is not None or act_scales is not None or wei_scales is not None:
        raise NotImplementedError("smooth_quant: factors and scales come from the calls of the model; give none")
    return _SmoothQuant()


def save_smooth_quant_recipe(model: nn.Module, save_path: str | Path) -> None:
    """Write what a prepared model was called with, for `load_smooth_quant_recipe`."""
    recording = recording_of(model)
    if recording is None or not recording.batches:
        raise ValueError("save_smooth_quant_recipe: prepare the model and call it with data first")
    torch.save({"settings": recording.settings, "batches": recording.batches}, save_path)


def load_smooth_quant_recipe(model: nn.Module, recipe_path: str | Path, device: Any = None) -> None:
    """Quantize a model with what `save_smooth_quant_recipe` wrote."""
    saved = torch.load(recipe_path, weights_only=True)
    stop(model)
    ao.quantize_(model, _config(saved["settings"]), None, device, calibration_data=saved["batches"])
