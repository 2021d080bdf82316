"""`Spec` says how to quantize, `QTensor` is what was quantized.

A dtype is one file: a `Spec` subclass with `choose_qparams` and `encode`, and a `QTensor` subclass that declares its
field tensors and `decode`. Each field carries a role, read once from the class annotations:

- `Elements`: the numbers. As long as the data along every dim, or packed along one dim, where it is shorter.
- `PerBlock`: a qparam. It has the rank of the data and repeats over tiles, so that the block size follows from shapes.
  It may itself be a QTensor (double quantization).
- `Shared`: the same for all elements (a codebook, a static activation scale); position does not matter.
- `Opaque`: a device's private layout. It can be copied and moved, but no op can touch one of its dims.

From the roles follows everything else, once, for every dtype: flatten and unflatten, pickle, device moves (this file),
where a tensor can be cut and written (lattice.py), slices and views (views.py), cat, `copy_` and reading (ops.py), FSDP2 and
DTensor (sharding.py), safetensors (checkpoint.py). The property that holds throughout is `D(op(q)) == op(D(q))`, bit for bit,
where D dequantizes.

Three kinds of ops read the decoded values: the matrix products, convolutions, embeddings and recurrent layers of ao.matmul;
reductions, comparisons and predicates (`READS` of ops.py), which give plain tensors that say something about the numbers; and
ops in place, which quantize what has changed anew and leave a block whose values stay as it is. All other arithmetic would
give a weight that is no longer quantized, and raises.

Numerics are written in float32 without exception, so that the compiled code, which keeps float32 between fused ops,
computes the same bits as eager code.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.jit._trace import is_tracing
from torch.utils._python_dispatch import return_and_correct_aliasing

from .bits import CHUNK
from .blocks import expand
from .lattice import lattice
from .operand import Cast, Operand
from .pieces import ELEMENTS, Box, boxes, part
from .rounding import narrow, range_power, round_to
from .running_layer import running_layer
from .tracing import fresh, is_eager, passed_over, unrecorded

Elements = Annotated[Tensor, "elements"]
"""A field of the numbers: as long as the data along every dim, or packed along one by `pack`."""

PerBlock = Annotated[Tensor, "per_block"]
"""A field of qparams, one per block, of the rank of the data. It may be a QTensor itself."""

Shared = Annotated[Tensor, "shared"]
"""A field that is the same for all elements: a table, the scale of a static activation."""

Opaque = Annotated[Tensor, "opaque"]
"""A field in a device's private layout, which can be copied and moved, and not cut."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""What a function of `torch` means for a QTensor; ao.matmul fills it."""

OPS: dict[Any, Callable[..., Any]] = {}
"""What an ATen operator means for a QTensor; ops.py, sharding.py and ao.matmul fill it. Operators of other libraries are known
by name: they are there once the library is."""

