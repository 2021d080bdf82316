"""What the tensor cores compute for one token, on any machine: the instructions of 32 lanes, one after another."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from ao.dtypes import NF4, Codebook, Float8, Intx
from ao.dtypes.bits import pack
from ao.dtypes.floatx import minifloat
from ao.matmul.kernels.f16_products import LOOKED_UP, TABLE, WORDS, X, elements, places, power_of, products_asm, way_of
from ao.matmul.kernels.reading import reading_of

LANE = np.arange(32)
ROW, LANE_OF_ROW = LANE // 4, LANE % 4
WORD = np.uint32


def _halves(words):
    """(32,) words -> (32, 2) float16."""
    return np.stack([words & 0xFFFF, words >> 16], 1).astype(np.uint16).view(np.float16)


def _words(low, high):
    """Two of (32,) numbers, as float16, in words."""
    bits = [np.asarray(x, np.float16).view(np.uint16).astype(WORD) for x in (low, high)]
    return bits[0] | bits[1] << WORD(16)


def _prmt(a, b, places):
    each = [x >> WORD(8 * i) & WORD(255) for x in (a, b) for i in range(4)]
    return sum(each[places >> 4 * i & 15] << WORD(8 * i) for i in range(4))


def _mma(a, b, c):
    """m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"): words of all lanes, four and two, and
    four sums."""
    left, right = np.zeros((16, 16)), np.zeros((16, 8))
    for i in range(4):
        for half in range(2):
            left[ROW + i % 2 * 8, LANE_OF_ROW * 2 + half + i // 2 * 8] = _halves(a[i])[:, half]
    for i in range(2):
        for half in range(2):
            right[LANE_OF_ROW * 2 + half + i * 8, ROW] = _halves(b[i])[:, half]
    product = left @ right
    return [c[i] + product[ROW + i // 2 * 8, LANE_OF_ROW * 2 + i % 2] for i in range(4)]


def _float8(pairs):
    codes = torch.from_numpy(np.stack([pairs & 255, pairs >> 8], 1).astype(np.uint8)).view(torch.float8_e4m3fn)
    return _words(*codes.half().numpy().T)


def run(lines, operands, shared):
    """The sums. shared: the words of shared memory."""
    registers = {f"${i}": value for i, value in operands.items()}

    def value(name):
        if name in registers:
            return registers[name]
        return np.zeros(32) if name == "0f00000000" else np.full(32, int(name, 0), WORD)

    def loaded(at):
        at = value(at.strip("[]"))
        assert (at % 128 == LANE * 4).all()  # each lane has its bank
        return shared[at // 4]

    one = {
        "and.b32": lambda a, b: value(a) & value(b),
        "lop3.b32": lambda a, b, c, what: {"0xEA": value(a) & value(b) | value(c)}[what],
        "shl.b32": lambda a, n: value(a) << WORD(n),
        "shr.b32": lambda a, n: value(a) >> WORD(n),
        "prmt.b32": lambda a, b, places: _prmt(value(a), value(b), int(places, 16)),
        "mad.lo.u32": lambda a, b, c: value(a) * value(b) + value(c),
        "ld.shared.b32": loaded,
        "cvt.rn.f16x2.e4m3x2": lambda a: _float8(value(a)),
        "mov.b32": value,
        "mov.f32": value,
    }
    for line in lines.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        groups = re.findall(r"\{(.*?)\}", rest)
        if name.startswith("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"):
            to, a, b, c = (group.split(", ") for group in groups)
            registers |= dict(zip(to, _mma(*([value(each) for each in of] for of in (a, b, c)))))
        elif groups:  # a word in two
            word = value(rest.split(", ")[-1])
            registers |= dict(zip(groups[0].split(", "), (word & WORD(0xFFFF), word >> WORD(16))))
        elif name and name != ".reg":
            to, *args = rest.split(", ")
            registers[to] = one[name](*args)
    return [registers[f"${i}"] for i in range(8)]


@pytest.mark.parametrize(
    ("spec", "n", "k", "taken"),
    [
        (NF4, 16, 16384, True), (NF4, 8, 64, False), (NF4, 16, 16448, False), (Float8(block=(1, 32)), 16, 64, True),
        (Float8("e5m2", (1, 32)), 16, 64, False), (Codebook((-1.0, -0.2, 0.1, 1.0), (1, 32)), 16, 64, False),
        (Intx(3, (1, 64)), 8, 16448, True),
    ],
    ids=str,
)  # fmt: skip
def test_which_weights_have_a_kernel_for_one_token(spec, n, k, taken):
    """Tables and small floats of which a tile has rows enough and x of a row fits; integers of any rows."""
    reading, _ = reading_of(spec.quantize(torch.ones(n, k)))
    assert reading.for_one_token == taken


CASES = [
    ("table", 4, 0, False), ("table", 4, 0, True), ("table", 5, 0, False), ("table", 8, 0, True), ("minifloat", 4, 2, False),
    ("minifloat", 4, 3, True), ("minifloat", 5, 2, False), ("minifloat", 6, 2, True), ("minifloat", 6, 3, False),
    ("minifloat", 7, 3, False), ("minifloat", 7, 2, False), ("minifloat", 8, 3, True), ("float", 8, 4, False),
]  # fmt: skip


@pytest.mark.parametrize("float8", [True, False], ids=["float8", "no float8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_of_chunks(case, float8):
    """Each lane gets the sums of its columns, of both parts of chunks of two rows: of its own, which may be halves with scales,
    or of those of the lanes that it is together with, for each of as many slices."""
    kind, bits, exponent, halves = case
    way = way_of(*case, float8)
    parts = [[e for step in range(4) for e in elements(way, part, step)] for part in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(32)) and (not halves or sorted(parts[0]) == list(range(16)))

    random = np.random.default_rng(0)
    codes = random.integers(0, 2**bits, (16, 4, 32)).astype(np.uint8)  # of a lane of a row
    codes[codes & 127 == 127] = 0  # which a float8 has for NaN
    table = random.standard_normal(2**bits)
    if kind != "table":
        table = minifloat(torch.arange(2**bits, dtype=torch.uint8), exponent, bits - 1 - exponent).double().numpy()
    table = table.astype(np.float16)
    words = pack(torch.from_numpy(codes), bits).numpy().view(WORD)  # (16, 4, bits)
    operands = {WORDS + 8 * r + i: words[ROW + 8 * r, LANE_OF_ROW, i] for r in range(2) for i in range(bits)}
    shared = None
    if way in LOOKED_UP:
        place = np.arange(256 if bits == 4 else 2**bits)
        entries = _words(table[place & 15], table[place >> 4]) if bits == 4 else _words(table, table)
        operands[TABLE], shared = (LANE * 4).astype(WORD), np.repeat(entries, 32)
    for together in (1,) if halves else (1, 2, 4):
        x = random.standard_normal((together, 4, 32)).astype(np.float16)  # of each slice
        slices, part_of = np.array([places(together, column)[:2] for column in range(8)]).T
        mine = np.array([lane % 4 in places(together, lane // 4)[2] for lane in LANE])
        for step in range(4):
            of_part = np.array([elements(way, part, step) for part in range(2)])
            met = x[slices[ROW][:, None], LANE_OF_ROW[:, None], of_part[part_of[ROW]]] * mine[:, None]  # (32, 4)
            operands |= {X + 2 * step + r: _words(met[:, 2 * r], met[:, 2 * r + 1]) for r in range(2)}
        sums = np.stack(run(products_asm(way, bits, exponent), operands, shared)) * 2.0 ** power_of(way, exponent)
        for lane, row, column in itertools.product(range(32), range(2), range(2)):
            of, part, lanes = places(together, lane % 4 * 2 + column)
            at = lane // 4 + 8 * row
            expected = sum(
                table[codes[at, one, e]].astype(np.float64) * x[of, one, e] for one in lanes for e in parts[part]
            )
            assert abs(sums[4 * part + 2 * row + column, lane] - expected) < 1e-9


def test_places_of_x():
    """Of as many slices as lanes are together, every part of the chunks of all lanes is in a column, once."""
    for together in (1, 2, 4):
        found = [
            (of, part, lane) for column in range(8) for of, part, lanes in [places(together, column)] for lane in lanes
        ]
        assert sorted(found) == sorted(itertools.product(range(together), range(2), range(4)))
