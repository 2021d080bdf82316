"""Products on a CPU by C++ that is compiled when it is needed: every kind of code, every number of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import weight

import ao
from ao import compute_error
from ao.dtypes import MXINT8, NF4, Codebook, Float8, FloatX, Intx, Shifted, Ternary, cpp
from ao.matmul import linear, made, path_name
from ao.matmul.kernels import built, device

pytestmark = pytest.mark.skipif(cpp.cpp_compiler() is None, reason="needs a C++ compiler")

N, K = 70, 1280  # no multiple of what is computed side by side, and more than one step of the decoding

HALF = {"signed": False, "symmetric": True, "scale_dtype": "float16"}
Q4_K = Shifted(4, (1, 32), scale_spec=Intx(6, (1, 8), **HALF), shift_spec=Intx(6, (1, 8), **HALF))
"""As GGUF has it: 4.5 bits."""


@pytest.fixture(autouse=True)
def _small_weights(monkeypatch):
    """Are worth it, also where there are units for int8."""
    monkeypatch.setattr(made, "WORTH", 0)
    monkeypatch.setattr(made, "VNNI", False)
    monkeypatch.setattr(linear, "_CHOICES", {})


def product(x, q):
    assert path_name(x, q) == "made"
    return F.linear(x, q)


def _slow(spec):
    """One that differs from another by what is a number to the kernel: a table, exponents, a size."""
    return pytest.param(spec, marks=pytest.mark.slow)


SPECS = pytest.mark.parametrize(
    "spec",
    [
        Intx(8),
        Intx(8, (1, 32), symmetric=False),
        _slow(Intx(8, (1, 16), signed=False)),
        *(Intx(bits, (1, 32), signed=bits % 2 == 0) for bits in range(1, 8)),
        Intx(4, (1, 16), symmetric=True),
        Intx(4, (1, 320), zero_point="float", scale_dtype="bfloat16"),
        NF4,
        _slow(Codebook(table=tuple(i * i * i / 100 for i in range(-7, 1)), block=(1, 32))),
        Codebook(table=tuple(i / 32 for i in range(-31, 33)), block=(1, 32)),
        Float8(),
        Float8("e5m2", block=(-1, -1)),
        FloatX(2, 1, block=(1, 32)),
        _slow(FloatX(3, 2, block=(1, 32))),
        FloatX(2, 3, block=(1, 16)),
        _slow(FloatX(5, 2, block=(1, 32))),
        MXINT8,
        _slow(FloatX(4, 3, block=(1, 32), scale="e8m0")),
        FloatX(2, 1, block=(1, 32), scale="e8m0"),
        Ternary(),
        Ternary((1, 64)),
        Shifted(4, (1, 32), scale_dtype="float16"),
        _slow(Shifted(4, (1, 64), centered=True, scale_dtype="bfloat16")),
        Q4_K,
        _slow(Shifted(2, (1, 16), scale_spec=Intx(4, (1, 16), **HALF), shift_spec=Intx(4, (1, 16), **HALF))),
        Shifted(3, (1, 16), symmetric=True, scale_spec=Intx(6, (1, 16), symmetric=True, scale_dtype="float16")),
        Shifted(6, (1, 16), symmetric=True, scale_spec=Intx(8, (1, 16), scale_dtype="float16")),
    ],
    ids=str,
)


@SPECS
def test_values(spec):
    """A few tokens, tiles of them, and pieces for PyTorch's product: what float64 gives."""
    q = spec.quantize(weight((N, K)))
    dense = q.dequantize().double()
    for tokens in (1, 2, 3, 4, 5, 9, 130):
        x = weight((tokens, K), 1)
        assert compute_error(x.double() @ dense.t(), product(x, q).double()) > 110, tokens
    for dtype, tokens in ((torch.bfloat16, 1), (torch.bfloat16, 4), (torch.float16, 3)):
        x = weight((tokens, K), 1, dtype)
        y, exact = product(x, q), x.double() @ dense.t()
        assert y.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=1e-4 * float(exact.abs().max()))


@SPECS
def test_rows_in_bfloat16(spec):
    """What is decoded for units of bfloat16 is what is decoded in float32, rounded, to the bit."""
    w = weight((12, K))
    w[1], w[2], w[3, 5], w[4] = 0, w[2] * 1e-30, 1e5, w[4] * 1e30
    q = spec.quantize(w)
    operand = made.readable(q)
    compiled, described = made._library(operand), made._described(operand, *q.shape)
    wide, half = torch.empty(q.shape), torch.empty(q.shape, dtype=torch.bfloat16)
    for out in (wide, half):
        compiled.rows(described.weight, 0, 12, out.data_ptr(), built.DTYPES[out.dtype], 2)
    torch.testing.assert_close(half, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not made.AVX512, reason="what feeds the tiles are vectors of AVX-512")
