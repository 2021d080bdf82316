"""int8 training: products of int8, weights that stay int8, and the ternary weights of BitNet."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from llama_block import Attention, FeedForward, Gate, block, gradients
from torch import nn

from ao.dtypes import Intx, QTensor
from ao.optim import AdamW, AdamW8bit
from ao.quant import compute_error
from ao.train import (
    BitNetTrainingConfig,
    Int8MixedPrecisionTrainingConfig,
    Int8WeightOnlyQuantizedTrainingConfig,
    LowPrecisionLinear,
    convert_from_low_precision_training,
    convert_to_low_precision_training,
    convert_to_precision,
    int8_mixed_precision_training,
    int8_weight_only_quantized_training,
)


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("precision", ["int8-mixed", "int8-mixed-stochastic"])
@pytest.mark.parametrize("half", [FeedForward, Attention])
def test_close_to_bfloat16(precision, half, device):
    torch.manual_seed(0)
    model = half(256).to(device, torch.bfloat16)
    x, g = (data(2, 128, 256, seed=seed, dtype=torch.bfloat16).to(device) for seed in (0, 1))
    expected = gradients(model, x, g)
    found = gradients(convert_to_precision(model, precision), x, g)
    errors = {name: compute_error(expected[name], found[name]).item() for name in expected}
    assert errors["output"] > 30 and min(errors.values()) > 26, errors


@pytest.mark.parametrize("product", ["output", "grad_input", "grad_weight"])
def test_each_product_is_switchable(product):
    """The product that is left out is as exact as ever; the others are those of int8."""
    layer = nn.Linear(64, 96, bias=False)
    x, g = data(48, 64), data(48, 96, seed=1)
    expected = gradients(layer, x, g)
    config = Int8MixedPrecisionTrainingConfig(**{product: False})
    found = gradients(convert_to_low_precision_training(layer, config), x, g)
    names = {"output": "output", "grad_input": "input", "grad_weight": "weight"}
    for each, name in names.items():
        error = compute_error(expected[name], found[name])
        assert error > 100 if each == product else 30 < error < 60
    with pytest.raises(ValueError, match="one of output, grad_input and grad_weight must be True"):
        int8_mixed_precision_training(output=False, grad_input=False, grad_weight=False)
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', got 'up'"):
        int8_mixed_precision_training(rounding="up")


def test_stochastic_gradients_are_unbiased():
    """The mean over many batches of one gradient plus small noise is closer to it than a single rounding."""
    layer = convert_to_low_precision_training(
        nn.Linear(64, 64, bias=False), int8_mixed_precision_training(rounding="stochastic")
    )
    plain = convert_from_low_precision_training(copy.deepcopy(layer))
    x, g = data(32, 64), data(32, 64, seed=1)
    exact = gradients(plain, x, g)["input"]
    found = [gradients(layer, x, g + 1e-4 * data(32, 64, seed=seed))["input"] for seed in range(2, 40)]
    assert compute_error(exact, torch.stack(found).mean(0)) > compute_error(exact, found[0]) + 5


def test_compiled(device):
    for config in (int8_mixed_precision_training(), BitNetTrainingConfig()):
        model = convert_to_low_precision_training(Gate(64).to(device), config)
        x, g = data(1, 32, 64).to(device), data(1, 32, 64, seed=1).to(device)
        expected = gradients(model, x, g)
        model.compile(fullgraph=True, backend="aot_eager")
        found = gradients(model, x, g)
        assert min(compute_error(expected[name], found[name]) for name in expected) > 60


def test_odd_shapes(device):
    layer = nn.Linear(36, 10, device=device)
    x, g = data(7, 36).to(device), data(7, 10, seed=1).to(device)
    expected = gradients(layer, x, g)
    found = gradients(convert_to_low_precision_training(layer, int8_mixed_precision_training()), x, g)
    assert min(compute_error(expected[name], found[name]) for name in expected) > 30


# Weights that are int8.


def test_weight_only():
    model = block()
    before = copy.deepcopy(model)
    keys = list(model.state_dict())
    convert_to_low_precision_training(model, int8_weight_only_quantized_training())
    weight = model[1].gate.weight
    assert isinstance(weight, nn.Parameter) and isinstance(weight, QTensor) and weight.requires_grad
    assert weight.spec == Intx(8, narrow=True, rounding="stochastic")
    nearest = Intx(8, narrow=True).quantize(before[1].gate.weight.detach())
    assert torch.equal(weight.qdata, nearest.qdata)  # the first codes are the nearest ones
    assert type(model[1].gate) is nn.Linear and list(model.state_dict()) == keys
    assert convert_to_low_precision_training(
        nn.Linear(64, 32), Int8WeightOnlyQuantizedTrainingConfig(group_size=32)
    ).weight.scale.shape == (32, 2)
    with pytest.raises(ValueError, match="dim 1 of shape .* is not a multiple of its block 48"):
        convert_to_low_precision_training(nn.Linear(64, 32), Int8WeightOnlyQuantizedTrainingConfig(group_size=48))
    convert_from_low_precision_training(model)
    assert type(model[1].gate.weight) is nn.Parameter and model[1].gate.weight.requires_grad


def loss_after(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: int = 150) -> float:
    target = data(64, 64, seed=3) / 8
    for i in range(steps):
        x = data(64, 64, seed=i)
        loss = F.mse_loss(layer(x), x @ target.t())
        loss.backward()
        assert type(layer.weight.grad) is torch.Tensor
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 2e-3),
        lambda p: torch.optim.AdamW(p, 2e-3, foreach=True),
        lambda p: AdamW(p, 2e-3, weight_decay=0.01, compile=False),
        lambda p: AdamW8bit(p, 2e-3, compile=False),
    ],
    ids=["torch", "torch-foreach", "ao", "ao-8bit"],
)
def test_weight_only_learns_like_float32(make):
    """Updates far below a step of the int8 weight arrive; rounded to nearest they are lost."""
    losses = {}
    for kind in ("float32", "stochastic", "nearest"):
        torch.manual_seed(0)
        layer = nn.Linear(64, 64, bias=False)
        if kind == "stochastic":
            convert_to_precision(layer, "int8-weight-only")
        elif kind == "nearest":
            layer.weight = nn.Parameter(Intx(8, narrow=True).quantize(layer.weight.detach()))
        losses[kind] = loss_after(layer, make(layer.parameters()))
        assert kind == "float32" or layer.weight.qdata.dtype == torch.int8
    assert losses["stochastic"] == pytest.approx(losses["float32"], rel=0.08)
    assert losses["nearest"] > 1.3 * losses["float32"]


def test_a_compiled_step_keeps_no_dense_weight():
    model = convert_to_precision(
        nn.Sequential(nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)), "int8-weight-only"
    )
    own = {t.untyped_storage().data_ptr() for p in model.parameters() for t in p.fields().values()}
    kept = {}

    def pack(t):
        for field in t.fields().values() if isinstance(t, QTensor) else (t,):
            if field.untyped_storage().data_ptr() not in own:
                kept[field.untyped_storage().data_ptr()] = field.untyped_storage().nbytes()
        return t

    x = data(8, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")(x)
    out.sum().backward()
    assert sum(kept.values()) <= x.nbytes + 8 * 256 * 4


# BitNet.


def test_bitnet_formula(device):
    layer = nn.Linear(64, 48, bias=False).to(device)
    w = layer.weight.detach().clone()
    convert_to_precision(layer, "bitnet")
    assert type(layer) is LowPrecisionLinear
    x, g = data(32, 64).to(device), data(32, 48, seed=1).to(device)
    found = gradients(layer, x, g)
    scale = w.abs().mean()
    ternary = (w / scale).round().clamp(-1, 1) * scale
    step = x.abs().amax(1, keepdim=True) / 127
    assert compute_error((x / step).round() * step @ ternary.t(), found["output"]) > 80
    assert compute_error(g @ ternary, found["input"]) > 80
    assert compute_error(g.t() @ x, found["weight"]) > 80


def test_bitnet_learns():
    model = convert_to_precision(FeedForward(64, 128), "bitnet")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for i in range(60):
        x = data(16, 16, 64, seed=i)
        loss = F.mse_loss(model(x), x.flip(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
