"""The functions that multiply by a weight, in every spelling: what they give for a quantized weight and for its numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch import Tensor, nn

from ao.dtypes import NF4, Intx, QTensor
from ao.quant import compute_error

N, K = 96, 64
FORMATS = pytest.mark.parametrize("spec", [Intx(8), Intx(4, (1, 32)), NF4], ids=str)

# Each takes inputs of these shapes, which it may read, and the weight.
Call = Callable[..., Any]
MATRIX: dict[str, tuple[Call, list[tuple[int, ...]]]] = {
    "linear, all by keyword": (lambda x, b, w: F.linear(input=x, weight=w, bias=b), [(2, 3, K), (N,)]),
    "linear, weight by keyword": (lambda x, w: F.linear(x, weight=w), [(3, K)]),
    "matmul, other=": (lambda x, w: torch.matmul(x, other=w.t()), [(2, 3, K)]),
    "matmul, all by keyword": (lambda x, w: torch.matmul(input=x, other=w.mT), [(K,)]),
    "linalg.matmul": (lambda x, w: torch.linalg.matmul(x, w.T), [(3, K)]),
    "x.matmul(other=)": (lambda x, w: x.matmul(other=w.T), [(3, K)]),
    "x @ w.T": (lambda x, w: x @ w.T, [(3, K)]),
    "x @ w": (lambda x, w: x @ w, [(2, 3, N)]),
    "w @ x": (lambda x, w: w @ x, [(K, 5)]),
    "w @ vector": (lambda x, w: w @ x, [(K,)]),
    "w @ batch": (lambda x, w: (w @ x).view(-1), [(2, K, 5)]),
    "vector @ w": (lambda x, w: x @ w, [(N,)]),
    "x.__rmatmul__": (lambda x, w: x.__rmatmul__(w), [(K, 5)]),
    "mm": (lambda x, w: torch.mm(input=x, mat2=w.t()), [(3, K)]),
    "w.mm": (lambda x, w: w.mm(mat2=x), [(K, 3)]),
    "mv": (lambda x, w: torch.mv(input=w, vec=x), [(K,)]),
    "w.mv": (lambda x, w: w.mv(x), [(K,)]),
    "w.t().mv": (lambda x, w: w.t().mv(x), [(N,)]),
    "addmm": (lambda b, x, w: torch.addmm(b, mat1=x, mat2=w.t(), beta=0.5, alpha=2), [(N,), (3, K)]),
    "addmm, beta=0": (lambda b, x, w: torch.addmm(b.detach() / 0, x, w.t(), beta=0), [(N,), (3, K)]),
    "b.addmm": (lambda b, x, w: b.addmm(x, w.t()), [(3, N), (3, K)]),
    "addmm_": (lambda b, x, w: (b * 1).addmm_(x, w.t(), beta=2, alpha=3), [(3, N), (3, K)]),
    "addmv": (lambda b, x, w: torch.addmv(b, w, vec=x, beta=0.5, alpha=-1), [(N,), (K,)]),
    "addmv_": (lambda b, x, w: (b * 1).addmv_(w, x), [(N,), (K,)]),
    "einsum": (lambda x, w: torch.einsum("bsk,nk->bsn", x, w), [(2, 3, K)]),
    "einsum of a list": (lambda x, w: torch.einsum("nk,bk->bn", [w, x]), [(3, K)]),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=([2], [1])), [(2, 3, K)]),
    "inner": (lambda x, w: torch.inner(input=x, other=w), [(2, 3, K)]),
    "w.inner": (lambda x, w: w.inner(x), [(5, K)]),
    "w.inner(vector)": (lambda x, w: w.inner(x), [(K,)]),
    "w.inner(batch)": (lambda x, w: w.inner(x), [(2, 5, K)]),
    "multi_dot": (lambda x, y, w: torch.linalg.multi_dot([x, w.t(), y]), [(3, K), (N, 5)]),
    "chain_matmul": (lambda x, y, w: torch.chain_matmul(x, w.t(), y), [(3, K), (N, 5)]),
    "vecdot": (lambda x, w: torch.linalg.vecdot(x, w), [(N, K)]),
    "dot": (lambda x, w: torch.dot(x, w[3]), [(K,)]),
    "a 1-D weight": (lambda x, w: F.linear(x, w[3]), [(3, K)]),
    "attention": (lambda x, w: F.scaled_dot_product_attention(x, w, w), [(5, K)]),
}
BATCH: dict[str, tuple[Call, list[tuple[int, ...]]]] = {
    "bmm": (lambda x, w: torch.bmm(input=x, mat2=w.mT), [(4, 3, K)]),
    "w.bmm": (lambda x, w: w.bmm(x), [(4, K, 3)]),
    "x @ w.mT": (lambda x, w: x @ w.mT, [(4, 3, K)]),
    "x @ w": (lambda x, w: x @ w, [(4, 3, 32)]),
    "w @ x": (lambda x, w: w @ x, [(2, 4, K, 3)]),
    "w @ vector": (lambda x, w: w @ x, [(K,)]),
    "vector @ w": (lambda x, w: x @ w, [(32,)]),
    "matrix @ w.mT": (lambda x, w: x @ w.mT, [(3, K)]),
    "baddbmm": (lambda b, x, w: torch.baddbmm(b, batch1=x, batch2=w.mT, beta=0.5, alpha=2), [(4, 3, 32), (4, 3, K)]),
    "baddbmm_": (lambda b, x, w: (b * 1).baddbmm_(x, w.mT), [(4, 3, 32), (4, 3, K)]),
    "addbmm": (lambda b, x, w: torch.addbmm(b, x, w.mT, beta=2), [(3, 32), (4, 3, K)]),
    "addbmm_": (lambda b, x, w: (b * 1).addbmm_(x, w.mT), [(3, 32), (4, 3, K)]),
    "einsum": (lambda x, w: torch.einsum("emk,enk->emn", x, w), [(4, 3, K)]),
    "bilinear": (lambda x, y, b, w: F.bilinear(input1=x, input2=y, weight=w, bias=b), [(3, 32), (3, K), (4,)]),
}
CONVOLUTIONS: dict[str, tuple[Call, list[tuple[int, ...]], tuple[int, ...]]] = {
    "conv1d": (
        lambda x, b, w: F.conv1d(input=x, weight=w, bias=b, stride=2, padding=1),
        [(2, 16, 9), (32,)],
        (32, 16, 3),
    ),
    "conv2d, same": (lambda x, w: F.conv2d(x, weight=w, padding="same", dilation=2), [(2, 16, 9, 9)], (32, 16, 3, 3)),
    "conv2d, groups": (lambda x, w: F.conv2d(input=x, weight=w, groups=4), [(2, 64, 5, 5)], (32, 16, 3, 3)),
    "conv2d, no batch": (lambda x, w: F.conv2d(x, w), [(16, 5, 5)], (32, 16, 3, 3)),
    "conv3d": (lambda x, w: F.conv3d(x, weight=w, padding=1), [(1, 16, 4, 4, 4)], (32, 16, 3, 3, 3)),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(input=x, weight=w, stride=2), [(2, 32, 9)], (32, 16, 3)),
    "conv_transpose2d": (
        lambda x, b, w: F.conv_transpose2d(x, weight=w, bias=b, output_padding=1, stride=2),
        [(2, 32, 5, 5), (16,)],
        (32, 16, 3, 3),
    ),
    "conv_transpose3d": (
        lambda x, w: F.conv_transpose3d(x, w, groups=2),
        [(1, 32, 3, 3, 3)],
        (32, 16, 2, 2, 2),
    ),
}


def cases() -> list[Any]:
    found = [(f"{name} (2-D)", *case, (N, K)) for name, case in MATRIX.items()]
    found += [(f"{name} (3-D)", *case, (4, 32, K)) for name, case in BATCH.items()]
    found += [(name, *case) for name, case in CONVOLUTIONS.items()]
    return [pytest.param(*case, id=name) for name, *case in found]


DOORS = pytest.mark.parametrize("call, shapes, w_shape", cases())


def quantized(spec: Any, shape: tuple[int, ...]) -> QTensor:
    w = weight(shape)
    if len(shape) > 2 and spec == Intx(8):
        spec = Intx(8, (1,) * (len(shape) - 1) + (-1,))
    if len(shape) > 2 and shape[-1] % 32:
        spec = Intx(8, (1,) + (-1,) * (len(shape) - 1))  # the others have groups along the last dim
    return spec.quantize(w)


def run(call: Call, shapes: list[tuple[int, ...]], w: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of the inputs and of a trained weight."""
    inputs = [weight(s, i + 1).requires_grad_() for i, s in enumerate(shapes)]
    w = w.detach().requires_grad_()
    y = call(*inputs, w)
    y.backward(weight(tuple(y.shape), 9))
    return y.detach(), *(t.grad for t in inputs if t.grad is not None), w.grad


