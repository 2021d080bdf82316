"""Operators on quantized tensors, on random cases: a few hundred each time, and many on demand (random_cases.py)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, weight
from random_cases import KINDS, judge

from ao.dtypes import Float8, Intx
from ao.quant import compute_error

PART = 50
QUICK = range(0, 400, PART)
MANY = range(0, 100_000, 1000)


def judged(numbers: range) -> Counter[tuple[str, str]]:
    """How many cases of each kind held, were refused or were none; raises the first three that failed."""
    found: Counter[tuple[str, str]] = Counter()
    wrong = []
    for number in numbers:
        try:
            found[judge(number)] += 1
        except AssertionError as error:
            wrong.append(str(error))
            if len(wrong) == 3:
                break
    assert not wrong, "\n".join(wrong)
    return found


@pytest.mark.parametrize("start", QUICK)
def test_some(start):
    found = judged(range(start, start + PART))
    held = sum(n for (_, how), n in found.items() if how == "held")
    assert held > 0.6 * PART


@pytest.mark.slow
@pytest.mark.parametrize("start", MANY)
def test_many(start):
    found = judged(range(start, start + 1000))
    for kind in KINDS:
        assert found[kind.__name__, "held"] > 0


# What such cases found.

every = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize(
    "spec, compiled",
    [
        (Intx(8), False),
        (Intx(4, (1, 32)), False),
        (Float8(), False),
        (Intx(8, act=Intx(8)), False),
        (Intx(4, (1, 32)), True),
    ],
    ids=str,
)
def test_a_multiplier_belongs_to_the_input_or_to_the_output(spec, compiled):
    """To the output where the weight is turned, also where as many rows as the multiplier has numbers would hide the mistake."""
    n, k = 32, 64
    q = spec.quantize(weight((n, k)), pre_scale=weight((1, k), 1).abs() + 0.1)
    d = q.dequantize()
    least = 100 if spec.act is None else 28

    def products(x, y):
        return F.linear(x, q), y @ q, F.linear(x[0], q), y[0] @ q

    run = torch.compile(products, backend="aot_eager") if compiled else products
    for m in (3,) if compiled else (3, n, k):
        x, y = weight((m, k), 2), weight((m, n), 3)
        for expected, found in zip((x @ d.t(), y @ d, x[0] @ d.t(), y[0] @ d), run(x, y), strict=True):
            assert found.shape == expected.shape and compute_error(expected, found) > least


def test_an_int8_weight_that_is_turned():
    """ATen's product of a few tokens takes no columns for rows."""
    q = Intx(8, (-1, 1)).quantize(weight((64, 32), dtype=torch.bfloat16)).t()
    x = weight((2, 64), 1, torch.bfloat16)
    assert compute_error(x.float() @ q.dequantize().float().t(), F.linear(x, q)) > 40


@every
def test_no_elements(case):
    """A product of no numbers is 0, as of plain tensors."""
    q = case.spec.quantize(weight((0, 128))) if case.spec.grid((0, 128)) else None
    for x, w in ((weight((3, 128)), q), (weight((3, 0)), q.t())):
        expected = F.linear(x, w.dequantize())
        assert torch.equal(F.linear(x, w), expected) and torch.equal(F.linear(x.requires_grad_(), w), expected)


@every
def test_the_largest_numbers_of_float16(case):
    """They stay finite; infinities, and numbers that are far too large, do not become finite."""
    w = (30000 * weight()).clamp(-65504, 65504).half()
    q = case.spec.quantize(w)
    assert q.dequantize().isfinite().all() and case.spec.fake_quantize(w).isfinite().all()
    wide = case.spec.quantize(1e30 * weight())
    if wide.dequantize().isfinite().all():
        assert torch.equal(wide.half().dequantize(), wide.dequantize().half())
    w[0, 3] = torch.inf
    assert not case.spec.quantize(w).dequantize().isfinite().all()