_S = TypeVar("_S", bound="Spec")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True, repr=False)
class Spec:
    """How to quantize a tensor: a frozen value made of literals, hashable, comparable and JSON-able.

    act: how to quantize the activation that a weight of this Spec meets in a matmul; None leaves it in floating point.
    """

    act: Spec | None = dataclasses.field(default=None, kw_only=True)

    registry: ClassVar[dict[str, type[Spec]]] = {}
    named: ClassVar[dict[Spec, str]] = {}
    """Specs that print as a name, under which they are public; see `called`."""
    tensor_type: ClassVar[type[QTensor]]

    def __deepcopy__(self, memo: dict[int, Any]) -> Spec:
        """Itself, as it never changes. A compiled model compares the Specs of its weights with copies of them at every call, and
        one object is the same at once."""
        return self

    if TYPE_CHECKING:  # A field here would come before those of a subclass.

        @property
        def block(self) -> tuple[int, ...]:
            """The elements that share a qparam, per dim, -1 for the whole dim: a field of each subclass."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Spec.registry[cls.__name__] = cls
        torch.serialization.add_safe_globals([cls])

    # What a dtype defines.

    def choose_qparams(self, x: Tensor, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """The qparams of `x` (float32), each of shape `grid`, by the round-to-nearest rule of this dtype."""
        raise NotImplementedError

    def encode(self, x: Tensor, *args: Any, **qparams: Any) -> dict[str, Tensor | None]:
        """Round `x` (float32) with the given qparams, and return the fields of the QTensor."""
        raise NotImplementedError

    def round(self, x: Tensor, *args: Any, **qparams: Any) -> Tensor:
        """What `x` (float32) becomes when it is encoded with the given qparams and decoded, float32, without storing it.

        Qparams of the shape of `x` stand for blocks of one element. A dtype that packs its codes says how to do without.
        """
        return self.wrap(self.encode(x, **qparams), torch.float32, x.shape).decode()

    def stored(self, *args: Any, **qparams: Any) -> dict[str, Tensor]:
        """Qparams (float32) as a QTensor stores them: as `choose_qparams` gives them, in its dtype, rounded to integers
        within their range, or quantized themselves."""
        grid = tuple(next(iter(qparams.values())).shape)
        kinds = self.choose_qparams(torch.empty(grid, dtype=torch.float32, device="meta"), grid)
        return {name: _stored(t.float(), kinds.get(name, t)) for name, t in qparams.items()}

    def block_of(self, qparam: str) -> tuple[int, ...]:
        """The elements that share the qparam called so."""
        return self.block

    def check_range(self, x: Tensor) -> None:
        """Raise ValueError for finite data `x` that is too large or too small for the qparams of this dtype."""

    def operand(self, q: Any) -> Operand | None:
        """How `q` multiplies by its codes (operand.py), or None, where a product reads what `q.decode()` gives.

        q: a QTensor of this Spec, or anything else that has its fields as attributes. It is asked at every product: give the
        fields as they are, and compute nothing.
        """
        return None

    def rearranged(self, q: Any) -> tuple[QTensor, Tensor] | None:
        """A weight (N, K) as it is stored, where its columns are in another order, and that order, (K,) int32, of its columns:
        x @ q.T = x[..., order] @ stored.T. None of any other weight."""
        return None

    def unfolded(self, q: Any) -> Tensor | None:
        """The same numbers in a larger form, plain or another QTensor, whose products are faster, or None: what ao.matmul keeps
        beside a weight that leaves out zeros."""
        return None

    def cast(self) -> Cast | None:
        """How data becomes codes of a byte that `operand` gives, or None, where they are made otherwise."""
        return None

    # What follows.

    def grid(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the qparams for data of `shape`: the number of blocks along each dim.

        A block with fewer dims than the data belongs to the last dims, with one block per index of the dims before them, except
        that an all -1 block is the whole tensor; a 1-D tensor takes the last entry. Raises ValueError when a dim is no multiple
        of its block.
        """
        block, rank = tuple(self.block), len(shape)
        if all(b == -1 for b in block):
            block = (-1,) * rank
        elif len(block) < rank:
            block = (1,) * (rank - len(block)) + block
        elif len(block) > rank:
            if rank == 0 or any(b != 1 for b in block[: len(block) - rank]):
                raise ValueError(f"{self}: block={block} has more dims than the data's shape {tuple(shape)}")
            block = block[len(block) - rank :]
        grid = []
        for dim, (b, size) in enumerate(zip(block, shape)):
            if b == -1:
                grid.append(1)
                continue
            if b < 1:
                raise ValueError(f"{self}: block={block}: a block is a positive size, or -1 for the whole dim")
            if size % b:
                common = math.gcd(b, size)
                fitting = common if common > 1 else max(d for d in range(1, min(b, size) + 1) if size % d == 0)
                fits = tuple(fitting if d == dim else b for d, b in enumerate(block))
                use = f"block={fits}, " if fitting > 1 else ""
                raise ValueError(
                    f"{self}: dim {dim} of shape {tuple(shape)} is not a multiple of its block {b}; "
                    f"use {use}-1 for the whole dim, or leave this tensor out"
                )
            grid.append(size // b)
        return tuple(grid)

    def grid_of(self, q: QTensor) -> tuple[int, ...]:
        """The shape of the qparams of `q`. Those of a view may belong to smaller blocks than `block` says."""
        roles = ((q.roles[name], name, t) for name, t in q.fields().items())
        own = (tuple(t.shape) for role, name, t in roles if role == "per_block" and name != "pre_scale")
        return next(own, None) or self.grid(q.shape)

    def wrap(
        self, fields: Mapping[str, Tensor | None], dtype: torch.dtype, shape: torch.Size | Sequence[int], **common: Any
    ) -> QTensor:
        """The QTensor of this Spec over `fields`, which dequantizes to `dtype` and `shape`."""
        return self.tensor_type(self, dtype, torch.Size(shape), True, **fields, **common)

    def quantize(
        self,
        x: Tensor,
        *,
        pre_scale: Tensor | None = None,
        act_scale: Tensor | None = None,
        **qparams: Tensor,
    ) -> QTensor:
        """Quantize a floating-point tensor of any shape that the blocks divide.

        x: the data; the QTensor dequantizes to its dtype.
        pre_scale: (1, K) per-input-channel multiplier of the activation; `x / pre_scale` is stored.
        act_scale: the scale of a static activation.
        qparams: qparams found by another algorithm (`scale=`, `zero_point=`) in place of `choose_qparams`.

        Looks at no number but those of float64, so that it can be traced and never waits for a device: a block with a NaN or an
        infinity in it has NaN or infinities afterwards, and scales that their dtype does not hold become infinite or 0.
        `quantize_` looks, and refuses such weights.

        Raises TypeError for data that is not floating point, ValueError where a block does not divide its dim, or where a
        float64 number is beyond the range of float32.
        """
        if isinstance(x, QTensor):
            raise TypeError(f"{self}.quantize: the tensor is quantized already ({x.spec}); call .dequantize() first")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{self}.quantize takes a floating-point tensor, got {x.dtype}; convert it first")
        if x.dtype == torch.float64:
            check_within_float32(self, x)
        fields = quantize_fields(self, x.detach(), self.grid(x.shape), pre_scale, qparams)
        return self.wrap(fields, x.dtype, x.shape, pre_scale=pre_scale, act_scale=act_scale)

    def element(self) -> Any:
        """How one number becomes its code (`Element` in operand.py); None where the ends of a block do not say its qparams."""
        return None

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`quantize(x).dequantize()` with a straight-through gradient: d out / d x = 1 (arXiv:1308.3432)."""
        return _FakeQuantize.apply(x, self)

    def called(self: _S, name: str) -> _S:
        """The same, which prints as `name` from now on, and is a format by that name: `quantize_(model, name)`."""
        Spec.named[self] = name
        _settings_of.cache_clear()  # it may be a part of others
        return self

    def settings(self) -> dict[str, Any]:
        """The first field of the dtype, and those that differ from their defaults: what repr shows."""
        common, first, *others = dataclasses.fields(self)
        values = {f.name: getattr(self, f.name) for f in (first, *others, common)}
        usual = {f.name: f.default for f in others} | {common.name: common.default}
        return {k: v for k, v in values.items() if k == first.name or v != usual[k]}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `Spec.from_dict` reads. Every field is there, so that no later default can change it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "type": type(self).__name__,
            **{k: v.to_dict() if isinstance(v, Spec) else v for k, v in values.items()},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Spec:
        """The Spec that `to_dict` wrote. Raises ValueError for a type or a field that this version does not know."""
        values = {k: _from_json(v) for k, v in data.items() if k != "type"}
        cls = Spec.registry.get(data.get("type", ""))
        if cls is None:
            raise ValueError(
                f"unknown Spec type {data.get('type')!r}; this version of ao knows {sorted(Spec.registry)}"
            )
        unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {sorted(unknown)}; a newer version of ao may have written this"
            )
        return cls(**values)

    def __repr__(self) -> str:
        return Spec.named.get(self) or _settings_of(self)


@functools.lru_cache(maxsize=256)
def _settings_of(spec: Spec) -> str:
    return f"{type(spec).__name__}({', '.join(f'{k}={v!r}' for k, v in spec.settings().items())})"


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Spec.from_dict(value)
    return tuple(_from_json(v) for v in value) if isinstance(value, list) else value


def check_within_float32(spec: Spec, x: Tensor) -> None:
    """Raise ValueError, in eager mode, where a number of a float64 `x` is beyond the range of float32."""
    if x.dtype == torch.float64 and is_eager(x) and (x.isfinite() & ~x.float().isfinite()).any():
        raise ValueError(
            f"{spec}.quantize computes in float32, and the data has numbers up to {x.abs().max().item():.3g}, which are "
            "beyond its range; scale them down first"
        )


def quantize_fields(
    spec: Spec,
    x: Tensor,
    grid: tuple[int, ...],
    pre_scale: Tensor | None = None,
    qparams: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor | None]:
    """The fields of `spec` for data `x` cut into `grid` blocks: the one road from numbers to fields.

    In eager mode large data goes in pieces, with the same result bit for bit: pieces.py says why. Data on meta gets fields like
    those of `blank`, which keeps its answer: a model has few shapes.
    """
    if x.is_meta and pre_scale is None and not qparams and is_eager(x, on_meta=True):
        return {name: _empty(t, x.device) for name, t in blank(spec, tuple(x.shape), tuple(grid)).fields().items()}
    if is_eager(x) and x.numel() > ELEMENTS[x.device.type] and not (x.requires_grad and torch.is_grad_enabled()):
        form = blank(spec, tuple(x.shape), tuple(grid))
        if "opaque" not in (form.roles[name] for name in form.fields()):
            return _quantize_pieces(spec, x, grid, pre_scale, dict(qparams or {}), form)
    x = x.float()
    if pre_scale is not None:
        x = x / expand(pre_scale.float(), x.shape)
    return spec.encode(x, **(qparams or spec.choose_qparams(x, grid)))


def has_scale_by_row(spec: Spec) -> bool:
    """Whether the rows of a matrix share no qparam, as far as the settings say: scales that are quantized may share one."""
    nested = (getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name != "act")
    return len(spec.block) == 2 and spec.block[0] == 1 and not any(isinstance(value, Spec) for value in nested)


def blank(spec: Spec, shape: tuple[int, ...], grid: tuple[int, ...] | None = None) -> QTensor:
    """A QTensor on meta, as quantizing data of `shape` would give. Raises ValueError where `spec` does not take it.

    The answer is kept, but under a mode that makes tensors of its own, such as fake ones, and in code that is compiled.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return _blank.__wrapped__(spec, shape, grid)
    return _blank(spec, shape, grid)


@functools.lru_cache(maxsize=256)
def _blank(spec: Spec, shape: tuple[int, ...], grid: tuple[int, ...] | None) -> QTensor:
    x = torch.empty(shape, dtype=torch.float32, device="meta")
    fields = spec.encode(x, **spec.choose_qparams(x, spec.grid(shape) if grid is None else grid))
    return spec.wrap(fields, x.dtype, shape)


def _quantize_pieces(
    spec: Spec,
    x: Tensor,
    grid: tuple[int, ...],
    pre_scale: Tensor | None,
    qparams: dict[str, Tensor],
    form: QTensor,
) -> dict[str, Tensor | None]:
    """`quantize_fields` piece by piece into fields like those of `form`; much data by C++ (cpp_codes.py)."""
    from .cpp_codes import coder  # which few programs need

    size = ELEMENTS[x.device.type]
    unit = _unit(form)
    if not qparams and math.prod(unit) > 8 * size:
        # Blocks larger than a piece: first their qparams, then the codes in pieces of blocks.
        scaled = x if pre_scale is None else x / expand(pre_scale.float(), x.shape)
        qparams = spec.choose_qparams(scaled, grid)
    given = {name: dense(t) for name, t in qparams.items()}
    if given:
        unit = _unit(form, given)
    made: dict[str, Tensor | None] = {name: _empty(t, x.device) for name, t in form.fields().items()}
    rows = coder(spec, x, grid) if pre_scale is None and not qparams else None
    if rows is not None and rows.library is not None:
        size *= 4  # it needs no memory for numbers in between, and a piece costs some calls from Python
    buffer = None
    for box in boxes(x.shape, unit, size):
        piece = part(x, box, x.shape)
        piece_grid = tuple(max(g * p // n, 1) for g, p, n in zip(grid, piece.shape, x.shape))
        chosen: dict[str, Tensor] = {}
        if rows is not None and rows.ready(piece):
            qdata = made["qdata"]
            assert qdata is not None
            fields = rows.quantize(spec, piece, piece_grid, part(qdata, box, x.shape))
        else:
            if x.dtype != torch.float32:
                # One buffer for all pieces: memory that is warm, and that malloc does not hand back in between.
                buffer = torch.empty(piece.numel(), dtype=torch.float32, device=x.device) if buffer is None else buffer
                piece = buffer[: piece.numel()].view(piece.shape).copy_(piece)
            if pre_scale is not None:
                piece = piece / expand(part(pre_scale.float(), box, x.shape), piece.shape)
            chosen = {name: part(t, box, x.shape) for name, t in given.items()} or spec.choose_qparams(
                piece, piece_grid
            )
            fields = spec.encode(piece, **chosen)
        for name, t in fields.items():
            if t is None:
                made[name] = None
            elif name in given and t is chosen[name]:
                made[name] = qparams[name]
            elif form.roles[name] == "shared":
                made[name] = t
            else:
                field = made[name]
                assert field is not None
                _write(field, t, box, x.shape)
    return made


def _unit(form: QTensor, given: Mapping[str, Tensor] | None = None) -> list[int]:
    """The multiples, per dim, at which data like `form` can be cut through no block and no packed chunk.

    given: qparams that are known, so that a block which spans a dim may be cut.
    """
    places = [lattice(form, d) for d in range(form.dim())]
    unit = [p.chunk if given else p.whole for p in places]
    for t in (given or {}).values():
        unit = [math.lcm(u, n // f) if f > 1 else u for u, n, f in zip(unit, form.shape, t.shape)]
    for d, p in enumerate(places):
        if p.chunk > 1:
            # A cut of a later dim would make another dim of the piece the one to pack.
            return [*unit[: d + 1], *form.shape[d + 1 :]]
    return unit


def _empty(t: Tensor, device: torch.device) -> Tensor:
    """Memory for a field like `t`."""
    return t.map(lambda f: _empty(f, device)) if isinstance(t, QTensor) else torch.empty_like(t, device=device)


def _write(field: Tensor, piece: Tensor, box: Box, shape: torch.Size) -> None:
    """Put what belongs to `box` of data of `shape` in its place in `field`."""
    if isinstance(field, QTensor) and isinstance(piece, QTensor):
        for name, t in field.fields().items():
            inner = piece.fields()[name]
            t.copy_(inner) if field.roles[name] == "shared" else _write(t, inner, box, shape)
    else:
        part(field, box, shape).copy_(piece)


def dense(field: Tensor) -> Tensor:
    """A field as a plain tensor: a nested QTensor is dequantized."""
    # Not `dequantize`, which torch.export does not see through for what was computed in the graph.
    return field.decode_scaled(field.dtype) if isinstance(field, QTensor) else field


def repeated(field: Tensor, shape: Sequence[int]) -> Tensor:
    """A field over smaller blocks, as plain numbers, or as it is where it is a QTensor of one number per element."""
    if isinstance(field, QTensor) and all(t.shape == field.shape for t in field.fields().values()):
        return field.like(shape, field.dtype, {name: expand(t, shape) for name, t in field.fields().items()})
    return expand(dense(field), shape)


def _stored(t: Tensor, kind: Tensor) -> Tensor:
    """`t` (float32) as a tensor like `kind`."""
    if isinstance(kind, QTensor):
        return kind.spec.quantize(t)
    if kind.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return round_to(t, kind.dtype)
    if not kind.is_floating_point():
        ends = torch.iinfo(kind.dtype)
        t = t.round().clamp(ends.min, ends.max)
    return t.to(kind.dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: Spec) -> Tensor:
        power = range_power(x, has_scale_by_row(spec)) if x.dtype == torch.float64 else None
        wide = (x.detach() if power is None else x.detach() / power).float()
        out = narrow(spec.round(wide, **spec.choose_qparams(wide, spec.grid(x.shape))), x.dtype)
        return fresh(out if power is None else out * power)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class QTensor(torch.Tensor):
    """A quantized tensor: a few field tensors and the Spec that made them.

    Invariants:
    1. every field but the Shared and Opaque ones has the rank of the tensor; blocks are axis-aligned;
    2. along each dim a field is `tile` times shorter than the tensor; the tile follows from the two shapes;
    3. values depend on shapes and fields only; the Spec says how to quantize anew (`copy_`) and how a matmul treats
       the activation;
    4. `decode()` computes in float32; `dequantize()` multiplies by `pre_scale`, where there is one, and casts to `dtype`;
    5. `whole` is False for a view that got only a part of some block, and so shares that block's qparams with elements
       outside of it: it can be read, and refuses to be quantized anew in place.

    Subclass it with `class FooTensor(QTensor, spec=Foo)`, annotated fields, and `decode`.

    `FooTensor(q, requires_grad=...)` is `torch.nn.Parameter(q, requires_grad)`, as for a plain parameter's class: code that
    moves the parameters of any model, such as accelerate's, makes them anew so.
    """

    spec: Spec
    whole: bool
    pre_scale: PerBlock | None
    act_scale: Shared | None

    roles: ClassVar[dict[str, str]] = {}
    unit: ClassVar[int] = CHUNK
    """The elements at which a packed dim of the `Elements` can be cut."""
    grain: ClassVar[int] = 8
    """What the size of a packed dim is a multiple of."""
    turns: ClassVar[bool] = True
    """Whether the `Elements` can be packed along another dim than the one they were packed along."""
    alike: ClassVar[tuple[str, ...]] = ()
    """Fields that several weights of a model may have alike, and that are small: such are one tensor in a compiled graph."""
    own_ops: ClassVar[dict[Any, Callable[..., Any]]] = {}
    """Handlers of ATen operators that come before those in `OPS` where the first argument is of this type."""

    def __init_subclass__(cls, spec: type[Spec] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.roles = dict(_read_roles(cls))
        if spec is not None:
            spec.tensor_type = cls
        torch.serialization.add_safe_globals([cls])

    @staticmethod
    def __new__(
        cls,
        spec: Spec | QTensor,
        dtype: torch.dtype = torch.float32,
        shape: torch.Size | tuple[int, ...] = (),
        whole: bool = True,
        **fields: Any,
    ) -> QTensor:
        if isinstance(spec, QTensor):
            made: Any = torch.nn.Parameter(spec, **fields)
            return made
        # Each dtype has a field that is always there.
        name, first = next((name, t) for name, t in fields.items() if t is not None)
        # The strides that the data would have if the first field were not packed: a transposed, sliced or expanded QTensor says
        # so, and `contiguous()` knows what to do.
        strides = None
        if first.dim() == len(shape) and cls.roles[name] != "opaque":
            strides = first.stride()
            packed = next((d for d in range(len(shape)) if first.shape[d] != shape[d]), None)
            if packed is not None:
                inner, full, small = strides[packed], shape[packed], first.shape[packed]
                strides = tuple(s * full // small if s > inner else s for s in strides)
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=first.device, requires_grad=False
        )
        made.spec = spec
        made.whole = whole
        for name in cls.roles:
            setattr(made, name, fields.get(name))
        return made

    # What a dtype defines.

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values before `pre_scale`, computed in float32 and given as `dtype`.

        Cast before the last reshape: the compiler then iterates over blocks, and its indices stay simple enough for wide
        loads (five times faster on a GPU than over rows).
        """
        raise NotImplementedError

    # What follows. `dequantize` is torch.Tensor's own method; ops.py gives it its meaning.

    def decode_scaled(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in float32 and given as `dtype`."""
        if self.pre_scale is None:
            return self.decode(dtype)
        return narrow(self.decode() * expand(self.pre_scale.float(), self.shape), dtype)

    def fields(self) -> dict[str, Tensor]:
        """The field tensors that are there, by name."""
        return {name: t for name in type(self).roles if (t := getattr(self, name)) is not None}

    def like(
        self,
        shape: torch.Size | Sequence[int],
        dtype: torch.dtype,
        fields: Mapping[str, Tensor | None],
        whole: bool = True,
    ) -> QTensor:
        """A QTensor of the same Spec from other fields."""
        return type(self)(self.spec, dtype, torch.Size(shape), whole, **fields)

    def map(self, fn: Callable[[Tensor], Tensor]) -> QTensor:
        """A copy with a shape-preserving function applied to every field."""
        return self.like(self.shape, self.dtype, {name: fn(t) for name, t in self.fields().items()})

    @property
    def nbytes_packed(self) -> int:
        """Bytes of storage, every field counted."""
        # Not `Tensor.nbytes`, which a traced tensor of any size does not have.
        return sum(
            t.nbytes_packed if isinstance(t, QTensor) else t.numel() * t.element_size() for t in self.fields().values()
        )

    nbytes = nbytes_packed

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Spec, torch.dtype, bool]]:
        # Compiled code asks at every call whether this is what it was made for: the answer is kept.
        kept = self.__dict__.get("flattened")
        if kept is None:
            kept = self.flattened = (list(self.fields()), (self.spec, self.dtype, self.whole))
        return kept

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], context: tuple[Spec, torch.dtype, bool], outer_size: Any, outer_stride: Any
    ) -> QTensor:
        spec, dtype, whole = context
        return cls(spec, dtype, outer_size, whole, **inner)

    def _stable_hash_for_caching(self) -> str:
        """The key under which AOTAutograd may reuse a compiled graph: it must change when the numerics do.

        Code that is reached through a tensor subclass is not part of PyTorch's key, hence the digest of our sources.
        """
        parts = [type(self).__name__, repr(self.spec), str(self.dtype), str(self.whole), str(tuple(self.shape))]
        parts.append(sources_digest())
        for name, t in self.fields().items():
            inner = t._stable_hash_for_caching() if isinstance(t, QTensor) else ""
            parts += [name, str(t.dtype), str(tuple(t.shape)), str(t.stride()), str(t.device), inner]
        return hashlib.blake2b("|".join(parts).encode(), digest_size=16).hexdigest()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        size = 8 * self.nbytes_packed / self.numel() if self.numel() else None
        bits = f", {size:.2f} bits per element" if isinstance(size, float) else ""  # a traced tensor's is a symbol
        return f"{type(self).__name__}({self.spec}, shape={tuple(self.shape)}, {self.dtype}, {self.device}{bits}{grad})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QTensor:
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            copy: Any = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, requires_grad=self.requires_grad)
        else:
            copy.requires_grad_(self.requires_grad)
        if self.grad is not None:
            copy.grad = self.grad.detach().clone()
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        fields = {name: t if isinstance(t, QTensor) else as_bytes(t) for name, t in self.fields().items()}
        dtypes = {name: t.dtype for name, t in self.fields().items()}
        # The digest is for torch < 2.13, whose compile cache takes this pickle for its key; nothing reads it back.
        flags = (self.whole, self.requires_grad, isinstance(self, torch.nn.Parameter), sources_digest())
        return _rebuild, (type(self), self.spec, self.dtype, tuple(self.shape), fields, dtypes, flags)

    @classmethod
    @passed_over
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FUNCTIONS:
            return FUNCTIONS[func](*args, **(kwargs or {}))
        attribute = is_tracing() and func.__name__ == "__get__"
        with torch._C.DisableTorchFunctionSubclass(), unrecorded() if attribute else nullcontext():
            return func(*args, **(kwargs or {}))

    @classmethod
    @passed_over
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        own = args[0].own_ops if isinstance(args[0], QTensor) else {}
        handler = own.get(func) or OPS.get(func) or OPS.get(func.name())
        if handler is not None:
            with view_mode(func, args[0]):
                out = handler(*args, **kwargs)
            if func._schema.is_mutable and not is_tracing():
                _written(args[0])
                _written(args[0]._base)
            is_view = func.is_view and (isinstance(out, QTensor) or not isinstance(out, Tensor))
            return return_and_correct_aliasing(func, args, kwargs, out) if is_view else out
        if func._can_decompose():
            return func.decompose(*args, **kwargs)
        if func.namespace == "aten" and func._schema.is_mutable:
            if isinstance(args[0], QTensor) and func._schema.arguments[0].is_write:
                return requantize_in_place(func, args, kwargs)
            if func.__name__.startswith("_foreach_"):
                return _requantize_each_in_place(func, args, kwargs)
            if func.__name__.startswith("_fused_"):
                return _requantize_fused(func, args, kwargs)
        if _is_penalty(func, args, kwargs):
            return func(*torch.utils._pytree.tree_map_only(QTensor, lambda q: q.dequantize(), args), **kwargs)
        name = next(type(a).__name__ for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, QTensor))
        layer = running_layer(lambda t: isinstance(t, QTensor))
        raise NotImplementedError(
            f"{func} has no low-bit form for {name}: call .dequantize() first and .quantize() the result, "
            "or use an in-place op, which quantizes anew"
            + (
                f"; the layer {layer} computes with its weight otherwise than by a product: do not quantize it"
                if layer
                else ""
            )
        )


