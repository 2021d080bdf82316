"""torchao.quantization.qat.api: configs of quantization-aware training, and what leads through it step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from ao import Config, Report, Spec, SpecConfig

from ...core.config import AOBaseConfig, Translated
from ..quant_api import quantize_
from ..unified import TwoStepQuantizer
from .fake_quantize_config import FakeQuantizeConfig, FakeQuantizeConfigBase, IntxFakeQuantizeConfig
from .fake_quantizer import FakeQuantizerBase
from .layers import FakeQuantizedEmbedding, FakeQuantizedLinear, Part, Prepared, initialize, set_weight

__all__ = [
    "ComposableQATQuantizer",
    "FakeQuantizeConfig",
    "FromIntXQuantizationAwareTrainingConfig",
    "IntXQuantizationAwareTrainingConfig",
    "IntxFakeQuantizeConfig",
    "QATConfig",
    "QATStep",
    "from_intx_quantization_aware_training",
    "initialize_fake_quantizers",
    "intx_quantization_aware_training",
]


class QATStep(str, Enum):
    """Before and after training."""

    PREPARE = "prepare"
    CONVERT = "convert"


def _parts(base: Any, shape: tuple[int, ...]) -> tuple[Part, Part]:
    """How a base config rounds the activation and a weight of `shape`."""
    ours = base.to_ao() if isinstance(base, Translated) else base
    ours = SpecConfig(ours) if isinstance(ours, Spec) else ours
    if not isinstance(ours, Config):
        raise ValueError(f"QATConfig: {type(base).__name__} cannot be a base_config of training")
    spec = ours.weight(shape)
    return ours.act() or spec.act, spec


def _chosen(model: nn.Module, filter_fn: Any) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if filter_fn(m, name)]


def _prepare(model: nn.Module, chosen: list[tuple[str, nn.Module]], base: Any, activation: Any, weight: Any) -> Report:
    report = Report()
    for name, module in chosen:
        where = name or "the model"
        if isinstance(module, nn.Linear):
            a, w = (activation, weight) if base is None else _parts(base, tuple(module.weight.shape))
            try:
                FakeQuantizedLinear.from_linear(module, a, w)
            except ValueError as error:
                if base is None:
                    raise ValueError(f"{where}: {error}") from None
                report.skipped[name] = str(error)
        elif isinstance(module, nn.Embedding):
            a, w = (activation, weight) if base is None else _parts(base, tuple(module.weight.shape))
            if a is not None:
                raise ValueError(f"{where}: an embedding has no activation to quantize; leave activation_config out")
            FakeQuantizedEmbedding.from_embedding(module, w)
        else:
            raise ValueError(f"{where} is a {type(module).__name__}; training takes nn.Linear and nn.Embedding")
    report.measure(model)
    return report


def _unprepare(chosen: list[tuple[str, nn.Module]]) -> None:
    for _, module in chosen:
        if isinstance(module, Prepared):
            module.plain()


class QATConfig(AOBaseConfig):
    """`quantize_(m, QATConfig(base, step="prepare"))`, train, `quantize_(m, QATConfig(base, step="convert"))`.

    base_config: what the model is to become. activation_config, weight_config: in place of it, how to round each.
    step: "prepare" or "convert"; convert without a base gives plain layers with the weights that were trained.

    Raises ValueError for settings that contradict each other.
    """

    def __init__(
        self,
        base_config: Any = None,
        activation_config: Part = None,
        weight_config: Part = None,
        *,
        step: QATStep | str = "prepare",
    ) -> None:
        custom = activation_config is not None or weight_config is not None
        try:
            self.step = QATStep(step.lower() if isinstance(step, str) else step)
        except ValueError:
            raise ValueError(f"QATConfig: step must be 'prepare' or 'convert', got {step!r}") from None
        if base_config is not None and custom:
            raise ValueError("QATConfig: give base_config, or activation_config and weight_config, not both")
        if self.step is QATStep.PREPARE and base_config is None and not custom:
            raise ValueError("QATConfig: step='prepare' needs base_config, activation_config or weight_config")
        if self.step is QATStep.CONVERT and custom:
            raise ValueError("QATConfig: step='convert' takes base_config or nothing")
        if isinstance(base_config, FakeQuantizeConfigBase):
            raise ValueError("QATConfig: a FakeQuantizeConfig is given as activation_config or weight_config")
        self.base_config, self.activation_config, self.weight_config = base_config, activation_config, weight_config

    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Report:
        """Prepare or convert the layers that the filter takes."""
        if device is not None:
            model.to(device)
        chosen = _chosen(model, filter_fn)
        if self.step is QATStep.PREPARE:
            return _prepare(model, chosen, self.base_config, self.activation_config, self.weight_config)
        learned = (
            {id(m): m.quantized_weight() for _, m in chosen if isinstance(m, Prepared) and _keeps(m)}
            if self.base_config is not None
            else {}
        )
        _unprepare(chosen)
        report = Report()
        if self.base_config is not None:
            names = {name for name, m in chosen if id(m) not in learned}
            report = quantize_(model, self.base_config, lambda m, name: name in names)
            for name, module in chosen:
                if id(module) in learned:
                    set_weight(module, learned[id(module)])
                    report.notes.append(f"{name}: with the scales that were trained")
        report.measure(model)
        return report


def _keeps(module: nn.Module) -> bool:
    quantizer = module.weight_fake_quantizer if isinstance(module, Prepared) else None
    return quantizer is not None and quantizer.keeps


@dataclass
class IntXQuantizationAwareTrainingConfig(AOBaseConfig):
    """`QATConfig(activation_config=..., weight_config=...)` by an earlier name. With neither, it changes nothing."""

    activation_config: Part = None
    weight_config: Part = None

    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Report:
        """Prepare the layers that the filter takes."""
        return _prepare(model, _chosen(model, filter_fn), None, self.activation_config, self.weight_config)


class FromIntXQuantizationAwareTrainingConfig(AOBaseConfig):
    """Turn prepared layers back into plain ones with the weights that were trained."""

    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Report:
        """Turn back the layers that the filter takes."""
        _unprepare(_chosen(model, filter_fn))
        report = Report()
        report.measure(model)
        return report


intx_quantization_aware_training = IntXQuantizationAwareTrainingConfig
from_intx_quantization_aware_training = FromIntXQuantizationAwareTrainingConfig


class ComposableQATQuantizer(TwoStepQuantizer):
    """Several quantizers, one after the other."""

    def __init__(self, quantizers: Sequence[TwoStepQuantizer]) -> None:
        self.quantizers = list(quantizers)

    def prepare(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, prepared by each of them."""
        for quantizer in self.quantizers:
            model = quantizer.prepare(model)
        return model

    def convert(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The model, converted by each of them."""
        for quantizer in self.quantizers:
            model = quantizer.convert(model)
        return model


def initialize_fake_quantizers(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Make the scales that are trained, by a call of the model. Do it before the optimizer is made."""
    model.apply(initialize)
    waiting = [m for m in model.modules() if isinstance(m, FakeQuantizerBase) and m.keeps and m.scale is None]
    hooks = [m.register_forward_pre_hook(_initialize_by_input) for m in waiting]
    try:
        with torch.no_grad():
            model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _initialize_by_input(quantizer: Any, args: tuple[Any, ...]) -> None:
    if quantizer.scale is None:
        quantizer.initialize(args[0])
