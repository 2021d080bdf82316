"""Parameters that PyTorch joins to send them at once: the first broadcast of DistributedDataParallel.

DDP flattens the parameters of a module, joins them, broadcasts what comes out, cuts it up and copies the parts back, in C++.
Packed fields have no flat form in common, and joined values would be rounded anew. So what is joined here is only a list: a
broadcast sends the fields of each part, and a cut gives the part back. Every other operator raises.

From Python, a QTensor is flattened and joined as views.py and ops.py say. PyTorch tells the two apart: Python enters by
`__torch_function__`, which is switched off below it.

FullyShardedDataParallel joins parameters for good, as one that has a storage of its own. That cannot be, and is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import views  # noqa: F401  registers the operator that is wrapped here
from .base import FUNCTIONS, OPS, QTensor
from .tracing import is_eager

aten = torch.ops.aten

_view = OPS[aten.view.default]


class Joined(torch.Tensor):
    """What flat tensors would be if they were joined. parts: QTensors, and flat plain tensors that share `plain`."""

    parts: list[Tensor]
    plain: Tensor | None

    @staticmethod
    def __new__(cls, parts: Sequence[Tensor], plain: Tensor | None = None) -> Joined:
        size = sum(p.numel() for p in parts)
        return torch.Tensor._make_wrapper_subclass(cls, (size,), dtype=parts[0].dtype, device=parts[0].device)

    def __init__(self, parts: Sequence[Tensor], plain: Tensor | None = None) -> None:
        self.parts, self.plain = list(parts), plain

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Joined({', '.join(type(p).__name__ for p in self.parts)}; {self.numel()} elements)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = _HANDLERS.get(func)
        if handler is None:
            raise NotImplementedError(
                f"{func}: quantized parameters were flattened and joined, which only a broadcast is done with; call "
                ".dequantize() on each first"
            )
        return handler(*args, **(kwargs or {}))


def _flattened(q: QTensor, size: Sequence[int]) -> Tensor:
    field = next(iter(q.fields().values()))
    inside = torch._C._is_torch_function_enabled()  # called by PyTorch itself
    return Joined([q]) if inside and list(size) == [-1] and is_eager(field) else _view(q, size)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Joined:
    others = [t for t in tensors if not isinstance(t, Joined)]
    plain = torch.cat(others) if others else None
    rest = iter(() if plain is None else plain.split([t.numel() for t in others]))
    return Joined([p for t in tensors for p in (t.parts if isinstance(t, Joined) else [next(rest)])], plain)


def _cut(joined: Joined, dim: int = 0, start: int | None = 0, end: int | None = None, step: int = 1) -> Tensor:
    at, end = 0, joined.numel() if end is None else min(end, joined.numel())
    for part in joined.parts:
        if (at, at + part.numel()) == (start or 0, end):
            return Joined([part]) if isinstance(part, QTensor) else part
        at += part.numel()
    raise NotImplementedError(f"[{start}:{end}) is no parameter among those that were joined: {joined}")


def _given_back(joined: Joined, size: Sequence[int]) -> Tensor:
    (part,) = joined.parts
    if list(size) not in ([-1], list(part.shape)):
        raise NotImplementedError(f"a flattened {type(part).__name__} of shape {tuple(part.shape)} is no {tuple(size)}")
    return joined.detach() if list(size) == [-1] else part.detach()


def _flatten(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.flatten` of a QTensor from Python: the first thing that FullyShardedDataParallel does to a parameter."""
    if not torch.compiler.is_compiling() and _is_fsdp(sys._getframe(1)):
        raise NotImplementedError(
            "FullyShardedDataParallel cannot join quantized parameters: use torch.distributed.fsdp.fully_shard, which shards "
            "them, or leave them whole on each rank with "
            "ignored_states=[p for p in model.parameters() if isinstance(p, ao.dtypes.QTensor)]"
        )
    with torch._C.DisableTorchFunctionSubclass():
        return torch.flatten(t, *args, **kwargs)


def _is_fsdp(frame: Any) -> bool:
    """Whether the code of PyTorch that flattens parameters is what called, a few frames above."""
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_globals.get("__name__") == "torch.distributed.fsdp._flat_param":
            return True
        frame = frame.f_back
    return False


def _broadcast(tensors: Sequence[Any], *args: Any) -> Any:
    op, work = torch.ops.c10d.broadcast_.default, None
    for joined in tensors:
        quantized = [p for p in joined.parts if isinstance(p, QTensor)]
        for t in quantized if joined.plain is None else [joined.plain, *quantized]:
            _, work = op([t], *args)
            work.wait()
    return tensors, work


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _cut,
    aten.view.default: _given_back,
    aten.detach.default: lambda joined: Joined(joined.parts, joined.plain),
}

if torch.distributed.is_available():
    _HANDLERS[torch.ops.c10d.broadcast_.default] = _broadcast
    OPS[aten.view.default] = _flattened
    FUNCTIONS[torch.flatten] = _flatten
