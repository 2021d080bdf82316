"""The ATen operators that copy, write, join, gather or compare a QTensor, written once over the roles of its fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import FUNCTIONS, OPS, QTensor, as_bytes, dense, quantize_fields
from .bits import pack_dim
from .blocks import expand
from .views import cannot_cut, implements, map_ranked, resized, transpose

aten = torch.ops.aten


@implements(aten.dequantize.self)
def dequantize(q: QTensor) -> Tensor:
    return q.decode_scaled(q.dtype)


@implements(aten.clone.default)
def clone(q: QTensor, *, memory_format: Any = None) -> QTensor:
    return q.map(torch.clone)


@implements(aten._to_copy.default)
def to_copy(q: QTensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> QTensor:
    dtype = dtype or q.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"this {type(q).__name__} dequantizes to a floating-point dtype, not to {dtype}")
    kwargs = {k: v for k, v in kwargs.items() if k in ("non_blocking", "pin_memory")}
    moved = {name: aten._to_copy(t, device=device, **kwargs) for name, t in q.fields().items()}
    return q.like(q.shape, dtype, moved)


@implements(aten._pin_memory.default)
def pin_memory(q: QTensor, device: Any = None) -> QTensor:
    return q.map(lambda t: t.pin_memory())


@implements(aten.is_pinned.default)
def is_pinned(q: QTensor, device: Any = None) -> bool:
    return all(t.is_pinned() for t in q.fields().values())


@implements(aten.record_stream.default)
def record_stream(q: QTensor, stream: Any) -> None:
    for t in q.fields().values():
        t.record_stream(stream)


@implements(aten.empty_like.default)
def empty_like(q: QTensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> QTensor:
    return q.like(q.shape, dtype or q.dtype, {k: torch.empty_like(t, device=device) for k, t in q.fields().items()})


def _plain_like(op: Any) -> Callable[..., Tensor]:
    """A plain tensor of q's shape: optimizers allocate their states with `zeros_like`, and a state is no weight."""

    def handler(q: QTensor, *args: Any, **kwargs: Any) -> Tensor:
        blank = torch.empty(q.shape, dtype=q.dtype, device="meta")
        return op(blank, *args, **{**kwargs, "device": kwargs.get("device") or q.device})

    return handler


for _op in (aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like):
    OPS[_op.default] = _plain_like(_op.default)
for _op in (aten.new_ones, aten.new_full, aten.new_empty_strided):
    OPS[_op.default] = _plain_like(_op.default)


