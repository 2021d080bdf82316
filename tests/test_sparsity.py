"""ao.sparsity: prune, store, and train with zeros."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ao
from ao.dtypes import BlockSparse, BlockSparseLayout, Float8, Intx, MarlinSparseLayout, SemiSparseLayout, Sparse24
from ao.matmul import transposable_mask
from ao.quant import SpecConfig, compute_error, quantize_
from ao.quant.qat import QATConfig
from ao.sparsity import (
    BlockSparseWeightConfig,
    Magnitude,
    SemiSparseActivationLinear,
    SemiSparseLinear,
    SemiSparseWeightConfig,
    Sparsity,
    SparsitySchedule,
    SupermaskLinear,
    Wanda,
    block_sparse_weight,
    fake_sparsify_,
    int8_dynamic_activation_int8_semi_sparse_weight,
    prune_,
    semi_sparse_weight,
    sparsify_,
    sparsity_of,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)

INT4 = Intx(4, (1, 128), symmetric=True, scale_dtype="bfloat16")


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))


def batches(count=3, tokens=300):
    """Inputs of which some features are large and many go together."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(128, 128, generator=generator) * torch.linspace(0.1, 3, 128)
    return [torch.randn(tokens, 128, generator=generator) @ mix for _ in range(count)]


def error(model, original, data):
    """Of the outputs, relative."""
    with torch.no_grad():
        wrong = sum(float((model(x) - original(x)).square().sum()) for x in data)
        return (wrong / sum(float(original(x).square().sum()) for x in data)) ** 0.5


def is_24(w):
    return int(((w.reshape(-1, 4) != 0).sum(1) > 2).sum()) == 0


@pytest.mark.parametrize(
    ("sparsity", "block", "zeros"),
    [("2:4", None, 0.5), ("1:4", None, 0.75), ("4:8", None, 0.5), (0.7, None, 0.7), (0.5, 32, 0.5)],
)
@pytest.mark.parametrize("algorithm", ["magnitude", "wanda", "sparsegpt"])
def test_patterns(algorithm, sparsity, block, zeros):
    model = mlp()
    report = prune_(model, algorithm, sparsity, block=block, calibration_data=batches(1))
    assert [row.name for row in report.rows] == ["0.weight", "2.weight"]
    for row in report.rows:
        assert row.zeros == pytest.approx(zeros, abs=0.004) and row.kept_energy > 0
    w = model[0].weight
    if isinstance(sparsity, str):
        kept, of = map(int, sparsity.split(":"))
        assert int((w.reshape(-1, of) != 0).sum(1).max()) <= kept
    if block:
        there = (w.reshape(8, 32, 4, 32) != 0).any(3).any(1)
        assert int(there.sum()) == 16 and BlockSparse(32).quantize(w.detach()).density == 0.5
    assert f"{algorithm} to {Sparsity.parse(sparsity, block)}" in str(report)


def test_wanda_is_the_formula():
    model, data = mlp(), batches()
    x = torch.cat(data)
    w = model[0].weight.detach().clone()
    prune_(model, "wanda", calibration_data=data)
    scores = (w.abs() * x.norm(dim=0)).view(256, 32, 4)
    keep = torch.zeros_like(scores).scatter_(2, scores.topk(2).indices, 1).view_as(w).bool()
    assert torch.equal(model[0].weight, torch.where(keep, w, 0))
    half = mlp()
    prune_(half, Wanda(0.5), calibration_data=data)
    threshold = scores.view(256, 128).median(1, keepdim=True).values
    assert torch.equal(half[0].weight, torch.where(scores.view(256, 128) > threshold, w, 0))


def test_errors_in_the_outputs():
    """Each pruner is better than the one before; and zeros and codes in one pass better than one after the other."""
    data, fresh = batches(), batches(4)[3:]
    found = {}
    for algorithm in ("magnitude", "wanda", "sparsegpt"):
        model = mlp()
        prune_(model, algorithm, calibration_data=data)
        assert is_24(model[0].weight) and is_24(model[2].weight)
        found[algorithm] = error(model, mlp(), fresh)
        if algorithm == "sparsegpt":
            pruned = copy.deepcopy(model)
    assert found["wanda"] < found["magnitude"] and found["sparsegpt"] < 0.8 * found["wanda"]
    quantize_(pruned, Sparse24(INT4))
    joint = mlp()
    report = quantize_(joint, SpecConfig(Sparse24(INT4), algorithm="sparsegpt"), calibration_data=data)
    assert error(joint, mlp(), fresh) < error(pruned, mlp(), fresh)
    assert report.rows[0].algorithm == "sparsegpt" and isinstance(joint[0].weight, ao.QTensor)
    asymmetric = mlp()
    quantize_(asymmetric, SpecConfig(Sparse24(Intx(4, (1, 64))), algorithm="sparsegpt"), calibration_data=data)
    assert error(asymmetric, mlp(), fresh) < found["wanda"]


