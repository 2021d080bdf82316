"""What an optimizer needs to know of DTensor: work on local shards, and give states the placements of their parameter."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(t: Any) -> bool:
    """Whether `t` is a DTensor. Importing them takes long, and nobody has one without."""
    if type(t) is Tensor or type(t) is torch.nn.Parameter:  # asked for every parameter at every step
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> Any:
    """The tensor that this rank holds."""
    return t._local_tensor if is_dtensor(t) else t


def shard_like(value: Tensor, like: Tensor, whole: bool = False) -> Tensor:
    """`value` as a DTensor with the mesh, placements and shape of `like`, if that is one.

    value: the local shard; with `whole`, a full tensor, of which this rank takes its part, or any DTensor.
    """
    if not is_dtensor(like):
        return unshard(value)
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    if is_dtensor(value):
        return value.redistribute(mesh, placements)  # type: ignore[attr-defined]
    if whole:
        return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def unshard(value: Tensor) -> Tensor:
    """The full tensor."""
    return value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]


def grad_like(p: Tensor) -> Tensor:
    """The local gradient of `p`, with its placements."""
    grad = p.grad
    assert grad is not None
    if not is_dtensor(grad):
        return grad
    if is_dtensor(p) and grad.placements != p.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    mine: Any = local(grad)
    return mine if isinstance(mine, torch.nn.Parameter) or type(mine) is Tensor else _waited(mine)


def _waited(t: Any) -> Tensor:
    """The result of a collective that may still be under way."""
    return t.wait() if hasattr(t, "trigger_wait") else t