def _new(allocate: Callable[..., Tensor], q: QTensor, size: Sequence[int], dtype: Any, device: Any) -> Tensor:
    if len(size) != q.dim():
        return allocate(list(size), dtype=dtype or q.dtype, device=device or q.device)

    def sized(role: str, t: Tensor) -> Tensor:
        sizes = []
        for d, (new, n, f) in enumerate(zip(size, q.shape, t.shape)):
            if (new * f) % max(n, 1) and f != 1:
                raise cannot_cut(q, d, 0, new, f"blocked or packed, {n} elements to {f}", n // math.gcd(n, f))
            sizes.append(1 if f == 1 and role == "per_block" else new * f // max(n, 1))
        if isinstance(t, QTensor):
            return _new(allocate, t, sizes, t.dtype, device)
        return allocate(sizes, dtype=t.dtype, device=device or t.device)

    made = {k: (t if type(q).roles[k] == "shared" else sized(type(q).roles[k], t)) for k, t in q.fields().items()}
    return q.like(size, dtype or q.dtype, made)


@implements(aten.new_zeros.default)
def new_zeros(q: QTensor, size: Sequence[int], *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
    return _new(torch.zeros, q, size, dtype, device)


@implements(aten.new_empty.default)
def new_empty(q: QTensor, size: Sequence[int], *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
    return _new(torch.empty, q, size, dtype, device)


@implements(aten.copy_.default)
def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Into a QTensor: its fields where they match, else quantize anew. Out of one: dequantize."""
    if not isinstance(target, QTensor):
        assert isinstance(source, QTensor)
        return target.copy_(source.decode_scaled(), non_blocking)
    if isinstance(source, QTensor):
        if _same_form(target, source):
            for name, t in target.fields().items():
                t.copy_(source.fields()[name], non_blocking)
            return target
        source = source.decode_scaled()
    if not target.whole:
        raise ValueError(
            f"this {type(target).__name__} of shape {tuple(target.shape)} is a view that shares the scales of its blocks with "
            "elements outside of it, so it cannot be quantized anew in place; write to the whole tensor, or .clone() the view"
        )
    values = source.to(target.device, torch.float32, non_blocking=non_blocking).expand(target.shape)
    d = _packed(target)
    if d is not None and d != pack_dim(target.shape, 1):
        # Codes are packed along a dim that `encode` would not choose for this shape: a transposed view. Turn it back.
        copy_(transpose(target, d, -1), values.transpose(d, -1))
        return target
    fields = target.fields()
    if any(role == "opaque" and name in fields for name, role in type(target).roles.items()):
        raise NotImplementedError(
            f"this {type(target).__name__} in a device-specific layout cannot be written in place"
        )
    made = quantize_fields(target.spec, values, fields["scale"].shape, target.pre_scale)
    for name, new in made.items():
        if new is not None:
            fields[name].copy_(new)
    return target


def set_data(target: Tensor, source: Tensor) -> None:
    """`target.data = source`: the fields of `source`, shared. PyTorch's own would exchange dtype and shape, and leave the
    fields as they are.

    Raises TypeError unless both are of one class.
    """
    if type(target) is not type(source) or not isinstance(target, QTensor) or not isinstance(source, QTensor):
        form, given = (t.spec if isinstance(t, QTensor) else "a plain tensor" for t in (target, source))
        raise TypeError(
            f"cannot assign {given} to the data of {form}: replace the parameter, `module.weight = torch.nn.Parameter(...)`, "
            "or write the values with copy_"
        )
    alias: QTensor = source.detach()  # type: ignore[assignment]
    with torch._C.DisableTorchFunctionSubclass():
        _data.__set__(target, alias)
    target.spec, target.whole = alias.spec, alias.whole
    for name in type(target).roles:
        setattr(target, name, getattr(alias, name))
    for kept in ("flattened", "choices"):  # of what it was
        target.__dict__.pop(kept, None)


_data: Any = torch.Tensor.data

FUNCTIONS[_data.__set__] = set_data
# What tells accelerate which parameters are tied.
FUNCTIONS[torch.Tensor.data_ptr] = lambda q: next(iter(q.fields().values())).data_ptr()


def _packed(q: QTensor) -> int | None:
    """The dim along which the elements are packed, if they are."""
    sizes = [t.shape for name, t in q.fields().items() if type(q).roles[name] == "elements"]
    return next((d for shape in sizes for d in range(q.dim()) if shape[d] != q.shape[d]), None)


def _same_form(a: QTensor, b: QTensor) -> bool:
    fa, fb = a.fields(), b.fields()
    return (
        type(a) is type(b)
        and a.spec == b.spec
        and fa.keys() == fb.keys()
        and all(fa[k].shape == fb[k].shape and fa[k].dtype == fb[k].dtype for k in fa)
    )


# Joins, gathers, comparisons.


@implements(aten.cat.default)
def cat(tensors: Sequence[Tensor], dim: int = 0) -> QTensor:
    first = next(t for t in tensors if isinstance(t, QTensor))
    d = dim % first.dim()
    for t in tensors:
        if not isinstance(t, QTensor) or type(t) is not type(first) or t.spec != first.spec:
            raise NotImplementedError(
                f"cannot cat {first} with {t if isinstance(t, QTensor) else type(t).__name__}: "
                "all must be quantized by the same Spec; call .dequantize() on each first"
            )
    parts: list[QTensor] = list(tensors)  # type: ignore[arg-type]
    fields: dict[str, Tensor] = {}
    for name, t in first.fields().items():
        role = type(first).roles[name]
        if any(name not in p.fields() for p in parts) or role == "opaque":
            raise NotImplementedError(f"cannot cat {type(first).__name__}s: field {name} cannot be joined")
        pieces = [p.fields()[name] for p in parts]
        if role == "shared":
            fields[name] = t
            continue
        if role == "elements":
            packed = [p for p in parts[:-1] if p.fields()[name].shape[d] != p.shape[d] and p.shape[d] % p.unit]
            if packed:
                raise cannot_cut(packed[0], d, 0, packed[0].shape[d], f"packed in chunks of {first.unit}", first.unit)
        else:
            pieces = _common_tiles(parts, pieces, d)
        fields[name] = torch.cat(pieces, d)
    return first.like(resized(first.shape, d, sum(p.shape[d] for p in parts)), first.dtype, fields)


def _common_tiles(parts: Sequence[QTensor], pieces: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Split the blocks of qparams until they can be joined along `dim`."""
    grid = []
    for d in range(parts[0].dim()):
        tiles = [p.shape[d] // max(t.shape[d], 1) for p, t in zip(parts, pieces)]
        tile = math.gcd(*tiles)
        grid.append([max(p.shape[d] // max(tile, 1), 0 if p.shape[d] == 0 else 1) for p in parts])
    sizes = [[g[i] for g in grid] for i in range(len(parts))]
    return [t if list(t.shape) == s else expand(dense(t), s) for t, s in zip(pieces, sizes)]


@implements(aten.index_select.default)
def index_select(q: QTensor, dim: int, index: Tensor) -> QTensor:
    return gather(q, dim % q.dim(), index)


@implements(aten.index.Tensor)
def index(q: QTensor, indices: Sequence[Tensor | None]) -> QTensor:
    used = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(used) != 1:
        raise NotImplementedError(
            f"this {type(q).__name__} can be indexed by one tensor at a time, got {len(used)}; index twice, or call .dequantize()"
        )
    d, i = used[0]
    return gather(q, d, i.nonzero().squeeze(-1) if i.dtype in (torch.bool, torch.uint8) else i)


def gather(q: QTensor, d: int, index: Tensor) -> QTensor:
    """`q` at the given positions of dim `d`, which `index.shape` replaces: packed rows move, nothing is decoded."""
    n = q.shape[d]
    index = torch.where(index < 0, index + n, index)

    def gathered(role: str, t: Tensor) -> Tensor:
        f = t.shape[d]
        if role == "elements" and f != n:
            raise cannot_cut(q, d, 0, n, f"packed in chunks of {q.unit}", q.unit)
        if f == 1 and role == "per_block":
            return t.reshape([*t.shape[:d], *([1] * index.dim()), *t.shape[d + 1 :]])
        where = index if f == n else index // (n // f)
        if isinstance(t, QTensor):
            return gather(t, d, where)
        return aten.index(t, [None] * d + [where])

    return map_ranked(q, [*q.shape[:d], *index.shape, *q.shape[d + 1 :]], gathered, True)


@implements(aten.equal.default)
def equal(a: Tensor, b: Tensor) -> bool:
    """Same Spec, same dtype, same fields."""
    if not (isinstance(a, QTensor) and isinstance(b, QTensor)):
        return False
    same = a.shape == b.shape and a.dtype == b.dtype and _same_form(a, b)
    return same and all(torch.equal(as_bytes(t), as_bytes(b.fields()[name])) for name, t in a.fields().items())


@implements(aten.linalg_vector_norm.default)
def vector_norm(q: QTensor, *args: Any, **kwargs: Any) -> Tensor:
    """Adafactor scales its steps by it."""
    return aten.linalg_vector_norm.default(q.decode_scaled(), *args).to(kwargs.get("dtype") or q.dtype)
