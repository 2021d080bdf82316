"""safetensors: `save_file`, `save`, `save_model` and `load_model` for state dicts and models with quantized tensors.

    import ao.integrations.safetensors  # importing the module of transformers, diffusers or peft does this too

    safetensors.torch.save_file(model.state_dict(), "model.safetensors")
    model.load_state_dict(ao.load("model.safetensors"), assign=True)

The files are those of `ao.save`: each quantized tensor as its fields, with a header that describes them. `load_file` returns
the fields, as the loaders of transformers and diffusers need them; `ao.load` returns the tensors. What finds tensors that are
tied by their storages, such as `save_model` of accelerate, finds quantized ones too.

safetensors has no place to register how a tensor is stored: these functions are changed when this module is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..dtypes import QTensor, load
from ..dtypes.base import FUNCTIONS
from ..dtypes.checkpoint import apart, flatten
from .redirect import redirect

__all__: list[str] = []


def _save_file(
    tensors: Mapping[str, Tensor], filename: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """As in safetensors; and quantized tensors as `ao.save` stores them."""
    _original_save_file(*_described(tensors, filename, metadata))


def _save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    plain, _, described = _described(tensors, "", metadata)
    return _original_save(plain, described)


def _described(tensors: Any, filename: Any, metadata: Any) -> tuple[Any, Any, Any]:
    if not any(isinstance(t, QTensor) for t in tensors.values()):
        return tensors, filename, metadata
    leaves, header = flatten(tensors)
    return apart(leaves), filename, {**(metadata or {}), **header}


def _save_model(
    model: nn.Module, filename: str, metadata: Mapping[str, str] | None = None, force_contiguous: bool = True
) -> None:
    """As in safetensors; with quantized tensors, tied ones are kept by the header, and all is made contiguous."""
    state = model.state_dict(keep_vars=True)
    if any(isinstance(t, QTensor) for t in state.values()):
        _save_file(state, filename, metadata)
    else:
        _original_save_model(model, filename, metadata, force_contiguous)


def _load_model(
    model: nn.Module,
    filename: str | os.PathLike[str],
    strict: bool = True,
    device: Any = "cpu",
    **kwargs: Any,
) -> tuple[list[str], list[str]]:
    """As in safetensors; a file with quantized tensors into a model with such of the same shapes."""
    with safetensors.safe_open(filename, framework="pt") as file:
        described = "ao" in (file.metadata() or {})
    if not described:
        return _original_load_model(model, filename, strict, device, **kwargs)
    found = model.load_state_dict(load(filename, device=device), strict=strict)
    return found.missing_keys, found.unexpected_keys


class _Storage:
    """What libraries ask of a storage to find tensors that are tied: of a quantized tensor, that of its first field."""

    def __init__(self, q: Tensor) -> None:
        self.tensor = q

    def data_ptr(self) -> int:
        first = next(iter(self.tensor.fields().values())) if isinstance(self.tensor, QTensor) else self.tensor
        return _Storage(first).data_ptr() if isinstance(first, QTensor) else first.untyped_storage().data_ptr()

    def size(self) -> int:
        return self.tensor.numel()


FUNCTIONS[torch.Tensor.storage] = _Storage
_original_save_file = redirect(safetensors.torch.save_file, _save_file)
_original_save = redirect(safetensors.torch.save, _save)
_original_save_model = redirect(safetensors.torch.save_model, _save_model)
_original_load_model = redirect(safetensors.torch.load_model, _load_model)
