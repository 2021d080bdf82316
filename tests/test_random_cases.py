"""Operators on quantized tensors, on random cases: a few hundred each time, and many on demand (random_cases.py)."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, weight
from random_cases import KINDS, judge

import ao
from ao.dtypes import NF4, NVFP4, DynamicTree, Float8, Intx, Shifted
from ao.dtypes.lattice import lattice
from ao.dtypes.permuted import Permuted
from ao.matmul.integers import integer_product
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


def test_numbers_of_float64_keep_their_range():
    """Also where a multiplier is the output's, and where a large weight is decoded in pieces."""
    spec = Intx(4, (1, 32))
    scaled = spec.quantize(1e20 * weight((32, 64)), pre_scale=weight((1, 64), 1).abs() + 0.1)
    for w in (scaled, scaled.t(), spec.quantize(1e20 * weight((2048, 512)))):
        x = 1e60 * weight((3, w.shape[1]), 2).double()
        expected, found = x @ w.dequantize().double().t(), F.linear(x, w)
        assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    "act",
    [Intx(8), Intx(8, symmetric=False), Intx(8, (-1, -1)), Float8(), Float8(block=(-1, -1)), Intx(8, (1, 32)), NVFP4],
    ids=str,
)
def test_activations_of_float64_keep_their_range(act):
    """A power of two goes through, bit for bit, also one that float32 does not hold, as do the gradients of training."""
    q = dataclasses.replace(Intx(8) if act != NVFP4 else NVFP4, act=act).quantize(weight((32, 64)))
    x = weight((5, 64), 1).double()
    for power in (2.0**200, 2.0**-200, 2.0**900):
        assert torch.equal(F.linear(power * x, q), power * F.linear(x, q))
        found = torch.compile(F.linear, backend="aot_eager")(power * x.view(5, 1, 64), q)
        assert compute_error(F.linear(x, q), found.view(5, 32) / power) > 100
        assert torch.equal(act.fake_quantize(power * x), power * act.fake_quantize(x))
    if act.block[0] == 1 and act != NVFP4:
        x[1] *= 2.0**200
        assert compute_error(x[2:] @ q.dequantize().double().t(), F.linear(x, q)[2:]) > 15
    x[0, 0] = torch.nan
    assert F.linear(x, q)[0].isnan().all()


@pytest.mark.parametrize("act", [None, Intx(8), Intx(8, symmetric=False), Float8()], ids=str)
def test_a_weight_of_one_column(act):
    """PyTorch's product of integers reads memory that is not its own there."""
    for dtype in (torch.float32, torch.bfloat16):
        q = Intx(8, act=act).quantize(weight((33, 1), dtype=dtype))
        for m in (1, 3, 40):
            x = weight((m, 1), 1, dtype)
            expected = x.float() @ q.dequantize().float().t()
            traced = [torch.compile(F.linear, backend="aot_eager")] if m == 3 and dtype == torch.bfloat16 else []
            for product in (F.linear, *traced):
                assert compute_error(expected, product(x, q).float()) > 25
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((33, 1), (1, 17)))
    assert torch.equal(integer_product(a, b.t()).int(), a.int() @ b.int())


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


def test_a_transform_over_a_layer_of_one_output():
    """Below autograd the strides tell forward from backward, which quantizes no gradient, also where a dim has one element."""
    for spec in (Intx(8, act=Intx(8)), Float8(act=Float8()), Intx(4, (1, 32), act=Intx(8))):
        for shape in ((1, 64), (2, 64), (64, 32)):
            q, x, g = spec.quantize(weight(shape)), weight((3, shape[1]), 1), weight((3, shape[0]), 2)
            found = torch.func.grad(lambda x, q=q, g=g: (torch.matmul(x, other=q.mT) * g).sum())(x)
            assert compute_error(g @ q.dequantize(), found) > 100
            half = torch.func.grad(lambda x, q=q: (x @ q.t()).sum())(x.half())
            assert half.dtype == torch.float16 and compute_error(q.dequantize().sum(0).expand(3, -1), half) > 50


@every
def test_a_view_that_is_turned_is_written(case):
    """Also where the blocks of scales that are quantized themselves are no squares."""
    for shape in ((128, 256), (32, 512)):
        q = case.spec.quantize(weight(shape))
        expected = q.dequantize()
        q.mT.mul_(2)
        assert torch.equal(q.dequantize(), case.spec.quantize(2 * expected).dequantize())


def test_models_side_by_side():
    """torch.func.stack_module_state and vmap over it, also where activations are quantized."""
    for case in CASES:
        models = [torch.nn.Sequential(torch.nn.Linear(256, 128)) for _ in range(2)]
        for seed, model in enumerate(models):
            model[0].weight = torch.nn.Parameter(
                case.spec.quantize((1 + seed) * weight(seed=seed)), requires_grad=False
            )
        x = weight((4, 256), 3)
        stacked, _ = torch.func.stack_module_state(models)
        run = torch.func.vmap(lambda p, model=models[0], x=x: torch.func.functional_call(model, p, (x,)))
        assert compute_error(torch.stack([model(x) for model in models]), run(stacked)) > 60


