"""The ATen operators that copy, write, join, gather, compare or read a QTensor, written once over the roles of its fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import FUNCTIONS, OPS, QTensor, as_bytes, dense, quantize_fields, repeated, requantize_in_place
from .bits import pack_dim, packed_along
from .blocks import expand, spans, to_blocks
from .lattice import lattice
from .pieces import ELEMENTS, boxes, part
from .rounding import by_way_of
from .tracing import is_eager
from .views import implements, map_ranked, permute, refuse, resized, slice_, transpose, view

aten = torch.ops.aten


@implements(aten.dequantize.self)
def dequantize(q: QTensor) -> Tensor:
    return q.decode_scaled(q.dtype)


@implements(aten.clone.default)
def clone(q: QTensor, *, memory_format: Any = None) -> QTensor:
    """With memory_format=torch.contiguous_format, codes are packed along the dim that quantizing would choose."""
    if memory_format in (None, torch.preserve_format):
        return q.map(torch.clone)
    d = _packed(q)
    fields = {}
    for name, t in q.fields().items():
        if q.turns and q.roles[name] == "elements" and memory_format == torch.contiguous_format and d is not None:
            t = packed_along(t, q.shape, pack_dim(q.shape, 1))
        fields[name] = torch.clone(t, memory_format=memory_format if t.dim() == q.dim() else torch.preserve_format)
    return q.like(q.shape, q.dtype, fields)


@implements(aten._to_copy.default)
def to_copy(q: QTensor, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> QTensor:
    dtype = dtype or q.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"this {type(q).__name__} dequantizes to a floating-point dtype, not to {dtype}")
    own = {k: v for k, v in kwargs.items() if k in ("non_blocking", "pin_memory")}
    moved = q.like(q.shape, dtype, {name: aten._to_copy(t, device=device, **own) for name, t in q.fields().items()})
    memory_format = kwargs.get("memory_format") or torch.preserve_format
    return moved if memory_format == torch.preserve_format else clone(moved, memory_format=memory_format)


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

    for d, new in enumerate(size):
        if not lattice(q, d).can_be(new):
            raise refuse(q, d, 0, new)

    def sized(role: str, t: Tensor) -> Tensor:
        sizes = []
        for d, (new, n, f) in enumerate(zip(size, q.shape, t.shape)):
            if role == "per_block" and f == 1:
                # Of a dim of one element the shapes do not say whether the block spans it.
                sizes.append(1 if n != 1 or spans(q.spec.block, q.dim(), d) else new)
            else:
                sizes.append(new * f // max(n, 1))
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
    # A whole tensor with the same blocks goes into a part of another: sharded checkpoints are put together so, shard by shard,
    # and the shards agree on the scales that they share.
    if not target.whole and not (isinstance(source, QTensor) and source.whole and _same_form(target, source)):
        raise ValueError(
            f"this {type(target).__name__} of shape {tuple(target.shape)} is a view that shares the scales of its blocks with "
            "elements outside of it, so it cannot be quantized anew in place; write to the whole tensor, or .clone() the view"
        )
    if isinstance(source, QTensor):
        if _same_form(target, source):
            for name, t in target.fields().items():
                t.copy_(source.fields()[name], non_blocking)
            return target
        source = source.decode_scaled()
    values = source.to(target.device, torch.float32, non_blocking=non_blocking).expand(target.shape)
    d = _packed(target)
    if not target.turns and d is not None and d != target.dim() - 1:
        copy_(transpose(target, d, -1), values.transpose(d, -1))
        return target
    fields = target.fields()
    nested = any(isinstance(t, QTensor) for t in fields.values())
    first = next(iter(fields.values()))
    order = (
        sorted(range(target.dim()), key=lambda d: -first.stride()[d]) if nested and first.dim() == target.dim() else []
    )
    if order != sorted(order):
        # Blocks of scales that are quantized themselves are those of the tensor as it was before it was turned.
        copy_(permute(target, order), values.permute(order))
        return target
    if target.turns and d is not None and d != pack_dim(target.shape, 1) and not nested:
        # Codes are packed along a dim that `encode` would not choose for this shape: a transposed view. Turn it back.
        copy_(transpose(target, d, -1), values.transpose(d, -1))
        return target
    if any(role == "opaque" and name in fields for name, role in type(target).roles.items()):
        raise NotImplementedError(
            f"this {type(target).__name__} in a device-specific layout cannot be written in place"
        )
    if 0 in target.shape:
        return target
    kept = _unchanged(target, values)
    if kept is not None and kept.device.type == "cpu" and is_eager(kept):
        if kept.all():
            return target
        kept = kept if kept.any() else None
    made = quantize_fields(target.spec, values, target.spec.grid_of(target), target.pre_scale)
    for name, new in made.items():
        if new is not None and target.roles[name] != "shared":
            if d is not None and target.roles[name] == "elements" and new.shape != fields[name].shape:
                new = packed_along(new, target.shape, d)
            _put_blocks(fields[name], new, kept)
    return target


def _unchanged(q: QTensor, values: Tensor) -> Tensor | None:
    """Which blocks of `q` hold `values` (float32) already: bool, one entry for each part that can be written by itself.
    None: no block does.

    Quantizing is no fixed point: of the numbers that come out of a block, the formula may choose another scale. So what is
    written back unchanged, `q.copy_(q.dequantize())` or `q.mul_(1)`, must leave the block as it is.
    """
    places = [lattice(q, d) for d in range(q.dim())]
    unit = [p.size if p.size % p.whole else p.whole for p in places]
    grid = [n // max(u, 1) for n, u in zip(q.shape, unit)]
    if not is_eager(values) or values.numel() <= ELEMENTS[values.device.type]:
        return _same(q, values, grid)
    found = torch.empty(grid, dtype=torch.bool, device=values.device)
    for box in boxes(q.shape, unit, ELEMENTS[values.device.type]):
        piece = q
        for d, (start, stop) in enumerate(box):
            piece = slice_(piece, d, start, stop) if stop - start < q.shape[d] else piece
        mine = part(found, box, q.shape)
        mine.copy_(_same(piece, part(values, box, q.shape), mine.shape))
    return found


def _same(q: QTensor, values: Tensor, grid: Sequence[int]) -> Tensor:
    """Whether all of a block, in `grid`, is `values` (float32), as `q` holds it or as `q.dequantize()` gives it."""
    few = max(lattice(q, -1).chunk, 32) if q.dim() else 0
    if (
        is_eager(values)
        and values.device.type == "cpu"
        and few
        and q.stride(-1) == 1
        and q.shape[-1] >= 2 * few * grid[-1]
    ):
        # A look at the first numbers of each block tells that all have changed, as they do in a step of training.
        shape = [*q.shape[:-1], grid[-1], q.shape[-1] // grid[-1]]
        first = slice_(view(q, shape), -1, 0, few)
        found = _same(first, values.reshape(shape)[..., :few], [*grid, 1]).squeeze(-1)
        if not found.any():
            return found
    now = q.decode_scaled()
    same = _equal(now, values)
    if q.dtype in (torch.bfloat16, torch.float16):
        same = same | _equal(by_way_of(now, q.dtype), values)
    same = to_blocks(same, grid)
    for dim in reversed(range(1, same.dim(), 2)):
        same = same.all(dim)
    return same


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """a == b of float32; a NaN equals itself."""
    return (a == b) | (a.view(torch.int32) == b.view(torch.int32))


def _put_blocks(field: Tensor, new: Tensor, kept: Tensor | None) -> None:
    """Write `new` to a field, except the blocks that are kept."""
    if kept is None:
        field.copy_(new)
    elif isinstance(field, QTensor) and isinstance(new, QTensor):
        for name, t in field.fields().items():
            if field.roles[name] != "shared":
                _put_blocks(t, new.fields()[name], kept)
    elif field.dim() == kept.dim():
        old, new = as_bytes(field), as_bytes(dense(new).to(field.dtype))
        old.copy_(torch.where(expand(kept, field.shape), old, new))


@implements(aten.index_copy_.default)
def index_copy_(target: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`source` at the given positions of dim `dim`: it alone is quantized. Raises ValueError where that would cut a block."""
    values = source.decode_scaled() if isinstance(source, QTensor) else source
    if not isinstance(target, QTensor):
        return target.index_copy_(dim, index, values.to(target.dtype))
    d = dim % target.dim()
    if not target.whole or lattice(target, d).whole != 1:
        raise ValueError(
            f"cannot write at single positions of dim {d} of this {type(target).__name__} of shape {tuple(target.shape)}: "
            f"{target.spec} quantizes them together with others; write along another dim, or to whole blocks with copy_"
        )
    size = resized(target.shape, d, index.numel())
    if list(values.shape) != size:
        raise IndexError(
            f"index_copy_: {index.numel()} positions of dim {d} of shape {tuple(target.shape)} take a source of shape "
            f"{tuple(size)}, got {tuple(values.shape)}"
        )
    rows = _new(torch.empty, target, size, target.dtype, target.device)
    assert isinstance(rows, QTensor)
    if target.pre_scale is not None:
        own = target.pre_scale
        rows.pre_scale = own if own.shape[d] == 1 else own.index_select(d, index)
    copy_(rows, values)
    for name, t in target.fields().items():
        if name != "pre_scale" and target.roles[name] != "shared":
            _put_at(t, d, index.reshape(-1), rows.fields()[name])
    return target


