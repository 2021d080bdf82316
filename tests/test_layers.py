"""Layers with a quantized weight: what they are to the user, what a graph gets of them, and how short the way is."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import ao
from ao.dtypes import QTensor
from ao.matmul import layer_class

CONFIGS = {
    "int8": ao.Int8WeightOnlyConfig(),
    "int4": ao.Int4WeightOnlyConfig(group_size=32),
    "nf4": ao.NF4,
    "8da4w": ao.Int8DynamicActivationInt4WeightConfig(),
}


def model(config, bias=True):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 128, bias), nn.ReLU(), nn.Linear(128, 32, bias)).eval()
    ao.quantize_(made, config)
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_is_what_it_was(name):
    made = model(CONFIGS[name])
    layer = made[0]
    assert isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear"
    assert repr(layer).startswith("Linear(")
    assert isinstance(layer.weight, QTensor) and isinstance(layer.weight, nn.Parameter)
    x = torch.randn(3, 64)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), again):
        assert type(other[0]) is type(layer)
        assert torch.equal(other(x), made(x))
        assert other[0].weight.qdata.data_ptr() != layer.weight.qdata.data_ptr()
    ao.dequantize_(made)
    assert type(made[0]) is nn.Linear


class Turned(nn.Linear):
    """A layer of somebody else, whose class libraries may ask for."""

    def forward(self, x):
        return x @ self.weight.t()


class Said(nn.Embedding):
    """A layer that prints what it likes, as transformers' Conv1D does."""

    def __repr__(self):
        return f"Said(n={self.num_embeddings})"


def test_a_class_that_prints_what_it_likes_says_its_format():
    model = nn.Sequential(Said(64, 64), nn.Linear(64, 64))
    ao.quantize_(model, ao.FqnToConfig({"0": "nf4", "1": "nf4"}))
    assert "(0): Said(n=64, weight=NF4)" in str(model) and str(model).count("NF4") == 2


