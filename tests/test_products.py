"""Products of two quantized matrices, and casts that transpose: against the decoded operands, on every device."""

from __future__ import annotations

import pytest
import torch
from cases import weight
from torch import nn

from ao.dtypes import NF4, Float8, Intx, Operand, reciprocal
from ao.matmul import (
    cast_whole,
    codes_both,
    codes_of,
    codes_of_transposed,
    has_float8,
    is_square,
    scaled_product,
)
from ao.quant import compute_error
from ao.train import (
    Float8LinearConfig,
    bitnet_training,
    convert_to_low_precision_training,
    int8_mixed_precision_training,
)

ROW, WHOLE = Float8(), Float8(block=(-1, -1))
PARTS, SQUARES = Float8(block=(1, 128), power_of_two=True), Float8(block=(128, 128), power_of_two=True)
INT8 = Intx(8, narrow=True)
TERNARY = Intx(2, (-1, -1), symmetric=True, narrow=True)
PAIRS = [
    (WHOLE, WHOLE),
    (Float8("e5m2", (-1, -1)), WHOLE),
    (ROW, ROW),
    (ROW, WHOLE),
    (PARTS, SQUARES),
    (PARTS, PARTS),
    (INT8, INT8),
    (Intx(8, (-1, -1)), INT8),
    (INT8, TERNARY),
    (None, TERNARY),
    (NF4, None),
    (None, None),
]


@pytest.mark.parametrize("a, b", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(512, 256, 512), (32, 512, 128)], ids=str)
def test_product(a, b, shape, device):
    """As of the numbers that the codes stand for, in the dtype of the result."""
    m, n, k = shape
    for dtype, least in ((torch.bfloat16, 45), (torch.float32, 45 if device == "cuda" else 100)):
        x, w = (t.to(device, dtype) for t in (weight((m, k)), weight((n, k), 1)))
        values = [t.float() if s is None else s.quantize(t).decode() for t, s in ((x, a), (w, b))]
        expected = values[0] @ values[1].t()
        for emulate in (False, True):
            out = scaled_product(codes_of(x, a), codes_of(w, b), dtype, emulate=emulate)
            assert out.dtype == dtype and compute_error(expected, out) > least


@pytest.mark.parametrize(
    "spec", [WHOLE, Float8("e5m2", (-1, -1)), ROW, PARTS, SQUARES, INT8, Intx(8, (-1, -1)), TERNARY, NF4], ids=str
)
@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (384, 16)], ids=str)
def test_transposed(spec, shape, device):
    """The same codes as of the transpose, bit for bit."""
    if any(s % b for s, b in zip(reversed(shape), spec.block) if b > 0) or (spec is SQUARES and shape[1] % 128):
        pytest.skip("the blocks do not fit")
    x = weight(shape, dtype=torch.bfloat16).to(device)
    x[3], x[:, 5] = 0, 0
    expected, found = codes_of(x.t().contiguous(), spec), codes_of_transposed(x, spec)
    ways = [found]
    if is_square(spec):
        same, turned = codes_both(x, spec)
        ways.append(turned)
        for a, b in zip(tensors(codes_of(x, spec)), tensors(same)):
            assert torch.equal(as_numbers(a), as_numbers(b))
        ways.append(codes_of_transposed(spec.quantize(x)))
    for codes in ways:
        assert isinstance(codes, Operand) == isinstance(expected, Operand)
        for a, b in zip(tensors(expected), tensors(codes)):
            assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(as_numbers(a), as_numbers(b))


def tensors(codes: Operand | torch.Tensor) -> list[torch.Tensor]:
    return [codes.codes, codes.scale] if isinstance(codes, Operand) else [codes]


def as_numbers(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8) if t.element_size() == 1 else t


@pytest.mark.parametrize("spec", [WHOLE, Float8("e5m2", (-1, -1)), Intx(8, (-1, -1)), TERNARY], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cast_with_a_scale_from_elsewhere(spec, dtype, device):
    """As `quantize`, to the bit, also beyond the largest code and where rows do not lie side by side."""
    x = weight((100, 1000)).to(device, dtype)
    for data, factor in ((x, 1.0), (x, 0.4), (x[:, :992], 1.0), (x.t(), 1.0), (x[:0], 1.0), (torch.zeros_like(x), 1.0)):
        scale = spec.choose_qparams(data, (1, 1))["scale"] * factor
        expected, found = spec.quantize(data, scale=scale), cast_whole(data, spec, scale, reciprocal(scale))
        assert found.spec == spec and found.dtype == dtype and found.shape == data.shape
        for name, field in expected.fields().items():
            assert torch.equal(field.view(torch.uint8), found.fields()[name].view(torch.uint8)), (name, factor)


def test_odd_shapes(device):
    x, w = weight((7, 36)).to(device), weight((10, 36), 1).to(device)
    out = scaled_product(codes_of(x, INT8), codes_of(w, INT8), torch.float32)
    assert compute_error(INT8.quantize(x).dequantize() @ INT8.quantize(w).dequantize().t(), out) > 100
    assert scaled_product(codes_of(x[:0], INT8), codes_of(w, INT8), torch.float32).shape == (0, 10)
    assert codes_of_transposed(x[:0], INT8).codes.shape == (36, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_on_a_gpu():
    """The operators are part of one graph, and the compiler calls what eager code calls."""
    if not has_float8(torch.device("cuda")):
        pytest.skip("needs float8")

    def product(x, w):
        a, turned = codes_both(x, WHOLE)
        return scaled_product(a, codes_of(w, WHOLE), torch.bfloat16), turned.codes.view(torch.uint8)

    x, w = weight((256, 512)).cuda().bfloat16(), weight((128, 512), 1).cuda().bfloat16()
    for expected, found in zip(product(x, w), torch.compile(product, fullgraph=True)(x, w)):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("a, b", PAIRS, ids=str)
def test_product_in_autocast(a, b):
    """Bit for bit as without: sums over codes are larger than float16 holds, and need more bits than bfloat16 has."""
    x, w = codes_of(weight((64, 4096), dtype=torch.float16), a), codes_of(weight((128, 4096), 1), b)
    expected = scaled_product(x, w, torch.float16, emulate=True)
    assert expected.isfinite().all()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(scaled_product(x, w, torch.float16, emulate=True), expected)


@pytest.mark.parametrize(
    "config",
    [
        Float8LinearConfig(),
        Float8LinearConfig.from_recipe_name("rowwise"),
        int8_mixed_precision_training(),
        bitnet_training(),
    ],
    ids=str,
)
def test_training_in_autocast(config):
    """Forward and backward, the latter inside of autocast too: as of a layer in that dtype."""
    x = weight((32, 256), 1)
    for dtype in (torch.float16, torch.bfloat16):
        found = []
        graph = dtype == torch.float16 and config == Float8LinearConfig()  # one, as it takes long
        for way in ("cast", "eager", *(["compiled"] if graph else [])):
            layer = nn.Linear(256, 256, bias=False)
            layer.weight.data.copy_(weight((256, 256)))
            layer = convert_to_low_precision_training(nn.Sequential(layer), config)
            z = x.clone().requires_grad_()
            run = torch.compile(layer, backend="aot_eager", fullgraph=True) if way == "compiled" else layer
            with torch.autocast("cpu", dtype, enabled=way != "cast"):
                y = run(z) if way != "cast" else layer.to(dtype)(z.to(dtype))
                y.sum().backward()
            found.append([t.float() for t in (y.detach(), z.grad, layer[0].weight.grad)])
        for expected, *others in zip(*found):
            assert expected.isfinite().all() and all(compute_error(expected, t) > 40 for t in others)
