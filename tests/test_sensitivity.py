"""Sensitivity of layers, and mixed precision under a budget."""

from __future__ import annotations

import copy

import pytest
import torch
from lm import batches, but_head, divergence, lm
from torch import nn

from ao.dtypes import Intx
from ao.quant import (
    HQQ,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Sensitivity,
    SpecConfig,
    quantize_,
    sensitivity,
)
from ao.quant.sensitivity import Effect

CANDIDATES = [SpecConfig(Intx(bits, (1, 32)), algorithm="hqq") for bits in (2, 3, 4)]


def test_measures_and_chooses():
    model, data = lm(1).train(), batches(2)
    before = dict(model.named_parameters())
    found = sensitivity(model, data, CANDIDATES, but_head)
    assert all(p is before[name] for name, p in model.named_parameters()) and model.training
    assert len(found.effects) == 7 * 3 and "layers.0.mlp.up_proj" in str(found)
    for layer in found.weights:
        two, three, four = found.of(layer)
        assert two.loss > three.loss > four.loss > 0 and two.bytes < three.bytes < four.bytes
    chosen = found.choose(4.5)
    assert 8 * sum(e.bytes for e in chosen.values()) / sum(found.weights.values()) <= 4.5
    mixed = found.config(target_bits=4.25)
    assert isinstance(mixed, FqnToConfig) and len({c.spec.bits for c in mixed.fqn_to_config.values()}) > 1
    # Better than all layers at the width below, and than a choice the other way around.
    turned = Sensitivity(
        found.candidates,
        found.weights,
        tuple(Effect(e.layer, e.candidate, e.bytes, 1 / e.loss / (1 + 9 * e.candidate)) for e in found.effects),
    )
    kl = {}
    for name, config in {"mixed": mixed, "two": CANDIDATES[0], "turned": turned.config(4.25)}.items():
        quantized = lm(1)
        quantize_(quantized, config, None if isinstance(config, FqnToConfig) else but_head)
        kl[name] = divergence(quantized, lm(1), batches(2, seed=4))
    assert kl["mixed"] < 0.8 * kl["two"] and kl["mixed"] < kl["turned"]


def test_effects_are_those_of_one_layer():
    model, data = lm(1), batches(2)
    found = sensitivity(model, data, CANDIDATES[:1], but_head)
    alone = lm(1)
    quantize_(alone, CANDIDATES[0], lambda m, name: name == "model.layers.0.mlp.down_proj")
    assert found.of("model.layers.0.mlp.down_proj")[0].loss == pytest.approx(divergence(alone, model, data), rel=1e-3)


def test_the_choice_is_optimal_for_convex_effects():
    weights = {"a": 100, "b": 100, "c": 100}
    loss = {"a": (8.0, 2.0, 0.5), "b": (1.0, 0.5, 0.25), "c": (4.0, 1.0, 0.25)}
    effects = tuple(Effect(n, i, 25 * (i + 1), each) for n, row in loss.items() for i, each in enumerate(row))
    found = Sensitivity((Int4WeightOnlyConfig(), *CANDIDATES[:2]), weights, effects)
    for bits, candidates in ((2.0, (0, 0, 0)), (2.7, (1, 0, 0)), (3.4, (1, 0, 1)), (6.0, (2, 2, 2))):
        assert tuple(found.choose(bits)[n].candidate for n in "abc") == candidates
    with pytest.raises(ValueError, match="target_bits=1.5 is too low for these candidates, which take at least 2.00"):
        found.choose(1.5)
    assert found.config(6.0, algorithm="hqq").fqn_to_config["a"].recipe == HQQ()


def test_a_loss_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    x = torch.randn(64, 64)
    y = model(x).detach()
    found = sensitivity(model, [(x,)], CANDIDATES, loss_fn=lambda m, batch: (m(batch[0]) - y).square().mean())
    for layer in ("0", "2"):
        assert found.of(layer)[0].loss > found.of(layer)[-1].loss > 0


def test_misuse():
    model = lm(1)
    with pytest.raises(ValueError, match="needs at least one batch"):
        sensitivity(model, [], CANDIDATES, but_head)
    with pytest.raises(ValueError, match="candidates must do without calibration, and algorithm='gptq' needs it"):
        sensitivity(model, batches(1), [Int4WeightOnlyConfig(32, algorithm="gptq")], but_head)
    with pytest.raises(ValueError, match="is not a multiple of its block"):
        sensitivity(model, batches(1), [Intx(4, (1, 48))], but_head)
    odd = nn.Sequential(nn.Linear(64, 64))
    wrapped = copy.deepcopy(odd)
    wrapped.forward = lambda x: {"out": odd(x)}
    with pytest.raises(ValueError, match="give loss_fn"):
        sensitivity(wrapped, [torch.randn(2, 64)], CANDIDATES)
