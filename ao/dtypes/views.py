"""Views of a QTensor: the ATen operators that cut, turn and reshape one, written once over the roles of its fields.

Every one of them keeps `D(op(q)) == op(D(q))` bit for bit and shares storage with its base. What would cut through a
packed chunk, or through blocks unevenly, raises ValueError and names the dim and the unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import OPS, QTensor, repeated
from .lattice import lattice, opaque

aten = torch.ops.aten


def implements(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler for ATen operators with a QTensor among their arguments."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            OPS[op] = handler
        return handler

    return register


# One field under one op. `d` is a dim of the QTensor, `n` its size, `f` the size of the field along it.


def map_ranked(
    q: QTensor, shape: Sequence[int], fn: Callable[[str, Tensor], Tensor], whole: bool | None = None
) -> QTensor:
    """Apply `fn(role, field)` to the fields that have dims; the Shared ones stay. `whole` is that of q unless given."""
    fields = {}
    for name, t in q.fields().items():
        role = type(q).roles[name]
        if role == "opaque":
            raise opaque(q, name)
        fields[name] = aten.alias(t) if role == "shared" else fn(role, t)
    return q.like(shape, q.dtype, fields, q.whole if whole is None else whole)


def refuse(q: QTensor, d: int, start: int, stop: int) -> ValueError:
    """The error for a range that `q` cannot be cut to."""
    places = lattice(q, d)
    packed = places.chunk > 1 and (start % places.chunk or stop % places.chunk or places.can_cut(start, stop))
    why, unit = ("packed in chunks", places.chunk) if packed else ("quantized in blocks", places.cut)
    return ValueError(
        f"cannot take [{start}:{stop}) of dim {d} of this {type(q).__name__} of shape {tuple(q.shape)}: the dim is "
        f"{why} of {unit}; cut at multiples of {places.cut}, or call .dequantize() first"
    )


def _cut(role: str, t: Tensor, d: int, n: int, start: int, stop: int) -> Tensor:
    """The part of one field that belongs to elements [start, stop) of dim `d`, which has `n` of them."""
    f = t.shape[d]
    if f == 1 and role == "per_block":
        return aten.alias(t) if n != 1 else aten.slice(t, d, start, stop)
    return aten.slice(t, d, start * f // max(n, 1), -(-stop * f // max(n, 1)))


def _index(size: int, i: int | None, default: int) -> int:
    """A Python slice bound, normalised to [0, size]."""
    if i is None:
        return default
    i = i + size if i < 0 else i
    return min(max(i, 0), size)


def resized(shape: Sequence[int], d: int, size: int) -> list[int]:
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
    places = lattice(q, d)
    if not (places.can_cut(lo, hi) if step == 1 else places.can_step(step)):
        raise refuse(q, d, lo, hi) if step == 1 else _cannot_step(q, d, step)
    if step == 1:
        whole = q.whole and places.can_write(lo, hi)
        return map_ranked(q, resized(q.shape, d, hi - lo), lambda role, t: _cut(role, t, d, n, lo, hi), whole)

    def stepped(role: str, t: Tensor) -> Tensor:
        each = max(n // max(t.shape[d], 1), 1)
        if role == "per_block" and t.shape[d] == 1:
            return aten.alias(t)
        return aten.slice(t, d, lo // each, -(-hi // each), step // each)

    return map_ranked(
        q, resized(q.shape, d, -(-(hi - lo) // step)), stepped, q.whole and all(b == 1 for b in places.blocks)
    )


def _cannot_step(q: QTensor, d: int, step: int) -> ValueError:
    places = lattice(q, d)
    why = f"packed in chunks of {places.chunk}" if places.chunk > 1 else f"quantized in blocks of {places.cut}"
    return ValueError(
        f"cannot take every {step}-th element of dim {d} of this {type(q).__name__} of shape {tuple(q.shape)}: the dim is "
        f"{why}; call .dequantize() first"
    )


@implements(aten.select.int)
def select(q: QTensor, dim: int, index: int) -> QTensor:
    d = dim % q.dim()
    n = q.shape[d]
    if not -n <= index < n:
        raise IndexError(f"index {index} is out of range for dim {d} of size {n}")
    i = index % n
    places = lattice(q, d)
    if places.chunk > 1 or not places.can_cut(i, i + 1):
        raise refuse(q, d, i, i + 1)
    shape = [s for k, s in enumerate(q.shape) if k != d]
    whole = q.whole and places.can_write(i, i + 1)
    return map_ranked(q, shape, lambda role, t: aten.select(t, d, i * t.shape[d] // n), whole)


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
    return map_ranked(q, [q.shape[d] for d in dims], lambda role, t: aten.permute(t, dims))


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
    return map_ranked(q, [*q.shape[:d], 1, *q.shape[d:]], lambda role, t: aten.unsqueeze(t, d))


@implements(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(q: QTensor, dim: int | Sequence[int] | None = None) -> QTensor:
    dims = range(q.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    drop = [d for d in (d % q.dim() for d in dims) if q.shape[d] == 1]
    return map_ranked(q, [n for d, n in enumerate(q.shape) if d not in drop], lambda role, t: aten.squeeze(t, drop))


@implements(aten.expand.default)
def expand_(q: QTensor, size: Sequence[int], *, implicit: bool = False) -> QTensor:
    lead = len(size) - q.dim()
    shape = [*size[:lead], *(n if s == -1 else s for s, n in zip(size[lead:], q.shape))]

    def wide(role: str, t: Tensor) -> Tensor:
        sizes = [s if n == 1 and role == "elements" else f for s, n, f in zip(shape[lead:], q.shape, t.shape)]
        return aten.expand(t, [*shape[:lead], *sizes])

    return map_ranked(q, shape, wide)


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
        rows = [
            f if d in [old[-1] for old, _ in groups if len(old)] else n
            for d, (n, f) in enumerate(zip(q.shape, t.shape))
        ]
        made = aten.view(repeated(t, rows).contiguous(), sizes(role, rows))
        whole = False
        return made

    made = map_ranked(q, shape, viewed)
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
        packed = [bool(n != f) for n, f in old]  # in a graph a condition on sizes is none
        wide = [n for n in new if n != 1]
        inner_old = next(n for n, f in reversed(old) if n != 1)
        inner_new = wide[-1] if wide else 1
        whole = inner_old % unit == 0 or math.prod(n for n, _ in old) == inner_old
        innermost = packed.index(True) == max(i for i, (n, _) in enumerate(old) if n != 1)
        if innermost and whole and (inner_new % unit == 0 or len(wide) <= 1):
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
        f"cannot view this {type(q).__name__} of shape {tuple(q.shape)} as {tuple(shape)}: it is {why}; "
        "call .dequantize() first"
    )
