"""Products on a CPU by C++ that is compiled when it is first needed, once per kind of code (kernels/cpu_source.py).

In eager mode there is nothing else that is fast: an expression over packed codes is dozens of operators, each of which writes
what the next one reads. The choice is made once per form of a weight, when it first multiplies (`chosen` in linear.py), and what
has been chosen stays: the same call gives the same bits.

A weight that is small is not worth a second of compiling, also where others have paid for it: what a call gives must not depend
on what was called before.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.base import QTensor, dense
from ..dtypes.bits import CHUNK, TRIT_BYTES, TRIT_CHUNK
from ..dtypes.cpp import cpp_compiler
from ..dtypes.operand import Operand
from ..dtypes.tracing import is_eager, known
from . import cpu_int8
from .anywhere import compiling, is_int8, quantized_act, row_cast
from .cpu_decode import AVX512
from .form import leaves
from .kernels.built import (
    CODES,
    DTYPES,
    IN_16_BITS,
    IN_31_BITS,
    IN_FLOATS,
    JOINT_SCALE,
    JOINT_ZERO,
    OF_INTEGERS,
    POWER,
    SCALES,
    Act,
    Kind,
    Level,
    Library,
    Weight,
    library,
)
from .kernels.device import FLOATS, TILES, VNNI
from .path import Product

WORTH = 2**16
"""A weight of so many elements is worth compiling for: decoded by PyTorch's operators it takes a millisecond a call."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_JOINT = "joint"
"""The kind of operand, in a graph, of integers whose scales are words that hold zero points as well."""

