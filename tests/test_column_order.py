"""Products with a weight whose columns are stored in another order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch import Tensor, nn

from ao import compute_error
from ao.dtypes import NF4, Intx, QTensor
from ao.dtypes.permuted import Permuted
from ao.matmul.layers import set_parameter

GPTQ = Intx(4, (1, 128), signed=False, symmetric=False, scale_dtype="float16")


def permuted(spec, n: int, k: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> QTensor:
    """A weight (n, k) in another order."""
    fields = {"qdata": spec.quantize(weight((n, k), 0, dtype)), "order": torch.randperm(k).int()}
    return Permuted(spec).wrap(fields, dtype, torch.Size((n, k))).to(device)


def in_order(x: Tensor, w: QTensor) -> Tensor:
    """The same product in two steps."""
    return F.linear(x.index_select(-1, w.order), w.qdata)


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_a_layer_in_a_graph(tokens):
    layer = nn.Linear(256, 64, bias=False)
    set_parameter(layer, "weight", nn.Parameter(permuted(GPTQ, 64, 256, torch.float32), requires_grad=False))
    x = weight((tokens, 256), 1)
    expected = in_order(x, layer.weight)
    assert compute_error(x @ layer.weight.dequantize().t(), expected) > 60
    assert torch.equal(layer(x), expected)
    assert compute_error(expected, torch.compile(layer, fullgraph=True)(x)) > 60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_columns_on_a_gpu(dtype):
    from ao.matmul.kernels import operators

    for k in (32, 96, 256, 1000, 4096, 14336, 32768):
        order = torch.randperm(k).int().cuda()
        for m in (0, 1, 7, 700):
            x = weight((m, k), 1, dtype).cuda()
            assert torch.equal(operators.gathered(x, order), x[:, order]), (m, k)


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
    """One token is put in order in the kernel of the product, more of them before: to the bit what it is in two steps."""
    for n, k in ((64, 128), (72, 1024), (512, 4096), (264, 14336), (24, 28672)):
        w = permuted(spec, n, k, dtype, "cuda")
        for shape in ((1, k), (1, 1, k), (2, k), (3, 5, k), (70, k), (200, k), (0, k), (600, k)):
            x = weight(shape, 1, dtype).cuda()
            assert torch.equal(F.linear(x, w), in_order(x, w)), (n, k, shape)
        assert torch.equal(F.linear(x.float(), w), in_order(x.float(), w))  # for which there is no kernel
        x = weight((2, k), 1, dtype).cuda()
        assert torch.equal(F.linear(x.t().contiguous().t()[1:], w), in_order(x[1:], w))  # columns of x that lie apart


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("tokens", "dynamic", "by_kernel"), [(1, False, 0), (64, False, 0), (65, False, 1), (5, True, 1)]
)
def test_a_graph_on_a_gpu(tokens, dynamic, by_kernel):
    """Few tokens are put in order where they are made, by the compiler."""
    from torch._inductor.utils import run_and_get_code

    layer = nn.Linear(4096, 512, bias=False)
    w = permuted(GPTQ, 512, 4096, device="cuda")
    set_parameter(layer, "weight", nn.Parameter(w, requires_grad=False))
    x = weight((tokens, 4096), 1, torch.bfloat16).cuda()

    def block(x: Tensor) -> Tensor:
        return layer(F.rms_norm(x, x.shape[-1:]))

    got, code = run_and_get_code(torch.compile(block, fullgraph=True, dynamic=dynamic), x)
    assert sum(text.count("ao.gathered.default(") for text in code) == by_kernel
    assert compute_error(block(x).float(), got.float()) > 35
