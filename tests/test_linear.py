"""A quantized weight in a matmul, an embedding and a convolution: values, shapes, gradients, paths."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, SHAPE, weight
from torch import nn

import ao.matmul.linear as linear
from ao.dtypes import NF4, NVFP4, Float8, Int4Prepacked, Intx, QTensor, linear_nf4, to_nf4
from ao.matmul import gpu, made, path_name
from ao.quant import compute_error

N, K = SHAPE
every = pytest.mark.parametrize("case", CASES, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def reference(x, q, bias=None):
    """The product of the dequantized weight, in float64."""
    y = x.double() @ q.dequantize().double().t()
    return y if bias is None else y + bias.double()


@every
@DTYPES
def test_values(case, dtype, device):
    """Against float64: as good as the dtype of the activation, or as its quantization, allows."""
    q = case.spec.quantize(weight()).to(device)
    x, bias = weight((5, K), 1, dtype).to(device), weight((N,), 2, dtype).to(device)
    y = F.linear(x, q, bias)
    assert y.dtype == dtype and y.shape == (5, N)
    # On a GPU tensor cores take the numbers of a weight as bfloat16, also with activations in float16.
    floor = {torch.float32: 100, torch.float16: 55 if device == "cpu" else 50, torch.bfloat16: 40}[dtype]
    if isinstance(case.spec.act, Intx):
        floor = min(floor, 37)
    elif isinstance(case.spec.act, Float8):
        floor = 28
    assert compute_error(reference(x, q, bias), y) > floor


@every
@pytest.mark.parametrize("lead", [(), (0,), (1,), (17,), (2, 3), (2, 1, 3), (0, 4)], ids=str)
def test_shapes(case, lead, device):
    q = case.spec.quantize(weight()).to(device)
    x = weight((*lead, K), 1).to(device)
    y = F.linear(x, q)
    assert y.shape == (*lead, N)
    if y.numel():
        assert compute_error(reference(x, q), y) > 25
    assert torch.equal(x @ q.t(), y) and torch.equal(torch.matmul(x, q.t()), y)
    with torch.inference_mode():
        assert torch.equal(F.linear(x, q), y)


@every
def test_gradients(case, device):
    """To the input, through a frozen weight: as of the dequantized weight; to a trained weight: as of a dense one."""
    q = case.spec.quantize(weight()).to(device)
    g = weight((2, 3, N), 3).to(device)
    x = weight((2, 3, K), 1).to(device).requires_grad_()
    F.linear(x, q).backward(g)
    assert compute_error(g.double() @ q.dequantize().double(), x.grad) > 100
    layer = nn.Linear(K, N).to(device)
    layer.weight = nn.Parameter(q)
    layer(x.detach()).backward(g)
    expected = g.reshape(-1, N).t().double() @ x.detach().reshape(-1, K).double()
    assert compute_error(expected, layer.weight.grad) > 100
    assert torch.equal(layer.bias.grad, g.sum((0, 1)))


def test_backward_keeps_packed_fields_only():
    q = Intx(4, (1, 32)).quantize(weight((512, 1024)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.linear(weight((2, 1024), 1).requires_grad_(), q)
    assert (
        sum(t.nbytes_packed if isinstance(t, QTensor) else t.numel() * t.element_size() for t in saved)
        == q.nbytes_packed
    )


@every
def test_embedding(case, device):
    """The packed rows are gathered, then decoded."""
    q = case.spec.quantize(weight(dtype=torch.bfloat16)).to(device)
    ids = torch.tensor([[1, 5, 127], [0, 1, 64]], device=device)
    assert torch.equal(F.embedding(ids, q), F.embedding(ids, q.dequantize()))
    table = nn.Embedding(N, K, padding_idx=1, device=device)
    table.weight = nn.Parameter(q)
    table(ids).sum().backward()
    dense = nn.Embedding(N, K, padding_idx=1, device=device, dtype=torch.bfloat16)
    dense(ids).sum().backward()
    assert torch.equal(table.weight.grad, dense.weight.grad)


@pytest.mark.parametrize("spec", [Intx(8), Intx(4, (1, 32)), NF4], ids=str)
def test_embedding_takes_all_keywords(spec):
    """As of a table of the decoded numbers; a table that is read stays as it is."""
    w = weight()
    ids = torch.tensor([[1, 5, 5, 127], [0, 1, 64, 5]])
    for options in (
        {"max_norm": 12.0},
        {"max_norm": 30.0, "norm_type": 1.0},
        {"padding_idx": -3},
        {"scale_grad_by_freq": True, "padding_idx": 5},
        {"sparse": True, "max_norm": 12.0},
    ):
        tables = [spec.quantize(w).requires_grad_(), spec.quantize(w).dequantize().requires_grad_()]
        found, expected = (F.embedding(input=ids, weight=t, **options) for t in tables)
        assert compute_error(expected, found) > 100
        for y in (found, expected):
            y.backward(weight(tuple(y.shape), 3))
        grads = [t.grad.to_dense() for t in tables]
        assert tables[0].grad.is_sparse == tables[1].grad.is_sparse and compute_error(grads[1], grads[0]) > 100
        assert torch.equal(tables[0], spec.quantize(w))
        with torch.inference_mode():
            assert torch.equal(F.embedding(ids, spec.quantize(w), **options), found)
    with pytest.raises(IndexError, match="the ids must be 0 to 127, got -105"):
        F.embedding(ids - 105, spec.quantize(w))
    with pytest.raises(ValueError, match="padding_idx must be within the 128 rows of the table, got 128"):
        F.embedding(ids, spec.quantize(w), padding_idx=128)


CONVS = {
    "conv1d": (F.conv1d, (32, 16, 3), (2, 16, 20)),
    "conv2d": (F.conv2d, (32, 16, 3, 3), (2, 16, 9, 9)),
    "conv2d 1x1": (F.conv2d, (32, 64, 1, 1), (2, 64, 5, 5)),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("spec", [Intx(8, (1, -1)), Intx(4), Intx(3), Float8(), Intx(8, (-1, -1))], ids=str)
def test_convolution(name, spec):
    conv, shape, x_shape = CONVS[name]
    if spec.block == (1, -1):
        spec = type(spec)(**{**spec.settings(), "block": (1,) + (-1,) * (len(shape) - 1)})
    w, x = weight(shape), weight(x_shape, 1).requires_grad_()
    q = spec.quantize(w)
    bias = weight((shape[0],), 2)
    y = conv(x, q, bias, padding=1, stride=2)
    assert torch.equal(y, conv(x, q.dequantize(), bias, padding=1, stride=2))
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.inference_mode():
        assert torch.equal(conv(x, q, bias, padding=1, stride=2), y)


@pytest.mark.parametrize(
    "spec, path",
    [
        (Intx(8), "dequantize"),
        (Intx(8, (1, 32)), "dequantize"),
        (NF4, "dequantize"),
        (Intx(8, act=Intx(8)), "int_mm"),
        (Intx(8, (-1, -1), act=Intx(8, (-1, -1))), "int_mm"),
        (Intx(8, act=Intx(8, symmetric=False)), "int_mm"),
        (Intx(8, (1, 32), act=Intx(8)), "dequantize"),
        (Intx(8, (32, -1), act=Intx(8)), "dequantize"),
        (Intx(4, (1, 32), act=Intx(8)), "dequantize"),
        (Float8(act=Float8()), "float8"),
        (Float8(block=(-1, -1), act=Float8(block=(-1, -1))), "float8"),
        (Float8(block=(32, 32), act=Float8()), "dequantize"),
    ],
    ids=str,
)
def test_paths(spec, path, monkeypatch):
    monkeypatch.setattr(made, "cpp_compiler", lambda: None)
    x, q = weight((4, K), 1), spec.quantize(weight())
    assert path_name(x, q) == path
    assert compute_error(x @ weight().t(), F.linear(x, q)) > (16 if getattr(spec, "bits", 8) == 4 else 28)


def test_a_few_tokens_on_a_cpu(monkeypatch):
    """ATen's int8 product, which is fast in bfloat16 only, and for a few tokens."""
    monkeypatch.setattr(made, "cpp_compiler", lambda: None)
    q = Intx(8).quantize(weight(dtype=torch.bfloat16))
    for tokens, dtype, path in (
        (1, torch.bfloat16, "int8pack"),
        (3, torch.bfloat16, "int8pack"),
        (5, torch.bfloat16, "pieces"),
        (1, torch.float32, "dequantize"),
    ):
        x = weight((tokens, K), 1, dtype)
        if path == "pieces" and torch.cpu._is_vnni_supported():
            path = "split"
        elif path == "pieces" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            path = "dequantize"
        assert path_name(x, q) == path
        assert compute_error(reference(x, q), F.linear(x, q)) > 45


