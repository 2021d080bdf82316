"""Layers whose weights are quantized, at no cost on the way to the product.

`quantize_` and the loaders give a module with a QTensor for a parameter the class that is here for its own class: the same
module in all but how it reads that parameter. A graph that holds a subclass is one whose inputs are taken apart in Python at
every call. So a traced module gives the compiler the plain fields of the weight, by way of an operator that stands for what is
made of them, and is written out before the compiler sees it.

- `nn.Linear` has another `forward`, which goes straight to the product. `F.linear` on the weight would be right as well, and
  slower: in eager mode by PyTorch's way to a tensor subclass.
- Any other module, an embedding, a convolution, transformers' `Conv1D` and mixtures of experts, keeps its `forward`, and reads
  the parameter through a property.
- A class of somebody else that is derived from `nn.Linear` and has a `forward` of its own stays as it is, since libraries ask
  for the types of linear layers.

The class has the name of the module's own, is an `isinstance` of it, and is pickled as it. The weight stays a parameter: if
another one is put in its place, of any kind, the module goes on working. A weight that is trained enters a graph as it is, for
its gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes.base import QTensor
from ..dtypes.tracing import passed_over
from . import graph_fields
from .form import form_of
from .linear import linear


def _linear(x: Tensor, fields: list[Tensor], bias: Tensor | None, form: str) -> Tensor:
    """`linear` of a weight given as its fields."""
    return linear(x, graph_fields.tensor_of(form, fields), bias)


graph_fields.composite("linear", "(Tensor x, Tensor[] fields, Tensor? bias, str form) -> Tensor", _linear)
graph_fields.composite(
    "weight", "(Tensor[] fields, str form) -> Tensor", lambda fields, form: graph_fields.tensor_of(form, fields)
)


LONGEST = 110
"""Characters of what a module says in one line; more of it has a line for each parameter."""


def _with_formats(said: str, parameters: dict[str, Any]) -> str:
    """What a module says of itself when it is printed, and the formats of its parameters."""
    formats = (f"{name}={p.spec}" for name, p in parameters.items() if isinstance(p, QTensor))
    parts = [part for part in (said, *formats) if part]
    return ("\n" if sum(map(len, parts)) > LONGEST else ", ").join(parts)


def _described(module: nn.Module) -> str:
    """What a printed model says of a quantized layer whose class stays as it is."""
    return _with_formats(type(module).extra_repr(module), module._parameters)


class _QuantizedModule:
    """What a module with quantized parameters has before its own class."""

    _parameters: dict[str, Any]
    in_graph: dict[str, dict[str, Any]]
    own_class: type[nn.Module]
    quantized_names: tuple[str, ...]

    def extra_repr(self) -> str:
        """What a printed model says of it: that of its own class, and the formats of its parameters."""
        cls: Any = getattr(self, "own_class", None)
        own = cls.extra_repr(self) if cls is not None else super().extra_repr()  # type: ignore[misc]
        return _with_formats(own, self._parameters)

    def __repr__(self) -> str:
        """As of its own class; one that says what it likes, as transformers' `Conv1D` does, says the formats as well."""
        said = super().__repr__()
        shown = any(f"{name}={p.spec}" in said for name, p in self._parameters.items() if isinstance(p, QTensor))
        return said if shown or not said.endswith(")") else f"{_with_formats(said[:-1], self._parameters)})"

    def _fields_in_graph(self, name: str) -> tuple[list[Tensor], str] | None:
        """In a graph that is traced: the fields of a parameter and the name of its form. None where it enters as it is."""
        own = self._parameters
        # Not is_exporting(), which Dynamo takes for True before torch 2.13.
        if torch.compiler._is_exporting_flag:
            return None
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.comptime.comptime(graph_fields.met)
        known = self._form_in_graph(name)
        if known is None:
            return None
        direct, trained, form, paths = known
        if trained and torch.is_grad_enabled():
            return None
        if direct:
            kept = self.in_graph[name]
            return [kept[graph_fields.key_of(path)] for path in paths], kept["form"]
        fields = []
        for path in paths:
            t: Any = own[name]
            for field in path:
                t = getattr(t, field)
            fields.append(t)
        return fields, form

    def _form_in_graph(self, name: str) -> tuple[bool, bool, str, tuple[tuple[str, ...], ...]] | None:
        weight: Any = self._parameters.get(name)
        if not isinstance(weight, QTensor):
            return None
        return graph_fields.direct(), weight.requires_grad, *graph_fields.registered(form_of(weight))

    # What torch.compiler.assume_constant_result does, which imports the compiler.
    _form_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.to()`, `.half()` and their like. nn.Module would exchange a tensor subclass for another, which PyTorch refuses where
        anything refers to the parameter weakly, such as an exported program; its fields can always be exchanged."""
        weights = {name: w for name, w in self._parameters.items() if isinstance(w, QTensor)}
        moved = {}
        with torch.no_grad():
            for name, w in weights.items():
                moved[name] = fn(w), None if w.grad is None else fn(w.grad)
        self._parameters.update(dict.fromkeys(weights))
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
        finally:
            self._parameters.update(weights)
        weight: Any
        for name, weight in weights.items():
            data, grad = moved[name]
            if data.device == weight.device:
                weight.data = data
            else:  # Tied layers go on sharing the parameter, unless something refers to it weakly.
                other = nn.Parameter(data, weight.requires_grad)
                try:
                    torch.utils.swap_tensors(weight, other)
                except RuntimeError:
                    weight = self._parameters[name] = other
            weight.grad = grad
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        if "in_graph" in self.__dict__:  # a parameter may have exchanged all that it has with another one
            graph_fields.refreshed(self)  # type: ignore[arg-type]


def _reduced(self: Any, protocol: Any) -> Any:
    """How a module is pickled: as one of its own class."""
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if name != "in_graph"}
    return _remade, (self.own_class, self.quantized_names), state


class QuantizedLayer(_QuantizedModule):
    """What a linear layer has before its own class, so that its weight may be quantized at no cost."""

    bias: Any  # Tensor or None
    weight: Any

    @passed_over
    def product(self, input: Tensor) -> Tensor:
        """`F.linear(input, self.weight, self.bias)`, whatever the weight is. input: (..., K) -> (..., N)."""
        if torch.compiler.is_compiling():
            parts = self._fields_in_graph("weight")
            if parts is None:
                return F.linear(input, self.weight, self.bias)
            return torch.ops.ao.linear(input, parts[0], self.bias, parts[1])
        parameters = self._parameters
        weight = parameters.get("weight")
        if not isinstance(weight, QTensor):
            return F.linear(input, self.weight, self.bias)
        if "bias" not in parameters:  # FSDP1 has it elsewhere
            return linear(input, weight, self.bias)
        return linear(input, weight, parameters["bias"])


def _forward_of_torch_nn() -> Callable[[Any, Tensor], Tensor]:
    """`product`, called from where `nn.Linear` computes: TorchDynamo tells the layers of torch.nn by the file of their forward.
    They are part of the graphs of what calls them, a graph where they are given to torch.compile by themselves, and passed over
    where PyTorch passes over the caller, as over a Sequential that is compiled in place."""
    place = nn.Linear.forward.__code__
    line = max(line for *_, line in place.co_lines() if line is not None)  # that of its product
    forward = lambda self, input: self.product(input)  # noqa: E731  (one line, as a traceback shows one)
    forward.__code__ = forward.__code__.replace(co_filename=place.co_filename, co_firstlineno=line, co_name="forward")
    forward.__name__ = forward.__qualname__ = "forward"
    return forward


class _QuantizedLinear(QuantizedLayer):
    """`nn.Linear` over a quantized weight."""

    forward = _forward_of_torch_nn()
    __reduce_ex__ = _reduced


def _parameter(name: str) -> property:
    """The parameter `name`, which a graph gets as its fields."""

    @passed_over
    def read(self: Any) -> Any:
        if name not in self._parameters:  # parametrizations and FSDP1 have it elsewhere
            if name in self.__dict__:
                return self.__dict__[name]
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        if torch.compiler.is_compiling():
            parts = self._fields_in_graph(name)
            if parts is not None:
                return torch.ops.ao.weight(*parts)
        return self._parameters[name]

    def write(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    def remove(self: Any) -> None:
        del self.__dict__[name]

    return property(read, write, remove)


def _remade(cls: type[nn.Module], names: tuple[str, ...] = ("weight",)) -> nn.Module:
    """A module whose own class is `cls`, to which its attributes come."""
    return nn.Module.__new__(_class_of(cls, names))  # type: ignore[arg-type]


@functools.cache
def _class_of(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class for a module of class `cls`, its own or one that was made here, whose parameters `names` are quantized."""
    if "own_class" in vars(cls):
        return _class_of(vars(cls)["own_class"], names)
    if issubclass(cls, _QuantizedModule):
        return cls  # derived from one of these, by FSDP2 or parametrizations, or one itself
    own: dict[str, Any] = {
        "__module__": cls.__module__, "__qualname__": cls.__qualname__, "own_class": cls, "quantized_names": names
    }  # fmt: skip
    pickled_otherwise = cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__
    if cls.forward is nn.Linear.forward and names == ("weight",):
        base: type = _QuantizedLinear
    elif issubclass(cls, nn.Linear) or pickled_otherwise:
        return cls
    else:
        base = _QuantizedModule
        own |= {"__reduce_ex__": _reduced, **{name: _parameter(name) for name in names}}
    made: Any = type(cls.__name__, (base, cls), own)
    return made


def layer_class(module: nn.Module) -> type[nn.Module]:
    """The class of a layer, whether its weight is quantized or not: `nn.Linear` of a quantized linear layer."""
    cls = type(module)
    return vars(cls).get("own_class", cls)


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Put `parameter` in its place in `module`, and give the module the class that its parameters need: that of one with
    quantized ones, or its own again."""
    module._parameters[name] = parameter
    module.__dict__.get("in_graph", {}).clear()  # what it keeps of parameters that may be others now
    names = tuple(name for name, p in module._parameters.items() if isinstance(p, QTensor))
    wanted = _class_of(type(module), names) if names else layer_class(module)  # type: ignore[arg-type]
    if wanted is not type(module):
        module.__class__ = wanted
    if names and not isinstance(module, _QuantizedModule):
        module.__dict__["extra_repr"] = functools.partial(_described, module)
    elif getattr(module.__dict__.get("extra_repr"), "func", None) is _described:
        del module.__dict__["extra_repr"]
