"""Products of int8 weights on the integer units of a CPU, and what any quantized layer is in a graph there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch._dynamo.backends.common import aot_autograd

import ao
from ao.dtypes import NF4, Float8, FloatX, Intx, Ternary, cpp
from ao.matmul import cpu, cpu_int8, linear, made, path_name
from ao.matmul.kernels import cpu_integers, device
from ao.matmul.kernels.device import TILES

pytestmark = pytest.mark.skipif(cpp.cpp_compiler() is None, reason="needs a C++ compiler")

DYNAMIC = Intx(8, act=Intx(8))
SPECS = [
    Intx(8),
    Intx(8, (-1, -1)),
    Intx(8, scale_dtype="bfloat16"),
    DYNAMIC,
    Intx(8, (-1, -1), act=Intx(8, (-1, -1))),
    Intx(8, act=Intx(8, symmetric=False)),
]


@pytest.fixture(autouse=True)
def _units(monkeypatch):
    """Small weights are worth it; PyTorch's product of integers is right on any CPU, and fast on one with units."""
    monkeypatch.setattr(cpu_int8, "WORTH", 0)
    monkeypatch.setattr(made, "WORTH", 0)
    monkeypatch.setattr(cpu, "VNNI", True)
    monkeypatch.setattr(made, "VNNI", True)
    monkeypatch.setattr(linear, "_CHOICES", {})


def activation(tokens: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """With a token of zeros, a tiny and a large one, one with NaN, and one that is never negative."""
    x = weight((tokens, k), 1) * 3
    for row, change in enumerate((lambda t: t * 0, lambda t: t * 1e-30, lambda t: t * 1e4, torch.Tensor.abs)):
        x[row % tokens] = change(x[row % tokens])
    x[4 % tokens, 3] = float("nan") if tokens > 4 else 1.0
    return x.to(dtype)


@pytest.mark.parametrize("shape", [(70, 96), (64, 75), (5, 33)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_bits_of_the_expressions(spec, shape):
    q = spec.quantize(weight(shape))
    expression = cpu.split if spec.act is None else cpu.int_mm
    for tokens in (9, 16, 37):
        for dtype in (torch.bfloat16, torch.float16) + (torch.float32,) * (spec.act is not None):
            x = activation(tokens, shape[1], dtype)
            assert path_name(x, q) == "int8"
            assert torch.equal(F.linear(x, q).nan_to_num(7.0), expression(x, q).nan_to_num(7.0))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="what feeds the tiles are vectors of AVX-512"
)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tiles(spec, monkeypatch):
    """Units that multiply tiles, with instructions that are written out, give the same bits: any number of rows and of tokens,
    and more than one panel along K."""
    name = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(cpp, "INSTRUCTIONS", {name: (*cpp.INSTRUCTIONS[name], "-DEMULATED_TILES")})
    monkeypatch.setattr(device, "TILES", False)
    cpu_integers.integers.cache_clear()
    assert cpu_integers.integers().tiles is not None
    expression = cpu.split if spec.act is None else cpu.int_mm
    before = torch.get_num_threads()
    try:
        for n, k in ((70, 2176), (144, 192)):
            q = spec.quantize(weight((n, k)))
            for tokens, threads in ((1, 1), (16, 3), (37, 1), (50, 3)):
                torch.set_num_threads(threads)
                for dtype in (torch.bfloat16,) + (torch.float32,) * (spec.act is not None):
                    x = activation(tokens, k, dtype)
                    assert torch.equal(cpu_int8.product(x, q).nan_to_num(7.0), expression(x, q).nan_to_num(7.0))
    finally:
        torch.set_num_threads(before)
        cpu_integers.integers.cache_clear()


def test_a_static_scale_and_more_threads():
    layer = torch.nn.Sequential(torch.nn.Linear(96, 70, bias=False))
    q = DYNAMIC.quantize(layer[0].weight.detach())
    q.act_scale = torch.tensor([0.02])
    x = activation(40, 96, torch.bfloat16)[5:]
    expected, before = cpu.int_mm(x, q), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(cpu_int8.product(x, q), expected)
    finally:
        torch.set_num_threads(before)


def test_a_few_tokens_go_elsewhere():
    """Integer units take as long for two tokens as for eight; where there are tiles, for less of them."""
    most = 4 if TILES else 8
    for spec, paths in ((Intx(8), ("made", "made", "made", "int8")), (DYNAMIC, ("int8", "made", "made", "int8"))):
        q = spec.quantize(weight((64, 1024)))
        assert tuple(path_name(weight((m, 1024), 1, torch.bfloat16), q) for m in (1, 2, most, most + 1)) == paths


def test_no_units_no_compiler(monkeypatch):
    q, x = DYNAMIC.quantize(weight((70, 96))), weight((16, 96), 1)
    monkeypatch.setattr(cpu_int8, "cpp_compiler", lambda: None)
    monkeypatch.setattr(made, "cpp_compiler", lambda: None)
    assert path_name(x, q) == "int_mm"


FORMATS = [
    *SPECS,
    Intx(4, (1, 32)),
    Intx(4, (1, 32), act=Intx(8, symmetric=False)),
    Intx(4, (1, 32), symmetric=True, act=Intx(8)),
    NF4,
    Float8(),
    Float8(act=Float8()),
    FloatX(2, 1, block=(1, 32), scale="e8m0"),
    Ternary((1, 64)),
]

MADE = torch.bfloat16 not in made._UNITS


@pytest.mark.skipif(not MADE, reason="CPUs with bfloat16 units multiply many tokens by what the compiler makes")
@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_a_layer_in_a_graph_computes_nothing_beside_its_product(spec):
    """So that a compiler makes no kernel for it: one operator, and what only says how a tensor is read."""
    called = set()

    def backend(graph, inputs):
        called.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    q = spec.quantize(weight((64, 1280), dtype=torch.bfloat16))
    x = weight((24, 1280), 1, torch.bfloat16)
    with torch.no_grad():
        y = torch.compile(F.linear, fullgraph=True, backend=aot_autograd(fw_compiler=backend))(x, q)
    own = {name for name in called if name.startswith("ao.cpu_")}
    views = ("aten.view", "aten.slice", "aten.detach", "aten.t.", "aten.permute", "aten._to_copy")
    assert len(own) == 1 and all(name.startswith(views) for name in called - own)
    assert ao.compute_error(F.linear(x, q), y) > 50
