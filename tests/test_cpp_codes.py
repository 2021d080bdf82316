"""Quantizing much data on a CPU by C++ (ao/dtypes/cpp_codes.py): the bits of PyTorch's operators, and when it is asked for."""

from __future__ import annotations

import pytest
import torch

from ao.dtypes import (
    FP6,
    MXFP4,
    MXFP6,
    MXFP8,
    NF4,
    NVFP4,
    Codebook,
    Float8,
    FloatX,
    Intx,
    QTensor,
    cpp,
    cpp_codes,
    cpp_compiler,
)
from ao.dtypes import pieces as pieces_module

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler")

N, K = 48, 1024


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Data of a few thousand numbers is large, and no kind has been seen."""
    monkeypatch.setitem(pieces_module.ELEMENTS, "cpu", 2**13)
    monkeypatch.setattr(cpp_codes, "_coders", {})
    monkeypatch.setattr(cpp_codes, "WORTH", 2**60)


def data(dtype):
    x = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-3, 2, N)[:, None]
    x[3], x[4, :256], x[5, 7] = 0, 0.5, 1e4
    x[6], x[7] = x[6].abs(), -x[7].abs()
    return x.to(dtype)


def leaves(q):
    fields = [f for f in q.fields().values() if f is not None]
    return [t for f in fields for t in (leaves(f) if isinstance(f, QTensor) else [f])]


def same(a, b):
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(leaves(a), leaves(b), strict=True)
    )


def compiled(spec, x, monkeypatch):
    """What the spec gives for x by C++."""
    monkeypatch.setattr(cpp_codes, "WORTH", 0)
    coder = cpp_codes.coder(spec, x, spec.grid(x.shape))
    assert coder is not None
    coder.ready(x)  # true at once where the file is found before this returns
    coder.thread.join()
    assert coder.ready(x)
    return spec.quantize(x)


SPECS = [
    Intx(4, (1, 128)),
    Intx(8),
    Intx(3, (1, 64), signed=False),
    Intx(4, (1, 32), zero_point="joint"),
    Intx(7, (1, 64), zero_point="float", scale_dtype="bfloat16"),
    NF4,
    Float8(),
    MXFP4,
]
MORE = [
    Intx(1, (1, 32), signed=False),
    Intx(2, (1, 32), symmetric=True, clip=False),
    Intx(5, (1, 32), symmetric=True),
    Intx(6, (1, 128), signed=False, symmetric=True),
    Intx(8, (1, 64), symmetric=False, scale_dtype="float16"),
    Intx(8, narrow=True),
    Float8(block=(1, 128), power_of_two=True),
    Codebook("fp4", (1, 64)),
    Codebook((-1.0, 0.0, 0.25, 1.0), (1, 32), scale_dtype="bfloat16"),
    FP6,
    MXFP6,
    MXFP8,
    FloatX(3, 2, (1, 32), "e4m3"),
]


CASES = [(SPECS[0], torch.float32), *((spec, torch.bfloat16) for spec in SPECS)]  # a second each to compile
ALL = [(spec, dtype) for spec in [*SPECS, *MORE] for dtype in (torch.bfloat16, torch.float32)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in CASES]


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_the_bits_are_those_of_pytorch(spec, dtype, monkeypatch):
    x = data(dtype)
    expected = spec.quantize(x)
    assert same(compiled(spec, x, monkeypatch), expected)


@pytest.mark.parametrize("flags", [(), ("-DW=16",)], ids=["eight lanes", "sixteen lanes"])
def test_other_machines(flags, monkeypatch):
    spec, x = Intx(7, (1, 32)), data(torch.bfloat16)
    expected = spec.quantize(x)
    monkeypatch.setattr(cpp, "INSTRUCTIONS", {torch.backends.cpu.get_cpu_capability(): flags})
    assert same(compiled(spec, x, monkeypatch), expected)


def test_a_nan_makes_its_block_nan(monkeypatch):
    x = data(torch.bfloat16)
    x[2, 100] = torch.nan
    values = compiled(Intx(4, (1, 128), symmetric=True), x, monkeypatch).dequantize()
    assert values[2, :128].isnan().all() and values.isnan().sum() == 128


def test_a_compiler_is_asked_after_much_data_and_never_waited_for(monkeypatch):
    spec, x = Intx(4, (1, 128)), data(torch.float32)
    monkeypatch.setattr(cpp_codes, "WORTH", 3 * x.numel() - 1)
    asked = []
    monkeypatch.setattr(cpp_codes, "cpp_library", lambda *args: asked.append(args))
    for _ in range(2):
        spec.quantize(x)
    assert not asked
    first = spec.quantize(x)
    (coder,) = cpp_codes._coders.values()
    coder.thread.join()
    assert len(asked) == 1 and coder.library is None
    assert same(spec.quantize(x), first) and len(asked) == 1  # one that fails is not asked again


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (Intx(2, (1, 32), symmetric=True), (N, K)),  # scaled by a mean
        (Intx(1, (1, 32), symmetric=True, clip=False), (N, K)),  # codes are signs
        (Intx(8, rounding="stochastic"), (N, K)),
        (NVFP4, (N, K)),
        (Float8("e5m2"), (N, K)),
        (Intx(8, (-1, -1)), (N, K)),
        (Intx(8, (1, 16)), (N, K)),
        (Intx(8), (4, N, K)),
    ],
    ids=str,
)
def test_what_goes_by_pytorch(spec, shape):
    x = torch.randn(shape)
    assert cpp_codes.coder(spec, x, spec.grid(x.shape)) is None