def _written(t: Tensor | None) -> None:
    """Count a change in the fields of a QTensor that was written to, as autograd does for the QTensor itself: what is kept beside
    a field is then made anew."""
    if isinstance(t, QTensor):
        for inner in t.fields().values():
            _written(inner)
    elif t is not None:
        torch.autograd.graph.increment_version(t)


def view_mode(func: Any, base: Any) -> AbstractContextManager[Any]:
    """The mode in which a tensor subclass makes what `func` gives of `base`, its first argument.

    A view in inference mode is an ordinary tensor where its base is one; nothing else can be a view of it.
    """
    inference = func.is_view and torch.is_inference_mode_enabled() and not base.is_inference()
    return torch.inference_mode(False) if inference else nullcontext()


def as_bytes(t: Tensor) -> Tensor:
    """float8 as uint8, for what does not know float8: pickle and some communication backends."""
    return t.view(torch.uint8) if t.dtype.is_floating_point and t.element_size() == 1 else t


def _rebuild(
    cls: type[QTensor],
    spec: Spec,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    fields: dict[str, Tensor],
    dtypes: dict[str, torch.dtype],
    flags: tuple[bool, bool, bool, str],
) -> QTensor:
    """What a pickled QTensor becomes."""
    whole, requires_grad, is_parameter, _ = flags
    made = {k: t if t.dtype == dtypes[k] else t.view(dtypes[k]) for k, t in fields.items()}
    q: Any = cls(spec, dtype, torch.Size(shape), whole, **made)
    made_again: Any = torch.nn.Parameter(q, requires_grad) if is_parameter else q.requires_grad_(requires_grad)
    return made_again


