"""Hugging Face transformers: `AoConfig` for `from_pretrained`, `save_pretrained` to ordinary safetensors, and back.

    from ao.integrations.transformers import AoConfig

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=AoConfig("int4_weight_only"), device_map="auto")
    model.save_pretrained("model-int4")
    model = AutoModelForCausalLM.from_pretrained("model-int4")  # after the import above, in any process

transformers has no way to find a quantizer by itself, so the import comes first. Without it, loading a saved model raises
(checkpoint.py tells of guards); nothing is filled with random numbers.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections import Counter
from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..dtypes import QTensor, Spec, blank
from ..dtypes.checkpoint import flatten, quantized_entries
from ..matmul import set_parameter
from ..quant import Config, FqnToConfig, autoquant, config_to_dict, dequantize_, is_linear
from ..quant.choice import by_default, few, slots_of
from ..quant.report import Report, storage_bytes
from . import safetensors as _safetensors  # noqa: F401  teaches it to store quantized tensors
from . import transformers_cache as _transformers_cache  # noqa: F401  generate's quantized cache
from . import transformers_stop_check as _transformers_stop_check  # noqa: F401  generate does not wait for the GPU
from .config_names import AS_STORED, AUTOQUANT, read_quant_type
from .foreign.checkpoint import ForeignCheckpoint, quantization_config
from .mapped_memory import MappedFiles
from .redirect import redirect
from .stored_tensors import StoredTensors, only_safetensors
from .transformers_kv_cache import QuantizedCache, enable_quantized_kv_cache
from .transformers_layers import embedding_names, plan_for
from .transformers_loading import Fields, Plan, Quantize, Stored
from .transformers_positions import fuse_relative_positions

__all__ = [
    "AoConfig",
    "AoHfQuantizer",
    "QuantizationMethod",
    "QuantizedCache",
    "enable_quantized_kv_cache",
    "fuse_relative_positions",
    "mark_quantized",
]


class QuantizationMethod(str, Enum):
    """The name under which transformers and diffusers know us."""

    AO = "ao"

    __str__ = str.__str__


@register_quantization_config("ao")
class AoConfig(QuantizationConfigMixin):
    """How to quantize a model while `from_pretrained` loads it.

    quant_type: a config (`ao.Int4WeightOnlyConfig()`), a Spec (`ao.Intx(bits=3, block=(1, 64))`), rules by name
        (`ao.FqnToConfig`), the name of a format or a config ("int8", "int4-g128+hqq", "int4_weight_only", with parameters as
        further keyword arguments), or "autoquant": the model then records what it runs, until
        `model.finalize_autoquant()`; keyword arguments go to `ao.autoquant`. "as_stored" keeps what another library has
        quantized (GPTQ, AWQ, compressed-tensors, bitsandbytes, HQQ, quanto, torchao, FP8, MXFP4, NVFP4) as it is, bit for bit, in
        tensors of ours.
    weights: another name of quant_type: `AoConfig(weights="int4")`.
    modules_to_not_convert: names, ends of names or regular expressions of modules that stay as they are. By default those
        are the output head, and what is tied to the embedding; giving a list replaces this default, and a head that is tied
        to an embedding stays as it is with it. A rule of a FqnToConfig that names a layer takes it even so; "_default" does
        not.
    include_embedding: quantize the input embedding and the output head too. Tied ones become one quantized tensor.
    include_input_output_embeddings: another name of the same.
    untie_embedding_weights: False; accepted because TorchAoConfig has it.

    Raises TypeError or ValueError for a quant_type that is none of these.
    """

    quant_method: QuantizationMethod  # type: ignore[assignment]
    quant_type: Config | Spec | str
    stored: Stored | None = None
    """What a state dict that `from_pretrained` is given holds, where there are no files of ours."""

    def __init__(
        self,
        quant_type: Any = None,
        modules_to_not_convert: list[str] | None = None,
        include_embedding: bool = False,
        untie_embedding_weights: bool = False,
        *,
        weights: Any = None,
        include_input_output_embeddings: bool = False,
        quant_method: str = "ao",
        quant_type_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if untie_embedding_weights:
            raise ValueError(
                "AoConfig: untie_embedding_weights must be False: a tied embedding and head are quantized as one tensor, with "
                "include_embedding=True; set tie_word_embeddings=False in the model's config to part them"
            )
        if (quant_type is None) == (weights is None):
            raise TypeError(
                "AoConfig: give quant_type, such as AoConfig('int8'), or weights=, which is another name of it"
            )
        quant_type = weights if quant_type is None else quant_type
        kwargs |= quant_type_kwargs or {}
        self.quant_method = QuantizationMethod.AO
        self.quant_type = read_quant_type(quant_type, kwargs, "AoConfig")
        self.quant_type_kwargs = kwargs if self.quant_type == AUTOQUANT else {}
        self.modules_to_not_convert = modules_to_not_convert
        self.include_embedding = include_embedding or include_input_output_embeddings

    @property
    def get_apply_tensor_subclass(self) -> Any:
        """A function that returns the config. PEFT asks for it when it puts adapters on a model."""
        _teach_peft()
        return functools.partial(getattr, self, "quant_type")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `from_dict` reads."""
        _teach_peft()
        return {
            "quant_method": "ao",
            "quant_type": self.quant_type if isinstance(self.quant_type, str) else config_to_dict(self.quant_type),
            "quant_type_kwargs": {key: str(value) for key, value in self.quant_type_kwargs.items()},
            "modules_to_not_convert": self.modules_to_not_convert,
            "include_embedding": self.include_embedding,
        }