def test_a_class_of_somebody_else_says_its_format():
    """It stays of its class, and prints its format, also as a copy; not once it is plain again."""
    model = nn.Sequential(Turned(64, 64, bias=False))
    ao.quantize_(model, "nf4")
    assert type(model[0]) is Turned and "weight=NF4)" in str(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert str(other) == str(model) and other[0].extra_repr.args[0] is other[0]
    ao.dequantize_(model)
    assert str(model) == str(nn.Sequential(Turned(64, 64, bias=False)))


def test_another_weight_in_its_place():
    made = model(CONFIGS["int8"])
    x = torch.randn(3, 64)
    made[0].weight = nn.Parameter(torch.randn(128, 64))
    torch.testing.assert_close(made[0](x), nn.functional.linear(x, made[0].weight, made[0].bias))
    assert type(pickle.loads(pickle.dumps(made))[0]) is type(made[0])


def replaced(layer, other):
    layer.weight = nn.Parameter(other, requires_grad=False)


def replaced_below(layer, other):
    layer._parameters["weight"] = nn.Parameter(other, requires_grad=False)


def given_data(layer, other):
    layer.weight.data = other


def written(layer, other):
    layer.weight.copy_(other.dequantize())


def loaded(layer, other, assign=False):
    layer.load_state_dict({"weight": other}, assign=assign)


def assigned(layer, other):
    loaded(layer, other, assign=True)


def swapped(layer, other):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        loaded(layer, other)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("change", [replaced, replaced_below, given_data, written, loaded, assigned, swapped])
def test_a_graph_reads_the_weight_that_is_there(change):
    """Without being made anew, whatever way another weight of the same form came there."""
    layer = model(CONFIGS["int4"], bias=False)[0]
    graphs = []
    call = torch.compile(layer, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    x = torch.randn(4, 64)
    for seed in range(4):
        torch.manual_seed(seed)
        change(layer, layer.weight.spec.quantize(torch.randn(128, 64)))
        with torch.no_grad():
            assert torch.equal(call(x), layer(x))
    assert len(graphs) == 1


def test_a_graph_with_a_functional_call_reads_what_it_was_given():
    layer = model(CONFIGS["int4"])[0]
    call = torch.compile(lambda w, x: torch.func.functional_call(layer, {"weight": w}, x), backend="eager")
    x = torch.randn(4, 64)
    for _ in range(2):
        other = nn.Parameter(layer.weight.spec.quantize(torch.randn(128, 64)), requires_grad=False)
        with torch.no_grad():
            torch.testing.assert_close(call(other, x), nn.functional.linear(x, other, layer.bias))


def test_what_a_layer_keeps_for_graphs_is_not_copied():
    layer = model(CONFIGS["int4"])[0]
    size = len(pickle.dumps(layer))
    torch.compile(layer, backend="eager")(torch.randn(4, 64))
    assert layer.in_graph["weight"]["qdata"] is layer.weight.qdata
    assert len(pickle.dumps(layer)) < size + 1000 and "in_graph" not in copy.deepcopy(layer).__dict__


class Experts(nn.Module):
    """As transformers has them: gathered experts for a batched product, and all of them for a grouped one."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 64, 64)), nn.Parameter(torch.randn(4, 32, 64))

    def forward(self, x):
        ids = x[:, 0].argsort() % 4
        y = torch.bmm(self.up[ids], x.unsqueeze(-1)).squeeze(-1)
        return sum(nn.functional.linear(y, self.down[i]) for i in range(4))


def conv1d():
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(32, 64)


MODULES = {
    "embedding": lambda: nn.Embedding(16, 64, padding_idx=1),
    "conv1d": conv1d,
    "experts": Experts,
    "convolution": lambda: nn.Conv1d(64, 32, 1),
    "bag": lambda: nn.EmbeddingBag(16, 64),
}


def other_module(kind, config=CONFIGS["int8"]):
    """A module that is not `nn.Linear`, quantized, and an input of it."""
    torch.manual_seed(0)
    made = MODULES[kind]().requires_grad_(False)
    ao.quantize_(made, config, filter_fn=lambda module, name: True)
    assert any(isinstance(p, QTensor) for p in made.parameters())
    ids = kind in ("embedding", "bag")
    return made, torch.tensor([[1, 3], [5, 1]]) if ids else torch.randn(3, 64, 1 if kind == "convolution" else 64)[
        ..., 0
    ]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_graphs_get_plain_fields_of_other_modules(kind, grad):
    """Embeddings, convolutions and experts: no subclass among the inputs, and the numbers of eager mode."""
    made, x = other_module(kind)
    x = x.unsqueeze(-1) if kind == "convolution" else x
    seen = []

    def backend(graph, inputs):
        seen.append([type(t) for t in inputs])
        return aot_eager(graph, inputs)

    if x.is_floating_point():
        x.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out, expected = torch.compile(made, backend=backend, fullgraph=True)(x), made(x)
    assert len(seen) == 1 and not any(issubclass(t, QTensor) for t in seen[0])
    torch.testing.assert_close(out, expected)
    if x.requires_grad:
        found, wanted = (torch.autograd.grad(y.sum(), x)[0] for y in (out, expected))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", MODULES)
def test_other_modules_are_what_they_were(kind):
    made, _ = other_module(kind)
    own = layer_class(made)
    assert isinstance(made, own) and type(made).__name__ == own.__name__ and type(made) is not own
    names = list(made.state_dict())
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(other) is type(made) and list(other.state_dict()) == names
        assert all(torch.equal(p, q) for p, q in zip(made.parameters(), other.parameters()))
    name = next(n for n, p in made.named_parameters() if isinstance(p, QTensor))
    plain = nn.Parameter(torch.zeros(getattr(made, name).shape))
    for value in (plain, plain.detach()):  # the latter as weight norm does
        delattr(made, name)
        assert not hasattr(made, name)
        setattr(made, name, value)
        assert getattr(made, name) is value
    assert type(ao.dequantize_(other)) is own


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv1d"])
def test_a_trained_weight_gets_its_gradient_from_a_graph(kind):
    made, x = (model(CONFIGS["int8"])[0], torch.randn(3, 64)) if kind == "linear" else other_module(kind)
    made.weight.requires_grad_()
    grads = []
    for run in (made, torch.compile(made, backend="aot_eager")):
        made.weight.grad = None
        run(x).square().sum().backward()
        grads.append(made.weight.grad)
    torch.testing.assert_close(*grads)


def test_a_class_of_the_user_keeps_its_forward():
    class Mine(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Mine(64, 32)
    x = torch.randn(3, 64)
    ao.quantize_(layer, CONFIGS["int8"])
    assert type(layer) is Mine
    torch.testing.assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight.dequantize(), layer.bias))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_get_plain_fields(name, grad):
    """No subclass among the inputs, one graph, and the numbers of eager mode; gradients too."""
    made = model(CONFIGS[name])
    seen = []

    def backend(graph, inputs):
        seen.append([type(t) for t in inputs])
        return graph

    x = torch.randn(3, 64, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        out = torch.compile(made, backend=backend, fullgraph=True)(x)
        expected = made(x)
    assert len(seen) == 1 and not any(issubclass(t, QTensor) for t in seen[0])
    torch.testing.assert_close(out, expected)
    if grad:
        (found,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), x)[0])


def test_a_graph_is_made_anew_for_another_format():
    """Two formats whose fields look alike: what was compiled for one does not serve the other."""
    made = nn.Sequential(nn.Linear(64, 32, bias=False)).eval()
    values = torch.randn(32, 64)
    specs = [ao.Intx(4, (1, 32), symmetric=True), ao.Intx(4, (1, 32), signed=False, symmetric=True)]
    ao.quantize_(made, specs[0])
    fast = torch.compile(made, backend="aot_eager")
    x = torch.randn(3, 64)
    with torch.no_grad():
        for spec in specs:
            made[0].weight = nn.Parameter(spec.quantize(values), requires_grad=False)
            torch.testing.assert_close(fast(x), made(x))


def entered(call):
    """The functions of ao that a call enters, without lambdas, and the files that they are in."""
    root = os.path.dirname(ao.__file__)
    found = Counter()

    def profile(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root) and "<" not in code.co_name:
            found[code.co_filename, code.co_name] += 1

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_the_way_to_the_product_is_short():
    """Eager calls after the first. These numbers may only fall."""
    most = {"int8": (6, 5), "int4": (9, 5)}
    for name, (functions, files) in most.items():
        layer = model(CONFIGS[name])[0].bfloat16()
        x = torch.randn(1, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            layer(x)
            found = entered(lambda layer=layer, x=x: layer(x))
        assert (len(found), len({file for file, _ in found})) <= (functions, files), sorted(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_moved_while_something_refers_to_the_weight(name):
    """PyTorch exchanges a tensor subclass for another, which a weak reference forbids; fields can always be exchanged."""
    made = model(CONFIGS[name])
    x = torch.randn(3, 64, requires_grad=True)
    before, out = [layer.weight for layer in made if isinstance(layer, nn.Linear)], made(x)
    references = [weakref.ref(w) for w in before]
    torch.export.export(made, (x,))
    made.half()
    assert all(made[i].weight is reference() for i, reference in zip((0, 2), references))
    assert {p.dtype for p in made.parameters()} == {torch.float16}
    assert made(x.half()).dtype == torch.float16 and out.grad_fn is not None
    made.to("meta")
    assert all(p.is_meta for p in made.parameters()) and made[0].weight.qdata.is_meta


def test_tied_layers_move_together():
    first, second = model(CONFIGS["int8"])[0], nn.Linear(64, 128)
    second.weight = first.weight
    pair = nn.ModuleList([first, second]).to("meta")
    assert pair[0].weight is pair[1].weight and pair[0].weight.qdata.is_meta
