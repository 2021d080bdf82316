"""The ATen operators that move, cut, join, copy or compare a QTensor, written once over the roles of its fields.

Every one of them keeps `D(op(q)) == op(D(q))` bit for bit, and every view shares storage with its base. What would cut
through a block or a packed chunk raises ValueError and names the dim and the unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import OPS, QTensor, as_bytes, dense, quantize_fields
from .blocks import expand

aten = torch.ops.aten


def implements(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler for ATen operators with a QTensor among their arguments."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            OPS[op] = handler
        return handler

    return register


# One field under one op. `d` is a dim of the QTensor, `n` its size, `f` the size of the field along it.


def _map_ranked(
    q: QTensor, shape: Sequence[int], fn: Callable[[str, Tensor], Tensor], whole: bool | None = None
) -> QTensor:
    """Apply `fn(role, field)` to the fields that have dims; the Shared ones stay. `whole` is that of q unless given."""
    fields = {}
    for name, t in q.fields().items():
        role = type(q).roles[name]
        if role == "opaque":
            raise NotImplementedError(
                f"{type(q).__name__}.{name} is in a device-specific layout that cannot be cut or reordered; "
                "do this before quantizing, or quantize with the default layout"
            )
        fields[name] = aten.alias(t) if role == "shared" else fn(role, t)
    return q.like(shape, q.dtype, fields, q.whole if whole is None else whole)


def _keeps_blocks(q: QTensor, d: int, start: int, stop: int) -> bool:
    """Whether [start, stop) of dim `d` takes blocks whole or not at all."""
    for name, t in q.fields().items():
        if type(q).roles[name] == "per_block" and name != "pre_scale":
            tile = q.shape[d] // max(t.shape[d], 1)
            if tile > 1 and (start % tile or stop % tile):
                return False
    return q.whole


def _cut(q: QTensor, role: str, t: Tensor, d: int, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of dim `d` of one field."""
    n, f = q.shape[d], t.shape[d]
    if f == n:
        return aten.slice(t, d, start, stop)
    if role == "elements":
        unit = q.unit
        if start % unit == 0 and (stop % unit == 0 or stop == n):
            return aten.slice(t, d, start * f // n, stop * f // n)
        raise _cannot_cut(q, d, start, stop, f"packed in chunks of {unit}", unit)
    tile = n // f
    if f == 1:
        return aten.slice(t, d, 0, 1)
    if start % tile == 0 and stop % tile == 0:
        return aten.slice(t, d, start // tile, stop // tile)
    if start < stop and start // tile == (stop - 1) // tile:
        return aten.slice(t, d, start // tile, start // tile + 1)
    raise _cannot_cut(q, d, start, stop, f"quantized in blocks of {tile}", tile)


def _cannot_cut(q: QTensor, d: int, start: int, stop: int, why: str, unit: int) -> ValueError:
    return ValueError(
        f"cannot take [{start}:{stop}) of dim {d} of a {type(q).__name__} of shape {tuple(q.shape)}: the dim is {why}; "
        f"cut at multiples of {unit}, or call .dequantize() first"
    )


def _index(size: int, i: int | None, default: int) -> int:
    """A Python slice bound, normalised to [0, size]."""
    if i is None:
        return default
    i = i + size if i < 0 else i
    return min(max(i, 0), size)


def _resized(shape: Sequence[int], d: int, size: int) -> list[int]:
    return [size if i == d else n for i, n in enumerate(shape)]


# Views.


@implements(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def alias(q: QTensor) -> QTensor:
    return q.like(q.shape, q.dtype, {name: aten.alias(t) for name, t in q.fields().items()}, q.whole)


@implements(aten.slice.Tensor)
def slice_(q: QTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> QTensor:
    d = dim % q.dim()
    n = q.shape[d]
    lo = _index(n, start, 0)
    hi = max(_index(n, end, n), lo)
    if step == 1:
        whole = _keeps_blocks(q, d, lo, hi)
        return _map_ranked(q, _resized(q.shape, d, hi - lo), lambda role, t: _cut(q, role, t, d, lo, hi), whole)

    def stepped(role: str, t: Tensor) -> Tensor:
        if t.shape[d] == n:
            return aten.slice(t, d, lo, hi, step)
        tile = n // max(t.shape[d], 1)
        if role == "per_block" and t.shape[d] == 1:
            return aten.alias(t)
        if role == "per_block" and step % tile == 0:
            return aten.slice(t, d, lo // tile, -(-hi // tile), step // tile)
        raise _cannot_cut(q, d, lo, hi, f"blocked, and the step is {step}", n)

    whole = _keeps_blocks(q, d, lo, lo + 1)
    return _map_ranked(q, _resized(q.shape, d, -(-(hi - lo) // step)), stepped, whole)


@implements(aten.select.int)
def select(q: QTensor, dim: int, index: int) -> QTensor:
    d = dim % q.dim()
    n = q.shape[d]
    if not -n <= index < n:
        raise IndexError(f"index {index} is out of range for dim {d} of size {n}")
    i = index % n

    def one(role: str, t: Tensor) -> Tensor:
        f = t.shape[d]
        if role == "elements" and f != n:
            raise _cannot_cut(q, d, i, i + 1, f"packed in chunks of {q.unit}", q.unit)
        return aten.select(t, d, i * f // n)

    return _map_ranked(q, [s for k, s in enumerate(q.shape) if k != d], one, _keeps_blocks(q, d, i, i + 1))


@implements(aten.split_with_sizes.default)
def split_with_sizes(q: QTensor, sizes: Sequence[int], dim: int = 0) -> list[QTensor]:
    if sum(sizes) != q.shape[dim]:
        raise ValueError(f"split sizes {list(sizes)} do not add up to dim {dim} of size {q.shape[dim]}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [slice_(q, dim, a, a + n) for a, n in zip(starts, sizes)]


@implements(aten.split.Tensor)
def split(q: QTensor, size: int, dim: int = 0) -> list[QTensor]:
    n = q.shape[dim]
    return [slice_(q, dim, a, min(a + size, n)) for a in range(0, max(n, 1), size)]


@implements(aten.unbind.int)
def unbind(q: QTensor, dim: int = 0) -> list[QTensor]:
    return [select(q, dim, i) for i in range(q.shape[dim])]


@implements(aten.permute.default)
def permute(q: QTensor, dims: Sequence[int]) -> QTensor:
    return _map_ranked(q, [q.shape[d] for d in dims], lambda role, t: aten.permute(t, dims))


@implements(aten.transpose.int)
def transpose(q: QTensor, a: int, b: int) -> QTensor:
    dims = list(range(q.dim()))
    dims[a], dims[b] = dims[b], dims[a]
    return permute(q, dims)


@implements(aten.t.default)
def t(q: QTensor) -> QTensor:
    return permute(q, list(range(q.dim()))[::-1])


@implements(aten.unsqueeze.default)
def unsqueeze(q: QTensor, dim: int) -> QTensor:
    d = dim % (q.dim() + 1)
    return _map_ranked(q, [*q.shape[:d], 1, *q.shape[d:]], lambda role, t: aten.unsqueeze(t, d))


@implements(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(q: QTensor, dim: int | Sequence[int] | None = None) -> QTensor:
    dims = range(q.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    drop = [d for d in (d % q.dim() for d in dims) if q.shape[d] == 1]
    return _map_ranked(q, [n for d, n in enumerate(q.shape) if d not in drop], lambda role, t: aten.squeeze(t, drop))


@implements(aten.expand.default)
def expand_(q: QTensor, size: Sequence[int], *, implicit: bool = False) -> QTensor:
    lead = len(size) - q.dim()
    shape = [*size[:lead], *(n if s == -1 else s for s, n in zip(size[lead:], q.shape))]

    def wide(role: str, t: Tensor) -> Tensor:
        sizes = [s if n == 1 and role == "elements" else f for s, n, f in zip(shape[lead:], q.shape, t.shape)]
        return aten.expand(t, [*shape[:lead], *sizes])

    return _map_ranked(q, shape, wide)


@implements(aten.view.default, aten._unsafe_view.default)
def view(q: QTensor, size: Sequence[int]) -> QTensor:
    shape = _infer(size, q.numel())
    if list(q.shape) == shape:
        return alias(q)
    groups = _view_groups(list(q.shape), shape)
    whole = q.whole

    def sizes(role: str, field_shape: Sequence[int]) -> list[int]:
        out: list[int] = []
        for old, new in groups:
            out += _view_sizes(q, role, [(q.shape[d], field_shape[d]) for d in old], [shape[d] for d in new], shape)
        return out

    def viewed(role: str, t: Tensor) -> Tensor:
        nonlocal whole
        try:
            return aten.view(t, sizes(role, t.shape))
        except ValueError:
            if role != "per_block":
                raise
        # Blocks of several rows: give each row its own copy of their qparams. The view can be read, not written.
        rows = [f if d in [old[-1] for old, _ in groups if len(old)] else n for d, (n, f) in enumerate(zip(q.shape, t.shape))]
        made = aten.view(expand(dense(t), rows), sizes(role, rows))
        whole = False
        return made

    made = _map_ranked(q, shape, viewed)
    made.whole = whole
    return made


def _infer(size: Sequence[int], numel: int) -> list[int]:
    known = math.prod(s for s in size if s != -1)
    return [numel // max(known, 1) if s == -1 else s for s in size]


def _view_groups(old: list[int], new: list[int]) -> list[tuple[range, range]]:
    """Match runs of old dims to runs of new dims with the same number of elements."""
    if math.prod(old) != math.prod(new):
        raise ValueError(f"cannot view a tensor of shape {tuple(old)} as {tuple(new)}")
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        m = k = 1
        if i < len(old):
            m, i = old[i], i + 1
        if j < len(new):
            k, j = new[j], j + 1
        while m != k:
            if m < k:
                m, i = m * old[i], i + 1
            else:
                k, j = k * new[j], j + 1
        groups.append((range(a, i), range(b, j)))
    return groups


def _view_sizes(q: QTensor, role: str, old: list[tuple[int, int]], new: list[int], shape: Sequence[int]) -> list[int]:
    """The sizes of a field over `new` dims, given (size, field size) of the old dims that they came from."""
    size = math.prod(n for n, _ in old)
    total = math.prod(f for _, f in old)
    if len(old) == len(new) == 1:
        return [total]
    if role == "elements":
        if total == size:
            return new
        unit = q.unit
        packed = [n != f for n, f in old]
        wide = [n for n in new if n != 1]
        inner_old = next(n for n, f in reversed(old) if n != 1)
        inner_new = wide[-1] if wide else 1
        whole = inner_old % unit == 0 or math.prod(n for n, _ in old) == inner_old
        if packed.index(True) == max(i for i, (n, _) in enumerate(old) if n != 1) and whole:
            if inner_new % unit == 0 or len(wide) <= 1:
                last = max(i for i, n in enumerate(new) if n == inner_new)
                return [n * total // size if i == last else n for i, n in enumerate(new)]
        raise _cannot_view(q, shape, f"packed in chunks of {unit}")
    tile = 1
    for i, (n, f) in enumerate(old):
        if n == f:
            continue
        if any(g != 1 for _, g in old[i + 1 :]):
            raise _cannot_view(q, shape, "quantized in blocks that the view would not keep whole")
        tile = n // f * math.prod(m for m, _ in old[i + 1 :])
        break
    sizes = []
    for n in reversed(new):
        if n and tile % n == 0:
            sizes.append(1)
            tile //= n
        elif n % tile == 0:
            sizes.append(n // tile)
            tile = 1
        else:
            raise _cannot_view(q, shape, "quantized in blocks that the view would not keep whole")
    return sizes[::-1]


def _cannot_view(q: QTensor, shape: Sequence[int], why: str) -> ValueError:
    return ValueError(
        f"cannot view a {type(q).__name__} of shape {tuple(q.shape)} as {tuple(shape)}: it is {why}; "
        "call .dequantize() first"
    )


# Copies.


@implements(aten.dequantize.self)
def dequantize(q: QTensor) -> Tensor:
    return q.decode_scaled().to(q.dtype)


@implements(aten.clone.default)
def clone(q: QTensor, *, memory_format: Any = None) -> QTensor:
    return q.map(torch.clone)


@implements(aten._to_copy.default)
def to_copy(q: QTensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> QTensor:
    dtype = dtype or q.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"a {type(q).__name__} dequantizes to a floating-point dtype, not to {dtype}")
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
                raise _cannot_cut(q, d, 0, new, f"blocked or packed, {n} elements to {f}", n // math.gcd(n, f))
            sizes.append(1 if f == 1 and role == "per_block" else new * f // max(n, 1))
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
    fields = target.fields()
    if any(role == "opaque" and name in fields for name, role in type(target).roles.items()):
        raise NotImplementedError(f"a {type(target).__name__} in a device-specific layout cannot be written in place")
    made = quantize_fields(target.spec, values, target.scale.shape, target.pre_scale)
    for name, new in made.items():
        if new is not None:
            fields[name].copy_(new)
    return target


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
                raise _cannot_cut(packed[0], d, 0, packed[0].shape[d], f"packed in chunks of {first.unit}", first.unit)
        else:
            pieces = _common_tiles(parts, pieces, d)
        fields[name] = torch.cat(pieces, d)
    return first.like(_resized(first.shape, d, sum(p.shape[d] for p in parts)), first.dtype, fields)


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
            f"a {type(q).__name__} can be indexed by one tensor at a time, got {len(used)}; index twice, or call .dequantize()"
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
            raise _cannot_cut(q, d, 0, n, f"packed in chunks of {q.unit}", q.unit)
        if f == 1 and role == "per_block":
            return t.reshape([*t.shape[:d], *([1] * index.dim()), *t.shape[d + 1 :]])
        where = index if f == n else index // (n // f)
        if isinstance(t, QTensor):
            return gather(t, d, where)
        return aten.index(t, [None] * d + [where])

    return _map_ranked(q, [*q.shape[:d], *index.shape, *q.shape[d + 1 :]], gathered, True)


@implements(aten.equal.default)
def equal(a: Tensor, b: Tensor) -> bool:
    """Same Spec, same dtype, same fields."""
    if not (isinstance(a, QTensor) and isinstance(b, QTensor)):
        return False
    same = a.shape == b.shape and a.dtype == b.dtype and _same_form(a, b)
    return same and all(torch.equal(as_bytes(t), as_bytes(b.fields()[name])) for name, t in a.fields().items())