def _put_at(field: Tensor, d: int, index: Tensor, new: Tensor) -> None:
    if isinstance(field, QTensor) and isinstance(new, QTensor):
        for name, t in field.fields().items():
            if field.roles[name] != "shared":
                _put_at(t, d, index, new.fields()[name])
    else:
        as_bytes(field).index_copy_(d, index, as_bytes(new))


@implements(aten.index_put_.default)
def index_put_(target: Tensor, indices: Sequence[Tensor | None], source: Tensor, accumulate: bool = False) -> Tensor:
    """`target[..., index] = source`. With one index as `index_copy_`; with several, all of the target is quantized anew."""
    if not isinstance(target, QTensor):
        assert isinstance(source, QTensor)
        return target.index_put_(tuple(indices), source.decode_scaled(target.dtype), accumulate)
    used = [(d, i) for d, i in enumerate(indices) if i is not None]
    is_mask = used[0][1].dtype in (torch.bool, torch.uint8)
    if len(used) != 1 or accumulate or (is_mask and used[0][1].dim() != 1):
        return requantize_in_place(aten.index_put_.default, (target, indices, source, accumulate), {})
    d, i = used[0]
    i = i.nonzero().squeeze(-1) if is_mask else torch.where(i < 0, i + target.shape[d], i)
    values = source.decode_scaled() if isinstance(source, QTensor) else source
    lead, trail = target.shape[:d], target.shape[d + 1 :]
    values = values.expand([*lead, *i.shape, *trail]).reshape([*lead, i.numel(), *trail])
    return index_copy_(target, d, i.reshape(-1), values)


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
    told = target.__dict__.get("on_new_data")
    if told is not None:
        told(target)


