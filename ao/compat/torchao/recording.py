"""Recipes in two steps: a model is prepared, called with data, and converted.

In `ao` a recipe takes its data from `quantize_(model, config, calibration_data=batches)`. So the first step here has the model
remember what it is called with, and the second gives that to `quantize_`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import ao
from ao import Config, Report, Spec, SpecConfig
from ao.matmul import set_parameter

from .kinds import Kind

MODEL = "_ao_recording"
LAYER = "_ao_recorded"


class Recording:
    """The calls of a model, from `start` to `stop`.

    batches: the arguments of each, by name.
    settings: what the first step was told, for the second.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        self.batches: list[dict[str, Any]] = []
        self.settings = settings
        self.names = list(inspect.signature(model.forward).parameters)
        self.handle = model.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember a call."""
        given = {**dict(zip(self.names, args)), **kwargs}
        self.batches.append(tree_map_only(Tensor, lambda t: t.detach().clone(), given))

    def __deepcopy__(self, memo: dict[int, Any]) -> Recording:
        """A copied model has a recording of its own: its hook is copied with it, and belongs to this."""
        import copy

        if id(self) not in memo:
            made = memo[id(self)] = object.__new__(Recording)
            made.batches, made.names = list(self.batches), self.names
            made.settings = dict(self.settings)
            made.handle = copy.copy(self.handle)
        return memo[id(self)]


def start(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool], **settings: Any) -> Report:
    """Have a model remember its calls, for the layers that the filter takes."""
    stop(model)
    chosen = [m for name, m in model.named_modules() if filter_fn(m, name)]
    for module in chosen:
        module.__dict__[LAYER] = True
    model.__dict__[MODEL] = Recording(model, settings)
    report = Report(notes=[f"{len(chosen)} layers wait for data: call the model with it, then convert"])
    report.measure(model)
    return report


def recording_of(model: nn.Module) -> Recording | None:
    """The recording of a model that was prepared."""
    return model.__dict__.get(MODEL)


def stop(model: nn.Module) -> Recording | None:
    """End the recording of a model, if there is one, and return it."""
    recording = model.__dict__.pop(MODEL, None)
    if recording is not None:
        for key, hook in list(model._forward_pre_hooks.items()):
            if getattr(hook, "__self__", None) is recording:
                del model._forward_pre_hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in model.modules():
        module.__dict__.pop(LAYER, None)
    return recording


def finish(
    model: nn.Module,
    config: Config | Spec,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    device: torch.device | str | None,
    who: str,
) -> Report:
    """Quantize the layers of a prepared model, with the calls it remembers. Raises ValueError for one that was not prepared."""
    recording = recording_of(model)
    if recording is None:
        raise ValueError(f"{who}: this model is not prepared; do the first step, and call it with data")
    config = SpecConfig(config) if isinstance(config, Spec) else config
    needed = bool(config.recipe.needs) or config.act_range() is not None
    if needed and not recording.batches:
        raise ValueError(f"{who}: the model was not called since it was prepared; call it with data first")
    names = {name for name, m in model.named_modules() if LAYER in m.__dict__ and (not filter_fn or filter_fn(m, name))}
    batches = list(recording.batches)
    stop(model)
    report = ao.quantize_(
        model, config, lambda _, name: name in names, device, calibration_data=batches if needed else None
    )
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, ao.QTensor) and weight.pre_scale is not None:
            weight.act_pre_scale = weight.pre_scale  # type: ignore[attr-defined]  # torchao's name of it
    return report


def prepare_for_loading(model: nn.Module, config: Config, filter_fn: Callable[[nn.Module, str], bool]) -> Report:
    """Give a model weights of the form that `config` gives, with a scale of the input, for others to be copied into."""
    report = Report()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and filter_fn(module, name):
            weight = module.weight.detach()
            spec = config.weight(tuple(weight.shape))
            ones = torch.ones(1, weight.shape[1], dtype=torch.float32, device=weight.device)
            q = replace(spec, act=config.act() or spec.act).quantize(weight, pre_scale=ones)
            set_parameter(module, "weight", nn.Parameter(q, requires_grad=False))
            report.notes.append(f"{name}: waits for its weight")
    report.measure(model)
    return report


class Recorded(metaclass=Kind):
    """A layer of a prepared model."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return isinstance(x, nn.Linear) and LAYER in x.__dict__


def with_algorithm(base: Any, algorithm: Any) -> Config:
    """The config or Spec of `ao` that a base config stands for, with an algorithm."""
    from .core.config import Translated
    from .quantization.quant_api import Int8StaticActivationInt8WeightConfig

    if isinstance(base, Int8StaticActivationInt8WeightConfig):
        base = ao.Int8StaticActivationInt8WeightConfig(base.act_quant_scale, unsupported="skip")
    ours = base.to_ao() if isinstance(base, Translated) else base
    ours = SpecConfig(ours, unsupported="skip") if isinstance(ours, Spec) else ours
    if not isinstance(ours, Config):
        raise TypeError(f"{base!r} cannot be a base config here")
    return replace(ours, algorithm=algorithm)
