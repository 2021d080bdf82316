"""`Shifted`: its formula, and what is refused."""

from __future__ import annotations

import pytest
import torch
from cases import weight

from ao.dtypes import Intx, Shifted


def test_the_formula():
    w = weight((8, 64))
    q = Shifted(4, (1, 32)).quantize(w)
    blocks = w.reshape(8, 2, 32)
    lo, hi = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    assert torch.equal(q.shift, -lo) and torch.allclose(q.scale, (hi - lo) / 15)
    codes = ((blocks - lo[..., None]) / q.scale[..., None]).round().clamp(0, 15)
    assert torch.allclose(q.dequantize(), (codes * q.scale[..., None] + lo[..., None]).reshape(8, 64), atol=1e-6)
    q = Shifted(6, (1, 16), symmetric=True).quantize(w)
    assert q.shift is None and torch.allclose(q.scale, w.reshape(8, 4, 16).abs().amax(-1) / 32)


def test_super_blocks():
    """Scales and shifts of 6 bits, eight to a float16: 4.5 bits per element, as GGUF's Q4_K."""
    scales = Intx(6, (1, 8), signed=False, symmetric=True, scale_dtype="float16")
    q = Shifted(4, (1, 32), scale_spec=scales, shift_spec=scales).quantize(weight((256, 1024)))
    assert 8 * q.nbytes / q.numel() == 4.5
    assert torch.equal(q.dequantize(), q.spec.round(weight((256, 1024)), scale=q.scale, shift=q.shift))


def test_refused():
    for make in (
        lambda: Shifted(9),
        lambda: Shifted(scale_dtype="int8"),
        lambda: Shifted(symmetric=True, shift_spec=Intx(8)),
    ):
        with pytest.raises(ValueError, match="^Shifted: "):
            make()