_data: Any = torch.Tensor.data


# What asks for memory: the fields have some, the QTensor around them has none.


def share_memory_(q: QTensor) -> QTensor:
    """`torch.Tensor.share_memory_`: each field moves to shared memory."""
    for t in q.fields().values():
        t.share_memory_()
    return q


def is_shared(q: QTensor) -> bool:
    """`torch.Tensor.is_shared`: whether each field is in shared memory."""
    return all(t.is_shared() for t in q.fields().values())


def element_size(q: QTensor) -> float:
    """`torch.Tensor.element_size`: packed bytes per element, a fraction, so that it times `q.numel()` is what q takes."""
    return q.nbytes_packed / q.numel() if q.numel() else q.dtype.itemsize


def untyped_storage(q: QTensor) -> torch.UntypedStorage:
    """`torch.Tensor.untyped_storage`: a storage without memory, whose `nbytes()` are the packed bytes.

    Its `data_ptr()` raises, so that nothing takes packed codes for numbers of the tensor's dtype.
    """
    first: Tensor = q
    while isinstance(first, QTensor):
        first = next(iter(first.fields().values()))
    with torch._C.DisableTorchFunctionSubclass():
        if not is_eager(first):
            return torch.Tensor.untyped_storage(q)  # What compilers compare to find out about aliases.
        shown = torch.Tensor._make_wrapper_subclass(QTensor, (q.nbytes_packed,), dtype=torch.uint8, device=q.device)
        return torch.Tensor.untyped_storage(shown)


