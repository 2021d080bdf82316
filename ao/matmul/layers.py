"""Layers whose weight is quantized, at no cost on the way to the product.

`quantize_` and the loaders give a layer with a QTensor for a weight the class that is here for its own class: the same layer
in all but its `forward`, which goes straight to the product. `F.linear` on the weight would be right as well, and slower: in
eager mode by PyTorch's way to a tensor subclass; and a graph that holds a subclass is one whose inputs are taken apart in
Python at every call. So a traced forward gives the compiler the plain fields of the weight, by way of an operator that
stands for the product and is written out before the compiler sees it.

The class has the name of the layer's own, is an `isinstance` of it, and is pickled as it. The weight stays a parameter: if
another one is put in its place, of any kind, the layer goes on working.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes.base import QTensor, sources_digest
from .form import Form, form_of, made, names
from .linear import linear

_FORMS: dict[str, Form] = {}
"""Of the weights in graphs, by name."""


@functools.cache
def _register(form: Form) -> tuple[tuple[tuple[str, ...], ...], str]:
    """The ways to the plain tensors of a weight, and the name of its form in a graph, which is all that tells a compiler's cache
    how the product is made."""
    name = f"{form} {sources_digest()}"
    _FORMS[name] = form
    return tuple(names(form)), name


def _linear(x: Tensor, fields: list[Tensor], bias: Tensor | None, form: str) -> Tensor:
    """`linear` of a weight given as its fields."""
    return linear(x, made(_FORMS[form], iter(fields)), bias)


# CompositeImplicit: whatever is below Dynamo sees what the product is made of.
torch.library.define(
    "ao::linear", "(Tensor x, Tensor[] fields, Tensor? bias, str form) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.impl("ao::linear", "CompositeImplicitAutograd", _linear)


class QuantizedLayer:
    """What a linear layer has before its own class, so that its weight may be quantized at no cost."""

    _parameters: dict[str, Any]
    bias: Any  # Tensor or None
    weight: Any

    def product(self, input: Tensor) -> Tensor:
        """`F.linear(input, self.weight, self.bias)`, whatever the weight is. input: (..., K) -> (..., N)."""
        if torch.compiler.is_compiling():
            # Not is_exporting(), which Dynamo takes for True before torch 2.13.
            form = None if torch.compiler._is_exporting_flag else self._weight_form()
            if form is None:
                return F.linear(input, self.weight, self.bias)
            fields = []
            for path in form[0]:
                t: Any = self.weight
                for name in path:
                    t = getattr(t, name)
                fields.append(t)
            return torch.ops.ao.linear(input, fields, self.bias, form[1])
        parameters = self._parameters
        weight = parameters.get("weight")
        if not isinstance(weight, QTensor):
            return F.linear(input, self.weight, self.bias)
        if "bias" not in parameters:  # FSDP1 has it elsewhere
            return linear(input, weight, self.bias)
        return linear(input, weight, parameters["bias"])

    def _weight_form(self) -> tuple[tuple[tuple[str, ...], ...], str] | None:
        weight = self._parameters.get("weight")
        return _register(form_of(weight)) if isinstance(weight, QTensor) else None

    # What torch.compiler.assume_constant_result does, which imports the compiler.
    _weight_form._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()`, `.half()` and their like. nn.Module would exchange a tensor subclass for another, which PyTorch refuses where
        anything refers to the parameter weakly, such as an exported program; its fields can always be exchanged."""
        weight = self._parameters.get("weight")
        if not isinstance(weight, QTensor):
            return super()._apply(fn, recurse)  # type: ignore[misc]
        with torch.no_grad():
            moved = fn(weight)
            grad = None if weight.grad is None else fn(weight.grad)
            same = moved.device == weight.device
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
        finally:
            self._parameters["weight"] = weight
        if same:
            weight.data = moved
        else:  # Tied layers go on sharing the parameter, unless something refers to it weakly.
            other = nn.Parameter(moved, weight.requires_grad)
            try:
                torch.utils.swap_tensors(weight, other)
            except RuntimeError:
                weight = self._parameters["weight"] = other
        weight.grad = grad
        return self


def told(module: Any) -> str:
    """What a layer of a class below says of itself when its model is printed: that of its own class, and its format."""
    weight = module._parameters.get("weight")
    own: str = module.own_class.extra_repr(module)
    return f"{own}, weight={weight.spec}" if isinstance(weight, QTensor) else own


class _Shown:
    """An embedding or a convolution over a quantized weight: its own class in all, but what it prints."""

    own_class: type[nn.Module]
    extra_repr = told

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remade, (self.own_class,), self.__dict__


class _QuantizedLinear(QuantizedLayer):
    """`nn.Linear` over a quantized weight."""

    own_class: type[nn.Module]
    forward = QuantizedLayer.product
    extra_repr = told

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remade, (self.own_class,), self.__dict__


def _remade(cls: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(_class_of(cls) or cls)  # type: ignore[arg-type]


@functools.cache
def _class_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class for a layer of class `cls` with a quantized weight; None for a layer that is not known."""
    kinds: dict[Callable[..., Any], type[Any]] = {nn.Linear.forward: _QuantizedLinear}
    kinds |= {known.forward: _Shown for known in (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
    kind = kinds.get(cls.forward)
    if kind is None:
        return None
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "own_class": cls}
    quantized: Any = type(cls.__name__, (kind, cls), own)
    return quantized


def layer_class(module: nn.Module) -> type[nn.Module]:
    """The class of a layer, whether its weight is quantized or not: `nn.Linear` of a quantized linear layer."""
    cls = type(module)
    return vars(cls).get("own_class", cls)


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Put `parameter` in its place in `module`, and give the module the class that goes with it."""
    module._parameters[name] = parameter
    adopt(module)


def adopt(module: nn.Module) -> None:
    """Give a layer the class that its weight needs: that of a quantized layer, or its own again."""
    own = layer_class(module)
    if not isinstance(module._parameters.get("weight"), QTensor):
        wanted = own
    elif isinstance(module, (QuantizedLayer, _Shown)):
        return
    else:
        wanted = _class_of(own) or own  # type: ignore[arg-type]
    if wanted is not type(module):
        module.__class__ = wanted
