"""Sparse weights on a GPU: each kernel and the sparse units against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from cases import weight

from ao import compute_error
from ao.dtypes import NF4, NVFP4, BlockSparse, Float8, Intx, Sparse24
from ao.matmul import both_pruned, path_name, sparse
from ao.matmul.sparse import transposable_mask
from ao.sparsity import SemiSparseLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

VALUES = [
    (None, None),
    (Intx(4, (1, 128), symmetric=True, scale_dtype="bfloat16"), None),
    (Intx(4, (1, 64)), None),
    (Intx(8), None),
    (Intx(8), Intx(8)),
    (Float8(), Float8()),
    (NF4, None),
    (NVFP4, None),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("values", "act"), VALUES, ids=str)
@pytest.mark.parametrize("units", [False, True], ids=["dense", "units"])
def test_two_of_four(values, act, dtype, units, monkeypatch):
    monkeypatch.setattr(sparse, "_units_win", lambda *_: units)  # whichever is faster here, both are right
    q = Sparse24(values, prune=True, act=act).quantize(weight((384, 1024), 0, dtype).cuda())
    for m in (1, 2, 3, 8, 17, 100, 256, 300, 1000):
        x = weight((m, 1024), 1, dtype).cuda()
        expected = (x if act is None else act.fake_quantize(x)).float() @ q.dequantize().float().t()
        assert path_name(x, q) == "sparse"
        assert compute_error(expected, F.linear(x, q).float()) > 40, m
    compiled = torch.compile(F.linear, dynamic=True)
    for m in (1, 17, 300):
        x = weight((m, 1024), 1, dtype).cuda()
        assert compute_error(F.linear(x, q), compiled(x, q)) > 40


@pytest.mark.parametrize(("values", "act"), [(None, None), (Intx(8), None), (Intx(8), Intx(8))], ids=str)
def test_forms_made_while_graphs_warm_up(values, act):
    """A form that outlives the call is no memory of the graph's own, which refuses that and would overwrite it."""
    torch.compiler.reset()
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(3)])
    for i, layer in enumerate(model):
        q = Sparse24(values, prune=True, act=act).quantize(weight((1024, 1024), i, torch.bfloat16).cuda())
        layer.weight = torch.nn.Parameter(q, requires_grad=False)
    x = weight((512, 1024), 9, torch.bfloat16).cuda()
    for part in model:
        part.compile(mode="reduce-overhead")
    with torch.no_grad():
        outs = []
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            outs.append(model(x).clone())
        expected = x
        for layer in model:
            rows = expected if act is None else act.fake_quantize(expected)
            expected = (rows.float() @ layer.weight.dequantize().float().t() + layer.bias.float()).bfloat16()
    assert all(compute_error(expected.float(), out.float()) > 35 for out in outs)


@pytest.mark.parametrize("values", [None, Intx(8), Intx(4, (1, 32), symmetric=True), Intx(4, (1, 32))], ids=str)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_kept_blocks(values, size):
    w = weight((512, 1024), 0, torch.bfloat16).cuda()
    keep = torch.rand(512 // size, 1024 // size, device="cuda") < 0.3
    keep[1] = False
    w = torch.where(keep.repeat_interleave(size, 0).repeat_interleave(size, 1), w, 0)
    q = BlockSparse(size, values).quantize(w)
    for m in (1, 2, 5, 17, 100, 300):
        x = weight((m, 1024), 1, torch.bfloat16).cuda()
        assert compute_error(x.float() @ q.dequantize().float().t(), F.linear(x, q).float()) > 40, m


def test_what_is_kept_follows_the_weight():
    q = Sparse24(prune=True).quantize(weight((384, 1024), 0, torch.bfloat16).cuda())
    x = weight((300, 1024), 1, torch.bfloat16).cuda()
    first = F.linear(x, q)
    q.mul_(2)
    assert compute_error(2 * first, F.linear(x, q)) > 40
    before = sparse._Kept.total
    assert before > 0
    del q
    assert sparse._Kept.total < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(256, 512), (36, 132), (4, 8)], ids=str)
def test_pruned_along_both_dims(shape, dtype):
    w = weight(shape, 0, dtype)
    w[0, :3] = torch.nan  # which nothing hides
    pruned = both_pruned(w.cuda()).cpu()
    assert pruned[0, :3].isnan().sum() == 2
    w[0, :3] = 0
    expected = torch.where(transposable_mask(w), w, 0).float()
    pruned = both_pruned(w.cuda()).cpu().float()
    kept = (pruned != 0).view(shape[0] // 4, 4, shape[1] // 4, 4)
    assert kept.sum(3).max() <= 2 and kept.sum(1).max() <= 2
    assert torch.equal(pruned[kept.view(shape)], w.float()[kept.view(shape)])
    assert (pruned.abs().sum() / expected.abs().sum() - 1).abs() < 1e-6  # where two are as large, either is right


@pytest.mark.parametrize("tokens", [1024, sparse.COMPRESSED_FROM])
def test_training_on_the_sparse_units(tokens):
    layer = torch.nn.Linear(512, 256, device="cuda", dtype=torch.bfloat16)
    SemiSparseLinear.from_dense(layer)
    x = weight((tokens, 512), 1, torch.bfloat16).cuda().requires_grad_()
    grad = weight((tokens, 256), 2, torch.bfloat16).cuda()
    pruned = layer.sparse_weight().float()
    assert (pruned.view(256, 128, 4) != 0).sum(2).max() <= 2 and (pruned.view(64, 4, 512) != 0).sum(1).max() <= 2
    for call in (layer, torch.compile(layer)):
        x.grad = layer.weight.grad = None
        y = call(x)
        y.backward(grad)
        assert compute_error(x.detach().float() @ pruned.t() + layer.bias.float(), y.float()) > 40
        assert compute_error(grad.float() @ pruned, x.grad.float()) > 40
        assert compute_error(grad.float().t() @ x.detach().float(), layer.weight.grad.float()) > 40
