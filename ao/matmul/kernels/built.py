"""Products on a CPU whose C++ (cpu_source.py) is compiled when it is first needed, once per kind of code, and kept on disk."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch

from ...dtypes.cpp import cpp_instructions, cpp_library
from .cpu_source import SOURCE
from .device import VNNI, tile_instructions

CODES = {"unsigned": 0, "signed": 1, "e4m3": 2, "e5m2": 3, "table": 4, "minifloat": 5}
"""What codes are, as cpu_source.py numbers them."""

JOINT_SCALE, JOINT_ZERO, POWER = 6, 7, 8
"""Likewise, of words that hold both a scale and a zero point, and of powers of two."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3, torch.float8_e4m3fn: 4}
"""Dtypes of arguments, as cpu_source.py numbers them."""

SCALES = {**DTYPES, torch.float16: 5}
"""Dtypes of scales and zero points."""

IN_FLOATS, IN_16_BITS, IN_31_BITS, OF_INTEGERS = range(4)
"""How a product computes: in floats; with the activation in fixed point; with the integers that it holds."""


class Kind(NamedTuple):
    """What is compiled on its own: codes (a key of `CODES`), their bits, and the bits of the exponent of a minifloat."""

    codes: str
    bits: int
    exponent: int = 0


_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Level(ctypes.Structure):
    """`Level` of cpu_source.py."""

    _fields_ = [
        *((name, _POINTER) for name in ("values", "inner", "inner_zero")),
        *((name, _LONG) for name in ("rows", "inner_rows", "inner_groups")),
        *((name, _INT) for name in ("dtype", "bits", "inner_dtype", "inner_zero_dtype")),
        ("inner_offset", _FLOAT),
    ]


class Weight(ctypes.Structure):
    """`Weight` of cpu_source.py."""

    _fields_ = [
        *((name, _POINTER) for name in ("codes", "table")),
        *((name, Level) for name in ("scale", "zero")),
        *((name, _LONG) for name in ("n", "k", "row_bytes", "groups")),
        ("offset", _FLOAT),
        *((name, _INT) for name in ("shifted", "after", "trits")),
    ]


class Act(ctypes.Structure):
    """`Act` of cpu_source.py."""

    _fields_ = [("codes", _INT), ("whole", _INT), ("low", _FLOAT), ("high", _FLOAT), ("factor", _FLOAT)]


class Library(NamedTuple):
    """product(weight, x, x_dtype, token_scale, y, dtype, tokens, points, threads),
    rows(weight, start, stop, out, dtype, threads), quantize(act, x, dtype, tokens, k, given_scale, out, scale), and where there
    are units for it tiles(weight, x, tokens, y, threads)."""

    product: Any
    rows: Any
    quantize: Any
    tiles: Any


@functools.cache
def library(kind: Kind) -> Library | None:
    """The compiled functions of products, compiled now if no process has done so; None where that fails."""
    arguments = {
        "ao_product": [ctypes.POINTER(Weight), _POINTER, _INT, _POINTER, _POINTER, _INT, _LONG, _INT, _INT],
        "ao_rows": [ctypes.POINTER(Weight), _LONG, _LONG, _POINTER, _INT, _INT],
        "ao_quantize": [ctypes.POINTER(Act), _POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _POINTER],
        "ao_tiles": [ctypes.POINTER(Weight), _POINTER, _LONG, _POINTER, _INT],
    }
    found = functions(kind, SOURCE, arguments)
    return None if found is None else Library(*found)


def functions(kind: Kind, source: str, arguments: dict[str, list[Any]]) -> list[Any] | None:
    """The functions of `source` by their names and the types of their arguments, compiled for `kind` if no process has done so;
    None where that fails, and in place of one that is not for this CPU."""
    bias = f"0x1p{128 - 2 ** (kind.exponent - 1)}f" if kind.exponent else "1.0f"
    macros = {"KIND": CODES[kind.codes], "BITS": kind.bits, "EXPONENT": kind.exponent, "BIAS": bias}
    flags = cpp_instructions()
    if VNNI and "-mavx512f" in flags:
        flags = *flags, "-mavx512vnni"
    flags = (
        *flags,
        *tile_instructions(flags),
        "-ffp-contract=fast",
        *(f"-D{name}={value}" for name, value in macros.items()),
    )
    loaded = cpp_library(source, flags)
    if loaded is None:
        return None
    found = [getattr(loaded, name, None) for name in arguments]
    for function, types in zip(found, arguments.values()):
        if function is not None:
            function.argtypes, function.restype = types, None
    return found
