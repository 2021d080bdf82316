"""A QTensor under FSDP2 and DTensor: shards and gathers move the packed fields, never a dense weight.

FSDP2 asks a tensor for the pieces to all-gather and hands back the gathered ones (PyTorch's fsdp_pre_all_gather and
fsdp_post_all_gather); DTensor runs collectives on it as on any tensor. Both come down to one rule: a field that is cut with
dim 0 travels; one that is the same on every rank (Shared, a `pre_scale`, a qparam whose block spans dim 0) stays. In DTensor
such a qparam travels too: each rank may have quantized its shard anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import OPS, QTensor, as_bytes
from .blocks import spans
from .lattice import opaque
from .views import alias, implements

aten = torch.ops.aten


def _travels(q: QTensor, name: str, apart: bool = False) -> bool:
    """apart: whether the shards may have been quantized apart from each other."""
    role = type(q).roles[name]
    if role == "opaque":
        raise opaque(q, name)
    if role != "per_block" or name == "pre_scale":
        return role == "elements"
    return apart or not spans(q.spec.block_of(name), q.dim(), 0)


def _staying(q: QTensor) -> Iterator[str]:
    """The qparams, also those of a field that travels, that belong to the rows of all ranks."""
    for name, t in q.fields().items():
        if q.roles[name] == "per_block" and name != "pre_scale" and not _travels(q, name):
            yield name
        elif isinstance(t, QTensor):
            yield from (f"{name}.{inner}" for inner in _staying(t))


def _leaves(q: QTensor, apart: bool = False) -> Iterator[Tensor]:
    """The plain tensors that travel, in field order."""
    for name, t in q.fields().items():
        if _travels(q, name, apart):
            yield from _leaves(t, apart) if isinstance(t, QTensor) else (as_bytes(t.contiguous()),)


def _rebuild(q: QTensor, leaves: Iterator[Tensor], dtype: torch.dtype, world: int, apart: bool = False) -> QTensor:
    """`q` with dim 0 `world` times as long, from gathered leaves."""
    fields: dict[str, Tensor] = {}
    for name, t in q.fields().items():
        if not _travels(q, name, apart):
            fields[name] = t
        elif isinstance(t, QTensor):
            fields[name] = _rebuild(t, leaves, t.dtype, world, apart)
        else:
            leaf = next(leaves)
            fields[name] = leaf if leaf.dtype == t.dtype else leaf.view(t.dtype)
    return q.like([q.shape[0] * world, *q.shape[1:]], dtype, fields)


def fsdp_pre_all_gather(
    self: QTensor, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
) -> tuple[tuple[Tensor, ...], int]:
    """The tensors that FSDP2 gathers. Raises ValueError, on every rank alike, when dim 0 does not divide evenly."""
    world = mesh.size() if mesh.ndim == 1 else mesh.size(-1)
    if outer_size[0] % world:
        raise ValueError(
            f"FSDP: dim 0 of this {type(self).__name__} of shape {tuple(outer_size)} does not divide over {world} ranks; "
            "choose another number of ranks, or leave this module out of fully_shard"
        )
    staying = list(_staying(self))
    own = [] if module is None else [(p, getattr(p, "_local_tensor", p)) for p in module.parameters(recurse=False)]
    trained = any(p.requires_grad and isinstance(q, QTensor) and q.spec == self.spec for p, q in own)
    if staying and trained:
        raise ValueError(
            f"FSDP: the {staying[0]} of this trained {type(self).__name__} ({self.spec}) spans dim 0, and each rank would choose "
            "its own; train a weight with blocks inside of rows, such as block=(1, -1)"
        )
    return tuple(_leaves(self)), world


def fsdp_post_all_gather(
    self: QTensor, outputs: tuple[Tensor, ...], world: int, param_dtype: torch.dtype, *, out: Any = None
) -> tuple[QTensor, tuple[Tensor, ...]] | None:
    """The unsharded QTensor over what FSDP2 gathered, without a copy."""
    if world == 1:
        # FSDP2 gathers nothing then, and hands back only the first of the tensors: this shard is the whole.
        if out is None:
            return self.like(self.shape, param_dtype, self.fields()), outputs
        for mine, new in zip(_leaves(getattr(out, "_local_tensor", out)), _leaves(self)):
            if mine.data_ptr() != new.data_ptr():
                mine.copy_(new)
        return None
    if out is None:
        return _rebuild(self, iter(outputs), param_dtype, world), outputs
    local = getattr(out, "_local_tensor", out)
    for mine, gathered in zip(_leaves(local), outputs):
        assert mine.untyped_storage().data_ptr() == gathered.untyped_storage().data_ptr()
    return None


QTensor.fsdp_pre_all_gather = fsdp_pre_all_gather  # type: ignore[attr-defined]
QTensor.fsdp_post_all_gather = fsdp_post_all_gather  # type: ignore[attr-defined]


@implements(aten.as_strided.default)
def as_strided(q: QTensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> QTensor:
    """FSDP2 restates the shape that a tensor has; nothing else is possible over packed fields."""
    if list(size) != list(q.shape) or list(stride) != list(q.stride()) or storage_offset:
        raise NotImplementedError(
            f"as_strided of this {type(q).__name__} of shape {tuple(q.shape)} to {tuple(size)}: packed fields have no strides "
            "to reinterpret; call .dequantize() first"
        )
    return alias(q)


# Functional collectives: DTensor's redistribute.


def _all_gather(q: QTensor, group_size: int, group_name: Any) -> QTensor:
    # One at a time: where two functional gathers of a gloo group end at once, its two threads write one string of the group's
    # status without a lock (seen in torch 2.13), and the process dies of a corrupted heap sooner or later.
    ops = torch.ops._c10d_functional
    gather, wait = ops.all_gather_into_tensor.default, ops.wait_tensor.default
    gathered = (wait(gather(t, group_size, group_name)) for t in _leaves(q, apart=True))
    return _rebuild(q, gathered, q.dtype, group_size, apart=True)


def _each_field(op: Any) -> Callable[..., QTensor]:
    return lambda q, *args: q.map(lambda t: op(t, *args))


# Collectives in place: DTensor's distribute_tensor. A field of a QTensor is a tensor, so the op runs once per field.


def _in_place(op: Any) -> Callable[..., Any]:
    def handler(outputs: list[Tensor], *args: Any) -> Any:
        return outputs, _run(op, outputs, args)

    return handler


def _run(op: Any, outputs: list[Any], args: tuple[Any, ...]) -> Any:
    work = None
    for name, t in outputs[0].fields().items():

        def field(value: Any, name: str = name) -> Any:
            if isinstance(value, (list, tuple)):
                return [field(v, name) for v in value]
            return as_bytes(getattr(value, name).contiguous()) if isinstance(value, QTensor) else value

        out = [as_bytes(getattr(q, name)) for q in outputs]
        inputs = tuple(field(a) for a in args)
        work = _run(op, out, inputs) if isinstance(t, QTensor) else op(out, *inputs)[1]
        work.wait()
    return work


if torch.distributed.is_available():
    _functional, _c10d = torch.ops._c10d_functional, torch.ops.c10d
    OPS[_functional.all_gather_into_tensor.default] = _all_gather
    for _op in (_functional.wait_tensor.default, _functional.broadcast.default):
        OPS[_op] = _each_field(_op)
    # In torch 2.13, of a module that takes long to import and is there when somebody calls the operator.
    OPS["_c10d_functional::_wrap_tensor_autograd"] = lambda q: q.map(_functional._wrap_tensor_autograd.default)
    for _op in (_c10d.scatter_.default, _c10d.broadcast_.default):
        OPS[_op] = _in_place(_op)