torch.serialization.add_safe_globals([_rebuild])


def requantize_in_place(func: Any, args: Any, kwargs: Any) -> QTensor:
    """`q.add_(x)` and its like: the op on the dequantized values, in float32, then `copy_`.

    As in any dtype, a change that is small beside the steps between numbers vanishes in rounding.
    """
    target = args[0]
    values, *rest = [a.decode_scaled() if isinstance(a, QTensor) else a for a in args]
    func(values, *rest, **kwargs)
    return target.copy_(values)


def _requantize_each_in_place(func: Any, args: Any, kwargs: Any) -> None:
    """`torch._foreach_add_(targets, ...)` and its like, of optimizers: the same for each tensor of a list."""
    targets, *rest = torch.utils._pytree.tree_map_only(QTensor, lambda q: q.decode_scaled(), args)
    func(targets, *rest, **kwargs)
    for target, values in zip(args[0], targets):
        if isinstance(target, QTensor):
            target.copy_(values)


def _requantize_fused(func: Any, args: Any, kwargs: Any) -> None:
    """`torch._fused_adamw_(targets, grads, states, ...)` and its like, of optimizers: the same in float32, target by target, so
    that one of them at a time is decoded."""
    targets = args[0]

    def of(where: list[int]) -> list[Any]:
        return [[a[i] for i in where] if isinstance(a, (list, tuple)) and a else a for a in args]

    plain = [i for i, t in enumerate(targets) if not isinstance(t, QTensor)]
    if plain:
        func(*of(plain), **kwargs)
    for i in (i for i in range(len(targets)) if i not in plain):
        own = of([i])
        wide = torch.utils._pytree.tree_map_only(Tensor, _in_float32, own)
        func(*wide, **kwargs)
        for tensors, values in zip(own, wide):
            for t, new in zip(tensors, values):
                if t is not new:
                    t.copy_(new)


