"""What the GPU's kernels for five numbers in a byte compute, on any machine: their instructions, one after another."""

from __future__ import annotations

import random
import re

import numpy as np
import torch

from ao.dtypes import pack_trits
from ao.matmul.kernels.trits_ptx import digits, pairs, times_word

WORD = 2**32 - 1


def _bytes(word: int, signed: bool = False) -> list[int]:
    each = [word >> 8 * i & 255 for i in range(4)]
    return [b - 256 if signed and b > 127 else b for b in each]


def _word(each) -> int:
    return sum((b & 255) << 8 * i for i, b in enumerate(each))


def _prmt(a: int, b: int, places: int) -> int:
    both = _bytes(a) + _bytes(b)
    return _word(both[places >> 4 * i & 7] for i in range(4))


def _dp4a(a: int, b: int, c: int) -> int:
    return c + sum(x * y for x, y in zip(_bytes(a), _bytes(b, signed=True)))


def _float(word: int) -> np.float32:
    return np.array([word & WORD], np.uint32).view(np.float32)[0]


def _bits(x) -> int:
    return int(np.array([x], np.float32).view(np.uint32)[0])


def _fma(a: int, b: int, c: int, kind: str) -> int:
    """Of two halves; exact, so that no rounding is asked for."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]

    def numbers(word: int) -> torch.Tensor:
        return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(dtype).double()

    exact = numbers(a) * numbers(b) + numbers(c)
    assert torch.equal(exact.to(dtype).double(), exact)
    low, high = (int(i) & 0xFFFF for i in exact.to(dtype).view(torch.int16))
    return low | high << 16


RUN = {
    "prmt.b32": _prmt,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "shl.b32": lambda a, n: a << n,
    "add.s32": lambda a, b: a + b,
    "dp4a.u32.s32": _dp4a,
    "mov.b32": lambda a: a,
    "add.f32": lambda a, b: _bits(_float(a) + _float(b)),
    "fma.rn.f32": lambda a, b, c: _bits(np.float64(_float(a)) * _float(b) + _float(c)),
    "fma.rn.bf16x2": lambda a, b, c: _fma(a, b, c, "bf16"),
    "fma.rn.f16x2": lambda a, b, c: _fma(a, b, c, "f16"),
}


def run(ptx: str, results: int, *operands: int) -> list[int]:
    """The results of instructions, whose operands follow them."""
    registers = {f"${results + i}": operand & WORD for i, operand in enumerate(operands)}

    def value(name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return registers[name] if name in registers else int(name, 0) & WORD

    for line in ptx.strip()[1:-1].split(";"):
        name, *rest = line.split(None, 1)[:2] or [""]
        if not name or name == ".reg":
            continue
        if two := re.fullmatch(r"{(\S+), (\S+)}, (\S+)", rest[0]):  # a word as its halves
            low, high, source = two.groups()
            registers[low], registers[high] = value(source) & 0xFFFF, value(source) >> 16
            continue
        target, *sources = rest[0].replace(" ", "").split(",")
        registers[target] = RUN[name](*map(value, sources)) & WORD
    return [registers[f"${i}"] for i in range(results)]


def words_of_all_bytes() -> list[tuple[int, list[list[int]]]]:
    """Words with every byte that there is, and the five digits of each of their bytes."""
    trits = torch.zeros(244, 64, dtype=torch.uint8)
    for v in range(243):
        trits[v, ::13] = torch.tensor([v // 3**i % 3 for i in (4, 3, 2, 1, 0)])
    each = pack_trits(trits)[:, 0].tolist()
    order = random.Random(0).sample(range(244), 244)
    return [
        (_word(each[j] for j in order[i : i + 4]), [trits[j, ::13].tolist() for j in order[i : i + 4]])
        for i in range(0, 244, 4)
    ]


def test_digits():
    for word, expected in words_of_all_bytes():
        assert [_bytes(each) for each in run(digits(), 5, word)] == [list(place) for place in zip(*expected)]


def test_pairs():
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        for numbers in ((0, 1, 2, 0), (2, 2, 1, 0)):
            halves = torch.tensor(run(pairs(kind), 4, _word(numbers)), dtype=torch.int32).to(torch.int16).view(dtype)
            assert halves.tolist() == [n - 1 for n in numbers]


def _split(y: int) -> tuple[int, int]:
    high = y + 128 >> 8
    assert -128 <= high < 128
    return high, y - 256 * high


def test_products():
    """Of codes and of fixed point, the largest among them: exact."""
    draw = random.Random(1)
    for largest in (1, 127, 8128):
        for word, expected in words_of_all_bytes():
            x = [
                [draw.choice((-largest, largest, draw.randint(-largest, largest))) for _ in range(5)] for _ in range(4)
            ]
            y = [[a - 3 * b for a, b in zip(each, [*each[1:], 0])] for each in x]
            high = [_word(_split(y[b][i])[0] for b in range(4)) for i in range(5)]
            low = [_word(_split(y[b][i])[1] for b in range(4)) for i in range(5)]
            begin = -sum(map(sum, x))
            total = sum(a * (d - 1) for each, digits in zip(x, expected) for a, d in zip(each, digits))
            (found,) = run(times_word(True), 1, word, *high, *low, begin, 0, 1000)
            assert (found + 2**31) % 2**32 - 2**31 == total + 1000
            (found,) = run(times_word(False), 1, word, *high, *low, begin + 0x4B400000, _bits(0.5), _bits(3))
            assert _float(found) == total * 0.5 + 3
