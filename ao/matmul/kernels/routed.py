"""Products of rows with the experts to which they were routed: a row is one token to a kernel of ampere.py, one_token.py or
one_token_mma.py, which reads the codes of its expert where they lie. So a step of generation reads the experts that it needs, and
decodes none to memory.

All rows run side by side, each on its part of the GPU: those of one expert find its codes in the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ampere import _gemv_kernel, gemv_float_kernel, gemv_int_kernel
from .launch import launch, power_of_two
from .one_token import _gemv_constants, gemv_codes_kernel
from .one_token_mma import aligned, constants_of, gemv_halves_kernel, is_wide, programs_of, tile_of
from .reading import Fields, Reading
from .template import given


@triton.jit
def _expert_of(where_ptr, row, EXPERTS: tl.constexpr, ENDS: tl.constexpr):
    """The expert of a row, int64: as many as end before it, or what is said of the row."""
    if ENDS > 0:
        e = tl.arange(0, ENDS)
        ends = tl.load(where_ptr + e, mask=e < EXPERTS, other=2147483647)
        return tl.sum((ends <= row).to(tl.int64), 0)
    else:
        return tl.load(where_ptr + row).to(tl.int64)


@triton.jit
def _zeros(out_ptr, N):
    """A row that no expert has."""
    for first in tl.range(tl.program_id(0) * 1024, N, tl.num_programs(0) * 1024):
        n = first + tl.arange(0, 1024)
        tl.store(out_ptr + n, tl.zeros((1024,), tl.float32).to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def routed_int_kernel(
    x_ptr, where_ptr, q_ptr, scale_ptr, zero_ptr, out_ptr, N, EXPERTS: tl.constexpr, ENDS: tl.constexpr, QS: tl.constexpr,
    SS: tl.constexpr, ZS: tl.constexpr, K: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr,
    ROW: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BN: tl.constexpr, J: tl.constexpr, AHEAD: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """`gemv_int_kernel` of each row with its expert. QS, SS, ZS: how far apart the fields of two experts lie."""
    row = tl.program_id(1)
    e = _expert_of(where_ptr, row, EXPERTS, ENDS)
    if (e >= 0) & (e < EXPERTS):
        gemv_int_kernel(
            x_ptr + row * K, q_ptr + e * QS, scale_ptr + e * SS, zero_ptr + e * ZS, out_ptr + row * N, N, K, G, BITS, SIGNED,
            ROW, ZERO, OFFSET, BN, J, AHEAD, ACT,
        )  # fmt: skip
    else:
        _zeros(out_ptr + row * N, N)


@triton.jit
def routed_float_kernel(
    x_ptr, where_ptr, q_ptr, scale_ptr, out_ptr, N, EXPERTS: tl.constexpr, ENDS: tl.constexpr, QS: tl.constexpr,
    SS: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """`gemv_float_kernel` of each row with its expert."""
    row = tl.program_id(1)
    e = _expert_of(where_ptr, row, EXPERTS, ENDS)
    if (e >= 0) & (e < EXPERTS):
        gemv_float_kernel(
            x_ptr + row * K, q_ptr + e * QS, scale_ptr + e * SS, out_ptr + row * N, N, K, BN, BK, ACT
        )  # fmt: skip
    else:
        _zeros(out_ptr + row * N, N)


@triton.jit
def routed_codes_kernel(
    x_ptr, where_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, EXPERTS: tl.constexpr,
    ENDS: tl.constexpr, QS: tl.constexpr, SS: tl.constexpr, ZS: tl.constexpr, SS2: tl.constexpr, ZS2: tl.constexpr,
    K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, EXPONENT: tl.constexpr, SIGNED: tl.constexpr,
    ZERO: tl.constexpr, OFFSET: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr, NESTED: tl.constexpr,
    RG2: tl.constexpr, NG2: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """`gemv_codes_kernel` of each row with its expert."""
    row = tl.program_id(1)  # which that kernel takes as well, for x and out
    e = _expert_of(where_ptr, row, EXPERTS, ENDS)
    if (e >= 0) & (e < EXPERTS):
        gemv_codes_kernel(
            x_ptr, q_ptr + e * QS, scale_ptr + e * SS, zero_ptr + e * ZS, table_ptr, scale2_ptr + e * SS2,
            zero2_ptr + e * ZS2, out_ptr, N, K, BITS, KIND, EXPONENT, SIGNED, ZERO, OFFSET, RG, NG, NESTED, RG2, NG2, J,
        )  # fmt: skip
    else:
        _zeros(out_ptr + row * N, N)


@triton.jit
def routed_halves_kernel(
    x_ptr, where_ptr, q_ptr, scale_ptr, zero_ptr, table_ptr, scale2_ptr, zero2_ptr, out_ptr, N, EXPERTS: tl.constexpr,
    ENDS: tl.constexpr, QS: tl.constexpr, SS: tl.constexpr, ZS: tl.constexpr, SS2: tl.constexpr, ZS2: tl.constexpr,
    K: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, EXPONENT: tl.constexpr, RG: tl.constexpr, NG: tl.constexpr,
    NESTED: tl.constexpr, RG2: tl.constexpr, NG2: tl.constexpr, ASM: tl.constexpr, POWER: tl.constexpr,
    LOOKUP: tl.constexpr, TURNED: tl.constexpr, FLOAT8: tl.constexpr, WIDE: tl.constexpr, WARPS: tl.constexpr,
    SLICES: tl.constexpr, TOGETHER: tl.constexpr, KEPT: tl.constexpr, AHEAD: tl.constexpr, APART: tl.constexpr,
    UNROLL: tl.constexpr, ROUNDS: tl.constexpr, PLACE_ASM: tl.constexpr,
):  # fmt: skip
    """`gemv_halves_kernel` of each row with its expert."""
    row = tl.program_id(1)
    e = _expert_of(where_ptr, row, EXPERTS, ENDS)
    if (e >= 0) & (e < EXPERTS):
        gemv_halves_kernel(
            x_ptr, q_ptr + e * QS, scale_ptr + e * SS, zero_ptr + e * ZS, table_ptr, scale2_ptr + e * SS2,
            zero2_ptr + e * ZS2, out_ptr, N, K, BITS, KIND, EXPONENT, RG, NG, NESTED, RG2, NG2, ASM, POWER, LOOKUP, TURNED,
            FLOAT8, WIDE, WARPS, SLICES, TOGETHER, KEPT, AHEAD, APART, UNROLL, ROUNDS, PLACE_ASM,
        )  # fmt: skip
    else:
        _zeros(out_ptr + row * N, N)


MOST = 2**14
"""Rows of one launch: a grid has at most 65,535, and the kernels count the elements of x and of the result in 31 bits."""


def takes(reading: Reading) -> bool:
    """Whether there is a kernel for experts that are read so."""
    return _is_plain(reading) or (reading.for_one_token and reading.by_template)


def _is_plain(reading: Reading) -> bool:
    """Whether the kernels of ampere.py read an expert: codes of 4 or 8 bits, with a scale per row or group."""
    if reading.bits not in (4, 8) or reading.nested != "none" or reading.rows != 1:
        return False
    if reading.kind == "float":
        return reading.by_row
    group = 128 if reading.by_row else reading.group
    fits = group in (32, 64, 128, 256) and reading.k % group == 0
    return reading.kind == "affine" and fits and reading.offset in (0, 8 if reading.bits == 4 else 0)


def routed(x: Tensor, where: Tensor, ends: bool, reading: Reading, fields: Fields) -> Tensor:
    """Each row of x times the expert it was routed to. x: (R, K) of 16 bits -> (R, N).

    where: the expert of each row, (R,) integers; a row of no expert becomes zero. ends: it is where the rows of each expert end,
        (E,) int32, x being sorted by expert; rows after the last become zero.
    reading: of one expert, which `takes` takes. fields: of all experts: those with a dim of experts have three.
    """
    r, n = x.shape[0], reading.n
    if r > MOST and not ends:
        parts = zip(x.split(MOST), where.split(MOST))
        return torch.cat([routed(rows, each, False, reading, fields) for rows, each in parts])
    out = torch.empty(r, n, dtype=x.dtype, device=x.device)
    if not r:
        return out
    experts = fields[0].shape[0]
    plain = _is_plain(reading)
    if plain and reading.kind == "float":
        codes = torch.float8_e4m3fn if reading.exponent == 4 else torch.float8_e5m2
        given_fields = [fields[0].view(codes), fields[1]]
    else:
        given_fields = given(fields)[: 3 if plain else 6]
    apart = [t.stride(0) if t.dim() == 3 and t.shape[0] > 1 else 0 for t in given_fields]
    wide = is_wide([fields]) and not any(a * t.itemsize % 16 for a, t in zip(apart, given_fields[:2]))
    kernel, programs, constants = _form(reading, fields[2] is not None, r, plain, wide, x.device)
    del apart[3:4]  # a table is that of all experts
    places: dict[str, Any] = dict(zip(("QS", "SS", "ZS", "SS2", "ZS2"), apart))
    launch(
        kernel, (programs, r), aligned(x), where, *given_fields, out, n, EXPERTS=experts,
        ENDS=power_of_two(experts) if ends else 0, **places, **constants,
    )  # fmt: skip
    return out


@functools.cache
def _form(
    reading: Reading, zero: bool, rows: int, plain: bool, wide: bool, device: torch.device
) -> tuple[Any, int, dict[str, Any]]:
    """The kernel for so many rows, the programs of each, and the constants. wide: as of `constants_of`."""
    if not plain and not reading.in_integers:
        cut = tile_of(reading, device, rows)
        (programs,) = programs_of([reading.n], cut, device, rows)
        constants = constants_of(reading, cut, wide, device)
        return routed_halves_kernel, programs, constants | {"num_warps": cut.warps, "registers": cut.registers}
    if not plain:
        (programs,), tile = _gemv_constants(reading.k, [reading.n], device, rows)
        return routed_codes_kernel, programs, reading.constants(zero) | tile
    codes = torch.float8_e4m3fn if reading.kind == "float" else torch.int8 if reading.signed else torch.uint8
    width, offset = reading.k * reading.bits // 8, int(reading.offset)
    kernel, (programs,), constants = _gemv_kernel(
        reading.n, reading.k, width, codes, reading.groups, zero, offset, False, device, rows
    )
    return routed_float_kernel if kernel is gemv_float_kernel else routed_int_kernel, programs, constants
