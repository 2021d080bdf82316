"""Under torch.compile: the same bits as eager, one graph for all batches, no recompiles between equal layers."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import BYTES, CASES, SHAPE, SIXTEENTHS, weight
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import ao
from ao.dtypes import (
    MXFP4,
    MXFP6,
    NF4,
    Codebook,
    DynamicTree,
    Float8,
    FloatX,
    Intx,
    MXInt,
    QTensor,
    Shifted,
    Sparse24,
)
from ao.quant import compute_error

N, K = SHAPE
ALIKE = {
    Intx(8, (1, 32)),
    Intx(8, narrow=True),
    Intx(8, signed=False, symmetric=False),
    Intx(6, (32, 32)),
    Intx(5),
    Intx(4, (1, 128), signed=False),
    Intx(4, (1, 64), symmetric=True, clip=False),
    Intx(4, (1, 64), zero_point="float"),
    Intx(4, (1, 32), zero_point="float", scale_dtype="bfloat16"),
    Intx(4, (1, 32), signed=False, zero_point="joint"),
    Intx(3, (1, 64)),
    Intx(2, (1, 32), symmetric=True),
    Intx(2, (-1, -1), symmetric=True, narrow=True),
    Codebook(),
    Codebook(SIXTEENTHS, (1, 32)),
    Codebook(scale_spec=Codebook(BYTES, (1, -1), offset=True)),
    DynamicTree(4, True, (1, 32)),
    MXFP6,
    FloatX(2, 1, (1, 16), "float32", scale_spec=Float8(block=(-1, -1)), four_over_six=True),
    MXInt(scale_rule="rceil"),
    Shifted(4, (1, 32), scale_dtype="float16"),
    Shifted(6, (1, 16), symmetric=True, scale_spec=Intx(8, (1, 2), narrow=True, scale_dtype="float16")),
    Sparse24(prune=True),
}
"""Formats that others stand for where each is compiled, which takes seconds: of their class, with the same packing of bits and
the same kinds of scales and zero points, or with more of them, or with the better of two scales, each of which others have."""
every = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c.spec in ALIKE)) for c in CASES], ids=str
)


def kind(case) -> tuple[type, bool, bool, bool]:
    """Of how a compiler traces a format: its class, and whether codes are packed, scales are quantized, and activations."""
    spec = case.spec
    return type(spec), getattr(spec, "bits", 8) < 8, getattr(spec, "scale_spec", None) is not None, spec.act is not None


FIRST = {kind(c): c for c in reversed(CASES)}.values()
each_kind = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FIRST)) for c in CASES], ids=str
)
"""One format of each kind, where what the test is about does not depend on the numbers."""


def test_others_stand_for_what_is_slow():
    assert sum(c.spec in ALIKE for c in CASES) == len(ALIKE)


@every
def test_quantize_and_dequantize_bitwise(case, device):
    """One graph of both, which share no tensor, so that the loops of each are those that it has alone."""
    w = weight().to(device)
    eager = case.spec.quantize(w)
    q, values = torch.compile(lambda w, q: (case.spec.quantize(w), q.dequantize()), fullgraph=True)(w, eager)
    assert isinstance(q, QTensor) and torch.equal(q, eager)
    assert torch.equal(values, eager.dequantize())


@each_kind
def test_fake_quantize(case):
    w = weight().requires_grad_()
    out = torch.compile(case.spec.fake_quantize, fullgraph=True, backend="aot_eager")(w)
    assert torch.equal(out, case.spec.quantize(w.detach()).dequantize())
    out.backward(torch.full_like(out, 2.0))
    assert torch.equal(w.grad, torch.full_like(w, 2.0))


def linear(case, device="cpu"):
    layer = nn.Linear(K, N, device=device)
    layer.weight = nn.Parameter(case.spec.quantize(weight().to(device)), requires_grad=False)
    return layer


@each_kind
def test_one_graph_for_all_batches(case):
    counter = CompileCounterWithBackend("aot_eager")
    layer = linear(case)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 3, 7, 16, 17, 64):
            x = weight((batch, K), batch)
            assert compute_error(layer(x), compiled(x)) > 60
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[pytest.mark.slow] * (c.spec in (Intx(8), Float8(act=Float8()))))
        for c in CASES
        if c.spec in (Intx(8), Intx(4, (1, 32)), NF4, Intx(8, act=Intx(8)), Float8(act=Float8()))
    ],
    ids=str,
)
def test_linear_with_inductor(case, device):
    layer = linear(case, device)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for batch in (1, 2, 33):
            x = weight((batch, K), batch).to(device)
            assert compute_error(layer(x), compiled(x)) > 60
    x = weight((4, K), 1).to(device).requires_grad_()
    compiled(x).sum().backward()
    grad, x.grad = x.grad, None
    layer(x).sum().backward()
    assert compute_error(x.grad, grad) > 60


CHOSEN = [c for c in CASES if c.spec in (Intx(8), Intx(4, (1, 32)), NF4) or not c.weight_only]
chosen = pytest.mark.parametrize("case", CHOSEN, ids=str)


class Longer(nn.Module):
    """A layer on an input (batch, length, K) and on one that is longer: their rows are b * n and b * (n + 1)."""

    def __init__(self, case):
        super().__init__()
        self.layer = linear(case)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.layer(torch.cat([x[:, :1], x], 1))[:, 1:]


def test_batch_and_length_may_change():
    counter = CompileCounterWithBackend("inductor")
    model = Longer(CHOSEN[0])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for sizes in ((2, 9), (3, 17)):
            x = weight((*sizes, K), 1)
            assert compute_error(model(x), compiled(x)) > 60
    assert counter.frame_count == 1


@chosen
def test_sizes_that_are_unknown(case):
    """`mark_unbacked`: no condition on the number of tokens can be asked."""
    counter = CompileCounterWithBackend("aot_eager")
    layer = linear(case)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for sizes in ((2, 9), (3, 17), (1, 1)):
            x = weight((*sizes, K), 1)
            for d in (0, 1):
                torch._dynamo.decorators.mark_unbacked(x, d)
            assert compute_error(layer(x), compiled(x)) > 100
    assert counter.frame_count == 1


@pytest.mark.parametrize("spec", [Intx(8), Intx(4, (1, 32)), NF4, MXFP4], ids=str)
def test_a_quantized_layer_and_sizes_that_are_unknown(spec):
    """Also where the input has two dims, so that its elements are a multiple of one number."""
    layer = nn.Linear(64, 32)
    ao.quantize_(layer, spec)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = weight((5, 64), 1)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    with torch.no_grad():
        assert compute_error(layer(x), compiled(x)) > 100


def test_a_packed_weight_of_unknown_shape_is_viewed():
    q = Intx(4, (1, 32)).quantize(weight((64, 128)))
    flat = torch.compile(lambda q: q.reshape(-1).dequantize(), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(flat(q), q.dequantize().reshape(-1))


@chosen
def test_layers_of_torch_compiled_in_place(case):
    """Dynamo passes over the frames of torch.nn, before torch 2.14; it then takes no function of ours for a program, either."""
    _compiled_as(nn.Sequential(nn.Linear(K, N), nn.GELU()), nn.Sequential(linear(case), nn.GELU()), weight((4, K), 1))


@pytest.mark.parametrize("config", [ao.Int8WeightOnlyConfig(), NF4, Float8()], ids=str)
def test_layers_that_quantize_made_compiled_in_place(config):
    """Their forward is a function of ours."""
    for model, x in [
        (nn.Sequential(nn.Linear(64, 64), nn.GELU()), weight((4, 64), 1)),
        (nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64)), torch.arange(6).view(6, 1)),
        (nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval(), weight((4, 3, 64), 1)),
    ]:
        plain = copy.deepcopy(model)
        ao.quantize_(model, config, filter_fn=lambda m, name: isinstance(m, (nn.Linear, nn.Embedding)))
        _compiled_as(plain, model, x)


def test_a_whole_layer_in_one_graph():
    """PyTorch has one operator for it, without gradients; in eager mode it takes none where a weight is a subclass."""
    layer, x = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval(), weight((4, 3, 64), 1)
    ao.quantize_(layer, Intx(4, (1, 32)))
    with torch.no_grad():
        expected = layer(x)
        assert compute_error(expected, torch.compile(layer, backend="aot_eager", fullgraph=True)(x)) > 100


def _compiled_as(plain, model, x):
    """In as many graphs as a plain model, with no breaks, and with the results of eager mode."""
    graphs, outs = [], []
    with torch.no_grad():
        expected = [model(x[:n]) for n in (len(x), 3, 1)]
        for each in (plain, model):
            torch._dynamo.reset()
            counters.clear()
            each.compile(backend="eager")
            outs = [each(x[:n]) for n in (len(x), 3, 1)]
            assert not counters["graph_break"]
            graphs.append(counters["stats"]["unique_graphs"])
    assert all(compute_error(a, b) > 100 for a, b in zip(expected, outs)) and graphs[0] == graphs[1]


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning"
)
@every
def test_jit_trace(case):
    layer = linear(case)
    with torch.no_grad():
        traced = torch.jit.trace(layer, weight((1, K), 1))
        x = weight((7, K), 2)
        assert compute_error(layer(x), traced(x)) > 60


@each_kind
def test_equal_layers_share_a_graph(case):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, layer.weight)

    with torch.no_grad():
        for _ in range(4):
            forward(linear(case), weight((4, K), 1))
    assert counter.frame_count == 1


@each_kind
def test_structural_ops_in_graph(case):
    def joined(q: QTensor, x: torch.Tensor) -> torch.Tensor:
        top, bottom = q.chunk(2)
        return F.linear(x, torch.cat([bottom, top]))

    q, x = case.spec.quantize(weight()), weight((4, K), 1)
    # A CPU decodes with other instructions in a graph, which round the last bit differently.
    assert compute_error(joined(q, x), torch.compile(joined, fullgraph=True, backend="aot_eager")(q, x)) > 100


@each_kind
def test_update_in_place(case):
    """An optimizer's step: dequantize, arithmetic, copy_, in one graph and in place."""

    def step(q: QTensor, g: torch.Tensor) -> None:
        q.copy_(q.dequantize() * 0.5 + g)

    a, b = case.spec.quantize(weight()), case.spec.quantize(weight())
    pointer = a.data_ptr()
    torch.compile(step, fullgraph=True, backend="aot_eager")(a, weight(seed=1))
    step(b, weight(seed=1))
    assert torch.equal(a, b) and a.data_ptr() == pointer


