"""Products of a few tokens with several weights, in one launch."""

from __future__ import annotations

from functools import partial
from itertools import zip_longest

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch import Tensor, nn

import ao
from ao import compute_error
from ao.dtypes import MXFP4, NF4, NVFP4, Float8, Intx, QTensor
from ao.matmul.kernels import joined, quantize_in_graphs
from ao.matmul.kernels.reading import fields_of, reading_of


class Block(nn.Module):
    """A layer of a language model as the compiler sees it: which products share a token."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        sizes = {"q": (width, width), "k": (16, width), "v": (16, width), "o": (width, width)}
        sizes |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        self.layers = nn.ModuleDict({name: nn.Linear(k, n, bias=False) for name, (n, k) in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:])
        q, k, v = (self.layers[name](h) for name in "qkv")
        x = x + self.layers["o"](torch.tanh(q) * (k.sum() + v.mean()).to(q.dtype))
        h = F.rms_norm(x, x.shape[-1:])
        return x + self.layers["down"](F.silu(self.layers["gate"](h)) * self.layers["up"](h))


_FEW = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor? table, Tensor? outer_scale, Tensor? outer_zero_point"
SCHEMAS = {
    "gemv": "Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, int offset, bool act, Tensor? order=None",
    "few": f"Tensor x, {_FEW}, str reading",
    "fused": "Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, int offset",
    "dynamic_product": "Tensor x, Tensor qdata, Tensor columns, bool whole",
    "fused_joined": "Tensor x, Tensor[] qdata, Tensor[] scale, Tensor[] zero_point, int offset",
    "dynamic_product_joined": "Tensor x, Tensor[] qdata, Tensor[] columns, bool whole",
    "gemv_joined": "Tensor x, Tensor[] qdata, Tensor[] scale, Tensor[] zero_point, int offset, bool act, Tensor? order=None",
    "few_joined": f"Tensor x, {_FEW.replace('? ', ' ').replace('Tensor ', 'Tensor[] ')}, str reading",
}


@pytest.fixture
def on_a_cpu():
    """The operators of a GPU, on a CPU: how many weights each call had. `few` finds a weight by its codes, among `WEIGHTS`."""
    calls = []

    def gemv(x, qdata, scale, zero_point=None, offset=0, act=False, order=None):
        zero = 0 if zero_point is None else zero_point.float()
        x = x if order is None else x[:, order]
        return (x.float() @ ((qdata.float() - zero - offset) * scale.float()).t()).to(x.dtype)

    def few(x, codes, *_):
        return x @ WEIGHTS[codes.data_ptr()].dequantize().t()

    def alone(product, *args):
        calls.append(1)
        return product(*args)

    def several(product, x, *args):
        lists = [arg for arg in args if isinstance(arg, list)]
        calls.append(len(lists[0]))
        return torch.cat([product(x, *fields, *args[len(lists) :]).reshape(-1) for fields in zip_longest(*lists)])

    def dynamic(x, qdata, columns, whole):
        return gemv(x, qdata, columns)

    def shape(x, codes, *_):
        if isinstance(codes, list):
            return x.new_empty(x.shape[0] * sum(len(each) for each in codes))
        return x.new_empty(x.shape[0], codes.shape[0])

    products = {"gemv": gemv, "fused": gemv, "few": few, "dynamic_product": dynamic}

    with torch.library._scoped_library("ao", "FRAGMENT") as library:
        for name, schema in SCHEMAS.items():
            if not hasattr(torch.ops.ao, name):  # without Triton
                library.define(f"{name}({schema}) -> Tensor")
                torch.library.register_fake(f"ao::{name}", shape, lib=library)
            product = products[name.removesuffix("_joined")]
            library.impl(name, partial(several if name.endswith("joined") else alone, product), "CPU")
        yield calls
    joined._registered = quantize_in_graphs._registered = False  # without Triton the operators are gone
    WEIGHTS.clear()


WEIGHTS: dict[int, QTensor] = {}


class Few(nn.Module):
    """`ao::few` of a weight."""

    def __init__(self, w: QTensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(w, requires_grad=False)
        WEIGHTS[fields_of(w)[0].data_ptr()] = w

    def forward(self, x: Tensor) -> Tensor:
        found = reading_of(self.weight)
        assert found is not None
        reading, fields = found
        out = torch.ops.ao.few(x.reshape(-1, x.shape[-1]).contiguous(), *fields, reading.text)
        return out.reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    ("name", "tokens", "dynamic", "zero_points"),
    [
        pytest.param("gemv", 1, False, False, marks=pytest.mark.slow), ("gemv", 1, False, True),
        pytest.param("fused", 8, False, False, marks=pytest.mark.slow), ("fused", 64, False, True),
        ("fused", 8, True, True), ("dynamic_product", 8, False, False),
    ],
)  # fmt: skip
def test_the_compiler_joins_what_shares_tokens(on_a_cpu, name, tokens, dynamic, zero_points):
    import torch._inductor.graph

    joined.join_in_compiled_graphs()
    quantize_in_graphs.lower_in_compiled_graphs()
    block = Block(64, 128).requires_grad_(False)
    fields = {
        name: (torch.randint(-8, 8, layer.weight.shape, dtype=torch.int8), torch.rand(layer.weight.shape[0], 1) / 50)
        for name, layer in block.layers.items()
    }

    class Product(nn.Module):
        def __init__(self, layer: str) -> None:
            super().__init__()
            self.codes, self.scale = fields[layer]
            self.zero = self.codes[:, :1] // 4 if zero_points else None

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            rest = {"gemv": (self.zero, 0, False), "fused": (self.zero, 0), "dynamic_product": (False,)}[name]
            out = getattr(torch.ops.ao, name)(rows, self.codes, self.scale, *rest)
            return out.reshape(*x.shape[:-1], -1)

    block.layers = nn.ModuleDict({layer: Product(layer) for layer in fields})
    x = weight((1, tokens, 64))
    expected = block(block(x))
    on_a_cpu.clear()
    torch.compiler.reset()
    got = torch.compile(lambda x: block(block(x)), dynamic=dynamic)(x)
    assert on_a_cpu == [3, 1, 2, 1] * 2
    assert compute_error(expected, got) > 60


def test_columns_in_one_order_are_joined(on_a_cpu):
    import torch._inductor.graph

    joined.join_in_compiled_graphs()
    codes = [torch.randint(-8, 8, (24, 64), dtype=torch.int8) for _ in range(5)]
    scale = [torch.rand(24, 1) for _ in codes]
    one, other = torch.randperm(64).int(), torch.randperm(64).int()

    def products(x: Tensor) -> list[Tensor]:
        orders = (one, other, one, None, one)
        return [torch.ops.ao.gemv(x, q, s, None, 0, False, order) for q, s, order in zip(codes, scale, orders)]

    x = weight((1, 64))
    expected = products(x)
    on_a_cpu.clear()
    torch.compiler.reset()
    got = torch.compile(products)(x)
    assert on_a_cpu == [3, 1, 1]
    assert all(compute_error(e, g) > 60 for e, g in zip(expected, got))


def test_what_is_not_alike_stays_alone(on_a_cpu):
    import torch._inductor.graph

    joined.join_in_compiled_graphs()
    codes = torch.randint(-8, 8, (24, 64), dtype=torch.int8)
    scale, wide = torch.rand(24, 1), torch.rand(24, 1, dtype=torch.float64)

    def products(x: Tensor) -> tuple[Tensor, ...]:
        one = torch.ops.ao.gemv(x, codes, scale, None, 0, False)
        return (
            one,
            torch.ops.ao.gemv(x, codes, scale, None, 8, False),  # another offset
            torch.ops.ao.gemv(x, codes, wide, None, 0, False),  # another dtype
            torch.ops.ao.gemv(x, codes[:12], scale[:12], None, 0, False),  # no multiple of 8 rows
            torch.ops.ao.gemv(x, codes, one.t(), None, 0, False),  # a field that is not there yet
        )

    x = weight((1, 64))
    expected = products(x)
    on_a_cpu.clear()
    torch.compiler.reset()
    got = torch.compile(products)(x)
    assert on_a_cpu == [1] * 5
    assert all(compute_error(e, g) > 60 for e, g in zip(expected, got))


FORMATS = [NF4, Intx(3, (1, 64)), NVFP4, Intx(2, (1, 32), signed=False, zero_point="joint")]


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        pytest.param(spec, tokens, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, spec in enumerate(FORMATS)
        for j, tokens in enumerate((1, 8))
    ],
    ids=str,
)
def test_the_compiler_joins_any_format(on_a_cpu, spec, tokens):
    import torch._inductor.graph

    joined.join_in_compiled_graphs()
    quantize_in_graphs.lower_in_compiled_graphs()
    block = Block(64, 128).requires_grad_(False)
    block.layers = nn.ModuleDict({name: Few(spec.quantize(layer.weight)) for name, layer in block.layers.items()})
    x = weight((1, tokens, 64))
    expected = block(block(x))
    on_a_cpu.clear()
    torch.compiler.reset()
    got = torch.compile(lambda x: block(block(x)))(x)
    assert on_a_cpu == [3, 1, 2, 1] * 2
    assert compute_error(expected, got) > 60


@pytest.mark.parametrize(
    ("tokens", "dynamic", "specs"),
    [
        (1, False, [NF4, Intx(3, (1, 64)), Intx(3, (1, 32))]),
        (1, False, [Intx(8), Intx(8)]),  # which has no kernel for one token by this operator
        (2, False, [NF4, Intx(3, (1, 64))]),
        (2, True, [NF4, Intx(3, (1, 64))]),
        (65, False, [NF4, NF4]),  # which are decoded to memory
    ],
    ids=str,
)
def test_of_any_format_what_is_not_alike_stays_alone(on_a_cpu, tokens, dynamic, specs):
    import torch._inductor.graph

    joined.join_in_compiled_graphs()
    layers = nn.ModuleList(Few(spec.quantize(weight((16, 64), i))) for i, spec in enumerate(specs))
    x = weight((tokens, 64))
    expected = [layer(x) for layer in layers]
    on_a_cpu.clear()
    torch.compiler.reset()
    got = torch.compile(lambda x: [layer(x) for layer in layers], dynamic=dynamic)(x)
    assert on_a_cpu == [1] * len(specs)
    assert all(compute_error(e, g) > 60 for e, g in zip(expected, got))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "spec",
    [NF4, Intx(3, (1, 64)), Intx(2, (1, 32), signed=False, zero_point="joint"), Intx(5, (1, 32)), MXFP4, NVFP4],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_format_on_a_gpu(spec, dtype):
    from ao.matmul.kernels import one_token_mma, operators

    for k, sizes in ((4096, (4096, 1024, 1024)), (1024, (24, 264)), (14336, (64, 8, 16)), (256, (8, 8, 8))):
        x = weight((1, k), 0, dtype).cuda()
        read = [reading_of(spec.quantize(weight((n, k), 1 + i, dtype)).cuda()) for i, n in enumerate(sizes)]
        assert all(found is not None for found in read)
        expected = torch.cat([operators.few(x, *fields, reading.text) for reading, fields in read], 1).view(-1)
        fields = [[t for t in each if t is not None] for each in zip(*(fields for _, fields in read))]
        got = operators.few_joined(x, *fields, read[0][0].text)
        one_way = all(reading.for_one_token for reading, _ in read)
        if one_way and not read[0][0].in_integers:  # of more rows K may be cut otherwise
            rows = (*(reading.n for reading, _ in read), sum(sizes))
            one_way = len({one_token_mma.tile_of(read[0][0]._replace(n=n), x.device) for n in rows}) == 1
        if one_way:
            assert torch.equal(expected, got), (k, sizes)
        else:  # all go where those with the fewest rows go
            assert compute_error(expected.float(), got.float()) > 45, (k, sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "spec",
    [
        Intx(4, (1, 128)), Intx(4, (1, 128), signed=False), Intx(4, (1, 32), signed=False, zero_point="joint"), Intx(8),
        Intx(8, (1, 64)), Intx(8, act=Intx(8)), Float8(), Float8(act=Float8()),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(spec, dtype):
    from ao.matmul.gpu import _weight, gemv_accepts
    from ao.matmul.kernels import operators

    for k, sizes in ((4096, (512, 128, 128)), (1024, (24, 264)), (14336, (64, 8, 16)), (256, (8, 8, 8))):
        x = weight((1, k), 0, dtype).cuda()
        weights = [spec.quantize(weight((n, k), 1 + i, dtype)).cuda() for i, n in enumerate(sizes)]
        assert all(gemv_accepts(x, w) for w in weights)
        act, fields = spec.act is not None, [_weight(w.spec.operand(w)) for w in weights]
        codes, scales, zeros, (offset, *_) = zip(*fields)
        expected = torch.cat([operators.gemv(x, *f, act) for f in fields], 1)
        zeros = [z for z in zeros if z is not None]
        got = operators.gemv_joined(x, codes, scales, zeros, offset, act)
        assert torch.equal(expected.view(-1), got), (k, sizes)
        if not act and not codes[0].is_floating_point():
            order = torch.randperm(k).int().cuda()
            got = operators.gemv_joined(x[:, torch.argsort(order)], codes, scales, zeros, offset, act, order)
            assert compute_error(expected.view(-1).float(), got.float()) > 45, (k, sizes)  # in other tiles


TOKENS = (2, 8, 16, 17, 33, 64, 65)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "spec",
    [NF4, Intx(3, (1, 64)), Intx(2, (1, 32), signed=False, zero_point="joint"), Intx(8, (1, 16)), MXFP4, NVFP4],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tokens_in_any_format_on_a_gpu(spec, dtype):
    from ao.matmul.kernels import operators
    from ao.matmul.kernels.several import cut

    for k, sizes in ((4096, (1024, 256, 256)), (1024, (24, 264)), (256, (8, 8, 8))):
        read = [reading_of(spec.quantize(weight((n, k), 1 + i, dtype)).cuda()) for i, n in enumerate(sizes)]
        assert all(found is not None for found in read)
        fields = [[t for t in each if t is not None] for each in zip(*(fields for _, fields in read))]
        for m in TOKENS:
            x = weight((m, k), 0, dtype).cuda()
            got = operators.few_joined(x, *fields, read[0][0].text)
            for (reading, own), y in zip(read, cut(got, m, sizes)):
                assert compute_error(operators.few(x, *own, reading.text).float(), y.float()) > 45, (m, k, sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "spec",
    [
        Intx(4, (1, 128)), Intx(4, (1, 128), signed=False), Intx(8), Intx(8, (1, 64)), Float8(),
        Intx(8, act=Intx(8)), Float8(act=Float8()), Float8(act=Float8(block=(-1, -1))),
    ],
    ids=str,
)  # fmt: skip
def test_tokens_on_a_gpu(spec):
    from ao.matmul.gpu import _weight
    from ao.matmul.kernels import operators
    from ao.matmul.kernels.several import cut

    for k, sizes in ((4096, (1024, 256, 256)), (14336, (128, 64)), (1024, (24, 264)), (1024, (8192, 8192, 64))):
        weights = [spec.quantize(weight((n, k), 1 + i, torch.bfloat16)).cuda() for i, n in enumerate(sizes)]
        for m in TOKENS:
            x = weight((m, k), 0, torch.bfloat16).cuda()
            if spec.act is None:
                codes, scales, zeros, (offset, *_) = zip(*(_weight(w.spec.operand(w)) for w in weights))
                each = [operators.fused(x, *f, offset) for f in zip(codes, scales, zeros)]
                got = operators.fused_joined(x, codes, scales, [z for z in zeros if z is not None], offset)
            elif k % 16 == 0 and all(n % 16 == 0 for n in sizes):
                fields = [(w.spec.operand(w).codes, w.spec.operand(w).scale.float()) for w in weights]
                whole = spec.act.block == (-1, -1)
                each = [operators.dynamic_product(x, *f, whole) for f in fields]
                got = operators.dynamic_product_joined(x, *zip(*fields), whole)
            else:
                continue  # which scaled_mm does not take
            for expected, y in zip(each, cut(got, m, sizes)):
                assert compute_error(expected.float(), y.float()) > 45, (m, k, sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ao.Int4WeightOnlyConfig(group_size=128), "gemv"), (ao.Int8WeightOnlyConfig(), "gemv"), (NF4, "few"), (MXFP4, "few"),
        (NVFP4, "few"), (Intx(3, (1, 64)), "few"), (Intx(4, (1, 32), signed=False, zero_point="joint"), "gemv"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_block_on_a_gpu(config, name, mode, tokens):
    from torch._inductor.utils import run_and_get_code

    if name == "gemv" and tokens > 1:
        name = "few" if isinstance(config, Intx) else "fused"
    block = Block(1024, 2048).to("cuda", torch.bfloat16).requires_grad_(False)
    ao.quantize_(block, config)
    x = weight((tokens, 1, 1024), 0, torch.bfloat16).cuda()
    expected = block(x)
    compiled = torch.compile(block, mode=mode)
    got, code = run_and_get_code(compiled, x)
    assert sum(text.count(f"ao.{name}_joined.default(") for text in code) == 2
    assert compute_error(expected.float(), got.float()) > 40
    for _ in range(3):
        assert compute_error(expected.float(), compiled(x).float()) > 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [Float8(act=Float8()), Intx(8, act=Intx(8))], ids=str)
def test_tokens_are_quantized_once_on_a_gpu(config):
    from torch._inductor.utils import run_and_get_code

    block = Block(1024, 2048).to("cuda", torch.bfloat16).requires_grad_(False)
    ao.quantize_(block, config)
    x = weight((8, 1, 1024), 0, torch.bfloat16).cuda()
    expected = block(x)
    got, code = run_and_get_code(torch.compile(block, dynamic=False), x)
    assert sum(text.count("ao.dynamic_product_joined.default(") for text in code) == 2
    assert compute_error(expected.float(), got.float()) > 30
