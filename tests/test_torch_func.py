"""torch.func over quantized weights and low-precision training: every transform gives what it gives for a plain layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, is_random, weight
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from ao.dtypes import NF4, Float8, Intx, QTensor, Spec
from ao.quant import compute_error
from ao.train import PRECISIONS, convert_to_precision

D = 128
# PyTorch's own derivatives of tanh and the like in forward mode are scripted.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


class Adapted(nn.Module):
    """A frozen layer with an adapter beside it."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.base = nn.Linear(D, D)
        self.base.weight = nn.Parameter(w, requires_grad=False)
        self.base.bias.requires_grad_(False)
        self.a, self.b = nn.Linear(D, 4, bias=False), nn.Linear(4, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x)) + self.b(self.a(x))


def both(spec: Spec) -> tuple[Adapted, Adapted]:
    q = spec.quantize(weight((D, D)))
    quantized = Adapted(q)
    plain = copy.deepcopy(quantized)
    plain.base.weight = nn.Parameter(q.dequantize(), requires_grad=False)
    return quantized, plain


def check(found: Any, expected: Any, least: float = 90) -> None:
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.shape == b.shape and not isinstance(a, QTensor)
        assert compute_error(b, a) > least, compute_error(b, a)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def of_parameters(model: nn.Module, p: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, p, (x,)).square().sum()


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda m, x: grad(lambda x: loss(m, x))(x),
    "grad_and_value": lambda m, x: grad_and_value(lambda x: loss(m, x))(x),
    "vjp": lambda m, x: vjp(m, x)[1](weight((4, D), 5)),
    "jvp": lambda m, x: jvp(m, (x,), (weight((4, D), 5),)),
    "jacrev": lambda m, x: jacrev(m)(x[0]),
    "jacfwd": lambda m, x: jacfwd(m)(x[0]),
    "hessian": lambda m, x: hessian(lambda x: loss(m, x))(x[0]),
    "vmap": lambda m, x: vmap(m)(x),
    "vmap along the second dim": lambda m, x: vmap(m, in_dims=1, out_dims=1)(x.reshape(2, 2, D)),
    "vmap twice": lambda m, x: vmap(vmap(m))(x.reshape(2, 2, D)),
    "vmap of grad": lambda m, x: vmap(grad(lambda x: loss(m, x)))(x),
    "grad of vmap": lambda m, x: grad(lambda x: vmap(m)(x).square().sum())(x),
    "grad of grad": lambda m, x: grad(lambda x: grad(lambda x: loss(m, x))(x).square().sum())(x),
    "adapters": lambda m, x: grad(lambda p: of_parameters(m, p, x))(adapters(m)),
    "per-sample gradients": lambda m, x: vmap(grad(lambda p, x: of_parameters(m, p, x)), (None, 0))(adapters(m), x),
    "jacobian by autograd": lambda m, x: torch.autograd.functional.jacobian(m, x[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("spec", [Intx(8), Intx(4, (1, 32), signed=False), Float8(), NF4], ids=str)
def test_transforms(spec, name):
    quantized, plain = both(spec)
    x = weight((4, D), 1)
    check(TRANSFORMS[name](quantized, x), TRANSFORMS[name](plain, x))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_format(case):
    """Also those that quantize the input: its gradient passes straight through, and each sample has its own scale."""
    model = nn.Linear(D, D)
    model.weight = nn.Parameter(case.spec.quantize(weight((D, D))), requires_grad=False)
    x, g = weight((4, 3, D), 1).requires_grad_(), weight((4, 3, D), 2)
    out = model(x)
    out.backward(g)
    x, expected = x.detach(), x.grad
    check(vmap(model)(x), torch.stack([model(sample) for sample in x]))
    check(vjp(model, x)[1](g), (expected,))
    check(vmap(lambda x, g: vjp(model, x)[1](g))(x, g), (expected,))
    primal, tangent = jvp(model, (x,), (g,))
    check(primal, out.detach())
    check((tangent * g).sum(), (expected * g).sum())


def test_samples_have_scales_of_their_own():
    """Where an activation has one scale for all of it."""
    model = nn.Linear(D, D, bias=False)
    model.weight = nn.Parameter(Intx(8, act=Intx(8, (-1, -1))).quantize(weight((D, D))), requires_grad=False)
    x = weight((3, 2, D), 1) * torch.tensor([0.01, 1, 100]).view(3, 1, 1)
    assert torch.equal(vmap(model)(x), torch.stack([model(sample) for sample in x]))
    assert not torch.equal(vmap(model)(x), model(x))


def test_embedding():
    table = nn.Embedding(D, D)
    table.weight = nn.Parameter(Intx(8).quantize(weight((D, D))), requires_grad=False)
    ids = torch.arange(12).reshape(4, 3)
    assert torch.equal(vmap(table, 1)(ids), table(ids.t()))
    p = {"weight": weight((D, D), 1)}
    assert grad(lambda p: functional_call(table, p, (ids,)).sum())(p)["weight"].sum() == 12 * D


def test_quantized_parameters():
    """The gradient of a quantized weight is a plain tensor, as it is in training."""
    model = nn.Linear(D, D)
    model.weight = nn.Parameter(Intx(8).quantize(weight((D, D))))
    x = weight((4, D), 1)
    loss(model, x).backward()
    found = grad(lambda p: of_parameters(model, p, x))({name: p.detach() for name, p in model.named_parameters()})
    check(found, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if not is_random(p)])
def test_training(precision):
    """Gradients of parameters and inputs, of a batch and of each sample, as by backward."""
    torch.manual_seed(0)
    model = convert_to_precision(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)), precision)
    x = weight((2, 128, D), 1) * torch.tensor([1, 10]).view(2, 1, 1)

    def by_backward(x):
        x = x.clone().requires_grad_()
        model.zero_grad()
        loss(model, x).backward()
        return {name: p.grad for name, p in model.named_parameters()}, x.grad

    p = {name: p.detach() for name, p in model.named_parameters()}
    both = grad(lambda p, x: of_parameters(model, p, x), (0, 1))
    check(both(p, x[0]), by_backward(x[0]))
    samples = [by_backward(sample) for sample in x]
    check(vmap(both, (None, 0))(p, x), tree_map(lambda *each: torch.stack(each), *samples))
    check(vjp(model, x[0])[1](weight((128, D), 2)), grad(lambda x: (model(x) * weight((128, D), 2)).sum())(x[0]))