_itemsize: Any = torch.Tensor.itemsize

FUNCTIONS.update(
    {
        _data.__set__: set_data,
        # What tells accelerate which parameters are tied.
        torch.Tensor.data_ptr: lambda q: next(iter(q.fields().values())).data_ptr(),
        torch.Tensor.share_memory_: share_memory_,
        torch.Tensor.is_shared: is_shared,
        torch.Tensor.element_size: element_size,
        torch.Tensor.untyped_storage: untyped_storage,
        _itemsize.__get__: element_size,
    }
)


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
                "all must be quantized by the same Spec; call .dequantize() on each first, or leave a layer "
                "whose weight the model joins to another out of quantize_, by filter_fn"
            )
    parts: list[QTensor] = list(tensors)  # type: ignore[arg-type]
    fields: dict[str, Tensor] = {}
    for name, t in first.fields().items():
        role = type(first).roles[name]
        if any(name not in p.fields() for p in parts) or role == "opaque":
            raise NotImplementedError(f"cannot cat {type(first).__name__}s: field {name} cannot be joined")
        pieces = [p.fields()[name] for p in parts]
        if role == "shared":
            if is_eager(t) and not all(torch.equal(t, piece) for piece in pieces if piece is not t):
                raise NotImplementedError(
                    f"cannot cat {type(first).__name__}s: field {name} is one for the whole tensor, and they differ in it; "
                    "call .dequantize() on each first"
                )
            fields[name] = t
            continue
        if role == "elements":
            packed = next((p for p in parts[:-1] if p.shape[d] % lattice(p, d).chunk), None)
            if packed is not None:
                raise refuse(packed, d, 0, packed.shape[d])
        else:
            pieces = _common_tiles(parts, pieces, d)
        fields[name] = torch.cat(pieces, d)
    return first.like(resized(first.shape, d, sum(p.shape[d] for p in parts)), first.dtype, fields)


@implements(aten.stack.default)
def stack(tensors: Sequence[Tensor], dim: int = 0) -> QTensor:
    """`cat` along a new dim: models side by side, as torch.func.stack_module_state puts them."""
    first = next(t for t in tensors if isinstance(t, QTensor))
    d = dim % (first.dim() + 1)
    return cat([torch.unsqueeze(t, d) for t in tensors], d)


