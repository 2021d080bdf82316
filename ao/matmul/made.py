"""Products on a CPU by C++ that is compiled when it is first needed, once per kind of code (kernels/cpu_source.py).

In eager mode there is nothing else that is fast: an expression over packed codes is dozens of operators, each of which writes
what the next one reads. The choice is made once per form of a weight, when it first multiplies (`chosen` in linear.py), and what
has been chosen stays: the same call gives the same bits.

A weight that is small is not worth a second of compiling. It takes the compiled product where another weight, or an earlier
process, has paid for it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes.base import QTensor, dense
from ..dtypes.bits import CHUNK
from ..dtypes.operand import Operand
from ..dtypes.pieces import is_eager
from ..dtypes.tracing import known
from .anywhere import compiling, int8_operand, quantize_act, quantized_act
from .cpu_decode import AVX512
from .kernels.built import DTYPES, Kind, Weight, compiler, is_made, library
from .kernels.device import FLOATS, VNNI
from .path import Product

WORTH = 2**18
"""A weight of so many elements is worth compiling for: decoded by PyTorch's operators it takes a millisecond a call."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_UNITS = FLOATS & {torch.bfloat16, torch.float16}
"""The dtypes in which the CPU multiplies faster than in float32."""

_PIECE = 2**20
"""How many elements are decoded at once for a product of PyTorch's: what stays in cache until it is read."""


