"""Products of int8 weights on the integer units of a CPU: PyTorch's product of integers, and C++ for what is before and after.

That C++ (kernels/cpu_integers.py) is compiled once for all shapes, and a graph holds one operator per layer. The expressions
(`int_mm` and `split` in cpu.py) give the same bits, and a compiler that makes kernels of them needs half as long again for a
model as in bfloat16. They are for exported programs, and where there is no C++ compiler.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..dtypes.base import QTensor, dense
from ..dtypes.cpp import cpp_compiler
from ..dtypes.operand import Operand
from ..dtypes.tracing import is_eager, known
from .anywhere import compiling, int8_operand, int8_weight, is_int8, row_cast
from .kernels.cpu_integers import ByteAct, integers
from .path import Product

WORTH = 2**16
"""A weight of so many elements is worth a C++ compiler."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""As cpu_integers.py numbers them."""

_TILE = 64
"""Bytes of a row of a tile, for units that multiply these."""

_FLOAT = ctypes.c_float

_HALVES = ByteAct(1)


def _read(w: QTensor, dtype: torch.dtype) -> tuple[Operand, ByteAct] | None:
    """The weight, and how an activation of `dtype` becomes bytes; None where the compiled functions do not make them."""
    if w.spec.act is None:
        operand = int8_weight(w)
        # 16 bits are not enough for float32.
        return None if operand is None or dtype == torch.float32 else (operand, _HALVES)
    operand, cast = int8_operand(w), row_cast(w)
    if operand is None or cast is None or cast.levels is None or not cast.nearest:
        return None
    if cast.zero_point and w.act_scale is not None:
        return None
    return operand, ByteAct(0, w.spec.act.block == (-1, -1), cast.zero_point, cast.low, cast.high, 1 / cast.levels)


def reads(w: QTensor, dtype: torch.dtype) -> bool:
    """Whether integer units multiply the weight and an activation of `dtype`: both of int8, or an activation of 16 bits."""
    return is_int8(w) or (dtype != torch.float32 and int8_weight(w) is not None)


def accepts(x: Tensor, w: QTensor) -> bool:
    """Whether `product` multiplies these."""
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and known(x.numel() > 0, True)
        and w.numel() >= WORTH
        and min(w.shape) > 1  # `_int_mm` of one column or row is wrong (PyTorch 2.13)
        and cpp_compiler() is not None
        and (compiling() or is_eager(x, or_recorded=False))
        and _read(w, x.dtype) is not None
        and integers() is not None
    )


def product(x: Tensor, w: QTensor) -> Tensor:
    """x @ decode(w).T, of x as the Spec of w quantizes it, or in two bytes. x: (M, K), w: (N, K) -> (M, N) in x's dtype."""
    read = _read(w, x.dtype)
    assert read is not None
    operand, act = read
    scale = dense(operand.scale)
    if is_eager(x, or_recorded=False):
        return _multiplied(x, operand.codes, scale, w.act_scale, act)
    numbers = [float(getattr(act, field[0])) for field in ByteAct._fields_]
    return torch.ops.ao.cpu_int8_product(x, operand.codes, scale, w.act_scale, numbers)


def launch(x: Tensor, w: QTensor) -> Product:
    """`product` of any x (..., K) and weights of the form of `w`."""
    n, k = w.shape

    def run(x: Tensor, w: QTensor) -> Tensor:
        return product(x.reshape(-1, k), w).view(*x.shape[:-1], n)

    return run


def _multiplied(x: Tensor, codes: Tensor, scale: Tensor, act_scale: Tensor | None, act: ByteAct) -> Tensor:
    """The product, now. x: (M, K), codes: (N, K) -> (M, N).

    Few calls of PyTorch: after a weight has come from memory, each one takes what the product of a token in cache does.
    """
    compiled = integers()
    assert compiled is not None
    (m, k), n, threads = x.shape, codes.shape[0], torch.get_num_threads()
    rows = 2 * m if act.halves else m + act.zero
    given = x if x.dtype in _DTYPES else x.float()
    given = given if given.is_contiguous() else given.contiguous()
    scale = scale if scale.dtype == torch.float32 else scale.float()
    scale = scale if scale.is_contiguous() else scale.contiguous()
    fixed = None if act_scale is None else act_scale.float()
    dtype, how = _DTYPES[given.dtype], ctypes.byref(act)
    where, one = None if fixed is None else fixed.data_ptr(), scale.shape[0] == 1
    if compiled.tiles is not None and k % _TILE == 0 and codes.stride(1) == 1:
        y = given.new_empty(m, n)
        of_weight = codes.data_ptr(), codes.stride(0), n, scale.data_ptr(), one
        compiled.tiles(how, given.data_ptr(), dtype, m, k, where, *of_weight, y.data_ptr(), threads)
        return y if y.dtype == x.dtype else y.to(x.dtype)
    q = given.new_empty(rows, k, dtype=torch.int8)
    scales = (_FLOAT * (2 * m))()  # of tokens, and their zero points
    zeros = ctypes.byref(scales, 4 * m)
    compiled.bytes(
        how,
        given.data_ptr(),
        dtype,
        m,
        k,
        where,
        q.data_ptr(),
        scales,
        zeros,
        threads,
    )
    # The weight on the left, as the library rearranges its right operand in every call.
    sums = torch._int_mm(codes, q.t() if rows > 1 else q.view(-1, 1))  # (N, rows)
    y = given.new_empty(m, n)
    compiled.scaled(
        how, sums.data_ptr(), n, m, rows, scales, zeros, scale.data_ptr(), one, y.data_ptr(), dtype, threads
    )
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _operator(x: Tensor, codes: Tensor, scale: Tensor, act_scale: Tensor | None, numbers: list[float]) -> Tensor:
    return _multiplied(x, codes, scale, act_scale, _act_of(tuple(numbers)))


@functools.cache
def _act_of(numbers: tuple[float, ...]) -> ByteAct:
    return ByteAct(*map(int, numbers[:3]), *numbers[3:])


def _shape(x: Tensor, codes: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


torch.library.define(
    "ao::cpu_int8_product",
    "(Tensor x, Tensor codes, Tensor scale, Tensor? act_scale, float[] act) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.impl("ao::cpu_int8_product", "CPU", _operator)
torch.library.impl("ao::cpu_int8_product", "Meta", _shape)
