"""What codes become in the kernels for a few tokens, on any machine: their constants, and their instructions for 32 lanes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ao.dtypes.bits import pack
from ao.dtypes.floatx import minifloat
from ao.matmul.kernels.bf16_pairs import decoding, pairs_asm
from ao.matmul.kernels.pair_products import products_asm
from ao.matmul.kernels.reading import Reading

LANE = np.arange(32)
ROW, LANE_OF_ROW = LANE // 4, LANE % 4
WORD = np.uint32


def _floats(words):
    return words.astype(WORD).view(np.float32)


def _bits(numbers):
    return np.asarray(numbers, np.float32).view(WORD)


def _halves(words):
    """(32,) words -> the lower and the upper bfloat16 of each, as float64."""
    return [_floats(half).astype(np.float64) for half in (words << WORD(16), words & WORD(0xFFFF0000))]


def _words(low, high):
    """Words of two bfloat16, the nearest to two numbers."""
    low, high = (torch.as_tensor(x).bfloat16().view(torch.int16).numpy().astype(WORD) & 0xFFFF for x in (low, high))
    return low | high << WORD(16)


def _prmt(a, b, places):
    each = np.stack([x >> WORD(8 * i) & WORD(255) for x in (a, b) for i in range(4)])
    found = np.zeros(32, WORD)
    for i in range(4):
        place = np.broadcast_to(places >> WORD(4 * i) & WORD(15), 32)
        byte = each[place & 7, LANE]
        found |= np.where(place & 8, byte // 128 * 255, byte).astype(WORD) << WORD(8 * i)
    return found


def _lop3(a, b, c, table):
    return {0xEA: a & b | c, 0xCA: a & b | ~a & c}[table]


def _fma(a, b, c):
    with np.errstate(invalid="ignore"):
        return _words(*(x * y + z for x, y, z in zip(_halves(a), _halves(b), _halves(c))))


def _mma(a, b, c):
    """m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"): words of all lanes, four and two, and
    four sums."""
    left, right = np.zeros((16, 16)), np.zeros((16, 8))
    for half in range(2):
        for i in range(4):
            left[ROW + i % 2 * 8, LANE_OF_ROW * 2 + half + i // 2 * 8] = _halves(a[i])[half]
        for i in range(2):
            right[LANE_OF_ROW * 2 + half + i * 8, ROW] = _halves(b[i])[half]
    product = left @ right
    return [c[i] + product[ROW + i // 2 * 8, LANE_OF_ROW * 2 + i % 2] for i in range(4)]


ONE = {
    "mov.b32": lambda a: a,
    "mov.f32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "shr.u32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma,
    "fma.rn.f32": lambda a, b, c: _bits(_floats(a) * _floats(b) + _floats(c)),
    "cvt.rn.bf16x2.f32": lambda high, low: _words(_floats(low), _floats(high)),
}


def run(lines, operands, shared=None):
    """The registers after instructions. shared: the words of shared memory."""
    registers = {f"${i}": value for i, value in operands.items()}

    def value(name):
        return registers[name] if name in registers else np.full(32, int(name, 0), WORD)

    for line in lines.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        groups = [group.split(", ") for group in re.findall(r"\{(.*?)\}", rest)]
        if name.startswith("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"):
            to, *of = groups
            registers |= dict(zip(to, _mma(*([value(each) for each in names] for names in of))))
        elif groups:  # a word in two
            word = value(rest.split(", ")[-1])
            registers |= dict(zip(groups[0], (word & WORD(0xFFFF), word >> WORD(16))))
        elif name == "ld.shared.b32":
            to, at = rest.split(", ")
            registers[to] = shared[value(at.strip("[]")) // 4]
        elif name == "lop3.b32":
            to, *args, table = rest.split(", ")
            registers[to] = _lop3(*map(value, args), int(table, 0))
        elif name and name != ".reg":
            to, *args = rest.split(", ")
            registers[to] = ONE[name](*map(value, args))
    return registers


def _reading(bits, kind, exponent=0, signed=False, offset=0.0, groups=4):
    return Reading(16, 128, bits, kind, exponent, signed, offset, 1, groups)


READINGS = [
    _reading(4, "minifloat", 2), _reading(4, "minifloat", 3), _reading(4, "minifloat", 1), _reading(4, "minifloat", 2, groups=1),
    _reading(5, "minifloat", 2), _reading(6, "minifloat", 3), _reading(6, "minifloat", 2, groups=1), _reading(8, "float", 4),
    _reading(8, "float", 5), _reading(4, "table"), _reading(4, "table", groups=1), _reading(3, "table"),
    _reading(4, "affine", offset=8.0), _reading(4, "affine", offset=7.5), _reading(4, "affine", offset=7.5, groups=1),
    _reading(3, "affine", offset=4.0), _reading(7, "affine", offset=64.0), _reading(8, "affine", signed=True),
    _reading(8, "affine", offset=128.0, groups=1), _reading(8, "fixed", 1, signed=True),
]  # fmt: skip


def _name(reading):
    scales = "by row" if reading.by_row else "in groups"
    return f"{reading.bits}-{reading.kind}-{reading.exponent}-{reading.offset}, scales {scales}"


def _numbers(reading):
    """Of each code, and which codes are numbers."""
    codes = torch.arange(2**reading.bits, dtype=torch.uint8)
    if reading.kind == "table":
        numbers = torch.randn(len(codes), generator=torch.Generator().manual_seed(0)).bfloat16()
    elif reading.kind == "float":
        numbers = codes.view(torch.float8_e4m3fn if reading.exponent == 4 else torch.float8_e5m2)
    elif reading.kind == "minifloat":
        numbers = minifloat(codes, reading.exponent, reading.bits - 1 - reading.exponent)
    else:
        numbers = (codes.view(torch.int8) if reading.signed else codes) - reading.offset
        if reading.kind == "fixed":
            numbers = numbers * 2.0 ** (1 + reading.exponent - reading.bits)
    numbers = numbers.double().numpy()
    return numbers, np.flatnonzero(np.isfinite(numbers))


def _factor_and_term(constants, how):
    """`_factor_and_term` of read_once.py, of a scale of 1."""
    kind, _, _, signed, shift, _ = how
    if kind == "affine" and shift is None:
        return _bits(np.ones(32)), _bits(np.full(32, -constants["OFFSET"] - (32896.0 if signed else 32768.0)))
    if kind == "affine":
        factor, term = 2.0**-shift, -128.0 - constants["OFFSET"] * 2.0**shift
    else:
        factor = term = 2.0 ** constants["POWER"]
    return _words(np.full(32, factor), np.full(32, factor)), _words(np.full(32, term), np.full(32, term))


def _table(reading, numbers):
    """A table of 16 numbers or fewer, in registers: the words of high bytes, and those of low ones."""
    if reading.kind != "table":
        return [np.zeros(32, WORD)] * 8
    number = _words(numbers, np.zeros(len(numbers)))[np.arange(16) % len(numbers)]
    each = [number >> WORD(8), number & WORD(255)]
    return [
        np.full(32, sum(int(b) << 8 * i for i, b in enumerate(of[4 * w : 4 * w + 4])), WORD)
        for of in each
        for w in range(4)
    ]


def _asked(reading, in_shared):
    """What a kernel knows of a format, after the other kernel has asked for it."""
    scaled = not reading.by_row
    decoding(reading, None, scaled, not in_shared)
    return decoding(reading, None, scaled, in_shared)


@pytest.mark.parametrize("reading", READINGS, ids=_name)
def test_pairs(reading):
    """Each code becomes its number, in pairs."""
    constants, how = _asked(reading, in_shared=False)
    numbers, codes = _numbers(reading)
    codes = np.resize(codes, (32, 32)).astype(np.uint8)
    words = pack(torch.from_numpy(codes), reading.bits).numpy().view(WORD)
    operands = {8 + i: words[:, i] for i in range(reading.bits)}
    operands |= {16 + i: each for i, each in enumerate(_factor_and_term(constants, how) * 2)}
    operands |= {20 + i: each for i, each in enumerate(_table(reading, numbers))}
    for j in range(4):
        registers = run(pairs_asm(*how, j), operands)
        found = np.stack([_floats(registers[f"${i}"] << WORD(16)) for i in range(8)], 1)
        at = [4 * j + i + 16 * half for half in range(2) for i in range(4)]
        np.testing.assert_array_equal(found.astype(np.float64) * 2.0 ** constants["LAST_POWER"], numbers[codes[:, at]])


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("reading", READINGS, ids=_name)
def test_products_of_pairs(reading, blocks):
    """The tensor cores get each number of a row where they get what it is multiplied with."""
    constants, how = _asked(reading, in_shared=True)
    assert (how[0] == "lookup") == reading.looks_up_pairs
    numbers, codes = _numbers(reading)
    random = np.random.default_rng(0)
    codes = random.choice(codes, (16, 4, 32)).astype(np.uint8)
    x = random.integers(-8, 8, (8 * blocks, 4, 32)).astype(np.float32)
    words = pack(torch.from_numpy(codes), reading.bits).numpy().view(WORD)  # (16, 4, bits)
    first = 8 * blocks
    operands = {4 * blocks + i: np.zeros(32) for i in range(4 * blocks)}
    operands |= {first + 8 * r + i: words[ROW + 8 * r, LANE_OF_ROW, i] for r in range(2) for i in range(reading.bits)}
    operands |= {first + 16 + i: each for i, each in enumerate(_factor_and_term(constants, how) * 4)}
    operands |= {first + 24 + i: each for i, each in enumerate(_table(reading, numbers))}
    shared = None
    order = np.arange(32)
    if how[0] == "lookup":
        byte = np.arange(256)
        operands[first + 24] = (LANE * 4).astype(WORD)
        shared = np.repeat(_words(numbers[byte & 15], numbers[byte >> 4]), 32)
        order = order.reshape(2, 16).T.ravel()  # elements e and e + 16 in a word
    for block in range(blocks):
        own = x[ROW + 8 * block, LANE_OF_ROW][:, order]
        operands |= {first + 32 + 16 * block + i: _words(own[:, 2 * i], own[:, 2 * i + 1]) for i in range(16)}
    registers = run(products_asm(*how, blocks), operands, shared)
    expected = np.einsum("rtc, mtc -> rm", numbers[codes], x)
    for i in range(4 * blocks):
        sums = expected[ROW + i % 4 // 2 * 8, LANE_OF_ROW * 2 + i % 2 + i // 4 * 8]
        np.testing.assert_allclose(registers[f"${i}"] * 2.0 ** constants["LAST_POWER"], sums, rtol=1e-9, atol=1e-9)


def test_what_all_kernels_share_cannot_be_changed():
    constants, _ = decoding(READINGS[0], None, True)
    with pytest.raises(TypeError):
        constants |= {"POWER": 0}
    with pytest.raises(TypeError):
        constants["POWER"] = 0
