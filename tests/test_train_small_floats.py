"""Training with MX and NVFP4 products: which numbers are multiplied, and what comes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from llama_block import Gate, block, gradients
from torch import Tensor, nn

import ao
from ao.dtypes import MXFP4, NVFP4, FloatX
from ao.train import (
    MXFP4TrainingConfig,
    MXFP8TrainingConfig,
    NVFP4TrainingConfig,
    convert_to_low_precision_training,
    convert_to_precision,
)
from ao.train.hadamard import orthogonal, turned

MXFP8 = FloatX(4, 3, scale_rule="rceil")


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(x: Tensor, spec: FloatX) -> Tensor:
    return spec.quantize(x.contiguous()).dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp8_multiplies_blocks_along_the_sum(dtype):
    layer = nn.Linear(64, 96, bias=False, dtype=dtype)
    x, g, w = data(3, 32, 64, dtype=dtype), data(3, 32, 96, seed=1, dtype=dtype), layer.weight.detach()
    found = gradients(convert_to_precision(layer, "mxfp8"), x, g)
    x, g = x.flatten(0, 1), g.flatten(0, 1)
    expected = {
        "output": rounded(x, MXFP8).float() @ rounded(w, MXFP8).float().t(),
        "input": rounded(g, MXFP8).float() @ rounded(w.t(), MXFP8).float().t(),
        "weight": rounded(g.t(), MXFP8).float() @ rounded(x.t(), MXFP8).float().t(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name].reshape(value.shape), value.to(dtype), rtol=1e-6, atol=1e-5)


def test_nvfp4_as_published():
    """Squares of weights, Hadamard on both sides of the weight's gradient, and gradients that are rounded stochastically."""
    recipe = NVFP4TrainingConfig().recipe()
    square, grad = replace(NVFP4, block=(16, 16)), replace(NVFP4, rounding="stochastic")
    assert (recipe.output.a, recipe.output.b) == (NVFP4, square)
    assert (recipe.grad_input.a, recipe.grad_input.b) == (grad, square)
    assert (recipe.grad_weight.a, recipe.grad_weight.b, recipe.grad_weight.hadamard) == (grad, NVFP4, 16)
    layer = nn.Linear(64, 96, bias=False)
    x, g, w = data(32, 64), data(32, 96, seed=1), layer.weight.detach()
    found = gradients(convert_to_precision(layer, "nvfp4"), x, g)
    weight = rounded(w, square)
    torch.testing.assert_close(found["output"], rounded(x, NVFP4) @ weight.t())
    torch.testing.assert_close(found["input"], rounded(g, grad) @ weight)
    expected = rounded(turned(g.t(), 16), grad) @ rounded(turned(x.t(), 16), NVFP4).t()
    torch.testing.assert_close(found["weight"], expected)


def test_turning_leaves_the_product():
    for points in (16, 32):
        h = orthogonal(points)
        torch.testing.assert_close(h @ h.t(), torch.eye(points))
        assert h.abs().unique().numel() == 1
        a, b = data(5, 64), data(7, 64, seed=1)
        torch.testing.assert_close(turned(a, points) @ turned(b, points).t(), a @ b.t())
    spike = torch.zeros(1, 16)
    spike[0, 3] = 1
    assert torch.equal(turned(spike, 16).abs(), torch.full((1, 16), 0.25))


@pytest.mark.parametrize(("precision", "least"), [("mxfp8", (38, 20)), ("mxfp4", (27, 6)), ("nvfp4", (28, 8))])
def test_close_to_the_plain_model(precision, least):
    """37 tokens, which no block divides, are filled up."""
    model = block(64, 96)
    x, g = data(1, 37, 64), data(1, 37, 64, seed=1)
    expected = gradients(model, x, g)
    found = gradients(convert_to_precision(model, precision), x, g)
    errors = {name: ao.compute_error(expected[name], found[name]).item() for name in expected}
    assert errors["output"] > least[0] and min(errors.values()) > least[1], errors
    assert errors["output"] < 60


def test_stochastic_gradients_are_unbiased():
    """The mean of the gradient of a weight over many small changes is nearer to the exact one than by nearest rounding."""

    def mean(rounding: str) -> float:
        layer = nn.Linear(32, 32, bias=False)
        x, g = data(64, 32), data(64, 32, seed=1) + 0.4
        exact = gradients(layer, rounded(x, MXFP4), g)["weight"]
        convert_to_low_precision_training(layer, MXFP4TrainingConfig(rounding, hadamard=0))
        found = [gradients(layer, x, g + 1e-4 * data(64, 32, seed=seed))["weight"] for seed in range(2, 26)]
        return ao.compute_error(exact, torch.stack(found).mean(0)).item()

    assert mean("stochastic") > mean("nearest")


def test_compiled_and_by_quantize():
    model = Gate(64)
    ao.quantize_(model, NVFP4TrainingConfig())
    x, g = data(1, 32, 64), data(1, 32, 64, seed=1)
    expected = gradients(model, x, g)
    model.compile(fullgraph=True, backend="aot_eager")
    for name, value in gradients(model, x, g).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert "e2m1/1x16 @ e2m1/16x16" in str(model.gate)


def test_refused():
    with pytest.raises(ValueError, match="the module: .*use block="):
        convert_to_precision(nn.Linear(48, 64), "mxfp8")
    with pytest.raises(ValueError, match="the module: .*use block="):
        convert_to_precision(nn.Linear(64, 40), "nvfp4")
    with pytest.raises(ValueError, match="MXFP4TrainingConfig: rounding must be"):
        MXFP4TrainingConfig(rounding="up")
    with pytest.raises(ValueError, match="NVFP4TrainingConfig: hadamard must be"):
        NVFP4TrainingConfig(hadamard=12)
    layer = convert_to_precision(nn.Linear(64, 64, dtype=torch.float64), "mxfp8")
    with pytest.raises(ValueError, match="computes in float32, and the data has numbers up to 1e\\+60"):
        layer(torch.full((32, 64), 1e60, dtype=torch.float64))
    assert MXFP8TrainingConfig("floor").recipe().output.a.scale_rule == "floor"
