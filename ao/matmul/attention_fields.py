"""Attention and quantizing for keys and values that are given as the plain fields of their QTensors.

A graph that holds a subclass takes it apart in Python at every call. So a cache holds fields, and an operator stands for what is
made of them, which is written out before the compiler sees it; layers.py does the same for weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes.base import QTensor, Spec, quantize_fields
from . import form as forms
from .attention import attend
from .form import form_of
from .graph_fields import FORMS, composite, registered, tensor_of
from .shared_graph import shared, shared_tuple
from .softmax_pieces import Exact, Sight


def register_form(spec: Spec, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], str]:
    """The fields, on meta, of data of `shape` by `spec`, and the name of their form, which is all that tells a compiler's cache
    what is done with them."""
    q = spec.quantize(torch.empty(shape, device="meta", dtype=dtype))
    return list(forms.leaves(q)), registered(form_of(q))[0]


@shared_tuple
def _encoded(x: Tensor, form: str) -> tuple[Tensor, ...]:
    known = FORMS[form]
    fields = quantize_fields(known.spec, x, known.spec.grid(x.shape))
    return tuple(t for name, _ in known.fields for t in forms.leaves(fields[name]))


def _encode(x: Tensor, form: str) -> list[Tensor]:
    return list(_encoded(x, form))


@shared
def _attended(q: Tensor, k: QTensor, v: QTensor, *more: Any) -> Tensor:
    start, stop, end, window, mask, scale, softcap, sinks, *exact = more
    others = [Exact(*exact[i : i + 3]) for i in range(0, len(exact), 3)]
    return attend(q, k, v, Sight(start, stop, end, window, mask), scale, softcap, sinks, others)


def _attend(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    k_form: str,
    v_form: str,
    start: int,
    stop: Tensor | None,
    end: Tensor | None,
    window: int | None,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    exact: list[Tensor],
) -> Tensor:
    more = start, stop, end, window, mask, scale, softcap, sinks, *exact
    return _attended(q, tensor_of(k_form, k), tensor_of(v_form, v), *more)


_ENCODE = composite("kv_encode", "(Tensor x, str form) -> Tensor[]", _encode)
_ATTEND = composite(
    "kv_attend",
    "(Tensor q, Tensor[] k, Tensor[] v, str k_form, str v_form, int start, Tensor? stop, Tensor? end, int? window, "
    "Tensor? mask, float? scale, float? softcap, Tensor? sinks, Tensor[] exact) -> Tensor",
    _attend,
)


def encode_fields(x: Tensor, form: str) -> list[Tensor]:
    """The fields of x (B, kv_heads, T, head_dim), quantized as the form has it, for any number of whole blocks."""
    return _ENCODE(x, form)


def attend_fields(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    k_form: str,
    v_form: str,
    sight: Sight,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    exact: list[Tensor],
) -> Tensor:
    """`attend` of keys and values by their fields. exact: keys, values and positions of each `Exact`, one after the other."""
    start, stop, end, window, mask = sight
    return _ATTEND(q, k, v, k_form, v_form, start, stop, end, window, mask, scale, softcap, sinks, exact)
