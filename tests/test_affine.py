"""The affine functions, against the formats that store the same numbers."""

from __future__ import annotations

import pytest
import torch

from ao.dtypes import Intx
from ao.quant import (
    MappingType,
    ZeroPointDomain,
    choose_qparams_affine,
    dequantize_affine,
    fake_quantize_affine,
    int_scaled_matmul,
    quantize_affine,
)

CASES = [
    (MappingType.ASYMMETRIC, (1, 32), torch.uint4, Intx(4, (1, 32), signed=False)),
    (MappingType.ASYMMETRIC, (1, -1), torch.int8, Intx(8, symmetric=False)),
    (MappingType.SYMMETRIC, (1, 16), torch.int4, Intx(4, (1, 16), symmetric=True)),
    (MappingType.SYMMETRIC, (8, 64), torch.int8, Intx(8, (-1, -1))),
    (MappingType.SYMMETRIC_NO_CLIPPING_ERR, (1, 64), torch.int5, Intx(5, symmetric=True, clip=False)),
]


@pytest.mark.parametrize("mapping, block, dtype, spec", CASES, ids=lambda c: str(c)[:40])
def test_agrees_with_the_formats(mapping, block, dtype, spec, device):
    w = torch.randn(8, 64).to(device)
    scale, zero = choose_qparams_affine(w, mapping, block, dtype)
    q = quantize_affine(w, block, scale, zero, dtype)
    assert q.dtype == (torch.uint8 if "uint" in str(dtype) else torch.int8) and q.shape == w.shape
    values = dequantize_affine(q, block, scale, zero, dtype)
    assert torch.allclose(values, spec.quantize(w).dequantize(), atol=1e-5)
    assert torch.equal(fake_quantize_affine(w, block, scale, zero, dtype), values)
    assert scale.shape == spec.grid((8, 64)) == zero.shape and zero.dtype == torch.int32
    # What this finds, a QTensor stores.
    given = {"scale": scale} if spec.symmetric else {"scale": scale, "zero_point": zero.to(q.dtype)}
    assert torch.allclose(spec.quantize(w, **given).dequantize(), values, atol=1e-6)


def test_ranges_and_dtypes():
    w = torch.randn(4, 32).bfloat16()
    scale, zero = choose_qparams_affine(
        w, MappingType.SYMMETRIC, (1, 32), torch.int8, -127, 127, scale_dtype=torch.float32
    )
    assert (
        torch.allclose(scale[:, 0], w.float().abs().amax(1) / 127)
        and (zero == 0).all()
        and scale.dtype == torch.float32
    )
    assert quantize_affine(w, (1, 32), scale, zero, torch.int8, -127, 127).min() >= -127
    assert choose_qparams_affine(w, MappingType.SYMMETRIC, (1, 32), torch.int8)[0].dtype == torch.bfloat16
    zeros = choose_qparams_affine(torch.zeros(1, 8), MappingType.ASYMMETRIC, (1, 8), torch.uint4, eps=1e-3)
    assert zeros[0] == 1e-3 and zeros[1] == 0
    scale, zero = choose_qparams_affine(torch.arange(8.0)[None] + 10, MappingType.ASYMMETRIC, (1, 8), torch.uint3,
                                        preserve_zero=False, zero_point_domain=ZeroPointDomain.FLOAT)  # fmt: skip
    assert scale == 1 and zero == -10
    assert quantize_affine(torch.arange(8.0)[None] + 10, (1, 8), scale, zero, torch.uint3).tolist() == [list(range(8))]


def test_gradients_pass_where_nothing_clips():
    x = torch.tensor([[-3.0, -0.4, 0.2, 3.0]], requires_grad=True)
    fake_quantize_affine(x, (1, 4), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), torch.int2).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0]]


def test_int_scaled_matmul(device):
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8).to(device) for shape in ((24, 64), (64, 16)))
    scales = torch.rand(24, 1).to(device)
    assert torch.allclose(int_scaled_matmul(a, b, scales), (a.float() @ b.float()) * scales)
    assert int_scaled_matmul(a[:3], b, scales[:3].bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="a and b must be int8 of shape"):
        int_scaled_matmul(a.int(), b, scales)
    with pytest.raises(ValueError, match=r"scales1 must have shape \(24, 1\)"):
        int_scaled_matmul(a, b, scales[:5])


def test_misuse():
    w = torch.randn(4, 32)
    with pytest.raises(ValueError, match=r"block_size=\(1, 5\) does not divide the shape \(4, 32\)"):
        choose_qparams_affine(w, MappingType.SYMMETRIC, (1, 5), torch.int8)
    with pytest.raises(ValueError, match="the dtype of codes must be"):
        choose_qparams_affine(w, MappingType.SYMMETRIC, (1, 32), torch.float16)
    with pytest.raises(ValueError, match="quant_min must be below quant_max"):
        quantize_affine(w, (1, 32), torch.ones(4, 1), None, torch.int8, 3, 3)
    with pytest.raises(ValueError, match="the codes are torch.float32"):
        dequantize_affine(w, (1, 32), torch.ones(4, 1), None, torch.int8)
    with pytest.raises(ValueError, match="preserve_zero=False needs"):
        choose_qparams_affine(w, MappingType.SYMMETRIC, (1, 32), torch.int8, preserve_zero=False)
