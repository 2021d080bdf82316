"""Whether a layer can compute with a quantized parameter, found by trying.

What a layer of PyTorch does with its weight is known. A subclass may standardize its weight first, or scale it, which has no
low-bit form: it is tried with an input of the right shape, on fake tensors, with which nothing is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import Intx, QTensor, Spec

_ONE_PRODUCT: tuple[Any, ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
"""Layers whose forward is one product with the weight."""

_SMALL: dict[type[nn.Module], Callable[[], tuple[Tensor, ...]]] = {
    nn.RNN: lambda: (torch.zeros(1, 2, 4, dtype=torch.float32, device="cpu"),),
    nn.LSTM: lambda: (torch.zeros(1, 2, 4, dtype=torch.float32, device="cpu"),),
    nn.GRU: lambda: (torch.zeros(1, 2, 4, dtype=torch.float32, device="cpu"),),
    nn.RNNCell: lambda: (torch.zeros(1, 4, dtype=torch.float32, device="cpu"),),
    nn.LSTMCell: lambda: (torch.zeros(1, 4, dtype=torch.float32, device="cpu"),),
    nn.GRUCell: lambda: (torch.zeros(1, 4, dtype=torch.float32, device="cpu"),),
}
"""Layers that PyTorch computes by one operator, which differs from device to device, and an input of four features."""


def can_try() -> bool:
    """Whether tensors are real here: under a mode that fakes them, nothing that is made may be kept."""
    return type(torch.empty(0, dtype=torch.float32, device="cpu")) is Tensor and not torch.compiler.is_compiling()


def why_it_cannot(owner: nn.Module, leaf: str, p: Tensor, spec: Spec) -> str:
    """Why `owner` cannot compute with its parameter `leaf` quantized by `spec`; "" where it can, or where nobody knows."""
    cls: Any = type(owner)
    if cls.__module__.partition(".")[0] == __name__.partition(".")[0] or not can_try():
        return ""
    if cls in _SMALL:
        error = _try_small(cls)
    elif leaf != "weight" or _is_one_product(owner, spec):
        return ""
    else:
        error = _try_twin(owner, p, spec)
    if not error:
        return ""
    return f"{cls.__name__} does with its {leaf} what has no low-bit form ({error}); leave it out"


def _is_one_product(owner: nn.Module, spec: Spec) -> bool:
    for cls in _ONE_PRODUCT:
        if isinstance(owner, cls):
            names = ("forward", "_conv_forward")
            return all(getattr(type(owner), name, None) is getattr(cls, name, None) for name in names)
    if isinstance(owner, nn.Embedding) and type(owner).forward is nn.Embedding.forward:
        usual = owner.max_norm is None and not owner.scale_grad_by_freq and not owner.sparse
        return usual and "opaque" not in spec.tensor_type.roles.values()
    return False


@functools.cache
def _try_small(cls: Any) -> str:
    """The error of a small layer of this type whose matrices are quantized, or ""."""
    layer: nn.Module = cls(4, 4, device="meta").to_empty(device="cpu")
    for name, p in layer._parameters.items():
        assert p is not None
        values = torch.zeros(p.shape, dtype=torch.float32, device="cpu")
        layer._parameters[name] = nn.Parameter(Intx(8).quantize(values) if p.dim() > 1 else values, requires_grad=False)
    return _error(lambda: layer(*_SMALL[cls]()))


@torch.no_grad()
def _try_twin(owner: nn.Module, p: Tensor, spec: Spec) -> str:
    """The error of a layer whose weight is quantized, where there is none as it is, or ""."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        twin = _twin(owner)
        try:
            inputs, q = _inputs(owner, p.dtype), spec.quantize(_fake(p))
        except (AttributeError, TypeError):  # of a shape that is unknown here, or for another device
            return ""
        if not inputs or _error(lambda: type(twin).forward(twin, *inputs)):
            return ""
        twin._parameters["weight"] = nn.Parameter(q, requires_grad=False)
        return _error(lambda: type(twin).forward(twin, *inputs))


@torch.no_grad()
def _error(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception as error:
        return (str(error) or type(error).__name__).splitlines()[0].partition(": call .dequantize()")[0]
    return ""


def _twin(module: nn.Module) -> nn.Module:
    """A module like this one, whose tensors are fake."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {name: t if t is None else _fake(t) for name, t in module.__dict__[kind].items()}
    twin.__dict__["_modules"] = {name: m if m is None else _twin(m) for name, m in module._modules.items()}
    return twin


def _fake(t: Tensor) -> Tensor:
    return t.map(_fake) if isinstance(t, QTensor) else torch.empty(t.shape, dtype=t.dtype, device="cpu")


def _inputs(owner: nn.Module, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Arguments for a layer of a kind that is known, else none."""
    make = functools.partial(torch.empty, dtype=dtype, device="cpu")
    if isinstance(owner, nn.Linear):
        return (make(2, owner.in_features),)
    if isinstance(owner, nn.modules.conv._ConvNd):
        sides = [3 * d * k for d, k in zip(owner.dilation, owner.kernel_size)]
        return (make(1, owner.in_channels, *sides),)
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return (torch.zeros(2, 3, dtype=torch.int64, device="cpu"),)
    if isinstance(owner, nn.Bilinear):
        return make(2, owner.in1_features), make(2, owner.in2_features)
    return ()