@pytest.mark.parametrize("spec", [Intx(4, (1, 32)), Intx(8), NF4, Ternary()], ids=str)
def test_tiles(spec, monkeypatch):
    """What tiles are given and what they give, with instructions that are written out: any number of rows and of tokens, and more
    than one panel along K."""
    name = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(cpp, "INSTRUCTIONS", {name: (*cpp.INSTRUCTIONS[name], "-DEMULATED_TILES")})
    monkeypatch.setattr(device, "TILES", False)
    built.library.cache_clear()
    for n, k in ((N, 1344), (144, K)):
        q = spec.quantize(weight((n, k), dtype=torch.bfloat16))
        compiled, described = made._library(made.readable(q)), made._described(made.readable(q), n, k)
        for tokens, threads in ((1, 1), (16, 3), (33, 1), (50, 3)):
            x = weight((tokens, k), 1, torch.bfloat16)
            y = torch.full((tokens, n), torch.nan, dtype=torch.bfloat16)
            compiled.tiles(described.weight, x.data_ptr(), tokens, y.data_ptr(), threads)
            assert compute_error(x.double() @ q.decode(torch.bfloat16).double().t(), y.double()) > 50
    built.library.cache_clear()


@pytest.mark.parametrize("bits", [4, 8])
def test_units_of_bfloat16(bits, monkeypatch):
    """A weight is decoded for them from few tokens on in 4 bits, and from many on in 8, in a graph too."""
    monkeypatch.setattr(made, "FLOATS", {torch.float32, torch.bfloat16})
    monkeypatch.setattr(made, "_UNITS", {torch.bfloat16})
    monkeypatch.setattr(made, "VNNI", True)
    monkeypatch.setattr(made, "AVX512", True)
    monkeypatch.setattr(made, "TILES", False)
    monkeypatch.setattr(made, "_MANY", 512)
    q = Intx(bits).quantize(weight((N, K), dtype=torch.bfloat16))
    for tokens in (9, 512):
        x = weight((tokens, K), 1, torch.bfloat16)
        assert made.accepts(x, q) == (bits == 4 or tokens == 512 or not made.cpu_int8.reads(q, x.dtype))
        if made.accepts(x, q):
            expected = F.linear(x.float(), q.decode(torch.bfloat16).float())
            assert compute_error(expected, made.product(x, q).float()) > 50


@pytest.mark.parametrize(
    "spec",
    [
        Intx(8, act=Intx(8)),
        Intx(8, act=Intx(8, symmetric=False)),
        Intx(4, (1, 32), act=Intx(8)),
        Ternary(act=Intx(8)),
        Float8(act=Float8()),
    ],
    ids=str,
)
def test_quantized_activations(spec, monkeypatch):
    """What plain expressions give: of integers to the last bit."""
    q = spec.quantize(weight((N, K)))
    for tokens in (1, 6):
        x = weight((tokens, K), 1)
        y = product(x, q)
        with monkeypatch.context() as patch:
            patch.setattr(made, "cpp_compiler", lambda: None)
            patch.setattr(linear, "_CHOICES", {})
            other = spec.quantize(weight((N, K)))
            assert path_name(x, other) != "made"
            expected = F.linear(x, other)
        exact = isinstance(spec, Ternary) or spec == Intx(8, act=spec.act)
        assert torch.equal(y, expected) if exact else compute_error(expected, y) > 110


@pytest.mark.parametrize("flags", [(), ("-DW=16",)], ids=["eight lanes", "sixteen lanes"])
@pytest.mark.parametrize("spec", [Intx(3, (1, 32)), Intx(8, (1, 16)), NF4, Q4_K], ids=str)
def test_other_machines(spec, flags, monkeypatch, tmp_path):
    """The same without instructions of AVX2, and in the order of vectors of 16 lanes, which AVX-512 has."""
    monkeypatch.setattr(cpp, "INSTRUCTIONS", {torch.backends.cpu.get_cpu_capability(): flags})
    built.library.cache_clear()
    q = spec.quantize(weight((N, K)))
    for tokens in (1, 3, 6):
        x = weight((tokens, K), 1)
        assert compute_error(x.double() @ q.dequantize().double().t(), product(x, q).double()) > 110
    built.library.cache_clear()


