"""Products with a weight whose columns are stored in another order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch import Tensor, nn

import ao
from ao import compute_error
from ao.dtypes import NF4, Intx, QTensor
from ao.dtypes.permuted import Permuted, stored_order
from ao.matmul.kernels.device import is_hopper
from ao.matmul.layers import set_parameter

GPTQ = Intx(4, (1, 128), signed=False, symmetric=False, scale_dtype="float16")


def permuted(spec, n: int, k: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> QTensor:
    """A weight (n, k) in another order."""
    fields = {"qdata": spec.quantize(weight((n, k), 0, dtype)), "order": stored_order(torch.randperm(k))}
    return Permuted(spec).wrap(fields, dtype, torch.Size((n, k))).to(device)


def in_order(x: Tensor, w: QTensor) -> Tensor:
    """The same product in two steps."""
    return F.linear(x.index_select(-1, w.order.int()), w.qdata)


def test_an_order_of_an_older_file(tmp_path):
    """They hold 32 bits, and load as they are."""
    w = permuted(GPTQ, 64, 256)
    older = w.spec.wrap({"qdata": w.qdata, "order": w.order.int()}, w.dtype, w.shape)
    ao.save({"w": older}, tmp_path / "w.safetensors")
    loaded = ao.load(tmp_path / "w.safetensors")["w"]
    assert loaded.order.dtype == torch.int32 and torch.equal(loaded.dequantize(), w.dequantize())
    w = permuted(GPTQ, 64, 256)
    w.copy_(loaded)
    assert w.order.dtype == torch.int16 and torch.equal(loaded.dequantize(), w.dequantize())


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_a_layer_in_a_graph(tokens):
    layer = nn.Linear(256, 64, bias=False)
    set_parameter(layer, "weight", nn.Parameter(permuted(GPTQ, 64, 256, torch.float32), requires_grad=False))
    x = weight((tokens, 256), 1)
    expected = in_order(x, layer.weight)
    assert compute_error(x @ layer.weight.dequantize().t(), expected) > 60
    assert torch.equal(layer(x), expected)
    assert compute_error(expected, torch.compile(layer, fullgraph=True)(x)) > 60


class Layers(nn.Module):
    """Layers of one input."""

    def __init__(self, *weights: QTensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta") for w in weights)
        for layer, w in zip(self.layers, weights):
            set_parameter(layer, "weight", nn.Parameter(w, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:])
        return torch.cat([layer(h) for layer in self.layers], -1)


def with_order_of(other: QTensor, n: int) -> QTensor:
    """Another weight, with an order that has the same numbers in memory of its own."""
    w = permuted(other.spec.inner, n, other.shape[1], other.dtype, other.device)
    w.order.copy_(other.order)
    return w


def test_one_order_is_one_tensor_in_a_graph():
    """Layers of one input are quantized in one order: the input is put in order once, until a layer gets another order."""
    counts = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        counts.append(sum(t.dtype == torch.int16 and t.dim() == 1 for t in inputs))
        return graph.forward

    torch.compiler.reset()
    first = permuted(GPTQ, 64, 256, torch.float32)
    model = Layers(first, with_order_of(first, 32), with_order_of(first, 16), permuted(GPTQ, 8, 256, torch.float32))
    x = weight((1, 256), 1)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    assert counts == [2]
    with torch.no_grad():
        model.layers[1].weight.copy_(permuted(GPTQ, 32, 256, torch.float32))
    assert torch.equal(compiled(x), model(x))
    assert counts == [2, 3]
    model.load_state_dict(Layers(*(permuted(GPTQ, n, 256, torch.float32) for n in (64, 32, 16, 8))).state_dict())
    assert torch.equal(compiled(x), model(x))
    assert counts == [2, 3, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_columns_on_a_gpu(dtype):
    from ao.matmul.kernels import operators

    for k in (32, 96, 256, 1000, 4096, 14336, 32768):
        order = stored_order(torch.randperm(k)).cuda()
        for m in (0, 1, 7, 700):
            x = weight((m, k), 1, dtype).cuda()
            assert torch.equal(operators.gathered(x, order), x[:, order.int()]), (m, k)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "spec",
    [
        GPTQ, Intx(4, (1, 32)), Intx(4, (1, 32), signed=False, zero_point="joint"), Intx(8), Intx(8, (1, 64), signed=False),
        Intx(3, (1, 64)), NF4,
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_on_a_gpu(spec, dtype):
    """One token is put in order in the kernel of the product, and a few of 4 bits in one of their own; more of them before: to
    the bit what it is in two steps. An order may be of either dtype, also of weights of one shape."""
    at_once = 16 if isinstance(spec, Intx) and spec.bits == 4 else 1
    for n, k in ((64, 128), (72, 1024), (512, 4096), (264, 14336), (24, 28672)):
        w = permuted(spec, n, k, dtype, "cuda")
        for shape in ((1, k), (1, 1, k), (2, k), (3, 5, k), (70, k), (200, k), (0, k), (600, k)):
            x = weight(shape, 1, dtype).cuda()
            if 0 < x.numel() <= at_once * k:
                assert compute_error(in_order(x, w).float(), F.linear(x, w).float()) > 45, (n, k, shape)
            else:
                assert torch.equal(F.linear(x, w), in_order(x, w)), (n, k, shape)
            older = w.spec.wrap({"qdata": w.qdata, "order": w.order.int()}, dtype, w.shape)
            assert torch.equal(F.linear(x, older), F.linear(x, w)), (n, k, shape)
        assert torch.equal(F.linear(x.float(), w), in_order(x.float(), w))  # for which there is no kernel
        x = weight((2, k), 1, dtype).cuda()
        assert torch.equal(F.linear(x.t().contiguous().t()[1:], w), in_order(x[1:], w))  # columns of x that lie apart


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "spec", [GPTQ, Intx(4, (1, 32), signed=False, zero_point="joint"), Intx(3, (1, 64)), NF4], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_tokens_on_a_gpu(spec, dtype):
    """What arranges x puts it in order: to the bit the product of what is in order."""
    from ao.matmul.kernels import operators
    from ao.matmul.kernels.reading import reading_of

    for n, k in ((72, 1088 if spec is NF4 else 1024), (264, 14336)):
        reading, fields = reading_of(spec.quantize(weight((n, k), 0, dtype)).cuda())
        order = stored_order(torch.randperm(k)).cuda()
        for m in (2, 9, 33, 64):
            x = weight((m, k), 1, dtype).cuda()
            got = operators.few_ordered(x, order, *fields, reading.text)
            assert torch.equal(got, operators.few(x[:, order.int()], *fields, reading.text)), (n, k, m)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_few_tokens_while_a_graph_records():
    """Not by memory that belongs to the stream."""
    w = permuted(GPTQ, 512, 4096, device="cuda")
    x, other = weight((2, 2, 4096), 1, torch.bfloat16).cuda()
    expected = in_order(other, w)
    F.linear(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = F.linear(x, w)
    x.copy_(other)
    F.linear(weight((2, 4096), 2, torch.bfloat16).cuda(), w)
    graph.replay()
    assert compute_error(expected.float(), out.float()) > 35


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("tokens", "k", "dynamic", "by_kernel"),
    [
        (1, 4096, False, 0),
        (1, 14336, False, 0),
        (2, 4096, False, 0),
        (16, 4096, False, 0),
        (64, 4096, False, 0),
        (65, 4096, False, 1),
        (5, 4096, True, 1),
    ],
)
def test_a_graph_on_a_gpu(tokens, k, dynamic, by_kernel):
    """Few tokens are put in order in the kernels of the product or, where they are made, by the compiler; more of them before."""
    from torch._inductor.utils import run_and_get_code

    layer = nn.Linear(k, 512, bias=False)
    w = permuted(GPTQ, 512, k, device="cuda")
    set_parameter(layer, "weight", nn.Parameter(w, requires_grad=False))
    x = weight((tokens, k), 1, torch.bfloat16).cuda()

    def block(x: Tensor) -> Tensor:
        return layer(F.rms_norm(x, x.shape[-1:]))

    torch.compiler.reset()
    got, code = run_and_get_code(torch.compile(block, fullgraph=True, dynamic=dynamic), x)
    assert sum(text.count("ao.gathered.default(") for text in code) == by_kernel
    in_product = tokens == 64 and is_hopper(x.device)
    assert sum(text.count("ao.few_ordered.default(") for text in code) == in_product
    assert compute_error(block(x).float(), got.float()) > 35


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_of_one_input_on_a_gpu():
    """One launch for all of one order, of one token."""
    from torch._inductor.utils import run_and_get_code

    first = permuted(GPTQ, 512, 4096, device="cuda")
    model = Layers(first, with_order_of(first, 64), with_order_of(first, 64))
    x = weight((1, 4096), 1, torch.bfloat16).cuda()
    torch.compiler.reset()
    got, code = run_and_get_code(torch.compile(model, fullgraph=True), x)
    assert [sum(text.count(f"ao.{name}.default(") for text in code) for name in ("gemv_joined", "gemv")] == [1, 0]
    assert compute_error(model(x).float(), got.float()) > 35