@each_kind
def test_export(case):
    exported = torch.export.export(linear(case), (weight((4, K), 1),))
    x = weight((4, K), 2)
    assert compute_error(linear_bias_like(exported, case)(x), exported.module()(x)) > 60


class Selected(nn.Module):
    """A layer of the tokens whose first number is positive."""

    def __init__(self, case):
        super().__init__()
        self.layer = linear(case)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[(x[:, 0] > 0).nonzero()[:, 0]])


@chosen
def test_export_where_the_number_of_tokens_depends_on_data(case):
    model = Selected(case).eval()
    with torch.no_grad():
        exported = torch.export.export(
            model, (weight((8, K), 1),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        ).module()
        for tokens in (3, 9):
            x = weight((tokens, K), tokens)
            assert compute_error(model(x), exported(x)) > 100


def linear_bias_like(exported, case):
    layer = linear(case)
    layer.bias = nn.Parameter(exported.state_dict["bias"])
    return layer


def test_no_trap_of_inductor():
    """Nothing rewrites a product of many tokens to `_weight_int8pack_mm`."""
    from torch._inductor.utils import run_and_get_code

    for spec in (Intx(8), Intx(4, (1, 32)), Intx(3, (1, 64))):
        q = spec.quantize(weight((512, 512), dtype=torch.bfloat16))
        for lead in ((1,), (2, 8)):
            x = weight((*lead, 512), 1, torch.bfloat16)
            with torch.no_grad():
                _, codes = run_and_get_code(torch.compile(F.linear, fullgraph=True), x, q)
            # ATen's int8 product reads the weight once per token: for one token it is fast.
            assert lead == (1,) or "_weight_int8pack_mm" not in "".join(codes)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from ao.dtypes import Intx
q = Intx(8).quantize(torch.ones(16, 32))
print(torch.compile(lambda q: q.dequantize(), fullgraph=True)(q)[0, 0].item())
"""


def test_editing_a_dtype_recompiles(tmp_path):
    """Two processes, one compile cache, an edit of `decode` in between: the second must not run the old kernel."""
    import shutil

    root = Path(__file__).parent.parent
    shutil.copytree(root / "ao", tmp_path / "ao", ignore=shutil.ignore_patterns("__pycache__"))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}

    def run() -> float:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        out = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
        return float(out.stdout)

    first = run()
    assert first == pytest.approx(1, abs=0.01)
    path = tmp_path / "ao" / "dtypes" / "intx.py"
    source = path.read_text()
    edited = source.replace("return q * in_blocks(scale.float())", "return q * in_blocks(2 * scale.float())")
    assert edited != source
    path.write_text(edited)
    assert run() == pytest.approx(2 * first)