def test_two_threads_give_the_same():
    x, q = weight((7, K), 1), NF4.quantize(weight((N, K)))
    threads = torch.get_num_threads()
    try:
        for tokens in (1, 7):
            torch.set_num_threads(1)
            y = product(x[:tokens], q)
            torch.set_num_threads(2)
            assert torch.equal(product(x[:tokens], q), y)
    finally:
        torch.set_num_threads(threads)


def test_a_compiler_is_asked_once(monkeypatch, tmp_path):
    """For a large weight, and then for all of its kind; a later process finds it on disk. Without one, nothing is lost."""
    monkeypatch.setattr(made, "WORTH", 2**16)
    monkeypatch.setenv("AO_CACHE_DIR", str(tmp_path))
    built.library.cache_clear()
    small, large = (Intx(2, (1, 32)).quantize(weight((n, 256))) for n in (64, 256))
    x = weight((2, 256), 1)
    for _ in range(2):  # a small weight is not worth it, whatever was compiled before
        assert path_name(x, small) != "made" and path_name(x, large) == "made"
    (file,) = (tmp_path / "kernels").iterdir()
    built.library.cache_clear()
    monkeypatch.setattr(cpp, "_compile", lambda *args: pytest.fail("compiled again"))
    assert path_name(x, large) == "made" and file.suffix == ".so"
    monkeypatch.setenv("AO_CACHE_DIR", str(tmp_path / "other"))
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / file.name).write_bytes(b"no library")
    built.library.cache_clear()
    assert path_name(x, large) != "made"
    assert compute_error(x @ large.dequantize().t(), F.linear(x, large)) > 100
    built.library.cache_clear()


def test_a_trained_layer():
    """The forward of a graph with a gradient goes the same way."""
    layer = torch.nn.Sequential(torch.nn.Linear(K, N))
    ao.quantize_(layer, ao.Int4WeightOnlyConfig(group_size=32))
    x = weight((3, K), 1).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert compute_error(x @ layer[0].weight.dequantize().t() + layer[0].bias, y) > 100
    assert compute_error(layer[0].weight.dequantize().sum(0).expand(3, K), x.grad) > 100


def test_in_a_graph():
    """One operator, whatever the shape."""
    from torch._dynamo.backends.common import aot_autograd

    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x, q = weight((3, K), 1), NF4.quantize(weight((N, K)))
    with torch.no_grad():
        y = torch.compile(F.linear, fullgraph=True, backend=aot_autograd(fw_compiler=backend))(x, q)
    assert any("cpu_product" in name for name in called)
    assert compute_error(x @ q.dequantize().t(), y) > 110


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 6e-8, 65504.0])
def test_scales_of_float16(scale):
    """The smallest and the largest, and what is no number."""
    q = Intx(4, (1, 32), symmetric=True, scale_dtype="float16").quantize(weight((N, K)))
    q.scale[3, 1] = scale
    expected = weight((1, K), 1) @ q.dequantize().t()
    y = product(weight((1, K), 1), q)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("spec", [Intx(8), Intx(4, (1, 32)), Intx(3, (1, 16)), NF4], ids=str)
def test_fixed_point_of_any_range(spec):
    """Outliers, zeros, the smallest and the largest numbers: a token's error is beside the largest of its terms."""
    q = spec.quantize(weight((N, K)))
    x = weight((6, K), 1, torch.bfloat16)
    x[1, ::200] *= 1e4
    x[2, :500] = 0
    x[3] *= 1e-38
    x[4] *= 1e33
    x[5] *= torch.logspace(-20, 3, K)
    exact = x.double() @ q.dequantize().double().t()
    for rows in (slice(0, 3), slice(3, 6), *(slice(t, t + 1) for t in range(6))):
        for row, expected in zip(product(x[rows], q), exact[rows]):
            largest = expected.abs().max()
            assert compute_error(expected / largest, row.double() / largest) > 50


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite(value):
    """Reaches the outputs of its token, and no other."""
    q = Intx(4, (1, 32)).quantize(weight((N, K)))
    x = weight((3, K), 1, torch.bfloat16)
    x[1, 77] = value
    y, plain = product(x, q), x @ q.dequantize().bfloat16().t()
    assert torch.equal(y.isfinite(), plain.isfinite())
