"""What comes out of a quantized layer, and out of one that trains in low precision, may be changed in place."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, is_random, weight
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ao.dtypes import NF4, Float8, Intx, Spec
from ao.train import PRECISIONS, convert_to_precision, convert_to_qlora

D = 128
SHAPES = [(16, D), (2, 8, D), (D,)]


def layer(spec: Spec, trained: bool = False) -> nn.Linear:
    made = nn.Linear(D, D, bias=False)
    made.weight = nn.Parameter(spec.quantize(weight((D, D))), requires_grad=trained)
    return made


def in_place(y: Tensor) -> Tensor:
    y += 1
    y[..., 0] = 0
    return torch.relu_(y)


def out_of_place(y: Tensor) -> Tensor:
    return torch.relu(torch.cat([torch.zeros_like(y[..., :1]), y[..., 1:] + 1], -1))


def step(model: nn.Module, x: Tensor, run) -> list[Tensor]:
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = run(model, x)
    out.backward(weight(tuple(out.shape), 3))
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def check(model: nn.Module, x: Tensor, wrap=lambda f: f) -> None:
    found = step(model, x, wrap(lambda m, x: in_place(m(x))))
    expected = step(model, x, lambda m, x: out_of_place(m(x)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def checkpointed(f):
    return lambda m, x: checkpoint(f, m, x, use_reentrant=False)


def compiled(f):
    return torch.compile(f, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_format(case):
    for shape in SHAPES:
        for trained in (False, True):
            check(layer(case.spec, trained), weight(shape, 1))


@pytest.mark.parametrize("spec", [Intx(8), NF4, Intx(8, act=Intx(8))], ids=str)
def test_checkpointed(spec):
    for shape in SHAPES:
        check(layer(spec), weight(shape, 1), checkpointed)


@pytest.mark.parametrize("spec", [Intx(8), Intx(8, act=Intx(8))], ids=str)
def test_compiled(spec):
    check(layer(spec), weight((2, 8, D), 1), compiled)
    check(layer(spec), weight((16, D), 1), lambda f: compiled(checkpointed(f)))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [Intx(4, (1, 32)), NF4, Float8(act=Float8())], ids=str)
def test_generated_code(spec):
    for shape in SHAPES[:2]:
        check(layer(spec), weight(shape, 1), lambda f: torch.compile(f, fullgraph=True))


def training(precision: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D, bias=False))
    model = convert_to_qlora(model, rank=4) if precision == "qlora" else convert_to_precision(model, precision)
    return model[0]


every_precision = pytest.mark.parametrize("precision", [*(p for p in PRECISIONS if not is_random(p)), "qlora"])


@every_precision
@pytest.mark.parametrize("wrap", [lambda f: f, checkpointed], ids=["", "checkpointed"])
def test_training(precision, wrap):
    for shape in [(128, D), (2, 64, D)]:
        check(training(precision), weight(shape, 1), wrap)


@pytest.mark.slow
@every_precision
@pytest.mark.parametrize("shape", [(128, D), (2, 64, D)], ids=str)
def test_training_compiled(precision, shape):
    check(training(precision), weight(shape, 1), compiled)


def test_trained_embedding():
    table = nn.Embedding(D, D)
    table.weight = nn.Parameter(Intx(8).quantize(weight((D, D))))
    plain = copy.deepcopy(table)
    ids = torch.tensor([[1, 2, 1], [0, 5, 9]])
    F.relu_(table(ids)).sum().backward()
    F.relu(plain(ids)).sum().backward()
    assert torch.equal(table.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("spec", [Intx(8), Float8()], ids=str)
def test_matmul(spec):
    q = spec.quantize(weight((D, D)))
    x = weight((2, 8, D), 1).requires_grad_()
    torch.relu_(x @ q.t()).sum().backward()
    y = x.detach().requires_grad_()
    torch.relu(y @ q.dequantize().t()).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
