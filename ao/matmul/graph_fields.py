"""The plain tensors of quantized parameters, as modules keep them for graphs, so that a compiled call costs what one of a plain
model does.

Before every call TorchDynamo asks whether a graph still fits. It passes over the tensors in a dict, and in torch before 2.13 over
a whole tree of modules, if no dict has changed, unless it has to look at attributes of a tensor: one quantized parameter, read
field by field, makes it ask for every tensor of the model, 13 us per layer. So a module whose parameter enters a graph keeps the
fields where Dynamo finds plain tensors in plain dicts:

    module.in_graph[name] is parameter.in_graph = {"form": the name of the form, "qdata": ..., "scale": ..., ...}

The parameter stays what counts. A guard on the module puts the dict of another parameter there, and the parameter itself its new
fields when it is given other data.

Fields that are `alike` in several weights, such as the order of the columns of all layers with one input, are one tensor in a
graph, a copy that nobody writes to: so that input is put in order once, and multiplied with all of these weights at once.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..dtypes.base import QTensor, sources_digest
from . import form as forms
from .form import Form, form_of

FORMS: dict[str, Form] = {}
"""Of the weights in graphs, by name. The name is all that tells a compiler's cache how the product is made."""


@functools.cache
def registered(form: Form) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """The name of a form in a graph, and the attributes that lead to each plain tensor."""
    name = f"{form} {sources_digest()}"
    FORMS[name] = form
    return name, tuple(forms.names(form))


def tensor_of(form: str, fields: Sequence[Any]) -> QTensor:
    """The QTensor over these plain tensors."""
    return forms.made(FORMS[form], iter(fields))


def composite(name: str, schema: str, function: Callable[..., Any]) -> Any:
    """Define the operator `ao::name` that stands in a graph for what is made of fields, and is written out below Dynamo."""
    torch.library.define(f"ao::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"ao::{name}", "CompositeImplicitAutograd", function)
    return getattr(torch.ops.ao, name).default


def key_of(path: tuple[str, ...]) -> str:
    """The key of a plain tensor in what a module keeps."""
    return ".".join(path)


def refreshed(module: nn.Module) -> dict[str, Any]:
    """Put what `module` keeps of its quantized parameters right, and return it."""
    own: dict[str, Any] = module.__dict__.setdefault("in_graph", {})
    now: dict[str, Any] = {}
    for other, weight in module._parameters.items():
        if isinstance(weight, QTensor):
            if "in_graph" not in weight.__dict__:
                weight.__dict__.update(in_graph={}, on_new_data=_filled)
                _filled(weight)
            now[other] = weight.__dict__["in_graph"]
    if own.keys() - now:
        own.clear()
    own.update(now)
    return own


def _filled(weight: QTensor) -> None:
    """The dict of a parameter, as its fields are now."""
    form, paths = registered(form_of(weight))
    fields = dict(zip(map(key_of, paths), forms.leaves(weight)))
    fields |= {name: _shared(fields[name]) for name in weight.alike if name in fields}
    weight.__dict__["in_graph"].clear()
    weight.__dict__["in_graph"].update({"form": form, **fields})


_SHARED: WeakValueDictionary[tuple[torch.device, torch.dtype, bytes], Tensor] = WeakValueDictionary()
"""What weights in graphs have alike, by its numbers, for as long as one of them is there."""


def _shared(t: Tensor) -> Tensor:
    """The tensor of these numbers that is in graphs."""
    if type(t) is not Tensor or t.is_meta:
        return t
    key = t.device, t.dtype, t.cpu().numpy().tobytes()
    shared = _SHARED.get(key)
    if shared is None:
        with torch.inference_mode(False):
            shared = _SHARED[key] = t.clone()
    return shared


class _Trace:
    """What the trace that runs knows of the parameter that it met last."""

    direct = False
    of: Callable[[], Any] = staticmethod(lambda: None)
    """The graph that is being traced, as long as it is there."""


def direct() -> bool:
    """Whether the graph can have the fields of the parameter that `met` has seen last as the module keeps them."""
    return _Trace.direct


def met(context: Any) -> None:
    """At compile time, in a frame with `self`, a module, `own`, its parameters, and `name`, which is one of them: whether the
    graph can have the fields as the module keeps them, and the guard for it.

    It cannot where the program has put another parameter in its place, as torch.func.functional_call does.

    context: of torch._dynamo.comptime, as there is no public way to install a guard.
    """
    from torch._dynamo.guards import install_guard

    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    layer, own, name = (tracer.symbolic_locals[local].realize() for local in ("self", "own", "name"))
    name = name.as_python_constant()
    there = next((weight for key, weight in own.items.items() if key.vt.as_python_constant() == name), None)
    from_module = own.source is not None and getattr(getattr(there, "source", None), "base", None) == own.source
    module, source = getattr(layer, "value", None), layer.source
    direct = from_module and source is not None and isinstance(module, nn.Module) and name in refreshed(module)
    _Trace.direct = direct
    if _Trace.of() is not tracer.output:
        _Trace.of = weakref.ref(tracer.output)
        _refresh_all(tracer.output.root_tx.f_locals.values())
    if direct:
        install_guard(source.make_guard(_guard_of(name)))


def _refresh_all(given: Iterable[Any]) -> None:
    """Put what all modules in `given` keep right: where blocks are regions that are compiled once
    (`torch.compiler.nested_compile_region`), Dynamo does not run the code of a second block, but looks for the tensors of the
    first one there."""
    for root in given:
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if any(isinstance(parameter, QTensor) for parameter in module._parameters.values()):
                refreshed(module)


@functools.cache
def _guard_of(name: str) -> Callable[[Any, Any], None]:
    """Makes the guard of the parameter `name`: one object, by which Dynamo knows it again."""

    def up_to_date(module: Any) -> bool:
        try:
            if module.in_graph[name] is module._parameters[name].in_graph:
                return True
        except (AttributeError, KeyError):  # another parameter, or none
            pass
        return name in refreshed(module)

    def in_graph(builder: Any, guard: Any) -> None:
        text = [f"{guard.name}.in_graph[{name!r}] is of its parameter"]
        builder.get_guard_manager(guard).add_lambda_guard(up_to_date, text, guard.user_stack)

    return in_graph
