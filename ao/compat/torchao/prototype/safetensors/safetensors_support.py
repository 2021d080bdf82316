"""torchao.prototype.safetensors.safetensors_support: a state dict as plain tensors, for a file of safetensors, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ao import QTensor, Spec

__all__ = ["flatten_tensor_state_dict", "unflatten_tensor_state_dict"]


def flatten_tensor_state_dict(tensors_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Plain tensors by name, `layer.weight` as `layer._weight_qdata` and so on, and metadata that says how they belong."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {"tensor_names": json.dumps(list(tensors_dict))}
    for name, t in tensors_dict.items():
        if isinstance(t, QTensor):
            base, _, leaf = name.rpartition(".")
            prefix = f"{base}." if base else ""
            metadata[name] = json.dumps(_flatten(t, f"{prefix}_{leaf}", tensors))
        else:
            tensors[name] = t.detach()
            metadata[name] = json.dumps({"_type": type(t.detach()).__name__})
    return tensors, metadata


def _flatten(q: QTensor, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for field, t in q.fields().items():
        inner[field] = None
        if isinstance(t, QTensor):
            inner[field] = _flatten(t, f"{prefix}_{field}", tensors)
        else:
            tensors[f"{prefix}_{field}"] = t.contiguous()
    dtype = str(q.dtype).removeprefix("torch.")
    return {
        "_type": type(q).__name__,
        "spec": q.spec.to_dict(),
        "dtype": dtype,
        "shape": list(q.shape),
        "fields": inner,
    }


def unflatten_tensor_state_dict(
    tensors_data_dict: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict, of those tensors whose parts are all there; and the parts that are left over."""
    left = dict(tensors_data_dict)
    made: dict[str, Tensor] = {}
    for name in json.loads(metadata["tensor_names"]):
        form = json.loads(metadata[name])
        if "spec" not in form:
            if name in left:
                made[name] = left.pop(name)
            continue
        base, _, leaf = name.rpartition(".")
        prefix = f"{base}._{leaf}" if base else f"_{leaf}"
        keys = _keys(form, prefix)
        if all(key in left for key in keys):
            made[name] = nn.Parameter(_unflatten(form, prefix, left), requires_grad=False)
    return made, left


def _keys(form: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for field, inner in form["fields"].items():
        found += [f"{prefix}_{field}"] if inner is None else _keys(inner, f"{prefix}_{field}")
    return found


def _unflatten(form: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> QTensor:
    fields: dict[str, Tensor | None] = {}
    for field, inner in form["fields"].items():
        key = f"{prefix}_{field}"
        fields[field] = tensors.pop(key) if inner is None else _unflatten(inner, key, tensors)
    spec = Spec.from_dict(form["spec"])
    return spec.wrap(fields, getattr(torch, form["dtype"]), form["shape"])
