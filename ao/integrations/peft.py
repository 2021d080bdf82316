"""PEFT: adapters over quantized layers that can be merged without losing what they learned.

    import ao.integrations.peft  # a model loaded with AoConfig does this by itself

    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    ...
    model = model.merge_and_unload()

Training needs nothing of this. Merging does: a LoRA update is small beside the steps between the codes of a few bits, and adding
it to a quantized weight would mostly round it away (of an update of 3 % of an int4 weight, 1 % is left). A layer that is merged
here, by any of PEFT's methods, becomes a plain one, W + B A in the dtype that W dequantizes to, and its quantized weight is kept
beside it, so that unmerging restores it bit for bit. After `merge_and_unload` the model is a plain one: save it, or
`ao.quantize_` it again. Where layers without adapters stay quantized, so does the model.

What begins from the weight of a layer begins from what it decodes to. Where an initialization takes its part out of the weight
(PiSSA, OLoRA, CorDA), the rest is quantized again by the Spec of the weight. LoftQ needs the weights before quantization:
`peft.replace_lora_weights_loftq(model, path)` reads them, for any format, and solves scaling * B A = W - D(q) in the rank that
it has. DoRA, and trainable tokens, read the weight decoded anew in each forward. `modules_to_save` trains a plain copy.
Adapters on parameters of other layers, such as experts (`target_parameters`), are refused.

PEFT has no place to register a layer class for `nn.Linear`s of a kind, nor how a weight is dequantized. Importing this module
puts functions of its own in front of those of PEFT.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import loftq_utils
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from ..dtypes import QTensor
from ..matmul import set_parameter
from ..quant import dequantize_
from .redirect import redirect
from .transformers import unmark_if_plain

__all__ = ["QuantizedEmbedding", "QuantizedLinear"]


class _Merging:
    """Merges into a dequantized copy of the weight, and keeps the quantized one."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT. The weight of the base layer is a plain one afterwards, if anything was merged."""
        layer = self.get_base_layer()  # type: ignore[attr-defined]
        weight = layer.weight
        if isinstance(weight, QTensor):
            self.__dict__["quantized_weight"] = weight  # not as a parameter, of which a state dict would tell
            set_parameter(layer, "weight", nn.Parameter(weight.detach().dequantize(), requires_grad=False))
        try:
            super().merge(*args, **kwargs)  # type: ignore[misc]
        finally:
            if not self.merged:  # type: ignore[attr-defined]
                self._restore()

    def unmerge(self) -> None:
        """As in PEFT. The weight of the base layer is the quantized one again."""
        super().unmerge()  # type: ignore[misc]
        self._restore()

    def get_base_weight(self) -> Tensor:
        """As in PEFT: the values of the weight."""
        weight = self.get_base_layer().weight  # type: ignore[attr-defined]
        values: Tensor = weight.detach().dequantize() if isinstance(weight, QTensor) else super().get_base_weight()  # type: ignore[misc]
        return values

    def _restore(self) -> None:
        quantized = self.__dict__.pop("quantized_weight", None)
        if quantized is not None:
            layer = self.get_base_layer()  # type: ignore[attr-defined]
            restored = nn.Parameter(quantized.detach().to(layer.weight.device), requires_grad=False)
            set_parameter(layer, "weight", restored)

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__mro__[2],), *made[2:]


class QuantizedLinear(_Merging, Linear):
    """`peft.tuners.lora.Linear` over a layer whose weight is quantized."""


class QuantizedEmbedding(_Merging, Embedding):
    """`peft.tuners.lora.Embedding` over a layer whose weight is quantized."""


_CLASSES: dict[type, type] = {Linear: QuantizedLinear, Embedding: QuantizedEmbedding}


def _merging(cls: type) -> type:
    """The class of a layer of PEFT over a quantized weight."""
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Quantized{cls.__name__}", (_Merging, cls), {"__module__": __name__})
    return _CLASSES[cls]


def _adopt(layer: Any) -> None:
    if _is_quantized(layer.get_base_layer()) and not isinstance(layer, _Merging):
        layer.__class__ = _merging(type(layer))


def _blank(cls: type) -> Any:
    """What pickle and deepcopy fill."""
    made: Any = _merging(cls)
    return made.__new__(made)


def _is_quantized(layer: Any) -> bool:
    return isinstance(getattr(layer, "weight", None), QTensor)


# Layers, as adapters are put on a model and taken off.


_create = LoraModel._create_new_module
_unload = BaseTuner._unload_and_optionally_merge
_update = ModulesToSaveWrapper.update


@functools.wraps(_create)
def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    name = kwargs.get("parameter_name")
    owner = target
    while isinstance(owner, ParamWrapper):
        owner = owner.base_layer
    if name is not None and isinstance(getattr(owner, name, None), QTensor):
        raise NotImplementedError(
            f"target_parameters names {name!r} of {type(owner).__name__}, which is quantized, and PEFT adds its adapter to all "
            'of it in every forward; leave it out when quantizing (modules_to_not_convert=["experts"]), or adapt linear layers'
        )
    return _create(lora_config, adapter_name, target, **kwargs)


def _adopting(replace: Callable[..., None]) -> Callable[..., None]:
    """`_replace_module` of a tuner, which puts each new layer into the model, one at a time."""

    @functools.wraps(replace)
    def call(self: BaseTuner, parent: nn.Module, child_name: str, new_module: Any, child: Any) -> None:
        replace(self, parent, child_name, new_module, child)
        if isinstance(new_module, BaseTunerLayer) and hasattr(new_module, "merge"):
            _adopt(new_module)

    return call