def test_what_prune_refuses_changes_nothing():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    for arguments, message in (
        (("wanda",), "needs calibration"),
        (("gptq",), "algorithm must be one of"),
        (("magnitude", "2:2"), "sparsity must be N:M"),
        (("magnitude", 1.5), "sparsity must be N:M"),
        (("magnitude", "3:7"), "not a multiple of 7"),
        (("sparsegpt", 0.5), "needs calibration"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_(model, *arguments)
    with pytest.raises(ValueError, match="blocks of 48"):
        prune_(model, "magnitude", 0.5, block=48)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="does not store"):
        quantize_(model, SpecConfig(Intx(4, (1, 128)), algorithm=Magnitude()))


CONFIGS = [
    (SemiSparseWeightConfig(), Sparse24()),
    (semi_sparse_weight(), Sparse24()),
    (ao.Int8DynamicActivationInt8WeightConfig(layout=SemiSparseLayout()), Sparse24(Intx(8), act=Intx(8))),
    (int8_dynamic_activation_int8_semi_sparse_weight(), Sparse24(Intx(8), act=Intx(8))),
    (
        ao.Float8DynamicActivationFloat8WeightConfig(layout=SemiSparseLayout(), granularity=ao.PerRow()),
        Sparse24(Float8(), act=Float8()),
    ),
    (ao.Int4WeightOnlyConfig(layout=MarlinSparseLayout()), Sparse24(INT4)),
    (BlockSparseWeightConfig(32), BlockSparse(32)),
    (block_sparse_weight(blocksize=64), BlockSparse(64)),
    (ao.Int8DynamicActivationInt8WeightConfig(layout=BlockSparseLayout(64)), BlockSparse(64, Intx(8), act=Intx(8))),
]


@pytest.mark.parametrize(("config", "spec"), CONFIGS, ids=str)
def test_configs(config, spec):
    model = mlp()
    if isinstance(spec, BlockSparse):
        prune_(model, "magnitude", 0.5, block=spec.size)
    else:
        prune_(model)
    original = copy.deepcopy(model)
    report = sparsify_(model, config)
    assert model[0].weight.spec == spec and len(report) == 2
    assert compute_error(original(batches()[0]), model(batches()[0])) > 16
    assert ao.config_from_dict(ao.config_to_dict(config)) == config


def test_what_sparsify_refuses():
    model = mlp()
    with pytest.raises(ValueError, match="of the 8,192 groups of four"):
        sparsify_(model)
    with pytest.raises(ValueError, match="symmetric, with group_size=128 or -1"):
        ao.Int4WeightOnlyConfig(layout=MarlinSparseLayout(), group_size=64)
    with pytest.raises(ValueError, match="MarlinSparseLayout"):
        ao.Int4WeightOnlyConfig(layout=SemiSparseLayout())
    assert type(model[0].weight) is nn.Parameter


# Training.


def test_the_mask_is_the_best_of_both_directions():
    w = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    mask = transposable_mask(w)
    assert (mask.view(64, 8, 4).sum(2) == 2).all() and (mask.view(16, 4, 32).sum(1) == 2).all()
    kept = float((w.abs() * mask).sum() / w.abs().sum())
    one_way = float(Sparse24(prune=True).quantize(w).dequantize().abs().sum() / w.abs().sum())
    assert 0.93 * one_way < kept < one_way


def test_semi_sparse_linear_and_back():
    layer = nn.Linear(64, 32)
    plain = copy.deepcopy(layer)
    swap_linear_with_semi_sparse_linear(layer, {"": SemiSparseLinear})  # a root layer
    assert type(layer) is SemiSparseLinear
    x = torch.randn(5, 7, 64, requires_grad=True)
    grad = torch.randn(5, 7, 32)
    y = layer(x)
    pruned = torch.where(transposable_mask(layer.weight), layer.weight, 0).detach()
    torch.testing.assert_close(y, F.linear(x, pruned, layer.bias))
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ pruned)
    torch.testing.assert_close(layer.weight.grad, grad.reshape(-1, 32).t() @ x.detach().reshape(-1, 64))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    swap_semi_sparse_linear_with_linear(layer)
    assert type(layer) is nn.Linear and torch.equal(layer.weight, plain.weight)

    model = mlp()
    swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseLinear, "2": SemiSparseActivationLinear})
    loss = model(torch.randn(6, 128)).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    for config, kind, message in (
        ({"5": SemiSparseLinear}, ValueError, "no layer '5'"),
        ({"0": nn.Linear}, TypeError, "must be SemiSparseLinear"),
        ({"1": SemiSparseLinear}, TypeError, "is for nn.Linear"),
    ):
        with pytest.raises(kind, match=message):
            swap_linear_with_semi_sparse_linear(mlp(), config)


