"""Hugging Face diffusers: `AoConfig` for the transformer and the unet of a pipeline.

    from ao.integrations.diffusers import AoConfig

    config = AoConfig("int8_weight_only")
    transformer = FluxTransformer2DModel.from_pretrained(name, subfolder="transformer", quantization_config=config)
    transformer.save_pretrained("transformer-int8")  # ordinary safetensors; from_pretrained reads them

It is the config of transformers, so that `PipelineQuantizationConfig(quant_backend="ao", ...)` serves a pipeline's text encoders
too. diffusers has no function to register a quantizer; its mappings are where one is looked up.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from accelerate.utils import CustomDtype
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..dtypes import QTensor
from ..dtypes.checkpoint import flatten, stored_names, unflatten
from ..matmul import set_parameter
from ..quant import dequantize_
from ..quant.report import Report, storage_bytes
from . import safetensors as _safetensors  # noqa: F401  teaches it to store quantized tensors
from .config_names import AUTOQUANT
from .mapped_memory import MappedFiles
from .transformers import AoConfig, is_saved_quantized, refuse_disk, rules_of
from .transformers_layers import plan_for
from .transformers_loading import Plan, Quantize, Stored

__all__ = ["AoConfig", "AoDiffusersQuantizer"]


class AoDiffusersQuantizer(DiffusersQuantizer):
    """What `from_pretrained` and `save_pretrained` of diffusers ask about a model that `ao` quantizes.

    report: what was quantized, and what was passed over and why.
    """

    quantization_config: AoConfig
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: AoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.quant_type == AUTOQUANT:
            raise ValueError("AoConfig: 'autoquant' is for transformers; load the model, and call ao.autoquant(model)")
        self.report = Report()
        self.plan: Plan = {}
        self.stored = Stored({})
        self.pending: dict[str, Tensor] = {}
        self.checked: set[Hashable] = set()

    @property
    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters over quantized layers are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True

    @property
    def supports_parallel_loading(self) -> bool:
        """No: one tensor is in full precision at a time, and the fields of one may be in two files."""
        return False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for a device map with "disk" in it."""
        refuse_disk(device_map)

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """What a quantized weight takes, for the device map: 4 bits or 8."""
        return CustomDtype.INT4 if self._bits() <= 4 else torch.int8

    def get_cuda_warm_up_factor(self) -> int:
        """How many times smaller than float32 the weights are."""
        return 8 if self._bits() <= 4 else 4

    def _bits(self) -> int:
        specs = [planned.spec for planned in self.plan.values()]
        return max((getattr(spec, "bits", 8) for spec in specs), default=8)

    # Loading.

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The names of the tensors, in place of those of their fields."""
        if not self.pre_quantized:
            return loaded_keys
        self.stored = Stored.of([str(file) for file in checkpoint_files])
        fields = {field for name, entry in self.stored.entries.items() for field in stored_names(name, entry)}
        return [key for key in loaded_keys if key not in fields]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Quantized tensors in place of their fields. What the next file has the rest of waits for it."""
        if not self.pre_quantized:
            return state_dict
        have, self.pending = {**self.pending, **state_dict}, {}
        for name, entry in self.stored.entries.items():
            if name in have and have[name].shape == (0,):
                del have[name]  # its guard
            fields = list(stored_names(name, entry))
            present = [field for field in fields if field in have]
            if len(present) < len(fields):
                self.pending |= {field: have.pop(field) for field in present}
            else:
                have[name] = unflatten(name, entry, have.pop, self.checked)
        return have

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            keep = [*(self.quantization_config.modules_to_not_convert or ()), *(keep_in_fp32_modules or ())]
            self.plan, self.report = plan_for(model, self.quantization_config, keep)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.pending = {}
        if self.plan:
            self.report.measure(model)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether `create_quantized_param` sets the parameter."""
        return param_name in self.plan or isinstance(param_value, QTensor)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any] | None = None,
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the parameter: quantized now, or as it was stored."""
        module, _, leaf = param_name.rpartition(".")
        value = param_value.to(target_device)
        if isinstance(value, QTensor):
            made = nn.Parameter(value, requires_grad=False)
        else:
            made = Quantize(self.plan, self.report, MappedFiles(())).quantize(param_name, value)
        set_parameter(model.get_submodule(module), leaf, made)

    def dequantize(self, model: nn.Module) -> nn.Module:
        """Plain weights in place of the quantized ones, in place. Returns the model."""
        dequantize_(model)
        _forget(model)
        return model

    # Saving.

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The plain tensors under their stored names, and the header that describes them."""
        if not safe_serialization:
            raise ValueError(
                "a model that ao has quantized is saved to safetensors; leave out safe_serialization=False"
            )
        return flatten(state_dict)


_save_pretrained = ModelMixin.save_pretrained
_get_memory_footprint = ModelMixin.get_memory_footprint


@functools.wraps(_save_pretrained)
def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As in diffusers, for what the parameters are now: quantized in place, or plain again."""
    quantized = is_saved_quantized(self)
    quantizer = getattr(self, "hf_quantizer", None)
    if quantized and quantizer is None:
        config = AoConfig(rules_of(self))
        self.hf_quantizer = AoDiffusersQuantizer(config, pre_quantized=True)
        self.register_to_config(quantization_config=config)
        try:
            return _save_pretrained(self, *args, **kwargs)
        finally:
            _forget(self)
    if not quantized and isinstance(quantizer, AoDiffusersQuantizer):
        _forget(self)
    return _save_pretrained(self, *args, **kwargs)


def _forget(model: Any) -> None:
    """Tell a model that it is not quantized."""
    del model.hf_quantizer
    model.is_quantized = False
    model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})


@functools.wraps(_get_memory_footprint)
def get_memory_footprint(self: Any, return_buffers: bool = True) -> int:
    """As in diffusers, in the bytes that quantized parameters take."""
    return sum(storage_bytes(t) for t in (*self.parameters(), *(self.buffers() if return_buffers else ())))


ModelMixin.save_pretrained = save_pretrained
ModelMixin.get_memory_footprint = get_memory_footprint
auto.AUTO_QUANTIZATION_CONFIG_MAPPING["ao"] = AoConfig
auto.AUTO_QUANTIZER_MAPPING["ao"] = AoDiffusersQuantizer