@FORMATS
@DOORS
@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
def test_as_of_the_numbers(spec, call, shapes, w_shape):
    """Values, gradients of the inputs and of the weight, strides; also in inference mode."""
    q = quantized(spec, w_shape)
    dense = q.dequantize()
    for expected, found in zip(run(call, shapes, dense), run(call, shapes, q), strict=True):
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        assert compute_error(expected, found) > 100
    inputs = [weight(s, i + 1) for i, s in enumerate(shapes)]
    expected = call(*inputs, dense)
    with torch.inference_mode():
        assert compute_error(expected, call(*inputs, q)) > 100


@DOORS
@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
def test_in_autocast_and_in_one_graph(call, shapes, w_shape):
    q = quantized(Intx(4, (1, 32)), w_shape)
    inputs = [weight(s, i + 1) for i, s in enumerate(shapes)]
    expected = call(*inputs, q.dequantize())
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert compute_error(expected, call(*inputs, q).float()) > 35
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        assert compute_error(expected, compiled(*inputs, q)) > 100


@pytest.mark.parametrize("given, cast", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_autocast_from_one_short_dtype_to_the_other(given, cast):
    """The weight goes straight to autocast's: by way of float16 its numbers could be lost, by way of bfloat16 their last bits."""
    large = cast == torch.bfloat16
    cases = [
        (*MATRIX[name], (N, K)) for name in ("linear, weight by keyword", "mm", "einsum", "tensordot", "multi_dot")
    ]
    cases += [(*BATCH[name], (4, 32, K)) for name in ("bmm", "x @ w.mT", "baddbmm", "addbmm", "einsum")]
    cases += [CONVOLUTIONS["conv1d"]]
    for call, shapes, w_shape in cases:
        q = Intx(8).quantize(weight(w_shape) * (1e6 if large else 1))
        inputs = [weight(s, i + 1, given) for i, s in enumerate(shapes)]
        expected = call(*(x.float() for x in inputs), q.dequantize())
        with torch.no_grad(), torch.autocast("cpu", cast):
            found = call(*inputs, q)
        assert found.dtype == cast and compute_error(expected, found.float()) > (40 if large else 60)


@pytest.mark.parametrize("name", ["addmm", "w @ batch", "einsum"])
def test_trained_in_one_graph(name):
    call, shapes = MATRIX[name]
    q = quantized(Intx(4, (1, 32)), (N, K))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for expected, found in zip(run(call, shapes, q), run(compiled, shapes, q), strict=True):
        assert compute_error(expected, found) > 100


def test_out():
    """PyTorch's rules: shape, dtype, no gradient; what is quantized is quantized anew."""
    q, x, bias = Intx(8).quantize(weight((N, K))), weight((3, K), 1), weight((N,), 2)
    for call in (
        lambda **out: torch.matmul(x, q.t(), **out),
        lambda **out: torch.mm(x, mat2=q.t(), **out),
        lambda **out: torch.addmm(bias, x, q.t(), **out),
        lambda **out: torch.inner(x, q, **out),
        lambda **out: torch.tensordot(x, q, ([1], [1]), **out),
    ):
        y = torch.empty(3, N)
        assert call(out=y) is y and torch.equal(y, call())
        with pytest.raises(RuntimeError, match="(?i)double|float64"):
            call(out=torch.empty(3, N, dtype=torch.float64))
    again = torch.empty(0)
    torch.mm(x, q.t(), out=again)
    assert again.shape == (3, N)
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        torch.mm(x.clone().requires_grad_(), q.t(), out=torch.empty(3, N))
    target = Intx(8).quantize(torch.zeros(3, N))
    assert torch.mm(x, q.t(), out=target) is target and compute_error(x @ q.t(), target.dequantize()) > 35
    assert torch.addbmm(target, x[None], q.t()[None], out=target) is target
    with pytest.raises(RuntimeError, match=r"out has shape \(3, 96\), and the result \(1, 96\)"):
        torch.mm(x[:1], q.t(), out=target)


def test_calls_that_pytorch_refuses():
    """Its own errors, for what no signature takes."""
    q, x = Intx(8).quantize(weight((N, K))), weight((3, K), 1)
    for call, message in (
        (lambda: torch.mm(x, q.t(), other=x), "other"),
        (lambda: torch.mm(x), "mat2"),
        (lambda: torch.mm(x[None], q.t()), "must be a matrix"),
        (lambda: torch.bmm(x, q.t()), "must be a 3D tensor"),
        (lambda: torch.addmm(weight((2, 3, N)), x, q.t()), "expand"),
        (lambda: F.conv2d(x[None, None], q[None, None, :5, :], paddin=1), "paddin"),
    ):
        with pytest.raises((TypeError, RuntimeError), match=message):
            call()
    with pytest.raises(TypeError, match="the input must be floating point, got torch.int64; convert it first"):
        F.linear(torch.ones(3, K, dtype=torch.int64), q)


def test_sparse_inputs():
    """Graph networks: a sparse adjacency times a weight."""
    q, x = Intx(8).quantize(weight((N, K))), (weight((3, N), 1) > 1).float().to_sparse()
    expected = x.to_dense() @ q.dequantize()
    for y in (torch.sparse.mm(x, q), torch.mm(x, q), x @ q, torch.sparse.addmm(torch.zeros(3, K), x, q)):
        assert compute_error(expected, y.to_dense() if y.is_sparse else y) > 100


@pytest.mark.parametrize("act", [Intx(8), Intx(8, symmetric=False), Intx(8, (-1, -1))], ids=str)
def test_quantized_activations(act):
    """Batches of matrices quantize them as a linear layer does, with a straight-through gradient; other functions refuse."""
    w = weight((4, 32, K))
    q = Intx(8, (1, 1, -1), act=act).quantize(w)
    x = weight((4, 3, K), 1).requires_grad_()
    rows = act.quantize(x.reshape(-1, K)).dequantize().view(x.shape)
    expected = rows @ q.dequantize().mT
    for y in (x @ q.mT, torch.bmm(x, q.mT), (q @ x.mT).mT, torch.baddbmm(torch.zeros(1), x, q.mT)):
        assert compute_error(expected, y) > 100
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert compute_error(q.dequantize().sum(1, keepdim=True).expand_as(x), grad) > 100
    scaled = Intx(8, (1, 1, -1), act=act).quantize(w, pre_scale=torch.full((1, 1, K), 2.0))
    assert compute_error(x @ w.mT, x @ scaled.mT) > 35
    for refused in (
        lambda: torch.einsum("emk,enk->emn", x, q),
        lambda: F.conv1d(x[:, :, :].mT, Intx(8, (1, 1, -1), act=act).quantize(weight((32, K, 3)))),
    ):
        with pytest.raises(NotImplementedError, match="quantizes activations, which only a linear layer and products"):
            refused()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode):
    """Values and the gradient of the table, with bags that are empty and places that do not count."""
    ids, offsets = torch.tensor([1, 5, 5, 31, 0, 7, 3]), torch.tensor([0, 2, 2, 6])
    pairs = ids[:6].view(2, 3)
    for input, options in (
        (pairs, {}),
        (pairs.int(), {"max_norm": 4.0}),
        (ids, {"offsets": offsets}),
        (ids, {"offsets": offsets, "padding_idx": 5}),
        (pairs, {"padding_idx": -1}),
        (pairs, {"sparse": mode == "sum"}),
        (ids, {"offsets": torch.tensor([0, 3, 7]), "include_last_offset": True}),
        (pairs, {"per_sample_weights": weight((2, 3), 4)} if mode == "sum" else {}),
        (pairs, {"scale_grad_by_freq": True} if mode != "max" else {}),
    ):
        tables = [Intx(4, (1, 32)).quantize(weight((32, K))), Intx(4, (1, 32)).quantize(weight((32, K))).dequantize()]
        tables = [t.requires_grad_() for t in tables]
        found, expected = (F.embedding_bag(input=input, weight=t, mode=mode, **options) for t in tables)
        assert torch.allclose(found, expected, atol=1e-6)
        for y in (found, expected):
            y.backward(weight(tuple(y.shape), 3))
        grads = [t.grad.to_dense() for t in tables]
        assert torch.allclose(grads[0], grads[1], atol=1e-6)