_SIGNED = {torch.int8: "signed", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""What codes of a byte are, by their dtype."""

_INTEGERS = CODES["signed"], CODES["unsigned"]

_UNITS = FLOATS & {torch.bfloat16, torch.float16}
"""The dtypes in which the CPU multiplies faster than in float32."""

_PIECE = 2**20
"""How many elements are decoded at once for a product of PyTorch's: what stays in cache until it is read. Half as many for one in
units, which puts them in another order first, beside them."""

_TOKENS = 4096
"""Tokens of a call of the units that multiply tiles, for which it copies them in another order."""

_MANY = 128 if TILES else 512
"""From so many tokens on a weight of integers of 8 bits is decoded for units of bfloat16, of which it takes one product: in bytes
it takes two, and their sums are written out."""


def readable(w: QTensor) -> Operand | None:
    """The operand of a weight whose codes the compiled functions read: rows of whole chunks, groups of 16 or of whole chunks."""
    operand = w.spec.operand(w)
    if operand is None or operand.kind == "int4pack" or w.dim() != 2 or w.numel() == 0:
        return None
    (n, k), codes, scale, zero = w.shape, operand.codes, operand.scale, operand.zero_point
    width = k // TRIT_CHUNK * TRIT_BYTES if operand.kind == "trits" else k * operand.bits // 8
    whole = (
        k % (TRIT_CHUNK if operand.kind == "trits" else CHUNK) == 0
        and codes.shape == (n, width)
        and codes.stride(1) == 1
        and scale.dim() == 2
        and scale.shape[0] in (1, n)
        and k % scale.shape[1] == 0
        and (k // scale.shape[1] == 16 or k // scale.shape[1] % CHUNK == 0)
        and (zero is None or (zero.shape[0] in (1, n) and zero.shape[1] == scale.shape[1]))
    )
    return operand if whole else None


def _kind(operand: Operand) -> Kind | None:
    codes = operand.codes.dtype
    if operand.kind == "trits":
        return Kind("signed", 8)  # which a row becomes, when it is read
    if operand.kind in ("affine", "shifted", "fixed"):
        return Kind("signed" if codes == torch.int8 else "unsigned", operand.bits)
    if operand.kind == "table" or (operand.kind == "minifloat" and operand.bits <= 4):
        return Kind("table", operand.bits)
    if operand.kind == "minifloat":
        whole = {(8, 4): "e4m3", (8, 5): "e5m2"}.get((operand.bits, operand.exponent))
        return Kind("minifloat", operand.bits, operand.exponent) if whole is None else Kind(whole, 8)
    return Kind(_SIGNED[codes], 8) if codes in _SIGNED else None


@functools.cache
def _one_number(value: float) -> Tensor:
    """A float32, (1,), that lives as long as the process."""
    return torch.tensor([value], dtype=torch.float32, device="cpu")


@functools.cache
def _minifloats(bits: int, exponent: int) -> Tensor:
    """What all codes stand for, float32: (2**bits,)."""
    codes = torch.arange(2**bits, dtype=torch.int32, device="cpu")
    return Operand(codes, codes, kind="minifloat", bits=bits, exponent=exponent).read(codes)


def accepts(x: Tensor, w: QTensor) -> bool:
    """Whether `product` multiplies these; in a graph, where it is faster than what a compiler makes of expressions."""
    if x.dtype not in _DTYPES or cpp_compiler() is None:
        return False
    operand = readable(w)
    kind = None if operand is None else _kind(operand)
    if operand is None or kind is None or w.numel() < WORTH:
        return False
    few = known(x.shape[0] <= _most(x.dtype, w.shape[1]))
    if VNNI and operand.kind == "trits" and is_int8(w) and not few:
        return False  # there are units for it
    in_bytes = VNNI and operand.kind != "trits" and cpu_int8.reads(w, x.dtype)
    if in_bytes and not (_before_units(x, w) or _after_units(x, w)):
        return False
    if compiling() and x.dtype in _UNITS and not few and not _decodes_fast(x.dtype):
        return False  # Inductor decodes as fast, and fuses what follows
    return library(kind) is not None


def _decodes_fast(dtype: torch.dtype) -> bool:
    """Whether the compiled functions decode to a dtype that has units in less time than it takes to read a weight of it."""
    return AVX512 and dtype in _UNITS and dtype in DTYPES


def _before_units(x: Tensor, w: QTensor) -> bool:
    """Whether there are so few tokens that the compiled loops are faster than integer units, where both multiply: these take as
    long for two tokens as for eight. One token that is quantized is as fast there."""
    return known(x.shape[0] <= (4 if TILES else 8)) and (w.spec.act is None or known(x.shape[0] > 1))


def _after_units(x: Tensor, w: QTensor) -> bool:
    """Whether there are so many tokens that one product of bfloat16 in units takes less time than two of bytes."""
    return w.spec.act is None and _decodes_fast(x.dtype) and known(x.shape[0] >= _MANY)


def _most(dtype: torch.dtype, k: int) -> int:
    """Up to how many tokens the compiled loops multiply themselves. From some number on it is faster to decode the weight once
    for a product of PyTorch's: soon where rows are short, as each takes a sum over its lanes per token, and where there are
    units."""
    if dtype == torch.float32 and not AVX512:
        return 128
    if TILES and dtype == torch.bfloat16:
        return 4
    return min(8 if _decodes_fast(dtype) else 16 if dtype in _UNITS else 32, k // 64)


def product(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T. x: (M, K), w: (N, K) -> (M, N) in x's dtype."""
    operand = readable(w)
    assert operand is not None
    act = _act(w)
    if w.spec.act is not None and act is None:
        return _of_rows(quantized_act(x.float(), w), operand).to(x.dtype)
    return _of_rows(x if x.dtype in SCALES else x.float(), operand, act, w.act_scale).to(x.dtype)


def _act(w: QTensor) -> Act | None:
    """How the compiled functions quantize the activation; None where they do not."""
    act, cast = w.spec.act, row_cast(w)
    if act is None or cast is None or cast.levels is None or not cast.nearest:
        return None
    if (cast.zero_point and w.act_scale is not None) or not (cast.zero_point or cast.dtype != torch.uint8):
        return None
    codes = "unsigned" if cast.zero_point else _SIGNED[cast.dtype]
    return Act(CODES[codes], act.block == (-1, -1), cast.low, cast.high, 1 / cast.levels)


def launch(x: Tensor, w: QTensor) -> Product:
    """`product` of any x (..., K) with as many tokens and weights of the form of `w`."""
    operand, operand_of, (n, k) = readable(w), w.spec.operand, w.shape
    assert operand is not None
    compiled, act = _library(operand), _act(w)
    direct = x.dtype in _DTYPES and (act is not None or w.spec.act is None)

    def run(x: Tensor, w: QTensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, k)
        if direct:
            operand = operand_of(w)
            y = _multiplied(compiled, rows, _described(operand, n, k, w), act, w.act_scale)  # type: ignore[arg-type]
        else:
            y = product(rows, w)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], n)

    return run


def _library(operand: Operand) -> Library:
    kind = _kind(operand)
    compiled = None if kind is None else library(kind)
    assert compiled is not None
    return compiled


def _of_rows(x: Tensor, operand: Operand, act: Act | None = None, act_scale: Tensor | None = None) -> Tensor:
    """x: (M, K) of a dtype in `SCALES`, which `act` quantizes -> (M, N) of its dtype."""
    if is_eager(x, or_recorded=False):
        return _multiplied(
            _library(operand), x, _described(operand, operand.codes.shape[0], x.shape[1]), act, act_scale
        )
    how = [] if act is None else [float(getattr(act, field[0])) for field in Act._fields_]
    zero: list[Tensor] = []
    if operand.words is not None:
        scale, kind = [operand.words], _JOINT
    else:
        kind = operand.kind
        scale = [operand.powers] if operand.powers is not None else _parts(operand.scale, kind != "fixed")
        zero = [] if operand.zero_point is None else _parts(operand.zero_point)
    numbers = operand.bits, operand.offset, operand.exponent
    return torch.ops.ao.cpu_product(x, operand.codes, scale, zero, kind, *numbers, operand.table, act_scale, how)