@functools.wraps(_unload)
def _unload_and_optionally_merge(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
    model = _unload(self, *args, **kwargs)
    unmark_if_plain(model)
    return model


@functools.wraps(_update)
def _update_module(self: ModulesToSaveWrapper, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    _update(self, adapter_name, *args, **kwargs)
    dequantize_(self.modules_to_save[adapter_name])


LoraModel._create_new_module = staticmethod(_create_new_module)
_tuners = [BaseTuner]
for _tuner in _tuners:
    _tuners += [each for each in _tuner.__subclasses__() if each not in _tuners]
    if "_replace_module" in vars(_tuner):
        _tuner._replace_module = _adopting(_tuner._replace_module)
BaseTuner._unload_and_optionally_merge = _unload_and_optionally_merge
ModulesToSaveWrapper.update = _update_module


def _adapter_state(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """As in PEFT, without the embedding and the head where they are quantized: the model's own files have them."""
    state = _get_peft_model_state_dict(*args, **kwargs)
    return {name: t for name, t in state.items() if not isinstance(t, QTensor)}


_get_peft_model_state_dict = redirect(get_peft_model_state_dict, _adapter_state)


# The values of a weight.


def _module_weight(module: Any) -> Any:
    return module.weight.detach().dequantize() if _is_quantized(module) else _dequantize_module_weight(module)


_dequantize_module_weight = redirect(dequantize_module_weight, _module_weight)


@contextmanager
def _decoded(layer: Any) -> Iterator[None]:
    """A plain weight in place of a quantized one; what is changed of it is quantized by the same Spec at the end."""
    if not _is_quantized(layer):
        yield
        return
    quantized = layer.weight
    set_parameter(layer, "weight", nn.Parameter(quantized.detach().dequantize(), requires_grad=False))
    try:
        yield
        values = layer.weight.detach()
    finally:
        set_parameter(layer, "weight", quantized)
    with torch.no_grad():
        if not torch.equal(values, quantized.detach().dequantize()):
            changed = quantized.detach().clone()
            changed.copy_(values)
            set_parameter(layer, "weight", nn.Parameter(changed, requires_grad=False))


def _over_decoded(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _decoded(self.get_base_layer()):
            return method(self, *args, **kwargs)

    return call


for _cls in (LoraLayer, Linear, Embedding):
    for _name in ("pissa_init", "olora_init", "corda_init", "mica_init", "orthogonal_init", "lora_ga_init"):
        if _name in vars(_cls):
            setattr(_cls, _name, _over_decoded(vars(_cls)[_name]))

_loftq_init = LoraLayer.loftq_init


@functools.wraps(_loftq_init)
def _loftq_init_of_plain(self: LoraLayer, *args: Any, **kwargs: Any) -> None:
    if _is_quantized(self.get_base_layer()):
        raise ValueError(
            "init_lora_weights='loftq' needs the weights before quantization, and the model is quantized; leave it out, and call "
            "peft.replace_lora_weights_loftq(peft_model, model_path) with the folder of the model as it was trained"
        )
    _loftq_init(self, *args, **kwargs)


LoraLayer.loftq_init = _loftq_init_of_plain


@torch.no_grad()
def _replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """As in PEFT, for linear layers of any of our formats: scaling * B A is the best approximation to W - D(q) in its rank."""
    layers = {name: m for name, m in peft_model.named_modules() if isinstance(m, QuantizedLinear) and not m.merged}
    if not layers:
        _replace_bitsandbytes(peft_model, model_path, adapter_name, callback)
        return
    loader = loftq_utils._SafetensorLoader(peft_model, None if model_path is None else str(model_path))
    for name, layer in layers.items():
        name = name.removeprefix("base_model.model.")
        q, a, b = layer.get_base_layer().weight, layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        original = loader.get_tensor(f"{name}.weight").to(q.device, torch.float32)
        if original.shape != q.shape:
            raise ValueError(
                f"{name}.weight is of shape {tuple(original.shape)} in the file, {tuple(q.shape)} in the model"
            )
        u, s, v = torch.linalg.svd(original - q.detach().dequantize().float(), full_matrices=False)
        root = (s[: len(a)] / layer.scaling[adapter_name]).sqrt()
        before = a.detach().clone(), b.detach().clone()
        a.copy_(root[:, None] * v[: len(a)])
        b.copy_(u[:, : len(a)] * root)
        if callback is not None and not callback(peft_model, name):
            a.copy_(before[0])
            b.copy_(before[1])


_replace_bitsandbytes = redirect(loftq_utils.replace_lora_weights_loftq, _replace_lora_weights_loftq)


# Trainable tokens.


_merged_weights = TrainableTokensLayer.get_merged_weights
_update_tokens = TrainableTokensLayer.update_layer


@functools.wraps(_merged_weights)
def _get_merged_weights(self: TrainableTokensLayer, active_adapters: Any) -> Tensor:
    if not _is_quantized(self.base_layer):
        return _merged_weights(self, active_adapters)
    w: Tensor = self.base_layer.weight.detach().dequantize()
    for name in active_adapters:
        index = torch.tensor(self.token_indices[name], dtype=torch.int64, device=w.device)
        w = w.index_copy(0, index, self.trainable_tokens_delta[name].to(w))
    return w


TrainableTokensLayer.get_merged_weights = _get_merged_weights


@functools.wraps(_update_tokens)
def _update_layer(self: TrainableTokensLayer, *args: Any, **kwargs: Any) -> None:
    with _decoded(self.get_base_layer()):
        _update_tokens(self, *args, **kwargs)
    _adopt(self)


TrainableTokensLayer.update_layer = _update_layer