def layers(layer: nn.Module, spec: Any) -> tuple[nn.Module, nn.Module]:
    """A layer whose weights are quantized, and one of their numbers."""
    dense = copy.deepcopy(layer)
    for name, p in [*layer.named_parameters()]:
        if p.dim() > 1:
            owner, _, last = name.rpartition(".")
            q = spec.quantize(p.detach())
            setattr(layer.get_submodule(owner), last, nn.Parameter(q))
            setattr(dense.get_submodule(owner), last, nn.Parameter(q.dequantize()))
    return layer, dense


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "LSTM": (lambda: nn.LSTM(K, 32, 2, batch_first=True, bidirectional=True), lambda m, x: m(x)[0]),
    "LSTM, projected": (lambda: nn.LSTM(K, 64, proj_size=32), lambda m, x: m(x)[0]),
    "LSTM, packed": (
        lambda: nn.LSTM(K, 32, batch_first=True),
        lambda m, x: m(nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True))[0].data,
    ),
    "GRU": (lambda: nn.GRU(K, 32), lambda m, x: m(x)[0]),
    "RNN": (lambda: nn.RNN(K, 32), lambda m, x: m(x)[0]),
    "RNN, relu": (lambda: nn.RNN(K, 32, nonlinearity="relu"), lambda m, x: m(x)[0]),
    "LSTMCell": (lambda: nn.LSTMCell(K, 32), lambda m, x: m(x[0])[0]),
    "GRUCell": (lambda: nn.GRUCell(K, 32), lambda m, x: m(x[0])),
    "RNNCell": (lambda: nn.RNNCell(K, 32), lambda m, x: m(x[0])),
    "Bilinear": (lambda: nn.Bilinear(K, K, 8), lambda m, x: m(x, x + 1)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(K, 4, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "MultiheadAttention, three widths": (
        lambda: nn.MultiheadAttention(K, 4, kdim=32, vdim=32, add_bias_kv=True),
        lambda m, x: m(x, x[..., :32], x[..., :32])[0],
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(K, 4, 96, 0.0), lambda m, x: m(x)),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(K, 4, 96, 0.0), lambda m, x: m(x, x)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    """Outputs, gradients of the input and of every weight; in eval mode, where PyTorch has fast paths; compiled."""
    make, call = LAYERS[name]
    made = make()
    if name.startswith("MultiheadAttention, three"):
        del made.bias_k, made.bias_v
        made.bias_k = made.bias_v = None
    layer, dense = layers(made, Intx(4, (1, 1, 32) if name == "Bilinear" else (1, 32)))
    x = weight((2, 5, K), 1)
    grads = []
    for m in (layer, dense):
        y = call(m, x.requires_grad_())
        x.grad = None
        y.backward(weight(tuple(y.shape), 3))
        grads.append([y.detach(), x.grad, *(p.grad for p in m.parameters())])
    for found, expected in zip(*grads, strict=True):
        assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()
    with torch.no_grad():
        expected = call(dense.eval(), x)
        assert compute_error(expected, call(layer.eval(), x)) > 90
        with torch.autocast("cpu", torch.bfloat16):
            try:
                call(dense, x)
            except RuntimeError as error:  # oneDNN has no recurrent layers in bfloat16 for CPUs without AVX-512
                assert "primitive descriptor" in str(error)
            else:
                assert compute_error(expected, call(layer, x).float()) > 30
        if name in ("LSTM", "GRUCell", "Bilinear", "MultiheadAttention"):
            compiled = torch.compile(lambda x: call(layer, x), backend="aot_eager")
            assert compute_error(expected, compiled(x)) > 90
    with torch.inference_mode():
        assert compute_error(expected, call(layer, x)) > 90


def test_arithmetic_with_a_weight_names_the_layer():
    """What is no product, such as an equalized learning rate, says which layer to leave out."""

    class Equalized(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight * 0.1, self.bias)

    model = nn.ModuleDict({"stem": nn.Linear(K, K), "blocks": nn.Sequential(nn.Linear(K, K), Equalized(K, K))})
    model.forward = lambda x: model["blocks"](model["stem"](x))
    for layer in (model["stem"], *model["blocks"]):
        layer.weight = nn.Parameter(Intx(8).quantize(layer.weight.detach()), requires_grad=False)
    with pytest.raises(
        NotImplementedError, match=r"the layer blocks.1 \(Equalized\) computes with its weight otherwise"
    ):
        model(weight((3, K)))
    with pytest.raises(NotImplementedError, match="which quantizes anew; the layer Equalized computes"):
        model["blocks"][1](weight((3, K)))
    with pytest.raises(NotImplementedError, match="which quantizes anew$"):
        model["blocks"][1].weight * 2
