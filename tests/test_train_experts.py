"""Mixtures of experts in low precision: the grouped products of 3-D weights are those of a linear layer, expert by expert."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ao
from ao.train import (
    Float8LinearConfig,
    MXFP8TrainingConfig,
    NVFP4TrainingConfig,
    convert_experts_to_low_precision_training,
    convert_to_low_precision_training,
    low_precision_grouped_mm,
)
from ao.train.training_config import RecipeConfig

OFFS = torch.tensor([10, 10, 50, 67], dtype=torch.int32)
CONFIGS = [
    Float8LinearConfig.from_recipe_name("rowwise"),
    Float8LinearConfig(),
    MXFP8TrainingConfig(),
    NVFP4TrainingConfig(),
]


class Experts(nn.Module):
    """Four experts with a gate, in the layout of checkpoints, (experts, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(0.1 * torch.randn(4, 96, 64, generator=generator))
        self.down = nn.Parameter(0.1 * torch.randn(4, 96, 64, generator=generator))
        self.norm = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.grouped_mm(x * self.norm, self.up.transpose(-2, -1), offs=OFFS)
        return torch._grouped_mm(F.silu(hidden), self.down, OFFS)


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("config", CONFIGS, ids=["rowwise", "tensorwise", "mxfp8", "nvfp4"])
def test_each_expert_is_a_linear_layer(config):
    """Output and gradients, bit for bit; an expert without tokens has a gradient of zeros."""
    w, x, g = data(4, 64, 96, seed=1), data(70, 64), data(70, 96, seed=2)
    mine, rows = w.clone().requires_grad_(), x.clone().requires_grad_()
    out = low_precision_grouped_mm(rows, mine, OFFS, config.recipe())
    out.backward(g)
    assert out[67:].eq(0).all() and rows.grad[67:].eq(0).all() and mine.grad[1].eq(0).all()
    for e, (start, stop) in enumerate(((0, 10), (10, 10), (10, 50), (50, 67))):
        if stop > start:
            layer = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
            layer.weight = nn.Parameter(w[e].t().contiguous())
            convert_to_low_precision_training(layer, config)
            part = x[start:stop].clone().requires_grad_()
            y = layer(part)
            y.backward(g[start:stop])
            assert torch.equal(out[start:stop], y) and torch.equal(rows.grad[start:stop], part.grad)
            assert torch.equal(mine.grad[e], layer.weight.grad.t())


@pytest.mark.parametrize("config", CONFIGS[::2], ids=["rowwise", "mxfp8"])
def test_a_model_of_experts(config):
    model = Experts().bfloat16()
    x, g = data(70, 64), data(70, 64, seed=1)

    def step(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        rows = x.clone().requires_grad_()
        out = model(rows)
        out[:67].backward(g[:67])
        return {"out": out.detach()[:67], "x": rows.grad[:67], **{n: p.grad for n, p in model.named_parameters()}}

    expected = step(model)
    assert convert_experts_to_low_precision_training(model, config) == ["up", "down"]
    found = step(model)
    errors = {name: ao.compute_error(expected[name], value).item() for name, value in found.items()}
    assert min(v for name, v in errors.items() if name != "norm") > 20 and errors["out"] < 45, errors
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model.up.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.up)
    again = Experts().bfloat16()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.up, model.up.as_subclass(Tensor))
    assert torch.equal(copy.deepcopy(model)(x)[:67], model(x)[:67])


def test_batches():
    """`bmm` and `@`."""
    model = Experts().bfloat16()
    x = data(4, 10, 64)
    expected = x @ model.up.mT
    convert_experts_to_low_precision_training(
        model, MXFP8TrainingConfig(), parameter_filter_fn=lambda name: name == "up"
    )
    found = x @ model.up.mT
    assert torch.equal(found, torch.bmm(x, model.up.transpose(1, 2)))
    assert 20 < ao.compute_error(expected, found) < 45 and type(found) is Tensor
    assert type(model.up + 1) is Tensor and type(model.down) is nn.Parameter


def test_refused():
    with pytest.raises(ValueError, match="no weights of experts"):
        convert_experts_to_low_precision_training(nn.Linear(4, 4), MXFP8TrainingConfig())
    with pytest.raises(TypeError, match="a config with a recipe"):
        convert_experts_to_low_precision_training(Experts(), MXFP8TrainingConfig)
    model = Experts()
    convert_experts_to_low_precision_training(model, MXFP8TrainingConfig())
    with pytest.raises(ValueError, match="up trains in low precision already"):
        convert_experts_to_low_precision_training(model, MXFP8TrainingConfig())
    with pytest.raises(ValueError, match=r"x must be \(M, K\)"):
        low_precision_grouped_mm(data(3, 5), data(4, 64, 96), OFFS, MXFP8TrainingConfig().recipe())
    assert isinstance(MXFP8TrainingConfig(), RecipeConfig)
