"""PEFT: adapters over quantized layers that can be merged without losing what they learned.

    import ao.integrations.peft  # a model loaded with AoConfig does this by itself

    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    ...
    model = model.merge_and_unload()

Training needs nothing of this. Merging does: a LoRA update is small beside the steps between the codes of a few bits, and adding
it to a quantized weight would mostly round it away (of an update of 3 % of an int4 weight, 1 % is left). A layer that is merged
here becomes a plain one, W + B A in the dtype that W dequantizes to, and its quantized weight is kept beside it, so that
unmerging restores it bit for bit. After `merge_and_unload` the model is a plain one: save it, or `ao.quantize_` it again.

DoRA reads the weight that it is added to, decoded anew in each forward. Adapters on parameters of other layers, such as experts
(`target_parameters`), are refused.

PEFT has no place to register a layer class for `nn.Linear`s of a kind, nor how a weight is dequantized. Importing this module
puts functions of its own in front of those with which PEFT chooses the class and dequantizes.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraModel, dora, variants
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from torch import nn

from ..dtypes import QTensor

__all__ = ["QuantizedEmbedding", "QuantizedLinear"]


class _Merging:
    """Merges into a dequantized copy of the weight, and keeps the quantized one."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT. The weight of the base layer is a plain one afterwards, if anything was merged."""
        layer = self.get_base_layer()  # type: ignore[attr-defined]
        weight = layer.weight
        if isinstance(weight, QTensor):
            self.__dict__["quantized_weight"] = weight  # not as a parameter, of which a state dict would tell
            layer.weight = nn.Parameter(weight.detach().dequantize(), requires_grad=False)
        try:
            super().merge(*args, **kwargs)  # type: ignore[misc]
        finally:
            if not self.merged:  # type: ignore[attr-defined]
                self._restore()

    def unmerge(self) -> None:
        """As in PEFT. The weight of the base layer is the quantized one again."""
        super().unmerge()  # type: ignore[misc]
        self._restore()

    def _restore(self) -> None:
        quantized = self.__dict__.pop("quantized_weight", None)
        if quantized is not None:
            layer = self.get_base_layer()  # type: ignore[attr-defined]
            layer.weight = nn.Parameter(quantized.detach().to(layer.weight.device), requires_grad=False)


class QuantizedLinear(_Merging, Linear):
    """`peft.tuners.lora.Linear` over a layer whose weight is quantized."""


class QuantizedEmbedding(_Merging, Embedding):
    """`peft.tuners.lora.Embedding` over a layer whose weight is quantized."""


CLASSES: dict[type[nn.Module], type[nn.Module]] = {Linear: QuantizedLinear, Embedding: QuantizedEmbedding}

_create = LoraModel._create_new_module


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
    made = _create(lora_config, adapter_name, target, **kwargs)
    if type(made) in CLASSES and isinstance(getattr(made.get_base_layer(), "weight", None), QTensor):
        made.__class__ = CLASSES[type(made)]
    return made


LoraModel._create_new_module = staticmethod(_create_new_module)

_dequantize = dora.dequantize_module_weight


def _dequantize_module_weight(module: Any) -> Any:
    weight = getattr(module, "weight", None)
    return weight.detach().dequantize() if isinstance(weight, QTensor) else _dequantize(module)


for _user in (dora, variants):
    _user.dequantize_module_weight = _dequantize_module_weight
