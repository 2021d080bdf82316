"""Products on a GPU: the Triton kernels against float32, in eager mode and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch._inductor.utils import run_and_get_code

from ao import compute_error
from ao.dtypes import Float8, Intx, QTensor, Ternary, reciprocal
from ao.matmul import cast_whole, codes_both, path_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SPECS = [
    Intx(4, (1, 128), signed=False),
    Intx(4, (1, 32)),
    Intx(4, (1, 64), symmetric=True),
    Intx(4, (1, 256), signed=False, scale_dtype="bfloat16"),
    Intx(4),
    Intx(8),
    Intx(8, (1, 64)),
    Intx(8, signed=False, symmetric=False),
    Intx(8, (1, 128), signed=False, symmetric=False),
    Float8(),
    Float8("e5m2"),
]


def case(spec, n=192, k=512, dtype=torch.bfloat16) -> QTensor:
    return spec.quantize(weight((n, k), dtype=dtype).cuda())


def activation(m, k=512, dtype=torch.bfloat16):
    """Rows of very different sizes, with an outlier."""
    span = 3 if dtype == torch.bfloat16 else 1
    x = weight((m, k), 1) * torch.logspace(-span, span, m).unsqueeze(1)
    x[:, 3] *= 50
    return x.to(dtype).cuda()


def sqnr(x, q, out):
    """The worst row, in dB, against float32 arithmetic on the decoded weight."""
    expected = x.float() @ q.dequantize().float().t()
    return min(compute_error(e, o).item() for e, o in zip(expected, out.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "spec",
    [*SPECS, Intx(4, (1, 64), zero_point="float"), Intx(4, (1, 32), signed=False, zero_point="joint"), Float8()],
    ids=str,
)
def test_one_token(spec, dtype):
    for n, k in ((192, 512), (100, 1280), (5000, 2304)):
        x, q = activation(1, k, dtype), case(spec, n, k, dtype)
        assert path_name(x, q) == "gemv"
        assert sqnr(x, q, F.linear(x, q)) > 48
        assert sqnr(x, q, torch.compile(F.linear)(x, q)) > 48


@pytest.mark.parametrize("spec", [*SPECS, Float8(block=(1, 128))], ids=str)
def test_a_few_tokens(spec):
    linear = torch.compile(F.linear, dynamic=True)
    for n, k in ((192, 512), (100, 1280)):
        q = case(spec, n, k)
        for m in (2, 7, 16, 17, 33, 64):
            x = activation(m, k)
            assert path_name(x, q) == "fused"
            assert sqnr(x, q, F.linear(x, q)) > 44
            assert sqnr(x, q, linear(x, q)) > 44


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", [4, 8])
def test_short_rows(bits, signed):
    """Fewer words than a warp has threads; and the same bits every time. (A row of one group goes another way.)"""
    for k, group in ((64, 32), (96, 32), (128, 32), (128, 64), (192, 64), (256, 128)):
        for n in (5, 64, 1000):
            q = case(Intx(bits, (1, group), signed=signed), n, k)
            for m in (1, 2, 10, 40):
                x = activation(m, k)
                assert path_name(x, q) == ("gemv" if m == 1 else "fused")
                out = F.linear(x, q)
                assert sqnr(x, q, out) > (48 if m == 1 else 34)  # a sum of few numbers may be near zero
                assert all(torch.equal(F.linear(x, q), out) for _ in range(5))


DYNAMIC = [
    Intx(8, act=Intx(8)),
    Intx(8, (-1, -1), act=Intx(8, (-1, -1))),
    Float8(act=Float8()),
    Float8(block=(-1, -1), act=Float8(block=(-1, -1))),
    Ternary(act=Intx(8, narrow=True)),
    Ternary((1, -1), act=Intx(8, (-1, -1))),
]


def dynamic_path(m, q):
    """What multiplies by a weight of `DYNAMIC`."""
    if isinstance(q.spec, Ternary):
        return "trits" if m <= 64 else "scaled_product"
    return "gemv" if m == 1 and q.scale.shape[0] == q.shape[0] else "scaled_product"


@pytest.mark.parametrize("spec", DYNAMIC, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_quantized_activations(spec, dtype):
    linear = torch.compile(F.linear, dynamic=True)
    for n, k in ((192, 512), (1000, 1280)):
        if n % 16 and isinstance(spec, Float8):
            continue
        q = case(spec, n, k, dtype)
        for m in (1, 2, 17, 40, 300, 700):
            x = activation(m, k, dtype)
            if spec.act.block == (-1, -1):
                x = weight((m, k), 1).to(dtype).cuda()  # no row so small that it becomes zero
            assert path_name(x, q) == dynamic_path(m, q)
            rounded = spec.act.quantize(x).dequantize()
            for out in (F.linear(x, q), linear(x, q)):
                assert sqnr(rounded.float(), q, out) > 40


@pytest.mark.parametrize("spec", DYNAMIC[:4], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_quantized_activations_of_rows_that_end_within_a_step(spec, dtype):
    linear = torch.compile(F.linear, dynamic=True)
    for n, k in ((48, 48), (208, 80), (1152, 4304)):
        q = case(spec, n, k, dtype)
        for m in (1, 2, 17, 40, 130, 300, 700):
            x = weight((m, k), 1).to(dtype).cuda()
            assert path_name(x, q) == dynamic_path(m, q)
            rounded = spec.act.quantize(x).dequantize()
            for out in (F.linear(x, q), linear(x, q)):
                assert sqnr(rounded.float(), q, out) > 36  # a sum of few numbers may be near zero


HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


@HOPPER
@pytest.mark.parametrize(
    "spec",
    [
        Intx(8),
        Float8(),
        Intx(4, (1, 128), signed=False),
        Intx(4, (1, 128)),
        Intx(4, (1, 128), symmetric=True),
        Intx(4, (1, 128), signed=False, scale_dtype="bfloat16"),
        Intx(4, (1, 32)),
        Intx(8, (1, 128)),
    ],
    ids=str,
)
def test_more_tokens_on_hopper(spec):
    """In eager mode, and as graphs call the product."""
    from ao.matmul.gpu import _weight
    from ao.matmul.kernels.operators import fused

    for n, k in ((192, 512), (320, 1280), (25728, 256)):
        q = case(spec, n, k)
        for m in (9, 17, 33, 65, 129, 200, 256, 300, 512):
            x = activation(m, k)
            assert path_name(x, q) == "fused"
            assert sqnr(x, q, F.linear(x, q)) > 44
            assert sqnr(x, q, fused(x, *_weight(spec.operand(q)))) > 44
        x[1, 5] = float("nan")
        out = F.linear(x, q)
        assert out[1].isnan().all() and not out[0].isnan().any()


@HOPPER
@pytest.mark.parametrize("spec", [Intx(8), Float8()], ids=str)
def test_bytes_of_any_number_of_rows_on_hopper(spec):
    """No multiple of a block of rows, and rows that are none of a step."""
    from ao.matmul.kernels import operators
    from ao.matmul.kernels.reading import reading_of

    for n, k in ((40, 48), (200, 256), (1152, 4304), (4304, 1152), (1000, 9232)):
        q, bias = case(spec, n, k), weight((n,), 2).cuda()
        reading, fields = reading_of(q)
        for m in (17, 33, 65, 129, 200, 256, 300, 512):
            x = activation(m, k)
            product = operators.few(x, *fields, reading.text, None)
            assert sqnr(x, q, product) > 42, (n, k, m)
            added = operators.few(x, *fields, reading.text, bias)
            assert compute_error(product.float() + bias, added.float()) > 40
            codes = operators.fused(x, q.qdata, q.scale, None, 0, None) if k % 128 == 0 else product
            assert torch.equal(codes, product)  # both by `hopper.parts_product`
        x[1, 5] = float("nan")
        out = operators.few(x, *fields, reading.text, None)
        assert out[1].isnan().all() and not out[0].isnan().any()


@HOPPER
@pytest.mark.parametrize("spec", [Intx(8), Intx(8, (-1, -1)), Float8(), Float8(block=(-1, -1))], ids=str)
def test_the_operator_quantizes_as_the_spec_does(spec):
    from ao.matmul.kernels.quantize_rows import quantized

    for m, k in ((1, 128), (7, 1280), (700, 4096)):
        x = activation(m, k)
        x[0, 1:9] = torch.tensor([0.5, -0.5, 1.5, 2.5, -2.5, 0.0, -0.0, 1e-30], device="cuda")
        expected = spec.quantize(x)
        codes, scale = quantized(x, expected.qdata.dtype, spec.block == (-1, -1))
        assert torch.equal(codes.view(torch.uint8), expected.qdata.view(torch.uint8))
        assert torch.equal(scale, expected.scale.expand(m, 1))
        apart = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(m, k)  # which begins where no word does
        assert torch.equal(
            quantized(apart, codes.dtype, spec.block == (-1, -1))[0].view(torch.uint8), codes.view(torch.uint8)
        )
    assert not quantized(torch.zeros(3, 128, device="cuda", dtype=torch.bfloat16), codes.dtype, False)[0].float().any()


@HOPPER
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", [Intx(8), Float8()], ids=str)
def test_codes_that_meet_several_weights(spec, out):
    from ao.matmul.kernels import hopper, operators

    least = 45 if isinstance(spec, Intx) else 30  # sums of float8 have some 14 bits
    for m, n, k in ((129, 640, 1280), (700, 336, 512), (1500, 1280, 336), (257, 100, 4096)):
        x = spec.quantize(activation(m, k, torch.float16 if out == torch.float16 else torch.bfloat16))
        weights = [spec.quantize(weight((n, k), i).cuda()) for i in range(3)]
        bias = [weight((n,), 7 + i, torch.bfloat16).cuda() for i in range(3)]
        codes, columns = [w.qdata for w in weights], [w.scale for w in weights]
        for some in (bias, [bias[0], None, bias[2]], [None] * 3, bias[:2], bias[:1], [None]):
            count = len(some)
            each = hopper.many_codes_product(x.qdata, x.scale, codes[:count], columns[:count], out, some)
            for got, w, b in zip(each, weights, some):
                expected = x.dequantize().double() @ w.dequantize().double().t() + (0 if b is None else b.double())
                assert got.dtype == out and compute_error(expected, got.double()) > least
                alone = hopper.many_codes_product(x.qdata, x.scale, [w.qdata], [w.scale], out, [b])
                assert torch.equal(got, alone[0])
            if count > 1 and n % 16 == 0:
                joined = operators.scaled_product_joined(x.qdata, x.scale, codes[:count], columns[:count], out, some)
                for got, w, b in zip(joined.view(count, m, n), weights, some):
                    alone = operators.scaled_product(x.qdata, x.scale, w.qdata, w.scale, out, b)
                    assert compute_error(alone.double(), got.double()) > least


def test_int4_weight_and_int8_activation():
    spec = Intx(4, (1, 32), symmetric=True, act=Intx(8, symmetric=False))
    x, q = activation(1), case(spec)
    assert path_name(x, q) == "gemv"
    assert sqnr(spec.act.quantize(x).dequantize(), q, F.linear(x, q)) > 44


def test_a_wide_and_a_long_weight():
    for n, k in ((20000, 256), (256, 14336)):
        for spec in (SPECS[0], Intx(8), Float8()):
            q = case(spec, n, k)
            for m in (1, 2, 24, 64):
                x = activation(m, k)
                assert sqnr(x, q, F.linear(x, q)) > 44


def test_zeros_and_nan():
    q = case(SPECS[0])
    for m in (1, 3):
        assert not F.linear(torch.zeros(m, 512, device="cuda", dtype=torch.bfloat16), q).any()
        x = activation(m)
        x[0, 5] = float("nan")
        assert F.linear(x, q)[0].isnan().all()


@pytest.mark.parametrize("spec", [Intx(4, (1, 128)), Intx(8), Float8()], ids=str)
def test_other_shapes_fall_back(spec):
    """Views, odd shapes and other dtypes are products too."""
    q = case(spec)
    x = activation(3)
    assert path_name(activation(1000), q) == "fused"
    assert path_name(activation(1000).half(), q) == "decode"
    assert path_name(x.float(), q) == "dequantize"
    for part in (q[:, :256], q[::2]):
        y = x[:, : part.shape[1]]
        assert sqnr(y, part, F.linear(y, part)) > 44
    x3 = activation(6).view(2, 3, 512)
    assert torch.equal(F.linear(x3, q).view(6, -1), F.linear(x3.view(6, 512), q))


@pytest.mark.parametrize("spec", [Intx(4, (1, 128), signed=False), Intx(8), Float8()], ids=str)
def test_generated_code(spec):
    q = case(spec, 1024, 1024)
    for m in (1, 16):
        torch.compiler.reset()
        x = activation(m, 1024)
        _, code = run_and_get_code(torch.compile(F.linear), x, q)
        text = "\n".join(code)
        assert "extern_kernels.mm" not in text and "(1024, 1024), (1024, 1), torch.bfloat16" not in text
        assert text.count(".run(") + text.count("torch.ops.ao.") <= 3


def test_graphs_over_all_batches():
    q = case(Intx(4, (1, 128), signed=False))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    linear = torch.compile(F.linear, backend=backend)
    for m in (16, 1, 2, 7, 17, 64, 65, 128, 300, 1000):
        linear(activation(m), q)
    assert len(graphs) <= 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "spec",
    [Intx(4, (1, 128), signed=False), Intx(8), Float8(), Intx(8, act=Intx(8)), Float8(act=Float8())],
    ids=str,
)
def test_a_device_that_is_not_the_current_one(spec):
    """Triton launches on the current device, whatever its arguments are on."""
    assert torch.cuda.current_device() == 0
    q = case(spec, 256, 512).to("cuda:1")
    for m in (1, 8, 128, 600):
        x = activation(m).to("cuda:1")
        expected = F.linear(x.to("cuda:0"), q.to("cuda:0"))
        assert torch.equal(F.linear(x, q).cpu(), expected.cpu())
        assert compute_error(expected.cpu(), torch.compile(F.linear)(x, q).cpu()) > 40
    same, turned = codes_both(x, Float8(block=(-1, -1)))
    assert torch.equal(same.values.view(torch.uint8).t(), turned.values.view(torch.uint8))
    scale = same.scale
    assert torch.equal(
        cast_whole(x, Float8(block=(-1, -1)), scale, reciprocal(scale)).qdata.view(torch.uint8),
        same.values.view(torch.uint8),
    )
    assert torch.cuda.current_device() == 0
