"""The form of a weight: what it is but for the numbers in its tensors. Choices, graphs and subgraphs are made once per form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes.base import QTensor, Spec


class Form(NamedTuple):
    """How to make a QTensor of plain tensors. fields: each with the form of a QTensor that is there, else None."""

    cls: type[QTensor]
    spec: Spec
    dtype: torch.dtype
    shape: tuple[int, ...]
    whole: bool
    fields: tuple[tuple[str, Form | None], ...]


def form_of(w: QTensor) -> Form:
    """The form of `w`."""
    fields = ((name, form_of(t) if isinstance(t, QTensor) else None) for name, t in w.fields().items())
    return Form(type(w), w.spec, w.dtype, tuple(w.shape), w.whole, tuple(fields))


def names(form: Form, start: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The attributes that lead to each plain tensor, in the order of `leaves`."""
    for name, inner in form.fields:
        if inner is None:
            yield (*start, name)
        else:
            yield from names(inner, (*start, name))


def leaves(a: Any) -> Iterator[Tensor]:
    """The plain tensors in a QTensor, or what is one itself."""
    if isinstance(a, QTensor):
        for t in a.fields().values():
            yield from leaves(t)
    elif isinstance(a, Tensor):
        yield a


def made(form: Form, tensors: Iterator[Tensor]) -> QTensor:
    """A QTensor of this form over the next plain tensors."""
    cls, spec, dtype, shape, whole, fields = form
    own = {name: next(tensors) if inner is None else made(inner, tensors) for name, inner in fields}
    return cls(spec, dtype, torch.Size(shape), whole, **own)


def key_of(a: Any) -> Any:
    """What distinguishes an argument from others, the numbers in tensors left out: hashable, also where a shape has symbols."""
    if isinstance(a, QTensor):
        return str(form_of(a)), *map(key_of, leaves(a))
    return (str(a.shape), str(a.stride()), a.dtype, a.device) if isinstance(a, Tensor) else a