def test_compiled_layers_of_several_shapes():
    """The second shape of a layer makes its sizes symbols."""
    torch.compiler.reset()
    for n, k in ((32, 16), (16, 32), (8, 24)):
        layer = SemiSparseLinear.from_dense(nn.Linear(k, n))
        x = torch.randn(2, 5, k, requires_grad=True)
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        y.sum().backward()
        found = x.grad
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(found, (torch.ones(10, n) @ layer.sparse_weight()).view(2, 5, k))


def test_sparse_in_training_is_sparse_in_inference():
    model = mlp()
    swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseLinear, "2": SemiSparseLinear})
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for x in batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    expected = model(batches()[0])
    sparsify_(model)
    assert not isinstance(model[0], SemiSparseLinear) and model[0].weight.spec == Sparse24()
    torch.testing.assert_close(model(batches()[0]), expected)
    again = mlp()
    swap_linear_with_semi_sparse_linear(again, {"0": SemiSparseLinear})
    with pytest.raises(ValueError, match="groups of four"):
        sparsify_(again)
    assert type(again[0]) is SemiSparseLinear


@pytest.mark.parametrize("act", [None, Intx(8)], ids=str)
def test_fake_sparsity_and_quantization_at_once(act):
    model = mlp()
    fake_sparsify_(model, values=INT4, act=act, decay=0.1)
    w = model[0].weight
    x = batches()[0]
    model(x).sum().backward()
    straight = w.grad.clone()
    w.grad = None
    other = mlp()
    quantize_(other, QATConfig(Sparse24(INT4, prune=True, act=act)))
    other(x).sum().backward()
    mask = Sparse24(prune=True).quantize(w.detach()).dequantize() != 0
    torch.testing.assert_close(
        straight - other[0].weight.grad, torch.where(mask, 0, 0.1 * w.detach()), rtol=1e-3, atol=1e-2
    )
    schedule = SparsitySchedule(model, begin=2, end=4)
    seen = []
    for _ in range(5):
        seen.append(sparsity_of(model[0].fake_quantized_weight()) > 0.4)
        schedule.step()
    assert seen == [False, False, True, True, False]
    schedule.load_state_dict({"steps": 2})
    expected = model(x)
    quantize_(model, QATConfig(step="convert"))
    assert isinstance(model[0].weight.spec, Sparse24) and compute_error(expected, model(x)) > 40
    with pytest.raises(ValueError, match="no layer has fake sparsity"):
        SparsitySchedule(mlp())


def test_supermask_learns_which_blocks_to_keep():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    layer = SupermaskLinear.from_linear(linear, sparsity_level=0.75, blocksize=16)
    assert layer.weight.data_ptr() == linear.weight.data_ptr() and not layer.weight.requires_grad
    assert layer.mask().unflatten(0, (2, 16)).unflatten(2, (4, 16)).mean((1, 3)).sum() == 2  # blocks of eight
    x, target = torch.randn(256, 64), torch.zeros(32, 64)
    target[:16, 48:] = linear.weight.detach()[:16, 48:]
    target[16:, :16] = linear.weight.detach()[16:, :16]
    optimizer = torch.optim.SGD([layer.scores], lr=0.05)
    for _ in range(60):
        loss = (layer(x) - F.linear(x, target, linear.bias)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-10
    plain = SupermaskLinear.to_linear(layer)
    assert type(plain) is nn.Linear and torch.equal(plain.weight, target) and torch.equal(plain(x), layer(x))
    sparsify_(plain, BlockSparseWeightConfig(16))
    assert torch.equal(plain.weight.dequantize(), target)
    for wrong in ({"sparsity_level": 1.0}, {"blocksize": 7}):
        with pytest.raises(ValueError, match="SupermaskLinear"):
            SupermaskLinear.from_linear(linear, **wrong)


def test_a_mask_along_both_dims_hides_no_nan():
    from ao.matmul.sparse import transposable_mask

    w = torch.randn(8, 12)
    w[1, 5], w[6, 2], w[6, 3] = torch.nan, torch.inf, -torch.inf
    mask = transposable_mask(w)
    assert mask[1, 5] and mask[6, 2] and mask[6, 3]
    assert (mask.view(2, 4, 3, 4).sum(3) == 2).all() and (mask.view(2, 4, 3, 4).sum(1) == 2).all()
