"""Products of one token with several weights, in one launch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch import Tensor, nn

import ao
from ao import compute_error
from ao.dtypes import Float8, Intx
from ao.matmul.kernels import joined


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


@pytest.fixture
def on_a_cpu():
    """The operators of a GPU, on a CPU: how many weights each call had."""
    calls = []

    def one(x, qdata, scale, zero_point, offset, act):
        zero = 0 if zero_point is None else zero_point.float()
        return (x.float() @ ((qdata.float() - zero - offset) * scale.float()).t()).to(x.dtype)

    def several(x, qdata, scale, zero_point, offset, act):
        calls.append(len(qdata))
        zeros = zero_point or [None] * len(qdata)
        return torch.cat([one(x, q, s, z, offset, act) for q, s, z in zip(qdata, scale, zeros)], 1)

    def alone(*args):
        calls.append(1)
        return one(*args)

    with torch.library._scoped_library("ao", "FRAGMENT") as library:
        if not hasattr(torch.ops.ao, "gemv"):  # without Triton
            library.define(
                "gemv(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, int offset, bool act) -> Tensor"
            )
            library.define(
                "gemv_joined(Tensor x, Tensor[] qdata, Tensor[] scale, Tensor[] zero_point, int offset, bool act) -> Tensor"
            )
            torch.library.register_fake("ao::gemv", lambda x, q, *_: x.new_empty(1, q.shape[0]), lib=library)
            torch.library.register_fake(
                "ao::gemv_joined", lambda x, q, *_: x.new_empty(1, sum(w.shape[0] for w in q)), lib=library
            )
        library.impl("gemv", alone, "CPU")
        library.impl("gemv_joined", several, "CPU")
        yield calls
    joined._registered = False  # without Triton the operator is gone


@pytest.mark.parametrize("zero_points", [False, True])
def test_the_compiler_joins_what_shares_a_token(on_a_cpu, zero_points):
    import torch._inductor.graph

    joined.join_in_compiled_graphs()
    block = Block(64, 128).requires_grad_(False)
    fields = {
        name: (torch.randint(-8, 8, layer.weight.shape, dtype=torch.int8), torch.rand(layer.weight.shape[0], 1) / 50)
        for name, layer in block.layers.items()
    }

    class Product(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.codes, self.scale = fields[name]
            self.zero = self.codes[:, :1] // 4 if zero_points else None

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            out = torch.ops.ao.gemv(rows, self.codes, self.scale, self.zero, 0, False)
            return out.reshape(*x.shape[:-1], -1)

    block.layers = nn.ModuleDict({name: Product(name) for name in fields})
    x = weight((1, 1, 64))
    expected = block(block(x))
    on_a_cpu.clear()
    torch.compiler.reset()
    got = torch.compile(lambda x: block(block(x)))(x)
    assert on_a_cpu == [3, 1, 2, 1] * 2
    assert compute_error(expected, got) > 60


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
        got = operators.gemv_joined(x, codes, scales, [z for z in zeros if z is not None], offset, act)
        assert torch.equal(expected, got), (k, sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [ao.Int4WeightOnlyConfig(group_size=128), ao.Int8WeightOnlyConfig()], ids=str)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_block_on_a_gpu(config, mode):
    from torch._inductor.utils import run_and_get_code

    block = Block(1024, 2048).to("cuda", torch.bfloat16).requires_grad_(False)
    ao.quantize_(block, config)
    x = weight((1, 1, 1024), 0, torch.bfloat16).cuda()
    expected = block(x)
    compiled = torch.compile(block, mode=mode)
    got, code = run_and_get_code(compiled, x)
    assert sum(text.count("ao.gemv_joined.default(") for text in code) == 2
    assert compute_error(expected.float(), got.float()) > 40
    for _ in range(3):
        assert compute_error(expected.float(), compiled(x).float()) > 40
