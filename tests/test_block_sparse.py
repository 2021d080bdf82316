"""Kept blocks: what is stored, and what a product makes of it."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from cases import weight
from torch import nn

import ao
from ao.dtypes import BlockSparse, Float8, Intx
from ao.matmul import path_name
from ao.quant import compute_error


def pruned(n=256, k=512, size=64, kept=0.25, dtype=torch.float32):
    """A weight of which a share of the blocks is there, a row of blocks without any among them."""
    keep = torch.rand(n // size, k // size, generator=torch.Generator().manual_seed(0)) < kept
    keep[1] = False
    mask = keep.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return torch.where(mask, weight((n, k), 0, dtype), 0), keep


@pytest.mark.parametrize("values", [None, Intx(8), Intx(4, (1, 32)), Float8()], ids=str)
@pytest.mark.parametrize("act", [None, Intx(8)], ids=str)
def test_products(values, act):
    w, keep = pruned()
    q = BlockSparse(64, values, act=act).quantize(w)
    assert (
        q.density == keep.float().mean()
        and ((q.dequantize() == 0) == (w == 0))[~keep.bool().repeat_interleave(64, 0).repeat_interleave(64, 1)].all()
    )
    assert compute_error(w, q.dequantize()) > (18 if values == Intx(4, (1, 32)) else 30)
    for m in (1, 5, 300):
        x = weight((m, 512), 1)
        expected = (x if act is None else act.fake_quantize(x)) @ q.dequantize().t()
        assert compute_error(expected, F.linear(x, q)) > 80
    assert path_name(x, q) == "blocks"
    compiled = torch.compile(F.linear, backend="aot_eager")
    assert compute_error(F.linear(x, q), compiled(x, q)) > 80
    x.requires_grad_()
    F.linear(x, q).sum().backward()
    assert compute_error(q.dequantize().sum(0).expand_as(x), x.grad) > 80


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bytes_are_those_of_what_is_kept(dtype):
    w, keep = pruned(dtype=dtype)
    q = BlockSparse().quantize(w)
    kept = int(keep.sum())
    assert torch.equal(q.dequantize(), w) and q.nbytes_packed == kept * (64 * 64 * 2 + 4) + 4 * 5
    assert BlockSparse(64) == BlockSparse((64, 64)) and ao.Spec.from_dict(q.spec.to_dict()) == q.spec


def test_it_is_copied_and_saved(tmp_path):
    w, _ = pruned()
    layer = nn.Linear(512, 256)
    layer.weight = nn.Parameter(BlockSparse(64, Intx(8)).quantize(w), requires_grad=False)
    for made in (copy.deepcopy(layer).weight, layer.weight.detach().clone(), layer.weight.to(torch.bfloat16).float()):
        assert torch.equal(made.dequantize(), layer.weight.dequantize())
    ao.save(layer, tmp_path / "w.safetensors")
    with torch.device("meta"):
        other = nn.Linear(512, 256)
    other.load_state_dict(ao.load(tmp_path / "w.safetensors"), assign=True)
    assert torch.equal(other.weight, layer.weight)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["weight"], layer.weight)


def test_what_is_refused():
    with pytest.raises(ValueError, match="blocks of 64 x 64"):
        BlockSparse().quantize(weight((128, 96)))
    with pytest.raises(ValueError, match="multiple of 8"):
        BlockSparse(12)
    nothing = BlockSparse().quantize(torch.zeros(128, 128))
    assert nothing.density == 0 and torch.equal(F.linear(weight((3, 128)), nothing), torch.zeros(3, 128))
