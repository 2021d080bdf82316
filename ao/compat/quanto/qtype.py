"""The number formats of quanto by name, and the Spec that each of them is here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...dtypes import Float8, Intx, Spec


@dataclass(frozen=True)
class qtype:
    """A number format by name. dtype: what an element is stored in. qmin, qmax: its ends."""

    name: str
    is_floating_point: bool
    bits: int
    dtype: torch.dtype
    qmin: float
    qmax: float

    def __str__(self) -> str:
        return f"quanto.{self.name}"


def _integer(bits: int) -> qtype:
    return qtype(f"qint{bits}", False, bits, torch.int8, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _float(dtype: torch.dtype) -> qtype:
    ends = torch.finfo(dtype)
    return qtype(f"q{ends.dtype}", True, 8, dtype, ends.min, ends.max)


qint2 = _integer(2)
qint4 = _integer(4)
qint8 = _integer(8)
qfloat8_e4m3fn = _float(torch.float8_e4m3fn)
qfloat8_e4m3fnuz = _float(torch.float8_e4m3fnuz)
qfloat8_e5m2 = _float(torch.float8_e5m2)
qfloat8 = qfloat8_e4m3fn

qtypes: dict[str, qtype] = {
    q.name: q for q in (qint2, qint4, qint8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2)
} | {"qfloat8": qfloat8}
"""The formats by name."""

_FLOATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def read_qtype(given: qtype | str | None, parameter: str) -> qtype | None:
    """The qtype that a name stands for: "qint8", or "int8" as quanto's command line has it; None stays None.

    Raises ValueError for another name.
    """
    if given is None or isinstance(given, qtype):
        return given
    found = qtypes.get(given) or qtypes.get(f"q{given}")
    if found is None:
        raise ValueError(f"{parameter} must be one of {', '.join(qtypes)}, got {given!r}")
    return found


def weight_spec(kind: qtype, group_size: int | None, shape: Sequence[int]) -> Spec:
    """The Spec of a weight: a scale per row for 8 bits; below, a scale and an offset per group of a row.

    Codes are packed along a dim that is a multiple of 8; a weight without one has a byte for each.
    """
    block = (1, group_size or -1, *[-1] * (len(shape) - 2)) if len(shape) > 1 else (-1,)
    if kind.is_floating_point:
        return Float8(_float8(kind), block)  # type: ignore[arg-type]
    if kind.bits == 8:
        return Intx(8, block, narrow=True)
    bits = kind.bits if any(n % 8 == 0 for n in shape) else 8
    return Intx(bits, block, signed=False, symmetric=False, zero_point="float")


def act_spec(kind: qtype) -> Spec:
    """The Spec of an activation: one scale for all of it. Raises ValueError for fewer than 8 bits."""
    if kind.bits != 8:
        raise ValueError(f"activations must be qint8 or one of qfloat8, got {kind}")
    if kind.is_floating_point:
        return Float8(_float8(kind), (-1, -1))  # type: ignore[arg-type]
    return Intx(8, (-1, -1), narrow=True)


def _float8(kind: qtype) -> str:
    if kind.dtype not in _FLOATS:
        raise NotImplementedError(f"ao has no {kind.name}; use qfloat8_e4m3fn or qfloat8_e5m2")
    return _FLOATS[kind.dtype]


def listed(names: str | Iterable[str] | None) -> list[str] | None:
    """A pattern or several as a list."""
    return [names] if isinstance(names, str) else None if names is None else list(names)
