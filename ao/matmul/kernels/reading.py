"""How the kernels for any format read a weight: what its operand is, as constants and plain tensors."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dtypes.base import QTensor
from ...dtypes.bits import TRIT_BYTES, TRIT_CHUNK
from ...dtypes.operand import Operand, stored_scale

KINDS = ("affine", "table", "minifloat", "float", "fixed")
"""Kinds of operands, by the numbers that the kernels have for them. A float is a minifloat with NaN. Trits, which are no whole
number of bits, have kernels of their own (trits.py)."""

NESTED = ("none", "e4m3", "scaled", "power", "affine")
"""How scales are stored, likewise."""


class Reading(NamedTuple):
    """The constants by which the kernels read a weight (n, k).

    kind: of its operand, one of `KINDS` or "trits".
    exponent, signed, offset: of its operand.
    rows: how many share a scale. groups: scales of a row, each for `group` elements.
    nested: how scales are stored: "none" as numbers, "e4m3" as float8, "scaled" as float8 that share one scale, "power" as
        exponents, "affine" as integers with scales and zero points of their own.
    outer_rows, outer_groups: how many rows share a scale of the scales, and how many of these a row has.
    """

    n: int
    k: int
    bits: int
    kind: str
    exponent: int
    signed: bool
    offset: float
    rows: int
    groups: int
    nested: str = "none"
    outer_rows: int = 1
    outer_groups: int = 1

    @property
    def group(self) -> int:
        """Elements of a row that share a scale."""
        return self.k // self.groups

    @property
    def by_row(self) -> bool:
        return self.groups == 1

    @property
    def by_template(self) -> bool:
        """Whether template.py, and what is made of it, reads the codes."""
        return self.kind in KINDS

    @property
    def for_one_token(self) -> bool:
        """Whether a kernel for one token is for such a weight: that of one_token.py, one_token_mma.py or trits.py."""
        if self.kind == "trits":
            return self.k <= 65536 and self.by_row and self.k % 256 == 0  # rows are whole words
        if self.bits == 8 and self.by_row:
            return False  # others are as fast
        if self.in_integers:
            return self.k <= 65536 and (self.kind == "affine" or self.bits >= 4)
        # In one_token_mma.py a tile has 16 rows, all chunks are whole, x of whole rows stays on the multiprocessor, and each code
        # also meets zeros in place of x, which makes NaN of the infinities of float8 e5m2.
        infinite = self.kind == "float" and self.exponent == 5
        return self.k <= 16384 and self.k % 32 == 0 and self.bits >= 4 and self.n >= 16 and not infinite

    @property
    def in_integers(self) -> bool:
        """Whether one token is multiplied in integers, by one_token.py; tables and small floats become float16."""
        return self.kind in ("affine", "fixed")

    @property
    def looks_up_pairs(self) -> bool:
        """Whether the kernel for up to 16 tokens looks both codes of a byte up at once."""
        return self.bits == 4 and self.kind in ("table", "minifloat", "float")

    @property
    def text(self) -> str:
        """It as a word, for the schema of an operator."""
        return " ".join(map(str, self))

    def constants(self, zero: bool) -> dict[str, Any]:
        """Those that every kernel has, in the order of its parameters."""
        return {
            "K": self.k, "BITS": self.bits, "KIND": KINDS.index(self.kind), "EXPONENT": self.exponent,
            "SIGNED": self.signed, "ZERO": zero, "OFFSET": self.offset, "RG": self.rows, "NG": self.groups,
            "NESTED": NESTED.index(self.nested), "RG2": self.outer_rows, "NG2": self.outer_groups,
        }  # fmt: skip


Fields = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None"]
"""codes, scale, zero point, table, scale of the scales, their zero point."""


@functools.cache
def reading_from(text: str) -> Reading:
    """The inverse of `Reading.text`."""
    n, k, bits, kind, exponent, signed, offset, *scales = text.split()
    rows, groups, nested, outer_rows, outer_groups = scales
    return Reading(
        int(n), int(k), int(bits), kind, int(exponent), signed == "True", float(offset), int(rows), int(groups), nested,
        int(outer_rows), int(outer_groups),
    )  # fmt: skip


def reading_of(w: QTensor) -> tuple[Reading, Fields] | None:
    """How the kernels read a weight (N, K), and its fields; None where they cannot."""
    a = w.spec.operand(w) if w.dim() == 2 else None
    if a is None or (a.kind not in KINDS and a.kind != "trits") or w.numel() >= 2**31:
        return None
    n, k = (int(size) for size in w.shape)  # int: a graph may have any number of tokens, but one shape of the weight
    scale, nested = _scale_fields(a)
    trits = a.kind == "trits"
    width, rest = divmod(k * TRIT_BYTES, TRIT_CHUNK) if trits else divmod(k * a.bits, 8)
    if scale is None or tuple(a.codes.shape) != (n, width) or rest:
        return None
    rows, groups = (int(size) for size in a.scale.shape)
    group = k // groups
    if n % rows or k % groups or k % 16 or (groups > 1 and group % (TRIT_CHUNK if trits else 16)):
        return None
    if k % 32 and a.bits not in (4, 8):  # in half a chunk at the end the planes of other codes begin within words
        return None
    if trits and nested[0] != "none":
        return None
    if a.zero_point is not None and tuple(a.zero_point.shape) != (rows, groups):
        return None
    exponent, kind = a.exponent, a.kind
    if kind == "float":
        exponent = {torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}.get(a.codes.dtype, 0)
        if not exponent:
            return None
    outer = tuple(int(size) for size in nested[1].shape) if nested[0] == "affine" else (rows, 1)
    if groups % outer[1] or rows % outer[0]:
        return None
    words = a.bits == 8 or (trits and width % 4 == 0)  # that could begin anywhere
    if not a.codes.is_contiguous() or (words and a.codes.storage_offset() % 4):
        return None
    fields = fields_of(w)
    if not all(t is None or t.is_contiguous() for t in fields):
        return None
    signed = a.codes.dtype == torch.int8
    return Reading(
        n, k, a.bits, kind, exponent, signed, float(a.offset), n // rows, groups, nested[0], n // outer[0], outer[1]
    ), fields


def fields_of(w: QTensor) -> Fields:
    """The fields of a weight of which there is a reading."""
    a = w.spec.operand(w)
    assert a is not None
    scale, (_, outer_scale, outer_zero_point) = _scale_fields(a)
    assert scale is not None
    zero_point = a.zero_point if a.words is None else a.words.view(torch.int16)
    codes = a.codes if a.kind == "trits" else a.codes.view(torch.int32)
    return codes, scale, zero_point, a.table, outer_scale, outer_zero_point


def _scale_fields(a: Operand) -> tuple[Tensor | None, tuple[Any, ...]]:
    """The tensor that holds the scales; how, and what else it takes: scale and zero point of the scales."""
    found = stored_scale(a)
    if found is None:
        return None, ("none", None, None)
    kind, values, scale, zero_point = found
    if kind == "power":
        return values, ("power", None, None)
    if kind == "joint":  # by this dtype the kernels know words of two numbers
        return values.view(torch.int16), ("none", None, None)
    if values.dtype == torch.float8_e4m3fn:
        if scale is None:
            return values.view(torch.uint8), ("e4m3", None, None)
        return (values.view(torch.uint8) if scale.numel() == 1 else None), ("scaled", scale, None)
    if kind == "plain":
        return (values if values.dtype.itemsize > 1 else None), ("none", None, None)
    return (None if zero_point is None else values), ("affine", scale, zero_point)