def _teach_peft() -> None:
    """Import our module of PEFT, if PEFT is there: it reads the config of a model before it puts adapters on it."""
    if "peft" in sys.modules:
        from . import peft  # noqa: F401


@register_quantizer("ao")
class AoHfQuantizer(HfQuantizer):
    """What `from_pretrained` and `save_pretrained` ask about a model that `ao` quantizes.

    report: what was quantized, and what was passed over and why; `print(model.hf_quantizer.report)`.
    """

    requires_calibration = False
    quantization_config: AoConfig

    def __init__(self, quantization_config: AoConfig, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)  # saving writes into it what was left out
        self.report = Report()
        self.plan: Plan = {}
        self.stored: Stored | ForeignCheckpoint = Stored({})
        self.loading: PreTrainedModel | None = None
        self.keep: list[str] = []
        self.files = MappedFiles(())

    # What transformers asks.

    def is_serializable(self, **kwargs: Any) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters over quantized layers are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` with a static cache may compile."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for a device map with "disk" in it."""
        refuse_disk(device_map)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the parameter is quantized as it loads."""
        return param_name in self.plan

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element, all fields of a quantized parameter counted."""
        if param_name in self.plan:
            spec = self.plan[param_name].spec
        elif isinstance(self.stored, Stored) and param_name in self.stored.entries:
            spec = Spec.from_dict(self.stored.entries[param_name]["spec"])
        else:
            return param.element_size()
        return blank(spec, tuple(param.shape)).nbytes_packed / max(param.numel(), 1)

    # Loading.

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.quantization_config.stored is not None:
            self.stored, self.loading, self.pre_quantized = self.quantization_config.stored, model, True
            return
        if self.quantization_config.quant_type == AS_STORED:
            self.stored, self.loading = foreign_checkpoint(checkpoint_files or []), model
            self.pre_quantized = True  # also where only a file beside config.json says so
            known = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = known | set(map(re.escape, self.stored.ignored))
            return
        if self.pre_quantized:
            self.stored, self.loading = stored = Stored.of(checkpoint_files or []), model
            stored[0].make_room(model)
            return
        self.keep = self.kept(model)
        if self.quantization_config.quant_type != AUTOQUANT:
            self.files = MappedFiles(checkpoint_files or (), kept=may_be_on_cpu(device_map))
            self.plan, self.report = plan_for(model, self.quantization_config, self.keep, embedding_names(model))

    def kept(self, model: PreTrainedModel) -> list[str]:
        """Names, ends of names or regular expressions of the modules that stay as they are."""
        config = self.quantization_config
        left_out = config.modules_to_not_convert
        keep: list[str] = self.get_modules_to_not_convert(model, left_out, list(model._keep_in_fp32_modules or ()))
        if config.include_embedding:
            ends = {name.removesuffix(".weight") for name in embedding_names(model)} - set(left_out or ())
            keep = [name for name in keep if name not in ends]
        return keep

    def get_quantize_ops(self) -> Quantize:
        """Quantize a tensor that was read."""
        return Quantize(self.plan, self.report, self.files)

    def get_weight_conversions(self) -> list[Any]:
        """None: `update_weight_conversions` has them."""
        return []

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """The conversions of the model, after that of the stored fields."""
        if not self.stored.parameters:
            return weight_conversions
        model, self.loading = self.loading, None
        return [Fields(self.stored, weight_conversions, model, self), *weight_conversions]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # Conversions turn the model's names and tensors back into those of its first checkpoint, which the fields of
        # quantized tensors cannot follow: it is saved under its own names.
        model._weight_conversions = []
        for slots in slots_of(model):
            for slot in slots:
                set_parameter(slot.owner, slot.name, slot.parameter)
        for name in self.plan:
            if not isinstance(model.get_parameter_or_buffer(name), QTensor):
                self.report.skipped[name] = "the checkpoint does not have it"
        if self.quantization_config.quant_type == AS_STORED:
            self.quantization_config.quant_type = rules_of(model)
        if self.plan:
            self.report.measure(model)
        if self.quantization_config.quant_type == AUTOQUANT and not self.pre_quantized:

            def chosen(module: nn.Module, name: str) -> bool:
                small = self.quantization_config.modules_to_not_convert is None and few(module, name)
                return is_linear(module, name) and not small and should_convert_module(name, self.keep)

            autoquant(model, **{"manual": True, "filter_fn": chosen, **self.quantization_config.quant_type_kwargs})

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Plain weights in place of the quantized ones, in place. Returns the model, which is one as any other afterwards.

        dtype: for the whole model, also by name ("bfloat16"). By default each weight has the dtype that it decodes to, and
        the others keep theirs.
        """
        wanted = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
            raise ValueError(f"dequantize: dtype must be a floating-point dtype, such as torch.bfloat16, got {dtype!r}")
        dequantize_(model)
        self.remove_quantization_config(model)
        return model if wanted is None else model.to(wanted)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Tell a model that it is not quantized. It is then saved under the names of its first checkpoint again."""
        super().remove_quantization_config(model)
        model.__dict__.pop("_weight_conversions", None)

    # Saving.

    def get_state_dict_and_metadata(self, model: PreTrainedModel, **kwargs: Any) -> tuple[Any, dict[str, str]]:
        """The plain tensors under their stored names, and the header that describes them.

        Raises RuntimeError for a model that `autoquant` is still recording.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters only
        config = self.quantization_config
        if config.quant_type == AUTOQUANT:
            report = getattr(model, "autoquant_report", None)
            if report is None:
                raise RuntimeError("autoquant has not decided yet: call model.finalize_autoquant(), then save")
            config.quant_type, config.quant_type_kwargs = report.plan, {}
        config.modules_to_not_convert = plain_linears(
            model, {n for n, p in model.named_parameters() if isinstance(p, QTensor)}
        )
        state = model.state_dict(keep_vars=True)
        tied = getattr(model, "all_tied_weights_keys", {})
        return flatten(dict(sorted(state.items(), key=lambda item: item[0] in tied)))  # stored under the name tied to


def plain_linears(model: nn.Module, quantized: Collection[str]) -> list[str]:
    """The linear layers whose weights are not among the `quantized` parameters.

    What is quantized follows from a checkpoint's files. This is for readers that must know before they open them, such as
    vLLM.
    """
    return [n for n, m in model.named_modules() if is_linear(m, n) and f"{n}.weight" not in quantized]


def mark_quantized(model: Any, config: AoConfig | None = None) -> Any:
    """Tell a model that `ao.quantize_`, or a recipe, has quantized in place, that it is. Returns the model.

    model: a PreTrainedModel.
    config: what config.json will say; by default the Spec of every parameter.

    From then on `model.save_pretrained(...)` and `from_pretrained` work as for a model that was loaded with an `AoConfig`.
    Raises ValueError for a model without quantized parameters, or one that another library has quantized.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, AoHfQuantizer):
        raise ValueError(
            f"mark_quantized: {quantizer.quantization_config.quant_method} has quantized this model already"
        )
    if not any(isinstance(p, QTensor) for p in model.parameters()):
        raise ValueError(f"mark_quantized: {type(model).__name__} has no quantized parameter; call ao.quantize_ first")
    config = config or AoConfig(rules_of(model))
    model.hf_quantizer = AoHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, config.quant_method
    model._weight_conversions = []
    return model


def unmark_if_plain(model: Any) -> None:
    """Tell a model that no parameter of it is quantized any more, if so: adapters were merged, or it was dequantized."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, AoHfQuantizer) or any(isinstance(p, QTensor) for p in model.parameters()):
        return
    if quantizer.quantization_config.quant_type != AUTOQUANT or hasattr(model, "autoquant_report"):
        quantizer.remove_quantization_config(model)


def is_saved_quantized(model: nn.Module) -> bool:
    """Whether its state dict has quantized tensors. Low-precision training has parameters that are plain there."""
    if not any(isinstance(p, QTensor) for p in model.parameters()):
        return False
    return any(isinstance(t, QTensor) for t in model.state_dict().values())


_save_pretrained = PreTrainedModel.save_pretrained
_get_memory_footprint = PreTrainedModel.get_memory_footprint
_from_pretrained = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]


@functools.wraps(_from_pretrained)
def from_pretrained(cls: Any, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
    """As in transformers. `quantization_config` may be a config of `ao` or of ao.compat, or a Spec, which stands for an AoConfig
    of it. With AoConfig("as_stored"), the weights of a `gguf_file` stay as they are."""
    if isinstance(quantization_config, (Config, Spec)) or hasattr(quantization_config, "to_ao"):
        quantization_config = AoConfig(quantization_config)
    if isinstance(quantization_config, AoConfig) and kwargs.get("gguf_file") is not None:
        return _from_gguf(cls, *args, settings=quantization_config, **kwargs)
    return _from_pretrained(cls, *args, quantization_config=quantization_config, **kwargs)


def _from_gguf(cls: Any, source: Any, *args: Any, settings: AoConfig, gguf_file: str, **kwargs: Any) -> Any:
    """The model of a GGUF file, with its weights in their blocks.

    source: a folder, or a name on the hub. Raises ValueError for settings other than "as_stored", and as `GGUFFile` does.
    """
    if settings.quant_type != AS_STORED:
        raise ValueError(
            "AoConfig: a GGUF file is quantized already, and is loaded by AoConfig('as_stored'); to quantize it anew, convert it "
            "to a model in full precision first"
        )
    from transformers.utils.hub import cached_file

    from .foreign.gguf_file import GGUFFile

    hub = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
    path: Any = cached_file(str(source), gguf_file, **{k: v for k, v in kwargs.items() if k in hub})
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
    dtype = getattr(torch, dtype, torch.bfloat16) if isinstance(dtype, str) else dtype or torch.bfloat16
    file = GGUFFile(Path(path), dtype)
    leaves, header = flatten({name: t for name, t, _ in file.tensors()})
    settings = copy.copy(settings)
    settings.stored = Stored(quantized_entries(header), frozenset(leaves))
    kwargs["config"] = kwargs.get("config") or file.config
    model = _from_pretrained(cls, None, *args, state_dict=leaves, quantization_config=settings, dtype=dtype, **kwargs)
    (model[0] if isinstance(model, tuple) else model).hf_quantizer.report.notes += file.notes()
    return model


@functools.wraps(_save_pretrained)
def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As in transformers, for what the parameters are now: quantized in place, or plain again."""
    unmark_if_plain(self)
    if getattr(self, "hf_quantizer", None) is not None or not is_saved_quantized(self):
        return _save_pretrained(self, *args, **kwargs)
    before = {key: self.__dict__[key] for key in ("_weight_conversions", "is_quantized") if key in self.__dict__}
    mark_quantized(self)
    try:
        return _save_pretrained(self, *args, **kwargs)
    finally:
        self.hf_quantizer.remove_quantization_config(self)
        self.__dict__.update(before)


@functools.wraps(_get_memory_footprint)
def get_memory_footprint(self: Any, return_buffers: bool = True) -> int:
    """As in transformers, in the bytes that quantized parameters take."""
    tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
    return sum(storage_bytes(t) for t in tensors)


PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment,arg-type]
PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
PreTrainedModel.get_memory_footprint = get_memory_footprint  # type: ignore[method-assign]


def rules_of(model: nn.Module) -> FqnToConfig:
    """Rules that would give a model the formats that its parameters have. For those who read a config without the files."""
    parameters = model.named_parameters(remove_duplicate=False)
    found = {name: p.spec for name, p in parameters if isinstance(p, QTensor)}
    table: dict[str, Any] = dict(found)
    layers = [slot.fqn for slots in slots_of(model) for slot in slots if not by_default(slot)]
    if layers:
        # The most common format is the default; what differs from it is named.
        table["_default"] = default = Counter(found.get(name) for name in layers).most_common(1)[0][0]
        table |= dict.fromkeys(set(layers) - found.keys())
        table = {name: spec for name, spec in table.items() if name not in layers or spec != default}
    return FqnToConfig(table)


def foreign_checkpoint(files: list[str]) -> ForeignCheckpoint:
    """The checkpoint in these files. Raises ValueError for files that are not safetensors, and for what no reader knows."""
    stored = StoredTensors(only_safetensors(files))
    folder = Path(files[0]).parent if files else Path()
    config = quantization_config(folder) if files else None
    if config is None:
        raise ValueError(
            f"AoConfig: quant_type='as_stored' is for checkpoints that another library has quantized, and {folder} says "
            "nothing of it; give a config such as 'int4_weight_only'"
        )
    return ForeignCheckpoint.of(config, stored)


def _merge_quantization_configs(cls: Any, stored: Any, given: Any) -> Any:
    """As in transformers, which refuses a config of one library for a checkpoint of another; "as_stored" is for that."""
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if isinstance(given, AoConfig) and given.quant_type == AS_STORED:
        return _original_merge(cls, stored, None) if str(method) == "ao" else given
    return _original_merge(cls, stored, given)


_original_merge = redirect(
    AutoHfQuantizer.merge_quantization_configs.__func__,  # type: ignore[attr-defined]
    _merge_quantization_configs,
)


def may_be_on_cpu(device_map: Any) -> bool:
    """Whether a device map may put modules on the CPU: one that is not decided yet, such as "auto", may."""
    if not isinstance(device_map, dict):
        return True
    return any(str(device) in ("cpu", "disk") for device in device_map.values())


def refuse_disk(device_map: Any) -> None:
    """Raise ValueError for a device map that puts modules on the disk."""
    if isinstance(device_map, dict) and "disk" in device_map.values():
        on_disk = [name for name, device in device_map.items() if device == "disk"]
        raise ValueError(
            f"device_map puts {on_disk[:3]} on the disk, where accelerate stores plain tensors only; give it more memory "
            '(max_memory), "cpu" in place of "disk", or fewer bits'
        )
