"""vLLM: a plugin that serves checkpoints of ours. Installing `ao-lowbit` beside it is all: vLLM finds it by its entry point.

    vllm serve model-int4

It covers linear layers, fused ones (`qkv_proj`) and tensor parallelism included; rows are never packed, so that a fused
layer is its parts below each other. Embeddings, heads and experts must be unquantized. vLLM loads tensors by name into
parameters that exist; here each field of a quantized weight is one until all are there. vLLM takes a name apart at its dots, and
looks for nothing below a parameter: what is stored as `weight.scale.qdata` is called `weight__scale__qdata`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import set_weight_attrs

from ..dtypes import QTensor, Spec
from ..dtypes.checkpoint import entry_of, stored_names, unflatten
from ..quant import Config, FqnToConfig
from .config_names import AUTOQUANT, read_quant_type

__all__ = ["AoLinearMethod", "AoVllmConfig", "register"]


def register() -> None:
    """What vLLM calls when it starts. Importing this module has registered the config already."""


@register_quantization_config("ao")
class AoVllmConfig(QuantizationConfig):
    """The `quantization_config` of a checkpoint's config.json: which layer has which format.

    quant_type, modules_to_not_convert, include_embedding: as in `ao.integrations.transformers.AoConfig`.
    Raises ValueError for a checkpoint whose embedding is quantized.
    """

    def __init__(
        self, quant_type: Any, modules_to_not_convert: list[str] | None = None, include_embedding: bool = False
    ) -> None:
        super().__init__()
        read = read_quant_type(quant_type, {}, "AoVllmConfig")
        if read == AUTOQUANT or include_embedding:
            what = "that autoquant has not decided on" if read == AUTOQUANT else "with include_embedding=True"
            raise ValueError(
                f"ao in vLLM reads quantized linear layers only, and this is a checkpoint {what}; save another"
            )
        self.rules = read if isinstance(read, FqnToConfig) else FqnToConfig({"_default": read})
        self.modules_to_not_convert = modules_to_not_convert or []

    def get_name(self) -> str:
        """The quant_method."""
        return "ao"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of the activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Turing."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json has it all."""
        return []

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Stored name -> the name of the parameter that it is loaded into."""
        patterns = {}
        for depth in (3, 2, 1):
            stored = re.compile(r"\.weight" + r"\.(\w+)" * depth + "$")
            patterns[stored] = ".weight" + "".join(rf"__\{i + 1}" for i in range(depth))
        return WeightsMapper(orig_to_new_regex=patterns)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AoVllmConfig:
        """From config.json."""
        return cls(config["quant_type"], config.get("modules_to_not_convert"), config.get("include_embedding", False))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How vLLM treats the layer called `prefix`: a linear method, or None for what is no linear layer.

        Raises ValueError when the parts of a fused layer have different formats.
        """
        if not isinstance(layer, LinearBase):
            return None
        head, _, leaf = prefix.rpartition(".")
        parts = (getattr(self, "packed_modules_mapping", None) or {}).get(leaf, [leaf])
        names = [f"{head}.{part}" if head else part for part in parts]
        choices = [self.choice(name) for name in names]
        if any(choice != choices[0] for choice in choices):
            raise ValueError(
                f"vLLM fuses {', '.join(names)} into {prefix}, and they have different formats: {choices}; quantize them alike"
            )
        return UnquantizedLinearMethod() if choices[0] is None else AoLinearMethod(choices[0])

    def choice(self, name: str) -> Config | Spec | None:
        """What a layer was quantized by."""
        found = self.rules.rules_for(f"{name}.weight")
        if found:
            return self.rules.fqn_to_config[found[0]]
        return (
            self.rules.fqn_to_config.get("_default")
            if should_convert_module(name, self.modules_to_not_convert)
            else None
        )


class AoLinearMethod(LinearMethodBase):
    """A linear layer with a quantized weight.

    choice: its config or Spec. Raises ValueError for a recipe that scales activations.
    """

    def __init__(self, choice: Config | Spec) -> None:
        if isinstance(choice, Config) and choice.recipe.scales:
            raise ValueError(
                f"ao in vLLM: algorithm={choice.recipe.label!r} scales the inputs of each layer by itself, and vLLM fuses "
                "layers that share one; serve a checkpoint made with 'hqq' or 'gptq'"
            )
        self.choice = choice

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """A parameter for each field of the weight (sum of output_partition_sizes, input_size_per_partition).

        Raises ValueError for scales that more than one row share in a layer that is fused or sharded.
        """
        shape = (sum(output_partition_sizes), input_size_per_partition)
        spec = self.spec(shape)
        act_scale = None
        if isinstance(self.choice, Config) and self.choice.act_scale() is not None:
            act_scale = torch.empty((), dtype=torch.float32, device="meta")
        form = spec.quantize(torch.empty(shape, dtype=params_dtype, device="meta"), act_scale=act_scale)
        whole = len(output_partition_sizes) == 1 and (output_size, input_size) == shape
        layer.ao_entry = entry_of(form)
        layer._parameters["weight"] = _parameter(torch.empty(0, dtype=torch.uint8))  # its guard
        set_weight_attrs(layer._parameters["weight"], {"weight_loader": lambda *args, **kwargs: None})
        for stored in stored_names("weight", layer.ao_entry):
            field, role = _field(form, stored)
            p = _parameter(torch.empty(field.shape, dtype=field.dtype))
            if role != "shared":
                if field.shape[0] != shape[0] and not whole:
                    raise ValueError(
                        f"{spec} has {field.shape[0]} scales for {shape[0]} rows, and vLLM fuses or shards this layer; "
                        "quantize with a scale per row or group, such as granularity=PerRow()"
                    )
                # A dim of one element serves all of the input, and is loaded whole.
                set_weight_attrs(p, {"output_dim": 0} | ({"input_dim": 1} if field.shape[1] > 1 else {}))
            set_weight_attrs(p, extra_weight_attrs)
            layer.register_parameter(_loaded_name(stored), p)

    def spec(self, shape: tuple[int, ...]) -> Spec:
        """The Spec of a weight of `shape`."""
        if isinstance(self.choice, Spec):
            return self.choice
        return replace(self.choice.weight(shape), act=self.choice.act())

    def process_weights_after_loading(self, layer: Any) -> None:
        """One quantized parameter in place of its fields."""
        fields = {
            stored: layer._parameters.pop(_loaded_name(stored)).detach()
            for stored in stored_names("weight", layer.ao_entry)
        }
        q = unflatten("weight", layer.ao_entry, fields.pop)
        assert isinstance(q, QTensor)
        layer._parameters["weight"] = nn.Parameter(q, requires_grad=False)
        del layer.ao_entry

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return F.linear(x, layer.weight, bias)


def _loaded_name(stored: str) -> str:
    """The name of the parameter that "weight.scale.qdata", say, is loaded into."""
    return stored.replace(".", "__")


def _parameter(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


def _field(form: QTensor, stored: str) -> tuple[Tensor, str]:
    """The field that is stored as "weight.scale.qdata", say, and its role."""
    first, *rest = stored.split(".")[1:]
    t, role = form.fields()[first], form.roles[first]
    for name in rest:
        assert isinstance(t, QTensor)
        role = t.roles[name]
        t = t.fields()[name]
    return t, role
