"""The operators by which compiled graphs call the products of ampere.py, hopper.py and those for any format.

They are opaque to the compiler, so that one graph serves every number of tokens and the kernel is chosen at the call. A kernel
of Triton that the compiler sees would be parsed three times for every layer, which takes longer than all the rest.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..integers import enough_rows
from . import (
    ampere,
    column_order,
    few_tokens,
    hopper,
    joined,
    normalize_rows,
    one_token,
    quantize_in_graphs,
    quantize_rows,
    relative_attention,
    routed,
    slices_of_k,
    template,
    trits,
)
from .device import is_hopper, on_its_device
from .reading import Fields, Reading, reading_from
from .ways_of_codes import way_of_codes


def _operator(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Define `ao::name`. `torch.library.custom_op` would do, and take 10 microseconds more at every call."""

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.define(f"ao::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"ao::{name}", "CUDA", on_its_device(function))
        torch.library.register_fake(f"ao::{name}", fake)
        return getattr(torch.ops.ao, name).default

    return define


def _to_be_joined(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    joined.join_in_compiled_graphs()  # Inductor is about to see the operator
    return x.new_empty(x.shape[0], codes.shape[0])


def _joined(x: Tensor, codes: Sequence[Tensor], *_: Any) -> Tensor:
    return x.new_empty(x.shape[0] * sum(q.shape[0] for q in codes))


def _as_one(products: list[Tensor]) -> Tensor:
    """One after the other: an operator may not return parts of one tensor. They are so already where one launch made them."""
    first, *others = products
    if all(y.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for y in others):
        return first.as_strided((sum(y.numel() for y in products),), (1,))
    return torch.cat([y.reshape(-1) for y in products])


@_operator(
    "gemv",
    "(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, int offset, bool act, Tensor? order=None) -> Tensor",
    _to_be_joined,
)
def gemv(x: Tensor, *weight: Any) -> Tensor:
    """One token: `ampere.gemv`."""
    return ampere.gemv(x, *weight)


@_operator(
    "gemv_joined",
    "(Tensor x, Tensor[] qdata, Tensor[] scale, Tensor[] zero_point, int offset, bool act, Tensor? order=None) -> Tensor",
    _joined,
)
def gemv_joined(x: Tensor, *weights: Any) -> Tensor:
    """One token and several weights: `ampere.gemv_joined` -> all products (1, N), one after the other."""
    return ampere.gemv_joined(x, *weights).view(-1)


@_operator("gathered", "(Tensor x, Tensor order) -> Tensor", lambda x, order: torch.empty_like(x))
def gathered(x: Tensor, order: Tensor) -> Tensor:
    """x[..., order]: `column_order.gathered`."""
    return column_order.gathered(x, order)


@_operator(
    "fused",
    "(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, int offset, Tensor? bias=None) -> Tensor",
    _to_be_joined,
)
def fused(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int, bias: Tensor | None = None
) -> Tensor:
    """x @ decode(qdata).T + bias -> (M, N).

    x: (M, K) bfloat16. qdata: (N, K) one-byte or (N, K / 2) 4-bit. scale: (N, K / group) or (N, 1), zero_point alike.
    offset: what to add to zero_point. bias: (N,).
    """
    of_hopper = is_for_hopper(x.shape[0], x.shape[1], qdata, scale, zero_point)
    return fused_at_once(x, qdata, scale, zero_point, offset, of_hopper, bias)


def fused_at_once(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int, of_hopper: bool,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`fused` past PyTorch's dispatcher, x (..., K), on the current device -> (..., N).

    of_hopper: what `is_for_hopper` says of these tokens and this weight.
    """
    k, n = x.shape[-1], qdata.shape[0]
    rows = x if x.dim() == 2 else x.view(-1, k)
    m = rows.shape[0]
    of_hopper = of_hopper and _is_aligned(x, qdata)
    reading = _reading_of_codes(n, k, qdata, scale.shape[1], offset)
    if reading is not None and _is_for_few(reading, m, of_hopper, x.device):
        fields = (qdata.view(torch.int32), scale, zero_point, None, None, None)
        out = few_tokens.few(rows, reading, fields, bias=bias)
    elif of_hopper and qdata.shape[1] == k:
        (out,) = hopper.parts_product(rows, [qdata], [scale], bias)
    elif of_hopper:
        out = hopper.nibbles_product(rows, qdata, scale, zero_point, offset, bias)
    elif m <= FEW:
        out = _plus(ampere.fused(rows, None, qdata, scale, zero_point, offset, x.dtype), bias)
    else:
        return F.linear(x, ampere.decoded(qdata, scale, zero_point, offset, k, x.dtype), _as(bias, x.dtype))
    return out if x.dim() == 2 else out.view(*x.shape[:-1], n)


def _plus(out: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a few tokens, and a bias (N,) after it."""
    return out if bias is None else out.add_(bias)


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bias in the only dtype that PyTorch's product takes."""
    return None if bias is None else bias.to(dtype)


@_operator(
    "fused_joined",
    "(Tensor x, Tensor[] qdata, Tensor[] scale, Tensor[] zero_point, int offset) -> Tensor",
    _joined,
)
def fused_joined(
    x: Tensor, qdata: Sequence[Tensor], scale: Sequence[Tensor], zero_point: Sequence[Tensor], offset: int
) -> Tensor:  # fmt: skip
    """`fused` of two or three weights of one format, up to `FEW` tokens in one launch. zero_point: of each, or none."""
    (m, k), n = x.shape, sum(q.shape[0] for q in qdata)
    weights = list(itertools.zip_longest(qdata, scale, zero_point))
    codes, scales, zero = weights[0]
    reading = _reading_of_codes(n, k, codes, scales.shape[1], offset)
    if m > FEW:
        return _as_one([fused_at_once(x, *w, offset, is_for_hopper(m, k, *w)) for w in weights])
    if reading is not None and reading.bits == 4:
        fields = [(q.view(torch.int32), s, z, None, None, None) for q, s, z in weights]
        return _as_one(few_tokens.few_joined(x, reading, fields))
    of_hopper = codes.shape[1] == k and _is_for_hopper(m, n, k, codes, scales, zero)
    if of_hopper and all(q.shape[0] % 64 == 0 and _is_aligned(x, q) for q in qdata):
        return _as_one(hopper.parts_product(x, qdata, scale))
    return _as_one(ampere.fused_joined(x, None, weights, offset, x.dtype))


def _reading_of_codes(n: int, k: int, qdata: Tensor, groups: int, offset: int) -> Reading | None:
    """How few_tokens.py reads codes (n, k) of 8 bits, or (n, k / 2) of 4, with scales (n, groups); None where it does not."""
    if k % 32 or (groups > 1 and k // groups % 16):
        return None
    return _reading(n, k, qdata.shape[1], qdata.dtype, groups, offset)


@functools.cache
def _reading(n: int, k: int, width: int, dtype: torch.dtype, groups: int, offset: int) -> Reading:
    if dtype.is_floating_point:
        return Reading(n, k, 8, "float", 4 if dtype == torch.float8_e4m3fn else 5, False, 0.0, 1, groups)
    return Reading(n, k, 8 * width // k, "affine", 0, width == k and dtype == torch.int8, float(offset), 1, groups)


@functools.cache
def _is_for_few(reading: Reading, m: int, of_hopper: bool, device: torch.device) -> bool:
    """Whether few_tokens.py multiplies codes of 4 or 8 bits. of_hopper: whether hopper.py could."""
    n, k = reading.n, reading.k
    if m > most(device) or (reading.bits == 8 and m <= 16):  # 8 bits have other kernels
        return False
    if slices_of_k.takes(reading, m, half=False) or (reading.bits == 4 and m <= FEW):
        return True
    if not of_hopper:
        return is_hopper(device) and (m <= FEW or n * k >= SMALL)
    if reading.bits == 8:
        return m > 128 and n * k >= LARGE
    return few_tokens.columns(reading, m, device) < hopper.nibbles_columns(m, n, k)


def most(device: torch.device) -> int:
    """The largest number of tokens whose weight is decoded on its way to the tensor cores; beyond, it is decoded to memory."""
    return SOME if is_hopper(device) else FEW


def nibbles_launch(
    m: int, n: int, k: int, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int
) -> Callable[..., Tensor] | None:
    """`fused` of m tokens and 4-bit codes by slices of K, in one launch, for weights of the form of these. None where that kernel
    is not for them."""
    reading = _reading_of_codes(n, k, qdata, scale.shape[1], offset)
    if m > 16 or reading is None or reading.bits == 8 or not slices_of_k.takes(reading, m, half=False):
        return None
    run = slices_of_k.sliced_launch(m, False, reading, (qdata, scale, zero_point, None, None, None))
    return lambda x, qdata, scale, zero_point: run(x, (qdata, scale, zero_point, None, None, None))


FEW = 64
"""The largest number of tokens for which weights are decoded on their way to the tensor cores, on most GPUs and in float16."""

SOME = 512
"""The same of bfloat16 on Hopper; beyond, the weight is decoded to memory first."""

SMALL = 2**23
"""Elements of a weight below which it is decoded to memory for more than 64 tokens: two launches, where the others are three."""

LARGE = 2**26
"""Elements of a weight of 8 bits from which it is decoded for more than 128 tokens. Below, x is in two parts of 8 bits: twice the
products, at twice the rate, by programs of which more find room."""


def is_for_hopper(m: int, k: int, qdata: Tensor, scale: Tensor, zero_point: Tensor | None) -> bool:
    """Whether hopper.py multiplies m tokens and this weight (N, k): the same for all m of a class, up to 16 and from there to the
    next power of two, for which eager mode decides it once."""
    return _is_for_hopper(m, qdata.shape[0], k, qdata, scale, zero_point)


def _is_for_hopper(m: int, n: int, k: int, qdata: Tensor, scale: Tensor, zero_point: Tensor | None) -> bool:
    """`is_for_hopper` of weights like this with n rows in all."""
    if m > SOME or k > 65536 or not is_hopper(qdata.device):
        return False
    if qdata.shape[1] == k:
        # Rows that end within a step, of more tokens: 46.9 us for 4304 x 4304 at 256 on an H200, more than decoding it takes.
        fits = k % 128 == 0 or (k % 16 == 0 and m <= FEW)
        exact = fits and qdata.dtype in (torch.int8, torch.float8_e4m3fn)
        return (m > 16 or n >= 16384) and exact and scale.shape[1] == 1 and zero_point is None
    whole = k % 128 == n % 64 == 0 and qdata.shape[1] == k // 2 and scale.shape[1] == k // 128
    return whole and m > (8 if k > 8192 else 16)


@_operator(
    "decoded",
    "(Tensor qdata, Tensor scale, Tensor? zero_point, int offset, int k, ScalarType dtype) -> Tensor",
    lambda qdata, scale, zero_point, offset, k, dtype: qdata.new_empty(qdata.shape[0], k, dtype=dtype),
)
def decoded(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, offset: int, k: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """The weight (N, k) as `dtype`, a 16-bit one; the fields as in `fused`."""
    return ampere.decoded(qdata, scale, zero_point, offset, k, dtype)


_FIELDS = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor? table, Tensor? outer_scale, Tensor? outer_zero_point"


@_operator(
    "few",
    f"(Tensor x, {_FIELDS}, str reading, Tensor? bias=None) -> Tensor",
    _to_be_joined,
)
def few(x: Tensor, *fields: Any) -> Tensor:
    """x @ decode(w).T + bias -> (M, N) by the kernels of one_token.py, few_tokens.py and template.py, or of trits.py.

    x: (M, K) of 16 bits. fields: of the weight, its reading, and the bias (N,) or None."""
    return few_at_once(x, fields[:6], reading_from(fields[6]), *fields[7:])


@_operator(
    "few_ordered",
    f"(Tensor x, Tensor order, {_FIELDS}, str reading) -> Tensor",
    lambda x, order, codes, *_: x.new_empty(x.shape[0], codes.shape[0]),
)
def few_ordered(x: Tensor, order: Tensor, *fields: Any) -> Tensor:
    """x[:, order] @ decode(w).T -> (M, N) by `few_tokens.few`. x: (M, K) of 16 bits, M up to `FEW`."""
    return few_tokens.few(x, reading_from(fields[6]), fields[:6], order)


@_operator(
    "few_joined",
    f"(Tensor x, {_FIELDS.replace('? ', ' ').replace('Tensor ', 'Tensor[] ')}, str reading) -> Tensor",
    _joined,
)
def few_joined(x: Tensor, *fields: Any) -> Tensor:
    """`few` of two or three weights, up to `FEW` tokens in one launch. Fields: of each weight, or none. reading: of the first."""
    weights, reading = list(itertools.zip_longest(*fields[:6])), reading_from(fields[6])
    rows = [w[0].shape[0] for w in weights]
    if x.shape[0] > FEW:
        return _as_one([few_at_once(x, w, reading._replace(n=n)) for w, n in zip(weights, rows)])
    if x.shape[0] == 1 and all(reading._replace(n=n).for_one_token for n in rows):
        return one_token.gemv_joined(x, reading, weights).view(-1)
    return _as_one(few_tokens.few_joined(x, reading, weights))


def few_at_once(x: Tensor, fields: Fields, reading: Reading, bias: Tensor | None = None) -> Tensor:
    """`few` past PyTorch's dispatcher, x (..., K), on the current device -> (..., N)."""
    rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
    m, (_, scale, zero_point, *_) = rows.shape[0], fields
    codes = _bytes(reading, fields) if m > 16 and x.dtype == torch.bfloat16 else None
    of_hopper = codes is not None and is_for_hopper(m, reading.k, codes, scale, zero_point) and _is_aligned(x, codes)
    if codes is not None and of_hopper and not _is_for_few(reading, m, of_hopper, x.device):
        (out,) = hopper.parts_product(rows, [codes], [scale], bias)
    elif not _in_registers(reading, rows):
        out = F.linear(rows, _decoded(reading, fields, x.dtype), _as(bias, x.dtype))
    elif reading.kind == "trits":
        out = _plus(trits.product(rows, reading, fields, x.dtype), bias)
    elif m == 1 and reading.for_one_token:
        out = _plus(one_token.gemv_each(rows, reading, fields), bias)
    else:
        out = few_tokens.few(rows, reading, fields, bias=bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], reading.n)


def _bytes(reading: Reading, fields: Fields) -> Tensor | None:
    """The codes (N, K), int8 or float8 e4m3, which times a scale for each row are the weight; None where they are not."""
    integers = reading.kind == "affine" and reading.signed and not reading.offset
    e4m3 = reading.kind == "float" and reading.exponent == 4
    by_row = reading.by_row and reading.rows == 1 and reading.nested == "none"
    if reading.bits != 8 or not by_row or not (integers or e4m3) or fields[2] is not None:
        return None
    return fields[0].view(torch.int8 if integers else torch.float8_e4m3fn)


def _in_registers(reading: Reading, x: Tensor) -> bool:
    """Whether a weight is decoded on its way to the tensor cores, for x (M, K)."""
    m, half = x.shape[0], x.dtype == torch.float16
    if m <= FEW or half or reading.kind == "trits":
        return m <= FEW
    return slices_of_k.takes(reading, m, half) or (m <= most(x.device) and reading.n * reading.k >= SMALL)


@_operator(
    "decoded_codes",
    f"({_FIELDS}, str reading, ScalarType dtype) -> Tensor",
    lambda codes, *rest: codes.new_empty(reading_from(rest[-2])[:2], dtype=rest[-1]),
)
def decoded_codes(*fields: Any) -> Tensor:
    """The weight (N, K) as `dtype`, a 16-bit one, by the kernel of template.py or trits.py; as int8 its trits."""
    return _decoded(reading_from(fields[6]), fields[:6], fields[7])


def _decoded(reading: Reading, fields: Fields, dtype: torch.dtype) -> Tensor:
    return (trits if reading.kind == "trits" else template).decoded(reading, fields, dtype)


@_operator(
    "codes_by_trits",
    "(Tensor x, Tensor? rows, Tensor codes, Tensor scale, str reading, float[] act, ScalarType dtype) -> Tensor",
    lambda x, rows, codes, scale, reading, act, dtype: x.new_empty(x.shape[0], codes.shape[0], dtype=dtype),
)
def codes_by_trits(
    x: Tensor, rows: Tensor | None, codes: Tensor, scale: Tensor, reading: str, act: Sequence[float], dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """(q_x @ trits.T) * rows * scale.T with an exact sum, of `FEW` tokens or fewer -> (M, N).

    x: (M, K), its codes of int8 with rows (M, 1), or numbers of 16 bits that become codes as `trits.Act` says.
    """
    fields = (codes, scale, None, None, None, None)
    return trits.product(x, reading_from(reading), fields, dtype, trits.Act(*act), rows)


@_operator(
    "routed",
    f"(Tensor x, Tensor where, bool ends, {_FIELDS}, str reading) -> Tensor",
    lambda x, where, ends, codes, *_: x.new_empty(x.shape[0], codes.shape[1]),
)
def routed_rows(x: Tensor, where: Tensor, ends: bool, *fields: Any) -> Tensor:
    """Each row of x times the expert to which it was routed: `routed.routed`."""
    return routed.routed(x, where, ends, reading_from(fields[6]), fields[:6])


@_operator(
    "quantized",
    "(Tensor x, ScalarType dtype, bool whole) -> (Tensor, Tensor)",
    lambda x, dtype, whole: (torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[0], 1, dtype=torch.float32)),
)
def quantized(x: Tensor, dtype: torch.dtype, whole: bool) -> tuple[Tensor, Tensor]:
    """The codes (M, K) of x and their scales (M, 1): `quantize_rows.quantized`."""
    return quantize_rows.quantized(x, dtype, whole)


@_operator(
    "quantized_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centered, bool added, ScalarType dtype) -> (Tensor, Tensor)",
    lambda x, weight, bias, eps, centered, added, dtype: (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[0], 1, dtype=torch.float32),
    ),
)
def quantized_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool, added: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The codes (M, K) of a norm of x and their scales (M, 1): `normalize_rows.normalized`."""
    return normalize_rows.normalized(x, dtype, eps, centered, weight, added, bias)


@_operator(
    "quantized_activation",
    "(Tensor x, Tensor? other, str function, ScalarType dtype, Tensor? before=None) -> (Tensor, Tensor)",
    lambda x, other, function, dtype, before=None: (
        x.new_empty(x.shape[0], x.shape[1] + (0 if before is None else before.shape[1]), dtype=dtype),
        x.new_empty(x.shape[0], 1, dtype=torch.float32),
    ),
)
def quantized_activation(
    x: Tensor, other: Tensor | None, function: str, dtype: torch.dtype, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The codes (M, K) of f(x), or of f(x) * other, after the columns of `before`, and their scales (M, 1):
    `quantize_rows.quantized`."""
    return quantize_rows.quantized(x, dtype, False, function, other, before)


@_operator(
    "scaled_product_joined",
    "(Tensor x, Tensor rows, Tensor[] qdata, Tensor[] columns, ScalarType dtype, Tensor?[] biases) -> Tensor",
    lambda x, rows, qdata, columns, dtype, biases: x.new_empty(x.shape[0] * sum(map(len, qdata)), dtype=dtype),
)
def scaled_product_joined(
    x: Tensor, rows: Tensor, qdata: Sequence[Tensor], columns: Sequence[Tensor], dtype: torch.dtype,
    biases: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """`scaled_product` of two or three weights of one shape, in one launch where `joins` says so."""
    ways = {_way_of(x, q, dtype, bias is not None) for q, bias in zip(qdata, biases)}
    if ways == {"many codes"}:
        return _as_one(hopper.many_codes_product(x, rows, qdata, columns, dtype, biases))
    if ways == {"few codes"} and all(bias is None and len(q) % 64 == 0 for q, bias in zip(qdata, biases)):
        return _as_one(hopper.codes_product(x, rows, qdata, columns, dtype))
    return _as_one([_scaled_product(x, rows, q, c, dtype, bias) for q, c, bias in zip(qdata, columns, biases)])


@_operator(
    "scaled_product",
    "(Tensor x, Tensor rows, Tensor qdata, Tensor columns, ScalarType dtype, Tensor? bias=None) -> Tensor",
    lambda x, rows, qdata, columns, dtype, bias=None: x.new_empty(x.shape[0], qdata.shape[0], dtype=dtype),
)
def scaled_product(
    x: Tensor, rows: Tensor, qdata: Tensor, columns: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """(x @ qdata.T) * rows * columns.T + bias, of int8 or of float8: x (M, K), rows (M, 1), qdata (N, K), columns (N, 1), bias
    (N,) -> (M, N).

    The sum is int32 or float32.
    """
    return _scaled_product(x, rows, qdata, columns, dtype, bias)


def _to_be_lowered(x: Tensor, qdata: Tensor, *_: Any) -> Tensor:
    quantize_in_graphs.lower_in_compiled_graphs()  # Inductor is about to see the operator
    return x.new_empty(x.shape[0], qdata.shape[0])


@_operator(
    "dynamic_product",
    "(Tensor x, Tensor qdata, Tensor columns, bool whole, Tensor? bias=None) -> Tensor",
    _to_be_lowered,
)
def dynamic_product(x: Tensor, qdata: Tensor, columns: Tensor, whole: bool, bias: Tensor | None = None) -> Tensor:
    """`scaled_product` of x (M, K) quantized to the dtype of qdata, int8 or float8 e4m3 -> (M, N) in x's dtype.

    whole: whether all of x has one scale, rather than every row its own.
    """
    codes, rows = quantize_rows.quantized(x, qdata.dtype, whole)
    return _scaled_product(codes, rows, qdata, columns, x.dtype, bias)


@_operator(
    "dynamic_product_joined",
    "(Tensor x, Tensor[] qdata, Tensor[] columns, bool whole) -> Tensor",
    _joined,
)
def dynamic_product_joined(
    x: Tensor, qdata: Sequence[Tensor], columns: Sequence[Tensor], whole: bool
) -> Tensor:  # fmt: skip
    """`dynamic_product` of two or three weights of one format: x is quantized once, and up to `FEW` tokens meet all in one
    launch."""
    codes, rows = quantize_rows.quantized(x, qdata[0].dtype, whole)
    if x.shape[0] <= FEW and all(_is_for_copies(codes, q, x.dtype) for q in qdata):
        return _as_one(hopper.codes_product(codes, rows, qdata, columns, x.dtype))
    return _as_one([_scaled_product(codes, rows, q, c, x.dtype, None) for q, c in zip(qdata, columns)])


def _is_for_copies(x: Tensor, qdata: Tensor, dtype: torch.dtype) -> bool:
    """Whether `hopper.codes_product` is the product for codes x (M, K) and several weights like this."""
    return qdata.shape[0] % 64 == 0 and _way_of(x, qdata, dtype, False) == "few codes"


def _way_of(x: Tensor, qdata: Tensor, dtype: torch.dtype, bias: bool) -> str:
    return way_of_codes(
        *x.shape, qdata.shape[0], x.dtype, qdata.dtype, dtype, bias, _is_aligned(x, qdata), x.device
    )  # fmt: skip


def _scaled_product(
    x: Tensor, rows: Tensor, qdata: Tensor, columns: Tensor, dtype: torch.dtype, bias: Tensor | None
) -> Tensor:
    way = _way_of(x, qdata, dtype, bias is not None)
    if way == "many codes":
        (out,) = hopper.many_codes_product(x, rows, [qdata], [columns], dtype, [bias])
        return out
    if way == "few codes":
        (out,) = hopper.codes_product(x, rows, [qdata], [columns], dtype, bias)
        return out
    if way == "fused":
        return _plus(ampere.fused(x, rows, qdata, columns, None, 0, dtype), bias)
    if way == "scaled_mm":
        a, b, added = x, qdata.t(), _as(bias, dtype)
        return torch._scaled_mm(a, b, rows, columns.t(), bias=added, out_dtype=dtype, use_fast_accum=True)
    if way == "int_mm":
        total = torch._int_mm(enough_rows(x), qdata.t())
    else:
        one = torch.ones((), dtype=torch.float32, device=x.device)
        total = torch._scaled_mm(x, qdata.t(), one, one, out_dtype=torch.float32)
    return ampere.scaled(total, rows, columns, dtype, x.shape[0], bias)


def _is_aligned(a: Tensor, b: Tensor) -> bool:
    """Whether the copy engine can read both: it wants addresses that are multiples of 16 bytes."""
    return (a.data_ptr() | b.data_ptr()) % 16 == 0


@_operator(
    "image_attention",
    "(Tensor qkv, Tensor table_h, Tensor table_w, int heads, int height, int width, float scale) -> Tensor",
    lambda qkv, *_: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
)
def image_attention(qkv: Tensor, table_h: Tensor, table_w: Tensor, *more: Any) -> Tensor:
    """Attention with decomposed relative positions -> (B, H * W, heads * D): `relative_attention.relative_attention`."""
    return relative_attention.relative_attention(qkv.contiguous(), table_h.contiguous(), table_w.contiguous(), *more)
