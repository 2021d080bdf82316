"""PTX that turns packed codes into pairs of bfloat16, several codes of a register at once.

A chunk of 32 codes is `bits` words (bits.py), in which codes 4 g to 4 g + 3 are one byte each of one word per section. They are
brought together as four bytes, and `prmt` and `lop3` make two pairs of bfloat16 of them:

    affine     128 + code, the code in the last bits of the mantissa, less 128 and the zero point, which is exact, times the scale
    affine32   2**15 + code as float32, times the scale, less the zero point times the scale: any zero point, and 8 bits
    table      both bytes of the bfloat16 that a code names, by `prmt` of a table in registers, of 16 numbers or fewer
    minifloat  the bits moved to their places in bfloat16, times a power of two for the difference of the biases, and the scale
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ...dtypes.bits import _SECTIONS
from .reading import Reading

OPERANDS = ",".join(["=h"] * 8 + ["r"] * 20)
"""Of `pairs_asm`: the results, and the `Registers` of both halves."""

HALF_POWER = 64
"""By 2**-this the numbers of minifloats are too small in the sum, so that no factor overflows."""


class Registers(NamedTuple):
    """Where codes and what they meet are.

    words: of a chunk, of which the first `bits` count. factor, term: what codes are multiplied with, and what is added to them.
    table: 4 words with the high bytes of a table, and 4 with the low ones."""

    words: Sequence[str]
    factor: str
    term: str
    table: Sequence[str]


DECLARED = ".reg .b32 a, b, c, d, e, f, m, n, o, p, q, s, t, u, z; .reg .f32 f0, f1, f2, f3; .reg .b64 k, l;"
"""What `pairs` needs besides."""


def bytes_of_codes(words: Sequence[str], bits: int, g: int, up: int = 0, sign: bool = False) -> str:
    """Codes 4 g to 4 g + 3 times 2**up, as the bytes of c. sign: without their highest bits, of which s has the bytes."""
    lines = []
    base = first = 0
    for section in _SECTIONS.get(bits, (8,)):
        source, shift = words[base + g % section], g // section * section - first - up
        ones = 2**section - 1 << first + up
        if shift:
            lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 t, {source}, {abs(shift)};")
            source = "t"
        if sign and first + section == bits:
            lines.append(f"and.b32 s, {source}, {(1 << bits - 1 + up) * 0x01010101:#010x};")
            ones -= 1 << bits - 1 + up
        if first:
            lines.append(f"lop3.b32 c, {source}, {ones * 0x01010101:#010x}, c, 0xEA;")
        else:
            lines.append(f"and.b32 c, {source}, {ones * 0x01010101:#010x};")
        base += section
        first += section
    return " ".join(lines)


def _affine(r: Registers, bits: int, shift: int, scaled: bool, g: int) -> str:
    lines = [bytes_of_codes(r.words, bits, g, shift), "mov.b32 o, 0x3f803f80; mov.b32 z, 0x80008000;"]
    for name, places in (("a", "0x4140"), ("b", "0x4342")):
        lines.append(f"prmt.b32 {name}, c, 0x43434343, {places}; fma.rn.bf16x2 {name}, {name}, o, {r.term};")
        if scaled:
            lines.append(f"fma.rn.bf16x2 {name}, {name}, {r.factor}, z;")
    return " ".join(lines)


def _affine32(r: Registers, bits: int, signed: bool, g: int) -> str:
    lines = [bytes_of_codes(r.words, bits, g), "xor.b32 c, c, 0x80808080;" if signed else ""]
    for i in range(4):
        lines.append(f"prmt.b32 t, c, 0x4700, 0x54{i}4; mov.b32 f{i}, t; fma.rn.f32 f{i}, f{i}, {r.factor}, {r.term};")
    lines.append("cvt.rn.bf16x2.f32 a, f1, f0; cvt.rn.bf16x2.f32 b, f3, f2;")
    return " ".join(lines)


def _table16(r: Registers, word: int, half: int) -> str:
    """Places of 4 bits: all of a word are looked up, and the half of them that is asked for is kept; the assembler sees that both
    halves share the rest."""
    w = r.words[word]
    # Places of the two nibbles of a byte follow each other; the highest bit of each says which half of the table it is.
    lines = [f"and.b32 s, {w}, 0x77777777; shr.u32 u, s, 16; shl.b32 t, {w}, 4;"]
    lines.append(f"prmt.b32 m, {w}, t, 0x9D8C; prmt.b32 n, {w}, t, 0xBFAE;")
    for byte, (low, high) in enumerate((("c", "d"), ("e", "f"))):
        t = r.table[4 * byte : 4 * byte + 4]
        for name, places, upper in ((low, "s", "m"), (high, "u", "n")):
            lines.append(f"prmt.b32 p, {t[0]}, {t[1]}, {places}; prmt.b32 q, {t[2]}, {t[3]}, {places};")
            lines.append(f"lop3.b32 {name}, {upper}, q, p, 0xCA;")
    order = ("0x2604", "0x3715")[half]
    lines.append(f"prmt.b32 a, c, e, {order}; prmt.b32 b, d, f, {order};")
    return " ".join(lines)


def _table8(r: Registers, bits: int, g: int) -> str:
    """Places of fewer bits, as bytes: these become the nibbles by which `prmt` chooses."""
    t = [r.table[i] for i in (0, 1, 4, 5)]
    lines = [bytes_of_codes(r.words, bits, g), "shr.b32 t, c, 4; or.b32 c, c, t; prmt.b32 s, c, 0, 0x4420;"]
    lines.append(f"prmt.b32 p, {t[0]}, {t[1]}, s; prmt.b32 q, {t[2]}, {t[3]}, s;")
    lines.append("prmt.b32 a, q, p, 0x5140; prmt.b32 b, q, p, 0x7362;")
    return " ".join(lines)


def _table_in_memory(r: Registers, bits: int, g: int) -> str:
    """Places of more bits: numbers, as float32, are read one by one. The address of the table is in two words."""
    lines = [bytes_of_codes(r.words, bits, g), f"mov.b64 l, {{{r.table[0]}, {r.table[1]}}};"]
    for i in range(4):
        lines.append(f"prmt.b32 t, c, 0, 0x444{i}; mad.wide.u32 k, t, 4, l; ld.global.nc.f32 f{i}, [k];")
    lines.append("cvt.rn.bf16x2.f32 a, f1, f0; cvt.rn.bf16x2.f32 b, f3, f2;")
    return " ".join(lines)


def _minifloat(r: Registers, bits: int, exponent: int, nan: bool, g: int) -> str:
    lines = [bytes_of_codes(r.words, bits, g, 8 - bits, sign=True), "mov.b32 z, 0x80008000;"]
    if nan:
        # What carries out of a full exponent, or of the one NaN of e4m3, becomes the bits that the exponent lacks in bfloat16.
        lines.append(f"add.u32 n, c, {0x01010101 if exponent == 4 else 0x04040404:#010x}; and.b32 n, n, 0x80808080;")
        lines.append(f"shr.b32 t, n, {8 - exponent}; sub.u32 n, n, t; or.b32 s, s, n;")
    for name, sizes, signs in (("a", "0x4140", "0x1404"), ("b", "0x4342", "0x3424")):
        lines.append(f"prmt.b32 t, c, 0, {sizes}; prmt.b32 u, s, 0, {signs}; mad.lo.u32 {name}, t, {2**exponent}, u;")
        lines.append(f"fma.rn.bf16x2 {name}, {name}, {r.factor}, z;")
    return " ".join(lines)


def pairs(
    r: Registers, kind: str, bits: int, exponent: int, signed: bool, shift: int | None, scaled: bool, g: int
) -> str:  # fmt: skip
    """Codes 4 g to 4 g + 3 of a chunk: the pairs a and b of bfloat16. See `pairs_asm`."""
    if kind == "affine" and shift is None:
        return _affine32(r, bits, signed, g)
    if kind == "affine":
        assert shift is not None
        return _affine(r, bits, shift, scaled, g)
    if kind in ("minifloat", "float"):
        return _minifloat(r, bits, exponent, kind == "float", g)
    assert kind == "table", kind
    if bits == 4:
        lines = [_table16(r, g % 4, g // 4)]
    else:
        lines = [_table8(r, bits, g) if bits < 4 else _table_in_memory(r, bits, g)]
    if scaled:
        lines.append(f"mov.b32 z, 0x80008000; fma.rn.bf16x2 a, a, {r.factor}, z; fma.rn.bf16x2 b, b, {r.factor}, z;")
    return " ".join(lines)


@functools.cache
def pairs_asm(kind: str, bits: int, exponent: int, signed: bool, shift: int | None, scaled: bool, j: int) -> str:
    """Codes 4 j to 4 j + 3 and 16 more than those, of a chunk: 8 bfloat16 as halves of registers.

    kind, bits, exponent, signed: as of a Reading.
    shift: by which codes are moved up, so that zero points are integers; None where the arithmetic is that of float32.
    scaled: whether there are factors, or only those of the kind.
    """
    lines = ["{", DECLARED]
    words, table = [f"${i}" for i in range(8, 16)], [f"${i}" for i in range(20, 28)]
    for half in range(2):
        r = Registers(words, f"${16 + 2 * half}", f"${17 + 2 * half}", table)
        lines.append(pairs(r, kind, bits, exponent, signed, shift, scaled, j + 4 * half))
        i = 4 * half
        lines.append(f"mov.b32 {{${i}, ${i + 1}}}, a; mov.b32 {{${i + 2}, ${i + 3}}}, b;")
    return " ".join([*lines, "}"])


def _shift(reading: Reading, zero: torch.dtype | None) -> int | None:
    """By which codes are moved up so that what is taken off them is an integer; None where they become float32 first, since
    bfloat16 would not hold the difference."""
    shift = 0 if zero != torch.int16 else max(0, 5 - reading.bits)  # joint words: 5 bits of a zero point
    while not (reading.offset * 2.0**shift).is_integer() and shift < 8:
        shift += 1
    exact = zero is None or not zero.is_floating_point
    return shift if exact and shift + reading.bits <= 7 else None


How = tuple[str, int, int, bool, "int | None", bool]
"""What `pairs_asm` wants to know of a format: kind, bits, exponent, signed, shift, scaled. Of codes that `products_asm` looks up,
the kind is "lookup"."""


@functools.cache
def decoding(
    reading: Reading, zero: torch.dtype | None, scaled: bool, in_shared: bool = False
) -> tuple[Mapping[str, Any], How]:
    """What the kernels know of a format, as constants that nobody can change, since all share them, and `How` its codes become
    pairs.

    zero: the dtype of the zero points, if there are any. scaled: whether scales multiply the numbers. in_shared: whether the
    kernel looks up codes that `looks_up_pairs`; numbers in the table are as they are, without a power of two to come."""
    lookup = in_shared and reading.looks_up_pairs
    integers = reading.kind in ("affine", "fixed")
    shift = _shift(reading, zero) if integers else 0
    power = last_power = 0
    if reading.kind in ("minifloat", "float") and not lookup:
        power, last_power = 128 - 2 ** (reading.exponent - 1) - HALF_POWER, HALF_POWER
    elif reading.kind == "fixed":
        last_power = 1 + reading.exponent - reading.bits
    if not scaled:
        last_power -= shift or 0
    kind = "affine" if integers else reading.kind
    constants = reading._replace(kind=kind).constants(zero is not None)
    how = "lookup" if lookup else kind, reading.bits, reading.exponent, reading.signed, shift, scaled
    return MappingProxyType({**constants, "SHIFT": shift, "POWER": power, "LAST_POWER": last_power}), how