def test_a_large_weight_is_decoded_in_pieces():
    """The same numbers as in one piece."""
    w, x = weight((1024, 1024)), weight((3, 1024), 1)
    for spec in (Intx(4, (1, 64)), Intx(8, (64, 64)), Intx(3), Int4Prepacked("cpu", (1, 64))):
        q = spec.quantize(w)
        assert compute_error(reference(x, q), F.linear(x, q)) > 80
        assert F.linear(x[:0], q).shape == (0, 1024)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "spec", [Intx(8), Intx(8, (1, 64)), Intx(4, (1, 32)), Intx(4, (1, 128), zero_point="float"), Float8()], ids=str
)
def test_one_token_on_a_gpu(spec):
    """Compiled, no dense weight is stored: at most three kernels, and no call of a library."""
    from torch._inductor.utils import run_and_get_code

    q = spec.quantize(weight((512, 1024))).cuda()
    for dtype in (torch.float32, torch.bfloat16):
        x = weight((1, 1024), 1, dtype).cuda()
        with torch.no_grad():
            y, codes = run_and_get_code(torch.compile(F.linear, fullgraph=True), x, q)
        assert compute_error(reference(x, q), y) > (100 if dtype == torch.float32 else 40)
        assert "extern_kernels.mm" not in codes[0] and codes[0].count(".run(") <= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_paths_on_a_gpu():
    q = Float8(act=Float8()).quantize(weight()).cuda()
    for tokens in (1, 17, 64):
        x = weight((tokens, K), 1).cuda()
        assert path_name(x, q) == "scaled_mm"
        assert compute_error(F.linear(x.cpu(), q.cpu()), F.linear(x, q).cpu()) > 45  # the emulation computes the same
    q = Intx(8, act=Intx(8)).quantize(weight()).cuda()
    for tokens in (1, 16, 17, 64):
        x = weight((tokens, K), 1).cuda()
        assert path_name(x, q) == "int_mm"
        assert torch.equal(F.linear(x.cpu(), q.cpu()), F.linear(x, q).cpu())