def _parts(t: Tensor, nested: bool = True) -> list[Tensor]:
    """Scales or zero points as the operator gets them: numbers, or, if they are quantized themselves, bytes, their scale and
    perhaps their zero point."""
    inner = _inner(t) if nested else None
    if inner is None or inner.bits < 8 or inner.offset:
        return [_plain(t)]
    return [inner.codes, *(_plain(u) for u in (inner.scale, inner.zero_point) if u is not None)]


def _whole(parts: list[Tensor]) -> Any:
    """What `_parts` took apart, a Tensor or an Operand; None of none."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return Operand(parts[0], parts[1], parts[2] if len(parts) > 2 else None)


def _operator(
    x: Tensor,
    codes: Tensor,
    scale: list[Tensor],
    zero_point: list[Tensor],
    kind: Any,
    bits: int,
    offset: float,
    exponent: int,
    table: Tensor | None,
    act_scale: Tensor | None,
    how: list[float],
) -> Tensor:
    first, zero = _whole(scale), _whole(zero_point)
    if kind == _JOINT:
        operand = Operand(codes, first, first, "affine", bits, offset, table, exponent, words=first)
    else:
        powers = first if len(scale) == 1 and first.dtype == torch.uint8 else None
        operand = Operand(codes, first, zero, kind, bits, offset, table, exponent, powers)
    act = Act(int(how[0]), int(how[1]), *how[2:]) if how else None
    return _multiplied(_library(operand), x, _described(operand, codes.shape[0], x.shape[1]), act, act_scale)


def _shape(x: Tensor, codes: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


torch.library.define(
    "ao::cpu_product",
    "(Tensor x, Tensor codes, Tensor[] scale, Tensor[] zero_point, str kind, int bits, float offset, int exponent, Tensor? table,"
    " Tensor? act_scale, float[] act) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.impl("ao::cpu_product", "CPU", _operator)
torch.library.impl("ao::cpu_product", "Meta", _shape)


class _Described(NamedTuple):
    """A weight as the compiled functions read it, and what must live as long."""

    weight: Weight
    tensors: tuple[Tensor | None, ...]


def _multiplied(
    compiled: Library, x: Tensor, described: _Described, act: Act | None = None, act_scale: Tensor | None = None
) -> Tensor:
    """The product, now. x: (M, K) -> (M, N) of its dtype. act: how to quantize x. act_scale: one number."""
    (m, k), n, dtype, weight = x.shape, described.weight.n, x.dtype, described.weight
    x, threads = x.contiguous(), torch.get_num_threads()
    scale, points = None, IN_16_BITS
    if dtype == torch.float32:
        points = IN_31_BITS if m <= 2 and weight.table is None else IN_FLOATS
    if act is not None:
        rows, scale = x.new_empty(m, k, dtype=torch.float32), x.new_empty(m, dtype=torch.float32)
        given = None if act_scale is None else act_scale.float()
        where = None if given is None else given.data_ptr()
        compiled.quantize(act, x.data_ptr(), SCALES[dtype], m, k, where, rows.data_ptr(), scale.data_ptr())
        x, points = rows, OF_INTEGERS if act.codes in _INTEGERS else IN_FLOATS
    if m <= _most(x.dtype, k):
        of = dtype if dtype in DTYPES else torch.float32
        y = x.new_empty(m, n, dtype=of)
        tokens = None if scale is None else scale.data_ptr()
        compiled.product(weight, x.data_ptr(), SCALES[x.dtype], tokens, y.data_ptr(), DTYPES[of], m, points, threads)
        return y.to(dtype)
    x = x.to(x.dtype if x.dtype in FLOATS and x.dtype in DTYPES else torch.float32)
    y = x.new_empty(m, n)
    if x.dtype == torch.bfloat16 and compiled.tiles is not None:
        for some, out in zip(x.split(_TOKENS), y.split(_TOKENS)):
            compiled.tiles(weight, some.data_ptr(), some.shape[0], out.data_ptr(), threads)
        return y
    step = min(n, max(_PIECE // (2 if _decodes_fast(x.dtype) else 1) // k, 16))
    piece = x.new_empty(step, k)
    for start in range(0, n, step):
        stop = min(start + step, n)
        compiled.rows(weight, start, stop, piece.data_ptr(), DTYPES[x.dtype], threads)
        torch.mm(x, piece[: stop - start].t(), out=y[:, start:stop])
    return (y if scale is None else y * scale.unsqueeze(1)).to(dtype)


def _described(operand: Operand, n: int, k: int, of: QTensor | None = None) -> _Described:
    """The operand of a weight (n, k). of: the weight, which keeps the answer as long as its tensors are where they are."""
    codes, scale, zero, table = operand.codes, operand.scale, operand.zero_point, operand.table
    where: list[int] | None = None
    if of is not None:
        where = [
            codes.data_ptr(),
            *([scale.data_ptr()] if type(scale) is Tensor else [t.data_ptr() for t in leaves(scale)]),
        ]
        if zero is not None:
            where += [t.data_ptr() for t in leaves(zero)]
        kept = of.__dict__.get("cpu_weight")
        if kept is not None and kept[0] == where:
            return kept[1]
    if operand.kind == "minifloat" and operand.bits <= 6:
        table = _minifloats(operand.bits, operand.exponent)
    if table is not None and table.numel() < 16:
        table = F.pad(table, (0, 16 - table.numel()))  # it is read by whole vectors
    levels: list[tuple[Level, tuple[Tensor, ...]]]
    if operand.words is not None:
        words = _plain(operand.words)
        levels = [(_numbers(words, kind), (words,)) for kind in (JOINT_SCALE, JOINT_ZERO)]
    else:
        powers = None if operand.powers is None else operand.powers.contiguous()
        unit = _one_number(operand.unit) if operand.kind == "fixed" else None
        levels = [
            _level(scale, unit) if powers is None else (_numbers(powers, POWER, unit), (powers,)),
            (Level(), ()) if zero is None else _level(zero),
        ]
    weight = Weight(
        *(None if t is None else t.data_ptr() for t in (codes, table)),
        *(level for level, _ in levels),
        *(n, k, codes.stride(0), _groups(scale)),
        operand.offset,
        zero is not None or operand.offset != 0,
        operand.kind == "shifted",
        operand.kind == "trits",
    )
    tensors = codes, table, *(t for _, of_level in levels for t in of_level)
    described = _Described(weight, tensors)
    if where is not None and all(t is None or t is table or t.data_ptr() in where for t in tensors):
        of.cpu_weight = where, described  # type: ignore[union-attr]
    return described


def _numbers(t: Tensor, kind: int, unit: Tensor | None = None) -> Level:
    """Numbers as they are, of one of the kinds of cpu_source.py, or times one that lives as long as the process."""
    if unit is None:
        return Level(t.data_ptr(), None, None, t.shape[0], 0, 0, kind)
    return Level(t.data_ptr(), unit.data_ptr(), None, t.shape[0], 1, 1, kind, 0, SCALES[unit.dtype])


def _level(t: Tensor | Operand, unit: Tensor | None = None) -> tuple[Level, tuple[Tensor, ...]]:
    """Scales or zero points as the compiled functions read them, and what must live as long: numbers, or codes with an affine map
    of their own, where that is all that leads to numbers."""
    inner = _inner(t) if unit is None else None
    if inner is None:
        t = _plain(t)  # type: ignore[arg-type]
        return _numbers(t, SCALES[t.dtype], unit), (t,)
    codes, scale = inner.codes.contiguous(), _plain(inner.scale)
    zero = None if inner.zero_point is None else _plain(inner.zero_point)
    level = Level(
        codes.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        *(codes.shape[0], *scale.shape),
        *(SCALES[codes.dtype], inner.bits if inner.bits < 8 else 0),
        *(SCALES[scale.dtype], 0 if zero is None else SCALES[zero.dtype]),
        inner.offset,
    )
    return level, (codes, scale) if zero is None else (codes, scale, zero)


def _inner(t: Tensor | Operand) -> Operand | None:
    """How scales or zero points are quantized themselves, where the compiled functions read that."""
    if isinstance(t, Operand):
        return t
    inner = t.spec.operand(t) if isinstance(t, QTensor) and t.dtype == torch.float32 and t.pre_scale is None else None
    return inner if inner is not None and _fits(inner, t.shape) else None


def _groups(scale: Tensor | Operand) -> int:
    """Of a row."""
    return scale.codes.shape[1] * 8 // scale.bits if isinstance(scale, Operand) else scale.shape[1]


def _fits(a: Operand, shape: torch.Size) -> bool:
    """Whether `_level` reads scales (rows, groups) by their codes."""
    (rows, groups), scale, zero = shape, a.scale, a.zero_point
    return (
        a.linear
        and a.codes.shape == (rows, groups * a.bits // 8)
        and a.codes.dtype in SCALES
        and not isinstance(scale, QTensor)
        and scale.dim() == 2
        and scale.shape[0] in (1, rows)
        and groups % scale.shape[1] == 0
        and (zero is None or (zero.shape == scale.shape and not isinstance(zero, QTensor)))
    )


def _plain(t: Tensor) -> Tensor:
    t = dense(t)
    t = t if t.dtype in SCALES else t.float()
    return t if t.is_contiguous() else t.contiguous()