def test_no_second_derivative_in_low_precision():
    model = convert_to_precision(nn.Sequential(nn.Linear(D, D)), "float8-rowwise")
    x = weight((16, D)).requires_grad_()
    (first,) = torch.autograd.grad(loss(model, x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="convert_from_low_precision_training"):
        first.square().sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it
@pytest.mark.parametrize("precision", ["int8-mixed", "quantized"])
def test_compiled(precision):
    """A compiled transform, and a transform of a compiled model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    if precision == "quantized":
        model[0].weight = nn.Parameter(Intx(8, act=Intx(8)).quantize(weight((D, D))), requires_grad=False)
    else:
        convert_to_precision(model, precision)
    x = weight((16, D), 1)
    expected = grad(lambda x: loss(model, x))(x)
    assert expected.abs().max() > 0
    check(torch.compile(grad(lambda x: loss(model, x)), backend="aot_eager")(x), expected)
    compiled = torch.compile(model, backend="aot_eager")
    check(grad(lambda x: loss(compiled, x))(x), expected)


def test_forward_mode_inside_and_around_vmap():
    quantized, plain = both(Intx(8))
    x, t = weight((4, D), 1), weight((4, D), 2)
    for f in (lambda m: jvp(vmap(m), (x,), (t,)), lambda m: vmap(lambda x, t: jvp(m, (x,), (t,)))(x, t)):
        check(f(quantized), f(plain))