@pytest.mark.parametrize(
    ("spec", "k", "one", "some"),
    [
        (Intx(8), 128, "gemv", "fused"),
        (Intx(8), 80, "few", "few"),
        (Intx(8), 72, "dequantize", "dequantize"),
        (Intx(8, signed=False, symmetric=False), 80, "few", "few"),
        (Intx(8, (1, 16)), 80, "gemv_codes", "few"),
        (Float8(), 48, "few", "few"),
        (Intx(4), 80, "gemv_codes", "few"),
        (Intx(4, (1, 16)), 16, "gemv_codes", "few"),
        (Intx(4, (1, 16)), 80, "gemv_codes", "few"),
        (Intx(4, (1, 8)), 72, "dequantize", "dequantize"),
        (NVFP4, 64, "gemv_codes", "few"),
        (NVFP4, 80, "few", "few"),
        (Intx(6), 64, "gemv_codes", "few"),
        (Intx(6), 80, "dequantize", "dequantize"),
        (Intx(3, (1, 16)), 80, "dequantize", "dequantize"),
        (Intx(8, act=Intx(8)), 80, "gemv", None),
        (Float8(act=Float8()), 80, "gemv", None),
        (Intx(4, act=Intx(8)), 80, "gemv_codes", "few"),
    ],
    ids=str,
)
def test_kernels_for_rows_of_any_length(spec, k, one, some, monkeypatch):
    """On a GPU that is not there: rows that end in half a chunk of 32 have kernels in 4 and 8 bits."""
    monkeypatch.setattr(gpu, "has_kernels", lambda device: True)
    monkeypatch.setitem(linear.PATHS, "cpu", gpu.PATHS)
    q = spec.quantize(weight((32, k), dtype=torch.bfloat16))
    for tokens, path in ((1, one), (2, some), (600, some)):
        assert path is None or path_name(weight((tokens, k), 1, torch.bfloat16), q) == path


def test_int8_dynamic_against_float32():
    """The bar of the field: 37 dB for a linear of int8 weights and int8 activations."""
    x, w = weight((64, 1024), 1), weight((1024, 1024))
    assert compute_error(x @ w.t(), F.linear(x, Intx(8, act=Intx(8)).quantize(w))) > 37


