"""torchao.prototype.awq: `ao.AWQ` in two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import ao

from ...core.config import AOBaseConfig
from ...quantization.quant_api import UIntXWeightOnlyConfig, _is_linear
from ...quantization.quantize_.common import QuantizationStep
from ...quantization.specs import UINT4
from ...recording import Recorded, finish, prepare_for_loading, recording_of, start, with_algorithm

__all__ = ["AWQConfig", "AWQObservedLinear", "AWQStep", "awq_uintx", "insert_awq_observer_"]

AWQStep = QuantizationStep


class AWQObservedLinear(Recorded):
    """A linear layer of a model that is prepared."""


@dataclass
class AWQConfig(AOBaseConfig):
    """`quantize_(m, AWQConfig(base, step="prepare"))`, call the model with data, `quantize_(m, AWQConfig(base, step="convert"))`.

    base_config: what the model is to become. step: "prepare", "convert", or "prepare_for_loading" for a model whose weights will
    be loaded. scale_search_space_size: how many scales are tried.
    """

    base_config: Any = None
    step: QuantizationStep | str = QuantizationStep.PREPARE
    scale_search_space_size: int = 20

    def __post_init__(self) -> None:
        self.step = QuantizationStep(str(getattr(self.step, "value", self.step)).lower())
        if self.base_config is None:
            raise ValueError("AWQConfig: base_config is missing; give Int4WeightOnlyConfig() or the like")

    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Any:
        """Do the step."""
        if self.step is QuantizationStep.PREPARE:
            return start(model, filter_fn)
        if self.step is QuantizationStep.PREPARE_FOR_LOADING:
            return prepare_for_loading(model, with_algorithm(self.base_config, ao.AWQ()), filter_fn)
        config = with_algorithm(self.base_config, ao.AWQ(steps=self.scale_search_space_size))
        return finish(model, config, None if filter_fn is _is_linear else filter_fn, device, "AWQConfig")


def insert_awq_observer_(
    model: nn.Module,
    n_validation_examples: int,
    validation_sequence_len: int,
    quant_dtype: torch.dtype = UINT4,
    scale_search_space_size: int = 20,
    group_size: int = 128,
) -> None:
    """Prepare the linear layers of a model. n_validation_examples, validation_sequence_len: accepted; all data counts."""
    if quant_dtype not in [getattr(torch, f"uint{bits}") for bits in range(1, 9)]:
        raise AssertionError(f"insert_awq_observer_: quant_dtype must be torch.uint1 to torch.uint8, got {quant_dtype}")
    start(model, _is_linear, steps=scale_search_space_size)


@dataclass
class _AWQUintx(AOBaseConfig):
    quant_dtype: torch.dtype
    group_size: int
    use_hqq: bool

    def replace_in(self, model: nn.Module, filter_fn: Any, device: Any) -> Any:
        recording = recording_of(model)
        steps = 20 if recording is None else recording.settings.get("steps", 20)
        rounding = ao.HQQ() if self.use_hqq else ao.RoundToNearest()
        base = UIntXWeightOnlyConfig(self.quant_dtype, self.group_size)
        config = with_algorithm(base, ao.AWQ(rounding=rounding, steps=steps))
        return finish(model, config, filter_fn, device, "awq_uintx")


def awq_uintx(quant_dtype: torch.dtype = UINT4, group_size: int = 64, use_hqq: bool = False) -> AOBaseConfig:
    """The second step: `quantize_(model, awq_uintx(), lambda m, name: isinstance(m, AWQObservedLinear))`."""
    return _AWQUintx(quant_dtype, group_size, use_hqq)