def test_weights_with_static_activations_are_joined_only_where_they_agree():
    spec = Intx(8, act=Intx(8))
    one, other = (spec.quantize(weight(), act_scale=torch.tensor(s)) for s in (0.01, 0.02))
    assert torch.equal(torch.cat([one, one.clone()]).act_scale, one.act_scale)
    with pytest.raises(NotImplementedError, match="field act_scale is one for the whole tensor"):
        torch.cat([one, other])


@pytest.mark.parametrize("inner", [Intx(4, (1, 32)), Intx(8), Shifted(5, (1, 32))], ids=str)
def test_a_weight_in_another_order(inner):
    """Its transpose multiplies as any, and what is written keeps the order, and unchanged numbers their bits."""
    spec, order = Permuted(inner), torch.randperm(64)
    w = weight((96, 64))
    fields = {"qdata": inner.quantize(w[:, order]), "order": order.int()}
    q = spec.wrap(fields, torch.float32, w.shape)
    d, x, y = q.dequantize(), weight((3, 64), 1), weight((3, 96), 2)
    assert compute_error(w, d) > 15 and torch.equal(q.t().dequantize(), d.t()) and torch.equal(q.t().t(), q)
    for expected, found in (
        (x @ d.t(), x @ q.t()),
        (y @ d, y @ q),
        (d @ x.t(), q @ x.t()),
        (x @ d.t(), F.linear(x, q)),
    ):
        assert compute_error(expected, found) > 100
    assert torch.equal(q.permute(1, 0).dequantize(), d.t()) and torch.equal(q.transpose(0, 0).dequantize(), d)
    before = copy.deepcopy(q)
    q.copy_(d).mul_(1)
    assert torch.equal(q, before)
    q.t().mul_(2)
    assert torch.equal(q.order, before.order) and compute_error(2 * d, q.dequantize()) > 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(q)], lr=0.5)
    optimizer.param_groups[0]["params"][0].grad = q.dequantize()
    optimizer.step()
    assert compute_error(d, q.dequantize()) > 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [Intx(4, (1, 32)), DynamicTree(4, True, (1, -1)), NF4], ids=str)
def test_numbers_written_back_in_another_order(inner, dtype):
    """Rounded to the dtype of the tensor they still are its numbers, which stay bit for bit."""
    q = Permuted(inner).quantize(weight((96, 64), dtype=dtype))
    before = q.decode_scaled()
    q.copy_(q.dequantize())
    assert torch.equal(q.decode_scaled(), before)


@pytest.mark.parametrize("inner", [Intx(4, (1, 32)), Float8()], ids=str)
def test_experts_in_another_order(inner):
    """The order goes where the columns go, among the last two dims; a dim of experts is exchanged with rows."""
    spec, order, w = Permuted(inner), torch.randperm(64), weight((3, 16, 64))
    q = spec.wrap({"qdata": inner.quantize(w[..., order]), "order": order.int()}, torch.float32, w.shape)
    d = q.dequantize()
    assert compute_error(w, d) > 15 and torch.equal(q.mT.dequantize(), d.mT) and torch.equal(q.mT.mT.dequantize(), d)
    assert torch.equal(q.transpose(0, 1).dequantize(), d.transpose(0, 1))
    assert torch.equal(q.mT.transpose(0, 2).dequantize(), d.mT.transpose(0, 2))
    x, y = weight((3, 5, 64), 1), weight((3, 5, 16), 2)
    assert compute_error(x @ d.mT, torch.bmm(x, q.mT)) > 100 and compute_error(y @ d, torch.bmm(y, q)) > 100
    with pytest.raises(NotImplementedError, match="stored in another order and stay in one of the last two dims"):
        q.transpose(0, 2)


def test_a_vector_is_written_where_it_changes():
    """Blocks that are as they were stay, and what all share, such as the table of a codebook, is no block."""
    for case in CASES:
        spec = case.spec
        try:
            q = spec.quantize(weight((512,)))
        except ValueError:
            continue
        values = q.dequantize()
        values[:256] *= 2
        q.copy_(values)
        if 256 % lattice(q, 0).whole == 0:
            assert torch.equal(q.dequantize()[256:], values[256:])


def test_a_corrected_bias_is_finite():
    model = torch.nn.Sequential(torch.nn.Linear(64, 16, dtype=torch.float16))
    model[0].weight.data.mul_(200000)
    report = ao.quantize_(
        model,
        ao.Int4WeightOnlyConfig(group_size=32, algorithm="bias_correction"),
        calibration_data=[torch.full((8, 64), 60000.0, dtype=torch.float16)],
    )
    assert model[0].bias.isfinite().all() and "its bias is not corrected: it would be beyond the range" in str(
        report.notes
    )