def test_static_activation():
    x, w = weight((16, K), 1), weight()
    scale = x.abs().max() / 448
    static = Float8(act=Float8(block=(-1, -1))).quantize(w, act_scale=scale)
    dynamic = Float8(act=Float8(block=(-1, -1))).quantize(w)
    assert torch.allclose(F.linear(x, static), F.linear(x, dynamic), atol=1e-4)
    assert (
        F.linear(10 * x, static).abs().max() < 5 * F.linear(10 * x, dynamic).abs().max()
    )  # it saturates, it does not adapt


@every
@DTYPES
def test_autocast(case, dtype, device):
    """As of a model in that dtype, also where float16 would not hold the sums over codes."""
    if dtype == torch.float32:
        pytest.skip("no dtype of autocast")
    q = case.spec.quantize(weight()).to(device)
    x = weight((20, K), 1).to(device)
    with torch.no_grad(), torch.autocast(device, dtype=dtype):
        y = F.linear(x, q)
    assert y.dtype == dtype and torch.equal(y, F.linear(x.to(dtype), q))
    assert F.linear(x.double(), q).dtype == torch.float64


@pytest.mark.parametrize("spec", [Float8(act=Float8()), Float8(block=(-1, -1), act=Float8(block=(-1, -1)))], ids=str)
def test_emulated_codes_in_autocast(spec, monkeypatch):
    """The path of chips without float8, which multiplies the codes in float32; forward and backward."""
    monkeypatch.setattr(linear, "PATHS", {"": tuple(p for p in linear.PATHS[""] if p.name == "float8")})
    q, x = spec.quantize(weight((128, 4096))), weight((20, 4096), 1).requires_grad_()
    expected = reference(x, q)
    for run in (F.linear, torch.compile(F.linear, backend="aot_eager", fullgraph=True)):
        x.grad = None
        with torch.autocast("cpu", dtype=torch.float16):
            y = run(x, q)
            y.sum().backward()
        assert y.dtype == torch.float16 and compute_error(expected, y) > 28
        assert compute_error(q.dequantize().sum(0).expand_as(x), x.grad) > 40


def test_experts():
    """3-D weights: one expert is a 2-D weight; a batched product decodes."""
    q = Intx(4, (1, 32)).quantize(weight((3, N, K)))
    x = weight((3, 5, K), 1)
    for i in range(3):
        assert compute_error(x[i] @ q.dequantize()[i].t(), F.linear(x[i], q[i])) > 100
    assert compute_error(x @ q.dequantize().transpose(1, 2), x @ q.transpose(1, 2)) > 100
    assert torch.equal(torch.bmm(x, q.transpose(1, 2)), x @ q.transpose(1, 2))


def test_linear_nf4():
    q = to_nf4(weight())
    x = weight((3, K), 1).requires_grad_()
    y = linear_nf4(x, q)
    y.sum().backward()
    assert torch.equal(y, F.linear(x, q)) and x.grad.shape == x.shape


