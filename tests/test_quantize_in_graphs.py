"""Where a compiled graph quantizes an activation: after a norm in its kernel, elsewhere by ours, for several products once."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.graph
import torch.nn.functional as F
from cases import weight
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import ao
from ao import compute_error
from ao.dtypes import Float8, Intx
from ao.matmul.kernels import joined, quantize_in_graphs

SCHEMAS = {
    "quantized": "(Tensor x, ScalarType dtype, bool whole) -> (Tensor, Tensor)",
    "quantized_activation": "(Tensor x, Tensor? other, str function, ScalarType dtype, Tensor? before=None)"
    " -> (Tensor, Tensor)",
    "quantized_norm": "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centered, bool added, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    "scaled_product": "(Tensor x, Tensor rows, Tensor qdata, Tensor columns, ScalarType dtype, Tensor? bias=None) -> Tensor",
    "scaled_product_joined": "(Tensor x, Tensor rows, Tensor[] qdata, Tensor[] columns, ScalarType dtype, Tensor?[] biases)"
    " -> Tensor",
    "dynamic_product": "(Tensor x, Tensor qdata, Tensor columns, bool whole, Tensor? bias=None) -> Tensor",
}
SPECS = {torch.int8: Intx(8), torch.float8_e4m3fn: Float8()}


def quantized(x: Tensor, dtype: torch.dtype, whole: bool) -> tuple[Tensor, Tensor]:
    assert not whole
    q = SPECS[dtype].quantize(x)
    return q.qdata, q.scale


FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


def quantized_activation(x, other, function, dtype, before=None):
    out = FUNCTIONS[function](x.float())
    out = (out if other is None else out * other).to(x.dtype)
    return quantized(out if before is None else torch.cat([before, out], 1), dtype, False)


def quantized_norm(x, weight, bias, eps, centered, added, dtype):
    wide = x.float()
    out = wide - wide.mean(1, keepdim=True) if centered else wide
    out = out * (out.square().mean(1, keepdim=True) + eps).rsqrt()
    weight, bias = (None if t is None else t.float().repeat_interleave(len(x) // len(t), 0) for t in (weight, bias))
    out = out if weight is None else out * (weight + added)
    return quantized((out if bias is None else out + bias).to(x.dtype), dtype, False)


def scaled_product(x, rows, qdata, columns, dtype, bias=None):
    out = (x.float() @ qdata.float().t()) * rows * columns.t()
    return (out if bias is None else out + bias.float()).to(dtype)


def scaled_product_joined(x, rows, qdata, columns, dtype, biases):
    out = [scaled_product(x, rows, *each, dtype, bias) for *each, bias in zip(qdata, columns, biases)]
    return torch.cat([each.flatten() for each in out])


def dynamic_product(x, qdata, columns, whole, bias=None):
    return scaled_product(*quantized(x, qdata.dtype, whole), qdata, columns, x.dtype, bias)


FAKES = {
    "quantized": lambda x, dtype, whole: (
        torch.empty_like(x, dtype=dtype),
        x.new_empty(len(x), 1, dtype=torch.float32),
    ),
    "quantized_norm": lambda x, weight, bias, eps, centered, added, dtype: (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(len(x), 1, dtype=torch.float32),
    ),
    "quantized_activation": lambda x, other, function, dtype, before=None: (
        x.new_empty(len(x), x.shape[1] + (0 if before is None else before.shape[1]), dtype=dtype),
        x.new_empty(len(x), 1, dtype=torch.float32),
    ),
    "scaled_product": lambda x, rows, qdata, columns, dtype, bias=None: x.new_empty(len(x), len(qdata), dtype=dtype),
    "scaled_product_joined": lambda x, rows, qdata, columns, dtype, biases: x.new_empty(
        len(x) * sum(map(len, qdata)), dtype=dtype
    ),
    "dynamic_product": lambda x, qdata, *_: x.new_empty(len(x), len(qdata)),
}


@pytest.fixture
def called(monkeypatch):
    """The operators of a GPU, on a CPU: the names of those that were called, and the codes that met weights."""
    calls: list[str] = []
    codes: list[Tensor] = []

    def noted(name, function, *args):
        calls.append(name)
        if name == "scaled_product":
            codes.append(args[0].clone())
        return function(*args)

    with torch.library._scoped_library("ao", "FRAGMENT") as library:
        for name, schema in SCHEMAS.items():
            if not hasattr(torch.ops.ao, name):  # without Triton
                library.define(name + schema)
                torch.library.register_fake(f"ao::{name}", FAKES[name], lib=library)
            function = globals()[name]
            library.impl(name, lambda *args, name=name, function=function: noted(name, function, *args), "CPU")
        quantize_in_graphs.lower_in_compiled_graphs()
        monkeypatch.setattr(joined, "MOST", 0)  # few tokens are enough
        torch.compiler.reset()
        with torch._inductor.config.patch(fx_graph_cache=False):
            yield calls, codes
    quantize_in_graphs._registered = False  # without Triton the operators are gone
    torch.compiler.reset()


class Product(nn.Module):
    """A layer with a quantized activation."""

    def __init__(self, n: int, k: int, dtype: torch.dtype = torch.int8, seed: int = 0) -> None:
        super().__init__()
        q = SPECS[dtype].quantize(weight((n, k), seed))
        self.codes, self.scale, self.bias = q.qdata, q.scale, weight((n,), seed + 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.ops.ao.dynamic_product(rows, self.codes, self.scale, False, self.bias)
        return out.reshape(*x.shape[:-1], -1)


class Block(nn.Module):
    """Attention without its products, and a feed-forward network, each after a norm."""

    def __init__(self, norm: type[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm(64), norm(64)])
        for p in self.norms.parameters():
            p.data = torch.rand_like(p) + 0.5
        self.q, self.k, self.v, self.o = (Product(64, 64, dtype, i) for i in range(4))
        self.up, self.down = Product(128, 64, dtype, 4), Product(64, 128, dtype, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.o(torch.tanh(self.q(h)) * self.k(h) + self.v(h))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


@pytest.mark.parametrize(
    ("norm", "dtype", "dynamic"),
    [(nn.LayerNorm, torch.int8, False), (nn.RMSNorm, torch.float8_e4m3fn, True)],
    ids=["LayerNorm int8 static", "RMSNorm float8 dynamic"],
)
def test_after_a_norm_the_compiler_quantizes(called, norm, dtype, dynamic):
    calls, _ = called
    block = Block(norm, dtype).requires_grad_(False)
    for tokens in (6, 8) if dynamic else (6,):
        x = weight((2, tokens, 64))
        expected = block(x)
        calls.clear()
        if tokens == 6:
            compiled = torch.compile(block, dynamic=dynamic)
        got = compiled(x)
        # q, k, v and the first of the feed-forward network meet codes of the norm's kernel; the others quantize by themselves.
        assert calls == [*["scaled_product"] * 3, "dynamic_product", "scaled_product", "dynamic_product"]
        assert compute_error(expected, got) > 35


AFTER_A_FUNCTION = {
    "GELU": (lambda h, g: F.gelu(h), True),
    "GELU by tanh": (lambda h, g: F.gelu(h, approximate="tanh"), True),
    "SiLU and a gate": (lambda h, g: F.silu(h) * g, True),
    "a gate and GELU": (lambda h, g: g * F.gelu(h), True),
    "quick GELU": (lambda h, g: h * torch.sigmoid(1.702 * h), True),
    "SiLU by hand, and a gate": (lambda h, g: torch.sigmoid(h) * h * g, True),
    "another factor": (lambda h, g: h * torch.sigmoid(2 * h), False),
    "a sigmoid of others": (lambda h, g: h * torch.sigmoid(g), False),
    "GELU of GELU": (lambda h, g: F.gelu(F.gelu(h)), False),
    "ReLU": (lambda h, g: F.relu(h), False),
    "a number": (lambda h, g: F.silu(h) * 2, False),
    "one of the numbers": (lambda h, g: F.silu(h) * g[0, 0, 0], False),
    "a row": (lambda h, g: F.silu(h) * g[:, :1], False),
    "a part of a row": (lambda h, g: F.silu(torch.cat([h, g], -1)[..., 8:72]), False),
    "halves": (lambda h, g: (lambda a, b: F.silu(a) * b)(*h.chunk(2, -1)), True),
    "halves, the second through GELU": (lambda h, g: (lambda a, b: a * F.gelu(b))(*h.chunk(2, -1)), True),
    "parts of two": (lambda h, g: F.gelu(h[..., 16:48]) * g[..., :32], True),
    "some columns": (lambda h, g: F.gelu(h.split([24, 40], -1)[0]), True),
    "columns that are not aligned": (lambda h, g: F.gelu(h[..., 4:36]), False),
    "every other column": (lambda h, g: F.gelu(h[..., ::2]), False),
    "halves of tokens": (lambda h, g: F.silu(h[:, :1]) * h[:, 1:2], False),
    "after columns": (lambda h, g: torch.cat([torch.tanh(g), F.gelu(h)], -1), True),
    "after columns, and a gate": (lambda h, g: torch.cat([h[..., 8:16], F.silu(h) * g], -1), True),
    "before columns": (lambda h, g: torch.cat([F.gelu(h), g], -1), False),
    "after tokens": (lambda h, g: torch.cat([g, F.gelu(h)], 1), False),
    "after columns that are not aligned": (lambda h, g: torch.cat([g[..., :4], F.gelu(h)], -1), False),
    "halves of heads": (lambda h, g: F.gelu(h.unflatten(-1, (4, 16))[..., :8].flatten(-2)), False),
}


@pytest.mark.parametrize("name", AFTER_A_FUNCTION)
def test_an_activation_function_is_part_of_what_quantizes(called, name):
    calls, _ = called
    function, fused = AFTER_A_FUNCTION[name]
    k = function(*torch.zeros(2, 2, 3, 64)).shape[-1]
    up, gate, down = (Product(64, k if i == 2 else 64, torch.int8, i).bfloat16() for i in range(3))
    for layer in (up, gate, down):
        layer.scale = layer.scale.float()

    def network(x: Tensor) -> Tensor:
        return down(function(up(x), gate(x)))

    x = weight((2, 3, 64), dtype=torch.bfloat16)
    expected = network(x)
    calls.clear()
    got = torch.compile(network, fullgraph=True)(x)
    assert ("quantized_activation" in calls) == fused
    assert compute_error(expected.float(), got.float()) > 30


def test_an_activation_function_of_what_the_graph_is_given(called):
    calls, _ = called
    down = Product(32, 64).bfloat16()
    down.scale = down.scale.float()

    def network(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return down(F.silu(x[..., 64:]) * x[..., :64]), down(F.gelu(y)), down(F.silu(y.transpose(0, 1)))

    given = weight((2, 3, 128), dtype=torch.bfloat16), weight((2, 3, 64), 1, torch.bfloat16)
    expected = network(*given)
    calls.clear()
    for e, got in zip(expected, torch.compile(network)(*given)):
        assert compute_error(e.float(), got.float()) > 30
    assert sorted(calls) == ["dynamic_product", *["quantized_activation"] * 2, *["scaled_product"] * 2]


def test_a_size_that_is_unknown_multiplies_an_activation_function(called):
    calls, _ = called
    down = Product(32, 64).bfloat16()
    down.scale = down.scale.float()
    compiled = torch.compile(lambda x: down(F.silu(x) * x.shape[1]), dynamic=True)
    for tokens in (3, 5):
        x = weight((2, tokens, 64), dtype=torch.bfloat16)
        assert compute_error(down(F.silu(x) * tokens).float(), compiled(x).float()) > 30
    assert "quantized_activation" not in calls


def test_columns_of_a_product_are_read_where_they_are(called):
    up, down = Product(64, 64), Product(64, 32)
    up.bias, down.bias = up.bias.bfloat16(), down.bias.bfloat16()

    def network(x: Tensor) -> Tensor:
        hidden, gate = up(x).chunk(2, -1)
        return down(hidden * F.gelu(gate))

    _, code = run_and_get_code(torch.compile(network), weight((2, 3, 64), dtype=torch.bfloat16))
    (line,) = [line for line in code[0].splitlines() if "ops.ao.quantized_activation.default(" in line]
    assert "(6, 32), (64, 1), 32)" in line and "(6, 32), (64, 1), 0)" in line


def test_columns_that_others_come_after_are_not_copied(called):
    up, down = Product(64, 64), Product(64, 96)
    up.bias, down.bias = up.bias.bfloat16(), down.bias.bfloat16()

    def network(x: Tensor, first: Tensor) -> Tensor:
        return down(torch.cat([first, F.gelu(up(x))], -1))

    inputs = weight((2, 3, 64), dtype=torch.bfloat16), weight((2, 3, 32), 1, torch.bfloat16)
    _, code = run_and_get_code(torch.compile(network), *inputs)
    (line,) = [line for line in code[0].splitlines() if "ops.ao.quantized_activation.default(" in line]
    assert line.endswith("torch.int8, reinterpret_tensor(arg4_1, (6, 32), (32, 1), 0))"), line
    assert "cpp_fused" not in code[0]  # no kernel puts rows together


def test_what_several_products_share_is_quantized_once(called):
    calls, codes = called
    layers = nn.ModuleList(Product(16, 64, torch.int8, i) for i in range(3))
    other = Product(16, 64, torch.float8_e4m3fn)
    x = weight((5, 64))

    def products(x: Tensor) -> list[Tensor]:
        h = F.gelu(x)
        return [layer(h) for layer in (*layers, other)]

    expected = products(x)
    calls.clear()
    codes.clear()
    got = torch.compile(products)(x)
    assert sorted(calls) == ["dynamic_product", "quantized", *["scaled_product"] * 3]
    assert all(torch.equal(codes[0].view(torch.uint8), c.view(torch.uint8)) for c in codes[1:3])
    assert all(compute_error(e, g) > 60 for e, g in zip(expected, got))


AFTER_A_NORM = {
    "itself": lambda h: h,
    "moved": lambda h: F.pad(h, (0, 0, 1, 2)).transpose(0, 1).contiguous(),
    "modulated": lambda h: h * (1 + h[:, :1]) + h[:, 1:2],
    "cast": lambda h: h.bfloat16(),
}
NOT_AFTER_A_NORM = {
    "of other numbers": lambda x: F.group_norm(x, 1),
    "of shorter rows": lambda x: F.layer_norm(x.view(2, 3, 4, 16), (16,)).view(2, 3, 64),
    "not number by number": lambda x: torch.cumsum(F.layer_norm(x, (64,)), 1),
    "of tokens": lambda x: x - x.mean(1, keepdim=True),
}


def test_weights_of_one_shape_meet_the_codes_in_one_launch(called, monkeypatch):
    calls, _ = called
    asked = []
    monkeypatch.setattr(quantize_in_graphs, "joins", lambda *args: not asked.append(args))
    q, k, v, other, last = (Product(96 if i == 3 else 64, 64, torch.int8, i) for i in range(5))
    k.bias = None

    def blocks(x):
        return q(x) * torch.tanh(k(x)), other(x)[..., :64] + v(x) - last(x)

    x = weight((2, 3, 64))
    got = torch.compile(blocks)(x)
    # Three in one launch; the one of 96 rows, and the fourth of 64, are alone.
    assert sorted(calls) == ["quantized", "scaled_product", "scaled_product", "scaled_product_joined"]
    torch.testing.assert_close(got, blocks(x))
    assert asked[0][:3] == (6, 64, 64) and {args[5] for args in asked} == {True, False}


def test_halves_of_one_launch_meet_in_an_activation_function(called, monkeypatch):
    calls, _ = called
    monkeypatch.setattr(quantize_in_graphs, "joins", lambda *args: True)
    gate, up, down = (Product(64, 64, torch.int8, i).bfloat16() for i in range(3))
    for layer in (gate, up, down):
        layer.scale = layer.scale.float()

    def network(x: Tensor) -> Tensor:
        return down(F.silu(gate(x)) * up(x))

    x = weight((2, 3, 64), dtype=torch.bfloat16)
    expected = network(x)
    calls.clear()
    got = torch.compile(network)(x)
    assert calls == ["quantized", "scaled_product_joined", "quantized_activation", "scaled_product"]
    assert compute_error(expected.float(), got.float()) > 30


def test_what_counts_as_after_a_norm(called):
    calls, _ = called
    layer = Product(16, 64)

    def products(x: Tensor) -> list[Tensor]:
        h = F.layer_norm(x, (64,))
        return [layer(between(h)) for between in AFTER_A_NORM.values()]

    torch.compile(products)(weight((2, 3, 64)))
    assert calls == ["scaled_product"] * len(AFTER_A_NORM)


def test_what_does_not(called):
    calls, _ = called
    layer = Product(16, 64)
    torch.compile(lambda x: [layer(made(x)) for made in NOT_AFTER_A_NORM.values()])(weight((2, 3, 64)))
    assert calls == ["dynamic_product"] * len(NOT_AFTER_A_NORM)


def test_rows_that_are_too_long(called, monkeypatch):
    monkeypatch.setattr(quantize_in_graphs, "LONGEST", 32)
    calls, _ = called
    layer = Product(16, 64)
    torch.compile(lambda x: layer(F.layer_norm(x, (64,))))(weight((2, 3, 64)))
    assert calls == ["dynamic_product"]


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    """As transformers writes it."""
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma_norm(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(x)


def modulated(x: Tensor, w: Tensor, shift: Tensor) -> Tensor:
    """A norm of a diffusion transformer: a weight and a bias for each image."""
    return F.layer_norm(x, (64,)) * (1 + w[:, None]) + shift[:, None]


NORMS = {
    "LayerNorm": lambda x, w, m: F.layer_norm(x, (64,), w, m[0, 0]),
    "without a bias": lambda x, w, m: F.layer_norm(x, (64,), w),
    "without a weight": lambda x, w, m: F.layer_norm(x, (64,)),
    "one for both": lambda x, w, m: F.layer_norm(x, (64,), w, w),
    "RMSNorm": lambda x, w, m: F.rms_norm(x, (64,), w, eps=1e-3),
    "as written": lambda x, w, m: rms_norm(x, w),
    "1 + weight": lambda x, w, m: gemma_norm(x, w),
    "modulated": lambda x, w, m: modulated(x, *m.chunk(2, 1)),
    "modulated by parts of a product": lambda x, w, m: modulated(x, *(m @ m.t() @ m).split([64, 64], 1)),
}


@pytest.mark.parametrize("residual", [False, True], ids=["of an input", "of a sum"])
def test_norms_of_long_rows_are_part_of_what_quantizes(called, monkeypatch, residual):
    monkeypatch.setattr(quantize_in_graphs, "LONGEST", 32)
    calls, _ = called
    layers = Product(16, 64), Product(32, 64, seed=3)
    x, w = weight((2, 3, 64), 1, torch.bfloat16), weight((64,), 2, torch.bfloat16)
    m = weight((2, 128), 5, torch.bfloat16)
    given = {name: m if "modulated" in name else m[:, None, :64].contiguous() for name in NORMS}

    def network(x: Tensor, w: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
        x = x + torch.tanh(x) if residual else x
        normed = [norm(x, w, given[name]) for name, norm in NORMS.items()]
        return [*(layer(h) for h in normed for layer in layers), x + 1]

    got = torch.compile(network)(x, w, given)
    assert sorted(calls) == ["quantized_norm"] * len(NORMS) + ["scaled_product"] * len(layers) * len(NORMS)
    for one, other in zip(got, network(x, w, given), strict=True):
        assert compute_error(other.float(), one.float()) > 35


NOT_SUCH_NORMS = {
    "kept": lambda x, w: F.layer_norm(x, (64,), w),
    "of tokens": lambda x, w: F.layer_norm(x.transpose(1, 2), (64,)).transpose(1, 2) if x.shape[1] == 64 else x * w,
    "times rows": lambda x, w: F.layer_norm(x, (64,)) * x,
    "twice": lambda x, w: F.layer_norm(x, (64,), w) * w,
    "biased before": lambda x, w: (F.layer_norm(x, (64,)) + w) * w,
    "of other sums": lambda x, w: x * torch.rsqrt(x.float().abs().mean(-1, keepdim=True) + 1e-5),
    "times vectors of another dim": lambda x, w: (
        (F.layer_norm(x, (64,))[:, None].expand(2, 2, 64, 64)) * (1 + x[:, :1].repeat(1, 1, 1))
    ).flatten(0, 1),
    "unbiased": lambda x, w: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5),
}


def test_what_is_no_such_norm(called, monkeypatch):
    monkeypatch.setattr(quantize_in_graphs, "LONGEST", 32)
    calls, _ = called
    layer = Product(16, 64)
    x, w = weight((2, 64, 64), 1, torch.bfloat16), weight((64,), 2, torch.bfloat16)

    def network(x: Tensor, w: Tensor) -> list[Tensor]:
        made = {name: function(x, w).to(x.dtype) for name, function in NOT_SUCH_NORMS.items()}
        return [*(layer(h) for h in made.values()), made["kept"]]

    got = torch.compile(network)(x, w)
    assert calls == ["dynamic_product"] * len(NOT_SUCH_NORMS)
    for one, other in zip(got, network(x, w), strict=True):
        assert compute_error(other.float(), one.float()) > 30


@pytest.mark.parametrize("dtype", list(SPECS), ids=str)
def test_the_codes_are_those_of_the_spec(called, dtype, monkeypatch):
    """To the bit, of an activation that comes as it is."""
    monkeypatch.setattr(quantize_in_graphs, "follows_norm", lambda *_: True)
    calls, codes = called
    layer = Product(16, 128, dtype)
    x = weight((64, 128)) * torch.logspace(-30, 30, 64).unsqueeze(1)
    x[0, :8] = torch.tensor([0.5, -0.5, 1.5, 2.5, -2.5, 0.0, -0.0, 127.5])
    x[1] = 0
    x[2] *= 1e-12  # scales below the smallest normal number
    got = torch.compile(layer)(x)
    expected = SPECS[dtype].quantize(x)
    assert calls == ["scaled_product"]
    assert torch.equal(codes[0].view(torch.uint8), expected.qdata.view(torch.uint8))
    assert torch.equal(
        got, scaled_product(expected.qdata, expected.scale, layer.codes, layer.scale, x.dtype, layer.bias)
    )


HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


@pytest.mark.gpu
@HOPPER
@pytest.mark.parametrize(
    "config",
    [ao.Int8DynamicActivationInt8WeightConfig(), ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())],
    ids=["int8", "float8"],
)
@pytest.mark.parametrize("width", [1024, 1280, 3072])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_block_on_a_gpu(config, width, mode):
    torch.compiler.reset()
    block = Mlp(width).to("cuda", torch.bfloat16).requires_grad_(False)
    ao.quantize_(block, config)
    x = weight((4, 197, width), 0, torch.bfloat16).cuda()
    expected = block(x)
    got, code = run_and_get_code(torch.compile(block, mode=mode), x)
    text = "\n".join(code)
    assert "torch.ops.ao.dynamic_product.default(" not in text
    assert text.count("torch.ops.ao.scaled_product.default(") == 2
    assert text.count("torch.ops.ao.quantized_norm.default(") == (width > quantize_in_graphs.LONGEST)
    assert text.count("torch.ops.ao.quantized_activation.default(") == 1
    assert "torch.ops.ao.quantized.default(" not in text
    # The norm, with the codes, of rows that are not long; the residual is another.
    assert text.count("@triton.jit") <= 2
    assert compute_error(expected.float(), got.float()) > 35


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).unflatten(-1, (-1, 64)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


@pytest.mark.gpu
@HOPPER
@pytest.mark.parametrize(("width", "tokens"), [(1024, 197), (1280, 1000)])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_attention_on_a_gpu(width, tokens, mode):
    torch.compiler.reset()
    block = Attention(width).to("cuda", torch.bfloat16).requires_grad_(False)
    ao.quantize_(block, ao.Int8DynamicActivationInt8WeightConfig())
    x = weight((4, tokens, width), 0, torch.bfloat16).cuda()
    expected = block(x)
    compiled = torch.compile(block, mode=mode)
    _, code = run_and_get_code(compiled, x)
    text = "\n".join(code)
    assert text.count("torch.ops.ao.scaled_product_joined.default(") == 1
    assert text.count("torch.ops.ao.scaled_product.default(") + text.count("torch.ops.ao.dynamic_product.default(") == 1
    for _ in range(3):  # recorded, and replayed
        assert compute_error(expected.float(), compiled(x).float()) > 35


@pytest.mark.gpu
@HOPPER
@pytest.mark.parametrize("dtype", list(SPECS), ids=str)
@pytest.mark.parametrize("k", [256, 1024, 1280, 4096])
def test_the_codes_on_a_gpu_are_those_of_the_spec(dtype, k, monkeypatch):
    from ao.matmul.kernels import operators

    torch.compiler.reset()
    monkeypatch.setattr(quantize_in_graphs, "follows_norm", lambda *_: True)
    monkeypatch.setattr(quantize_in_graphs, "LONGEST", 4096)
    q = SPECS[dtype].quantize(weight((256, k), 0, torch.bfloat16)).cuda()
    x = (weight((700, k), 1) * torch.logspace(-9, 9, 700).unsqueeze(1)).bfloat16().cuda()
    x[1] = 0
    expected = SPECS[dtype].quantize(x)
    bias = weight((256,), 2, torch.bfloat16).cuda()
    out = operators.scaled_product(expected.qdata, expected.scale, q.qdata, q.scale, x.dtype, bias)
    with torch._inductor.config.patch(fx_graph_cache=False):
        product = torch.compile(lambda x: torch.ops.ao.dynamic_product(x, q.qdata, q.scale, False, bias))
        got, code = run_and_get_code(product, x)
    assert "torch.ops.ao.scaled_product.default(" in code[0]
    assert torch.equal(got, out)


@pytest.mark.gpu
@HOPPER
@pytest.mark.parametrize("function", list(FUNCTIONS))
@pytest.mark.parametrize("form", ["", "gated", "gated by other columns", "after columns", "gated, after columns"])
@pytest.mark.parametrize("dtype", list(SPECS), ids=str)
def test_activation_functions_on_a_gpu(function, form, dtype):
    """To less than rounding to bfloat16 loses, also far from zero."""
    from ao.matmul.kernels import operators

    for k in (96, 4096, 14336):
        x = torch.cat([weight((33, k), 0) * 2, weight((2, k), 1) * 20, torch.zeros(1, k)]).bfloat16().cuda()
        x[3, 5] = float("nan")
        other = weight((36, k), 2, torch.bfloat16).cuda() if "gated" in form else None
        before = weight((36, 1032), 3, torch.bfloat16).cuda() if "after" in form else None
        if "other columns" in form:
            other, x = torch.cat([other, x], 1).chunk(2, 1)
        exact = FUNCTIONS[function](x.float())
        made = (exact if other is None else exact * other).bfloat16()
        expected = SPECS[dtype].quantize(made if before is None else torch.cat([before, made], 1))
        codes, scale = operators.quantized_activation(x, other, function, dtype, before)
        there = torch.arange(36, device="cuda") != 3
        assert compute_error(expected.scale[there], scale[there]) > 50 and scale[3].isnan().all()
        assert compute_error(expected.dequantize()[there].float(), (codes.float() * scale)[there]) > 45


@pytest.mark.gpu
@HOPPER
@pytest.mark.parametrize("dtype", list(SPECS), ids=str)
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("centered", [True, False], ids=["LayerNorm", "RMSNorm"])
def test_norms_on_a_gpu(dtype, of, centered):
    """To what rounding to bfloat16 and to codes loses where a number is near the middle between two."""
    from ao.matmul.kernels import operators

    for k in (72, 1152, 1280, 3072, 4096, 14336):
        x = (weight((36, k), 0) * 3 + 0.5).to(of).cuda()
        x[3, 5] = float("nan")
        parts = weight((4, 3 * k), 1, of).cuda()
        one, each = parts[:1, :k], parts.chunk(3, 1)
        for w, added, b in ((None, False, None), (one, False, one), (one, True, None), (each[1], True, each[2])):
            exact = quantized_norm(
                x.cpu(), w if w is None else w.cpu(), b if b is None else b.cpu(), 1e-5, centered, added, dtype
            )
            codes, scale = operators.quantized_norm(x, w, b, 1e-5, centered, added, dtype)
            there = torch.arange(36) != 3
            assert compute_error(exact[1][there], scale[there].cpu()) > 45 and scale[3].isnan().all()
            expected = (exact[0].float() * exact[1])[there]
            assert compute_error(expected, (codes.float() * scale).cpu()[there]) > (45 if dtype == torch.int8 else 35)
