"""Products of MX and NVFP4 on both sides: exact numbers, the layout of scales, and the chip's product, traced without data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch._subclasses.fake_tensor import FakeTensorMode

from ao.dtypes import MXFP4, MXFP6, MXFP8, MXINT8, NVFP4, FloatX
from ao.matmul import block_scaled, gpu, linear, path_name, product, swizzle, unswizzle
from ao.matmul.block_scaled import multiplies

TWO_SIDED = [
    replace(MXFP8, act=MXFP8),
    replace(MXFP4, act=replace(MXFP8, scale_rule="rceil")),
    replace(MXFP6, act=MXFP6),
    replace(NVFP4, act=NVFP4),
    replace(NVFP4, scale="e4m3", scale_spec=None, act=NVFP4),
    replace(MXINT8, act=MXINT8),
    replace(NVFP4, act=MXFP8),
]


def test_swizzle():
    """The 32_4_4 tile of cuBLAS: the scale of (r, c) is at (r % 32) * 16 + (r // 32) * 4 + c, tiles row by row."""
    tile = swizzle(torch.arange(512).remainder(251).to(torch.uint8).view(128, 4))
    expected = [(r + i * 32) * 4 + c for r in range(32) for i in range(4) for c in range(4)]
    assert expected[:20] == [0, 1, 2, 3, 128, 129, 130, 131, 256, 257, 258, 259, 384, 385, 386, 387, 4, 5, 6, 7]
    assert tile.tolist() == [e % 251 for e in expected]
    for rows, columns in ((1, 1), (130, 5), (256, 8), (300, 3)):
        scale = torch.randint(1, 255, (rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        flat = swizzle(scale)
        assert flat.numel() == -(-rows // 128) * 128 * -(-columns // 4) * 4
        assert torch.equal(unswizzle(flat, rows, columns), scale)
        r, c, tiles = rows - 1, columns - 1, -(-columns // 4)
        place = (r // 128 * tiles + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
        assert flat[place] == scale[r, c] and int(flat.count_nonzero()) == scale.numel()
    assert swizzle(scale.view(torch.float8_e8m0fnu)).dtype == torch.float8_e8m0fnu
    with pytest.raises(ValueError, match="unswizzle: scale has 1536 elements"):
        unswizzle(flat, 128, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", TWO_SIDED, ids=str)
def test_emulated_exactly(spec, dtype):
    """The sum of the products of the rounded numbers, in float64, is what comes out, but for its last rounding."""
    w, x = weight((48, 128), dtype=dtype), weight((5, 128), 1, dtype)
    q = spec.quantize(w)
    exact = spec.act.quantize(x.float()).dequantize().double() @ spec.quantize(w.float()).dequantize().double().t()
    found = F.linear(x, q)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=2e-5)
    assert path_name(x, q) in ("emulated", "pieces", "dequantize")


def test_large_weights_in_pieces_and_compiled():
    q = replace(NVFP4, act=NVFP4).quantize(weight((2048, 1024), dtype=torch.bfloat16))
    x = weight((3, 1024), 1, torch.bfloat16)
    seen = NVFP4.quantize(x.float()).dequantize().double()
    exact = seen @ NVFP4.quantize(weight((2048, 1024), dtype=torch.bfloat16).float()).dequantize().double().t()
    torch.testing.assert_close(F.linear(x, q).double(), exact, rtol=2**-8, atol=1e-4)
    small = replace(NVFP4, act=NVFP4).quantize(weight((64, 128)))
    x = weight((3, 128), 1)
    torch.testing.assert_close(torch.compile(F.linear, fullgraph=True)(x, small), F.linear(x, small))


@pytest.fixture
def blackwell(monkeypatch):
    """A chip that is not there: tensors without data, of a CPU that is said to have its products."""
    for place in (block_scaled, gpu, product):
        monkeypatch.setattr(place, "has_block_scaled", lambda device: True)
    monkeypatch.setitem(linear.PATHS, "cpu", gpu.PATHS)
    with FakeTensorMode() as mode:
        yield mode


@pytest.mark.parametrize(
    "spec", [replace(MXFP8, act=MXFP8), replace(MXFP4, act=MXFP4), replace(NVFP4, act=NVFP4)], ids=str
)
def test_the_product_of_the_chip(spec, blackwell, monkeypatch):
    """Which bytes of which shapes `scaled_mm` gets, by PyTorch's own checks of them."""
    calls = []
    real = F.scaled_mm

    def seen(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_mm", seen)
    w = torch.empty(256, 512, dtype=torch.bfloat16)
    x = torch.empty(2, 100, 512, dtype=torch.bfloat16)
    q = spec.quantize(w)
    assert path_name(x, q) == "block_scaled"
    out = F.linear(x, q)
    assert out.shape == (2, 100, 256) and out.dtype == torch.bfloat16
    a, _, scale_a, recipes, scale_b, *_ = calls[-1]
    block = spec.block[1]
    assert a.dtype == (torch.float4_e2m1fn_x2 if block == 16 else torch.float8_e4m3fn)
    assert scale_a[0].numel() == 256 * 512 // block and scale_b[0].numel() == 256 * 512 // block
    assert len(scale_a) == len(recipes) == (2 if spec.act == NVFP4 else 1)
    odd = spec.quantize(torch.empty(40, 512, dtype=torch.bfloat16))
    assert path_name(x, odd) == "emulated"


@pytest.mark.parametrize("precision", ["mxfp8", "mxfp4", "nvfp4"])
def test_training_on_the_chip(precision, blackwell, monkeypatch):
    """All three products, forward and backward, are those of the chip."""
    from ao.train import convert_to_precision

    calls, real = [], F.scaled_mm
    monkeypatch.setattr(F, "scaled_mm", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    layer = convert_to_precision(torch.nn.Linear(128, 256, bias=False, dtype=torch.bfloat16), precision)
    x = torch.empty(64, 128, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert len(calls) == 3 and x.grad.shape == x.shape and layer.weight.grad.shape == (256, 128)


def test_what_the_chip_multiplies():
    """One form on both sides."""
    x = weight((32, 128))

    def operand(spec: FloatX):
        return spec.operand(spec.quantize(x))

    assert multiplies(operand(MXFP8), operand(MXFP8)) and multiplies(
        operand(NVFP4), operand(replace(NVFP4, block=(16, 16)))
    )
    assert multiplies(operand(MXFP8), operand(MXFP4)) and multiplies(operand(MXFP6), operand(FloatX(3, 2)))
    for a, b in ((NVFP4, MXFP4), (FloatX(5, 2), FloatX(5, 2)), (MXFP8, FloatX(4, 3, (1, 64)))):
        assert not multiplies(operand(a), operand(b))
    one_level = replace(NVFP4, scale="e4m3", scale_spec=None)
    assert multiplies(operand(one_level), operand(one_level)) and not multiplies(operand(one_level), operand(NVFP4))
    short = FloatX(2, 1, (1, 16))
    assert not multiplies(operand(short), operand(short))


def test_codes_as_the_chip_reads_them():
    """Two in a byte, the even one in the low half, and scales that torch decodes to ours."""
    q = NVFP4.quantize(weight((32, 64)))
    octets = block_scaled._as_the_chip_reads(q.spec.operand(q)).view(torch.uint8)
    codes = torch.stack([octets & 15, octets >> 4], -1).reshape(32, 64)
    scale = q.scale.dequantize().repeat_interleave(16, 1)
    assert torch.equal(q.spec.values(codes) * scale, q.dequantize())
    for spec in (MXFP8, MXFP4, MXFP6, FloatX(3, 2)):
        q = spec.quantize(weight((32, 64)))
        values = block_scaled._as_the_chip_reads(q.spec.operand(q)).float()
        scale = q.spec.operand(q).powers.view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
        assert torch.equal(values * scale, q.dequantize())