def _common_tiles(parts: Sequence[QTensor], pieces: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Split the blocks of qparams until they can be joined along `dim`."""
    grid = []
    for d in range(parts[0].dim()):
        tiles = [p.shape[d] // max(t.shape[d], 1) for p, t in zip(parts, pieces)]
        tile = math.gcd(*tiles)
        grid.append([max(p.shape[d] // max(tile, 1), 0 if p.shape[d] == 0 else 1) for p in parts])
    sizes = [[g[i] for g in grid] for i in range(len(parts))]
    return [t if list(t.shape) == s else repeated(t, s) for t, s in zip(pieces, sizes)]


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
            raise refuse(q, d, 0, n)
        if f == 1 and role == "per_block":
            return t.reshape([*t.shape[:d], *([1] * index.dim()), *t.shape[d + 1 :]])
        where = index if f == n else index // (n // f)
        if isinstance(t, QTensor):
            return gather(t, d, where)
        return aten.index(t, [None] * d + [where])

    out = map_ranked(q, [*q.shape[:d], *index.shape, *q.shape[d + 1 :]], gathered, True)
    if d == 0 and index.dim() == 1 and not is_eager(index):
        out.origin = q, index, (_versions(q), _versions(out))  # type: ignore[attr-defined]
    return out


def gathered_from(q: QTensor) -> tuple[QTensor, Tensor] | None:
    """While a graph is traced: the tensor of which `q` is positions of the first dim, and these. A product that reads them there
    leaves the copy to nobody, so that the compiler drops it. None where that is not known, or either was written to since."""
    origin = None if torch.compiler.is_dynamo_compiling() else q.__dict__.get("origin")
    return origin[:2] if origin is not None and origin[2] == (_versions(origin[0]), _versions(q)) else None


def _versions(t: Tensor) -> Any:
    """What tells that a tensor was written to; an inference tensor does not."""
    if isinstance(t, QTensor):
        return [_versions(field) for field in t.fields().values()]
    return None if t.is_inference() else t._version


@implements(aten.equal.default)
def equal(a: Tensor, b: Tensor) -> bool:
    """Of two QTensors: same Spec, same dtype, same fields. Of one and a plain tensor: the same values."""
    if not (isinstance(a, QTensor) and isinstance(b, QTensor)):
        return torch.equal(*(t.dequantize() if isinstance(t, QTensor) else t for t in (a, b)))
    same = a.shape == b.shape and a.dtype == b.dtype and _same_form(a, b)
    return same and all(torch.equal(as_bytes(t), as_bytes(b.fields()[name])) for name, t in a.fields().items())


# Reading: what says something about the numbers, and gives no tensor that a layer could take for its weight.

READS = {
    "reductions": "sum nansum mean nanmean prod amax amin aminmax max min argmax argmin norm linalg_vector_norm var std "
    "var_mean std_mean any all median nanmedian logsumexp count_nonzero trace dist",
    "order": "sort topk kthvalue mode histc histogram nonzero _unique2 unique_dim unique_consecutive",
    "comparisons": "eq ne lt le gt ge isin",
    "predicates": "isnan isinf isposinf isneginf signbit logical_not logical_and logical_or logical_xor",
    "one number": "_local_scalar_dense",
    "magnitudes": "abs",  # The half of `abs().max()`, of isfinite and of a histogram; as a weight it has no use.
}
"""ATen operators that read decoded values and give plain tensors. All else that is out of place raises."""


def _read(op: Any) -> Callable[..., Any]:
    def handler(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(QTensor, lambda q: q.dequantize(), (args, kwargs))
        return op(*args, **kwargs)

    return handler


for _name in " ".join(READS.values()).split():
    _packet = getattr(aten, _name)
    for _overload in _packet.overloads():
        _op = getattr(_packet, _overload)
        OPS[_op] = _read(_op)

# These PyTorch makes of a difference before an operator is asked for.
for _function in (torch.isclose, torch.Tensor.isclose, torch.allclose, torch.Tensor.allclose):
    FUNCTIONS[_function] = _read(_function)


def _no_storage(q: Tensor) -> Any:
    """What writers of files ask, to find tensors that are tied, before they would write memory that is not there."""
    raise RuntimeError(
        f"a {type(q).__name__} has several tensors for fields and no storage of its own. To save it: ao.save(model, path); or, "
        "before save_pretrained, save_file or save_model of transformers, diffusers, accelerate or safetensors, import "
        "ao.integrations.transformers (.diffusers, .safetensors), which teaches them how"
    )


FUNCTIONS[Tensor.storage] = _no_storage