def _is_penalty(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an optimizer adds weight decay to a gradient: `grad.add(weight, alpha=weight_decay)`, and that of lists."""
    if func not in (torch.ops.aten.add.Tensor, torch.ops.aten._foreach_add.List) or kwargs.get("alpha", 1) == 1:
        return False
    return not any(isinstance(t, QTensor) for t in torch.utils._pytree.tree_leaves(args[0]))


def _in_float32(t: Tensor) -> Tensor:
    return t.decode_scaled() if isinstance(t, QTensor) else t.float()


def _read_roles(cls: type[QTensor]) -> Iterator[tuple[str, str]]:
    hints = get_type_hints(cls, include_extras=True)
    common = [name for name in QTensor.__annotations__ if name in hints]
    for name in [n for n in hints if n not in common] + common:
        for hint in (hints[name], *getattr(hints[name], "__args__", ())):
            if getattr(hint, "__metadata__", None):
                yield name, hint.__metadata__[0]


@functools.cache
def sources_digest() -> str:
    """A digest of the sources of `ao.dtypes` and `ao.matmul`."""
    digest = hashlib.blake2b(digest_size=16)
    rooms = Path(__file__).parent, Path(__file__).parent.parent / "matmul"
    for path in sorted(p for room in rooms for p in room.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