def test_adapters_train_through_a_frozen_weight():
    base = nn.Linear(K, N)
    base.weight = nn.Parameter(NF4.quantize(base.weight.detach()), requires_grad=False)
    a, b = nn.Linear(K, 8, bias=False), nn.Linear(8, N, bias=False)
    nn.init.zeros_(b.weight)
    x, target = weight((64, K), 1), weight((64, N), 2)
    optimizer = torch.optim.AdamW([*a.parameters(), *b.parameters()], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(base(x) + b(a(x)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    before = base.weight.dequantize()
    delta = b.weight.detach() @ a.weight.detach()
    base.weight.data += delta  # merging: PEFT's own expression
    kept = ((base.weight.dequantize() - before) * delta).sum() / (delta * delta).sum()
    assert kept == pytest.approx(1, abs=0.1)


def test_wrong_shapes():
    q = Intx(8).quantize(weight())
    with pytest.raises(ValueError, match=r"input of shape \(4, 100\) does not fit the weight of shape \(128, 256\)"):
        F.linear(torch.randn(4, 100), q)


@pytest.mark.parametrize("case", [c for c in CASES if c.weight_only], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_mm(case, dtype):
    """Experts: rows of x by group, and gathered for a batched product."""
    q = case.spec.quantize(weight((4, 64, 128), dtype=dtype))
    x = weight((20, 128), 1, dtype).requires_grad_()
    offs = torch.tensor([5, 5, 12, 17], dtype=torch.int32)
    y = F.grouped_mm(x, q.transpose(-2, -1), offs=offs)
    d = q.dequantize()
    expected = torch.cat([x[:5] @ d[0].t(), x[5:12] @ d[2].t(), x[12:17] @ d[3].t(), x.new_zeros(3, 64)])
    assert compute_error(expected, y) > (100 if dtype == torch.float32 else 40)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.float().square().sum(), x)
    assert compute_error(expected_grad, grad) > (100 if dtype == torch.float32 else 40)
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(torch.bmm(q[ids], x[:3].unsqueeze(-1)), torch.bmm(d[ids], x[:3].unsqueeze(-1)))


def test_grouped_mm_compiles():
    q = Intx(4, (1, 32)).quantize(weight((4, 64, 128), dtype=torch.bfloat16))
    x, offs = weight((17, 128), 1, torch.bfloat16), torch.tensor([5, 5, 12, 17], dtype=torch.int32)

    def experts(x, w, offs):
        return F.grouped_mm(x, w.transpose(-2, -1), offs=offs)

    with torch.no_grad():
        compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)(x, q, offs)
    assert compute_error(experts(x, q, offs), compiled) > 40


@pytest.mark.parametrize("written", [False, True], ids=["read", "written"])
def test_gathered_experts_in_a_graph(written, monkeypatch):
    """What the kernels of a GPU get: the experts where they lie, and not the copy of some, unless either was written to since."""
    q, seen = Intx(4, (1, 32)).quantize(weight((4, 64, 128))), []
    x, ids, new = weight((3, 128), 1), torch.tensor([3, 0, 3]), weight((4, 64, 128), 2)

    def routed(x, w, where, ends):
        seen.append(tuple(w.shape))
        return torch.einsum("rnk,rk->rn", w.dequantize()[where], x)

    def product(x, w, ids, new):
        each = w[ids]
        if written:
            w.copy_(new)
        return torch.bmm(each, x.unsqueeze(-1)), torch.bmm(x.unsqueeze(1), w.mT[ids])

    with torch.no_grad():
        expected = product(x, q.clone(), ids, new)
        monkeypatch.setattr("ao.matmul.linear.has_kernels", lambda device: True)
        monkeypatch.setattr("ao.matmul.routed_experts._routed", routed)
        outs = torch.compile(product, backend="aot_eager", fullgraph=True)(x, q.clone(), ids, new)
        assert all(compute_error(a, b) > 100 for a, b in zip(expected, outs))
        assert {shape[0] for shape in seen[-2:]} == ({3, 4} if written else {4})
        torch.compiler.reset()
        seen.clear()
        outs = product(x, q.clone(), ids, new)  # eager mode has made the copy
        assert all(compute_error(a, b) > 100 for a, b in zip(expected, outs)) and {s[0] for s in seen} == {3}


@every
def test_moved_while_an_output_is_alive(case):
    """`module.half()` swaps parameters of a tensor subclass, which nothing else may hold: no graph does."""
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))
    model[0].weight = nn.Parameter(case.spec.quantize(weight((N, K))), requires_grad=False)
    x = weight((4, K), 1).requires_grad_()
    out = model(x)
    model.half()
    assert {p.dtype for p in model.parameters()} == {torch.float16} and out.requires_grad


@pytest.mark.parametrize(
    ("dtype", "spec"),
    [
        pytest.param(torch.float32, Intx(8, (-1, -1)), marks=pytest.mark.slow),
        (torch.bfloat16, Intx(8, (-1, -1), act=Intx(8, (-1, -1)))),
        pytest.param(torch.float32, Intx(8, (-1, -1), act=Intx(8, (-1, -1))), marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, Intx(8, (-1, -1)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_column_that_is_transposed(dtype, spec):
    """A weight of one row whose stride is 1, and a token like that, which `torch._int_mm` reads wrongly."""
    q = spec.quantize(weight((96, 1))).t()  # (1, 96)
    wide = spec.quantize(weight((2, 96)))  # few rows, of which a graph for one token takes four parts
    column = weight((96, 1), 1).to(dtype)
    for w, x in ((q, weight((5, 96), 2).to(dtype)), (q, column.t()), (wide, column.t())):
        given = x if spec.act is None else spec.act.fake_quantize(x)
        for product in (F.linear, torch.compile(F.linear)):
            assert compute_error(given.double() @ w.dequantize().double().t(), product(x, w).double()) > 40