def readable(w: QTensor) -> Operand | None:
    """The operand of a weight whose codes the compiled functions read: rows of whole chunks, groups of 16 or of whole chunks."""
    operand = w.spec.operand(w)
    if operand is None or operand.kind == "int4pack" or w.dim() != 2 or w.numel() == 0:
        return None
    (n, k), codes, scale, zero = w.shape, operand.codes, operand.scale, operand.zero_point
    whole = (
        k % CHUNK == 0
        and codes.shape == (n, k * operand.bits // 8)
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
    if operand.kind == "affine":
        return Kind("signed" if codes == torch.int8 else "unsigned", operand.bits)
    if operand.kind == "table" or (operand.kind == "minifloat" and operand.bits <= 4):
        return Kind("table", operand.bits)
    if operand.kind == "minifloat":
        return Kind("minifloat", operand.bits, operand.exponent)
    names = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
    return Kind(names[codes], 8) if codes in names else None


@functools.cache
def _minifloats(bits: int, exponent: int) -> Tensor:
    """What all codes stand for, float32: (2**bits,)."""
    codes = torch.arange(2**bits, dtype=torch.int32)
    return Operand(codes, codes, kind="minifloat", bits=bits, exponent=exponent).read(codes)


def accepts(x: Tensor, w: QTensor) -> bool:
    """Whether `product` multiplies these; in a graph, where it is faster than what a compiler makes of expressions."""
    if x.dtype not in _DTYPES or compiler() is None:
        return False
    operand = readable(w)
    kind = None if operand is None else _kind(operand)
    if operand is None or kind is None or (w.numel() < WORTH and not is_made(kind)):
        return False
    most = _most(x.dtype)
    if VNNI and int8_operand(w) is not None:
        return False  # there are units for it
    if VNNI and _is_int8(operand) and not known(x.shape[0] <= most):
        return False
    if compiling() and (AVX512 or x.dtype in _UNITS) and not known(x.shape[0] <= most):
        return False
    return library(kind) is not None


def _is_int8(operand: Operand) -> bool:
    return operand.plain and operand.codes.dtype == torch.int8 and operand.by_row


def _most(dtype: torch.dtype) -> int:
    """Up to how many tokens the compiled loops multiply themselves: they compute in float32, and a CPU that multiplies in x's
    dtype does so faster."""
    return 8 if dtype in _UNITS else 128


def product(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T. x: (M, K), w: (N, K) -> (M, N) in x's dtype."""
    operand = readable(w)
    assert operand is not None
    if int8_operand(w) is not None:
        # Sums of integers, exact up to 2**24, and then the scales.
        act, unit = quantize_act(x, w), operand.scale.new_ones(1, 1, dtype=torch.float32)
        rows = act.codes.float()
        if act.zero_point is not None:
            rows = rows - act.zero_point.float()
        total = _of_rows(rows, operand._replace(scale=unit))
        return (total * act.scale.float() * operand.scale.float().t()).to(x.dtype)
    if w.spec.act is not None or x.dtype == torch.float16:
        return _of_rows(quantized_act(x.float(), w), operand).to(x.dtype)
    return _of_rows(x, operand)


def launch(x: Tensor, w: QTensor) -> Product:
    """`product` of any x (..., K) with as many tokens and weights of the form of `w`."""
    operand_of, (n, k) = w.spec.operand, w.shape
    plain = w.spec.act is None and x.dtype != torch.float16

    def run(x: Tensor, w: QTensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, k)
        y = _multiplied(rows, operand_of(w)) if plain else product(rows, w)  # type: ignore[arg-type]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], n)

    return run


def _of_rows(x: Tensor, operand: Operand) -> Tensor:
    """x: (M, K) float32 or bfloat16 -> (M, N) of its dtype."""
    if is_eager(x, or_recorded=False):
        return _multiplied(x, operand)
    zero = None if operand.zero_point is None else _plain(operand.zero_point)
    numbers = operand.bits, operand.offset, operand.exponent
    return torch.ops.ao.cpu_product(
        x, operand.codes, _plain(operand.scale), zero, operand.kind, *numbers, operand.table
    )


def _operator(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    kind: Any,
    bits: int,
    offset: float,
    exponent: int,
    table: Tensor | None,
) -> Tensor:
    return _multiplied(x, Operand(codes, scale, zero_point, kind, bits, offset, table, exponent))


def _shape(x: Tensor, codes: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


torch.library.define(
    "ao::cpu_product",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point, str kind, int bits, float offset, int exponent, Tensor? table)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.impl("ao::cpu_product", "CPU", _operator)
torch.library.impl("ao::cpu_product", "Meta", _shape)


def _multiplied(x: Tensor, operand: Operand) -> Tensor:
    """The product, now. x: (M, K) float32 or bfloat16 -> (M, N) of its dtype."""
    (m, k), n, kind, dtype = x.shape, operand.codes.shape[0], _kind(operand), x.dtype
    compiled = None if kind is None else library(kind)
    assert compiled is not None
    x, threads = x.contiguous(), torch.get_num_threads()
    weight, _alive = _described(operand, n, k)
    if m <= _most(dtype):
        y = x.new_empty(m, n)
        compiled.product(weight, x.data_ptr(), y.data_ptr(), m, DTYPES[dtype], threads)
        return y
    x = x.to(dtype if dtype in FLOATS else torch.float32)
    y = x.new_empty(m, n)
    rows = min(n, max(_PIECE // k, 16))
    piece = x.new_empty(rows, k)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        compiled.rows(weight, start, stop, piece.data_ptr(), DTYPES[x.dtype], threads)
        torch.mm(x, piece[: stop - start].t(), out=y[:, start:stop])
    return y.to(dtype)


def _described(operand: Operand, n: int, k: int) -> tuple[Weight, tuple[Tensor | None, ...]]:
    """The weight (n, k) as the compiled functions read it, and what must live as long."""
    codes, scale, table = operand.codes, _plain(operand.scale), operand.table
    zero = None if operand.zero_point is None else _plain(operand.zero_point)
    if operand.kind == "minifloat" and operand.bits <= 4:
        table = _minifloats(operand.bits, operand.exponent)
    if table is not None and table.numel() < 16:
        table = F.pad(table, (0, 16 - table.numel()))  # it is read by whole vectors
    weight = Weight(
        *(None if t is None else t.data_ptr() for t in (codes, scale, zero, table)),
        *(n, k, codes.stride(0), scale.shape[1], scale.shape[0], 0 if zero is None else zero.shape[0]),
        *(DTYPES[scale.dtype], 0 if zero is None else DTYPES[zero.dtype]),
        operand.offset,
        zero is not None or operand.offset != 0,
    )
    return weight, (scale, zero, table)


def _plain(t: Tensor) -> Tensor:
    t = dense(t)
    return (t if t.dtype in DTYPES else t.float()).contiguous()
