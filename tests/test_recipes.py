"""The recipes: each lowers the error that it is there to lower, on any format it takes, and says when it cannot."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from cases import CASES
from lm import VOCAB, batches, but_head, divergence, lm
from torch import nn

import ao
from ao.dtypes import MXFP4, NF4, NVFP4, Codebook, Float8, Int4CPULayout, Intx, QTensor
from ao.quant import (
    AWQ,
    GPTQ,
    HQQ,
    BiasCorrection,
    Clip,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    SmoothQuant,
    SpecConfig,
    UIntXWeightOnlyConfig,
    ZeroPointDomain,
    compute_error,
    config_from_dict,
    config_to_dict,
    quantize_,
    rotate_,
)
from ao.quant.algorithms import clip
from ao.quant.algorithms.factor import Factored
from ao.quant.algorithms.gptq import Solver
from ao.quant.algorithms.hadamard import random_hadamard
from ao.quant.algorithms.recipe import Recipe, Rounded
from ao.quant.calibration.observers import Hessian
from ao.quant.calibration.statistics import Statistics
from ao.quant.config import parse_recipe

N, K = 48, 96
PLAIN = GPTQ(act_order=False, search=False, rounds=0, match_original=False)


def data(tokens: int = 512) -> torch.Tensor:
    """Inputs that are correlated and of unequal size."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(tokens, K // 2, generator=g) @ torch.randn(K // 2, K, generator=g) * torch.logspace(-1, 0.5, K)


def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def seen(x: torch.Tensor) -> Statistics:
    found = Statistics({"hessian": Hessian()})
    found.observe(x)
    return found


def error(values: torch.Tensor, x: torch.Tensor) -> float:
    return float(((values - weight()) @ x.t()).norm() / (weight() @ x.t()).norm())


SPECS = [case.spec for case in CASES if case.spec.act is None and case.spec != Intx(6, (32, 32))] + [
    Intx(2, (1, 32), signed=False),
    Intx(2, (1, 32), zero_point="float", scale_dtype="float16"),
    Intx(3, (1, 32), zero_point="float", scale_dtype="bfloat16"),
    Intx(3, (16, 32)),
]


def takes(spec) -> bool:
    try:
        HQQ().check(spec, (N, K))  # which refuses qparams that it does not know
        spec.quantize(torch.zeros(N, K))  # and shapes in which a format cannot be packed
        return True
    except ValueError:
        return False


@pytest.mark.parametrize("spec", [s for s in SPECS if takes(s)], ids=lambda s: repr(s)[:60])
def test_every_format(spec, device):
    w, x = weight().to(device), data().to(device)
    results = {}
    recipes = {"rtn": parse_recipe("rtn"), "clip": Clip(), "hqq": HQQ(2.0), "plain": PLAIN, "gptq": GPTQ()}
    for name, recipe in recipes.items():
        found = recipe.quantize(w, spec, seen(x))
        # What is stored decodes to what the recipe worked with, bit for bit.
        q = spec.wrap(spec.encode(found.values, **found.qparams), torch.float32, w.shape)
        assert torch.equal(q.dequantize(), found.values) and torch.equal(
            spec.round(found.values, **found.qparams), found.values
        )
        assert found.notes == []
        results[name] = found.values
    output = {name: error(values.cpu(), data()) for name, values in results.items()}
    square = {name: float((values - w).norm()) for name, values in results.items()}
    assert square["hqq"] <= square["rtn"] * 1.0001 and square["clip"] <= square["rtn"] * 1.0001
    assert output["plain"] < output["rtn"]
    assert (
        output["gptq"] < (0.9 if spec.bits < 8 else 1.0) * output["plain"] if hasattr(spec, "bits") else output["plain"]
    )


@pytest.mark.parametrize(
    ("spec", "least"),
    [
        (Intx(2, (1, 32), scale_dtype="bfloat16"), 9.4),  # 7.8 dB rounded to nearest
        (Intx(3, (1, 32), scale_dtype="bfloat16"), 15.7),  # 15.2
        (Intx(4, (1, 32), scale_dtype="bfloat16"), 22.1),  # 21.8
        (Intx(4, (1, 128), scale_dtype="bfloat16"), 20.3),  # 19.9
        (Intx(3, (1, 32), zero_point="float", scale_dtype="bfloat16"), 16.5),  # 15.5
        (NF4, 21.2),  # 20.7
        (NVFP4, 21.3),  # 20.4
        (MXFP4, 19.0),  # 18.8
    ],
    ids=lambda value: repr(value)[:60],
)
def test_clip_on_normal_weights(spec, least):
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    found = Clip().quantize(w, spec, None)
    assert float(compute_error(w, found.values)) > least
    # Whatever the size of the numbers is, whose squares float32 need not hold.
    if isinstance(spec, Intx):
        for power in (2.0**80, 2.0**-80):
            assert torch.equal(Clip().quantize(w * power, spec, None).values, found.values * power)


def test_clip_works_in_pieces(monkeypatch):
    """Large weights are searched in parts that cut no block, with the same result."""
    w = torch.randn(6, 64, 96)
    specs = [Intx(4, (1, 32)), Intx(3, (16, 32)), Intx(4, (-1, -1)), Codebook("nf4", (1, 32))]
    whole = [Clip().quantize(w, spec, None).values for spec in specs]
    monkeypatch.setitem(clip.PIECES, "cpu", 7000)
    for spec, expected in zip(specs, whole):
        assert torch.equal(Clip().quantize(w, spec, None).values, expected)
        assert Clip().quantize(w[:0] if spec.block != (-1, -1) else w, spec, None).values.dim() == 3


@pytest.mark.parametrize(("bits", "size", "decibels"), [(4, 4.64, 22.3), (3, 3.6, 16.5), (2, 2.6, 10.3)])
def test_presets_take_less_with_clip(bits, size, decibels):
    """Scale and zero point in 16 bits together, and the best range for what these can be."""
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    model[0].weight.data = w
    report = quantize_(model, UIntXWeightOnlyConfig(getattr(torch, f"uint{bits}"), 32, algorithm="clip"))
    q = model[0].weight
    assert report.rows[0].algorithm == "clip" and 8 * q.nbytes_packed / q.numel() == bits + 16 / 32 < size
    assert compute_error(w, q.dequantize()) > decibels
    assert bits != 4 or Int4WeightOnlyConfig(32, algorithm="clip").weight(w.shape) == q.spec
    asked = UIntXWeightOnlyConfig(torch.uint4, zero_point_domain=ZeroPointDomain.INT, algorithm="clip")
    assert asked.weight(w.shape).zero_point == "int"
    signed = IntxWeightOnlyConfig(torch.int3, PerGroup(32), MappingType.ASYMMETRIC, algorithm="clip")
    assert signed.weight(w.shape).zero_point == "joint"
    assert replace(signed, scale_dtype=torch.float16).weight(w.shape).zero_point == "int"


def test_hqq_finds_the_grid_that_made_the_weight():
    spec = Intx(3, (1, 32), zero_point="float")
    scale, zero = torch.rand(N, K // 32) + 0.1, torch.randn(N, K // 32)
    codes = torch.randint(-4, 4, (N, K)).float()
    codes.view(N, -1, 32)[..., :2] = torch.tensor([-4.0, 3.0])  # the ends occur, so that the grid is known
    w = ((codes.view(N, -1, 32) - zero[..., None]) * scale[..., None]).view(N, K)
    assert (HQQ().quantize(w, spec, None).values - w).abs().max() < 1e-5


def test_a_larger_scale_where_that_is_better():
    """The rule of MXFP4 lets 7.5 end at 6; under the next power of two it is 8."""
    w = torch.full((4, K), 7.5)
    assert (MXFP4.quantize(w).dequantize() == 6).all()
    for recipe in (HQQ(), GPTQ(rounds=0)):
        assert (recipe.quantize(w, MXFP4, seen(torch.eye(K))).values == 8).all()


def test_integer_zero_points_keep_zero_exact():
    w, spec = weight() + 3, Intx(4, (1, 32))  # far from 0
    for recipe in (HQQ(), GPTQ()):
        qparams = recipe.quantize(w, spec, seen(data())).qparams
        assert qparams["zero_point"].dtype == torch.int8
        assert (spec.round(torch.zeros(N, K // 32), **qparams) == 0).all()


def test_gptq_is_optimal_where_it_can_be_checked():
    """One round of descent leaves codes that no change of a single code can better."""
    w, x = weight(), data()
    spec = Intx(3, (1, 32), zero_point="float")
    found = GPTQ(rounds=6).quantize(w, spec, seen(x))
    h = x.t() @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(K)
    loss = lambda v: (((v - w) @ h) * (v - w)).sum(1)  # noqa: E731
    best = loss(found.values)
    scale = found.qparams["scale"].repeat_interleave(32, 1)
    worse = 0
    for column in range(0, K, 5):
        for step in (-1, 1):
            moved = found.values.clone()
            moved[:, column] += step * scale[:, column]
            moved = spec.round(moved, **found.qparams)
            worse += int((loss(moved) >= best * (1 - 1e-4)).sum())
    assert worse >= 0.98 * N * len(range(0, K, 5)) * 2


@pytest.mark.parametrize(
    "spec",
    [
        MXFP4,
        NVFP4,
        Float8(block=(1, 32)),
        Codebook("nf4", (1, 32), Intx(8, (1, 3), zero_point="float", symmetric=False)),
    ],
    ids=lambda spec: repr(spec)[:60],
)
def test_gptq_fits_scales_as_they_are_stored(spec):
    """However coarsely: what was fitted are multiples of stored scales, and none of them made the error larger."""
    h = seen(data()).observers["hessian"].factored(True, 0.01)
    solver = Solver(spec, h, GPTQ(rounds=0), torch.ones(K))
    b = h.product(weight()[:, h.order])
    q, qparams = solver.piece(b, solver.start(weight()))  # b is what is left from here on
    before = q.clone()
    fitted = solver.fit(b, q, qparams)
    multiples = torch.empty_like(q).index_copy_(1, h.order, q)
    torch.testing.assert_close(spec.round(multiples, **fitted), multiples)
    loss = [
        (((v - weight()[:, h.order]) @ h.rows(slice(0, K))) * (v - weight()[:, h.order])).sum(1) for v in (before, q)
    ]
    assert (loss[1] <= loss[0] * (1 + 1e-4)).all()


def test_gptq_of_uncorrelated_inputs_is_rounding_to_nearest():
    spec = Intx(4, (1, 32))
    x = torch.eye(K) * 3
    found = GPTQ(search=False, rounds=0).quantize(weight(), spec, seen(x))
    assert torch.equal(found.values, spec.quantize(weight()).dequantize())


def test_gptq_follows_the_order_of_the_paper():
    """Against the textbook loop with the inverse Hessian's Cholesky factor."""
    w, x = weight().double(), data().double()
    spec = Intx(4, (1, 32))
    h = x.t() @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(K)
    order = torch.argsort(h.diagonal(), descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    qparams = spec.choose_qparams(weight(), spec.grid((N, K)))
    expected = torch.empty(N, K)
    rest = w[:, order].clone()
    for j, column in enumerate(order.tolist()):
        group = {name: t[:, column // 32 : column // 32 + 1] for name, t in qparams.items()}
        q = spec.round(rest[:, j : j + 1].float(), **group)
        expected[:, column] = q[:, 0]
        rest[:, j:] -= (rest[:, j : j + 1] - q) / upper[j, j] * upper[j, j:]
    found = GPTQ(search=False, rounds=0).quantize(weight(), spec, seen(data()))
    assert (found.values == expected).float().mean() > 0.98  # float32 against float64: a few ties fall otherwise


def test_gptq_pieces(monkeypatch):
    whole = GPTQ().quantize(weight(), Intx(4, (1, 32)), seen(data()))
    monkeypatch.setattr("ao.quant.algorithms.gptq.PIECE", 7 * K)
    pieces = GPTQ().quantize(weight(), Intx(4, (1, 32)), seen(data()))
    assert whole.qparams["scale"].shape == pieces.qparams["scale"].shape
    # Sums in another order make ties fall otherwise, and what follows a tie; the error is what must not change.
    assert error(pieces.values, data()) == pytest.approx(error(whole.values, data()), rel=0.02)


def test_factored():
    x = torch.randn(600, 300)
    h = x.t() @ x
    order = torch.randperm(300)
    factored = Factored(h.clone(), order)
    assert factored.factor(0.01)
    damped = h[order][:, order] + 0.01 * h.diagonal().mean() * torch.eye(300)
    assert torch.allclose(factored.rows(slice(0, 300)), damped)
    u = torch.cat(
        [
            torch.cat([factored.back(s, e), factored.within(s, e), torch.zeros(300 - e, e - s)])
            for s, e in factored.blocks()
        ],
        1,
    )
    assert torch.allclose((u * factored.pivots) @ u.t(), damped, rtol=1e-4, atol=1e-2)
    t = torch.randn(5, 300)
    assert torch.allclose(factored.product(t), t @ damped, rtol=1e-3, atol=1e-2)
    assert torch.allclose(factored.solve(t @ damped), t @ u, rtol=1e-3, atol=1e-2)
    assert torch.allclose(factored.matrix(), h, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("x, why", [
    (torch.zeros(10, K), "not finite, or all zero"),
    (torch.full((10, K), torch.inf), "not finite, or all zero"),
    (torch.empty(0, K), "no data came to it"),
])  # fmt: skip
def test_gptq_falls_back(x, why):
    spec = Intx(4, (1, 32))
    found = GPTQ().quantize(weight(), spec, seen(x))
    assert len(found.notes) == 1 and why in found.notes[0]
    assert (found.values - weight()).norm() <= (spec.quantize(weight()).dequantize() - weight()).norm()


def test_gptq_dead_channels_and_few_tokens():
    x = data()
    x[:, 5:9] = 0
    found = GPTQ().quantize(weight(), Intx(4, (1, 32)), seen(x))
    assert found.notes == ["4 of its 96 inputs were always zero: their weights are rounded to nearest"]
    assert (found.values - weight())[:, 5:9].abs().max() < 0.5
    few = GPTQ().quantize(weight(), Intx(4, (1, 32)), seen(data(3)))  # rank 3
    assert few.notes == [] and error(few.values, data(3)) < 0.02


def test_awq_scales_up_what_matters():
    x = torch.randn(512, K)
    x[:, 7] *= 30
    found_stats = Statistics({"hessian": Hessian(), "channels": ao.quant.calibration.statistics.Channels()})
    found_stats.observe(x)
    spec = Intx(3, (1, 32))
    found = AWQ().quantize(weight(), spec, found_stats)
    assert found.pre_scale.shape == (1, K) and found.pre_scale[0].argmin() == 7
    values = found.values * found.pre_scale
    rtn = spec.quantize(weight()).dequantize()
    assert error(values, x) < 0.7 * error(rtn, x)
    assert error(
        AWQ(GPTQ()).quantize(weight(), spec, found_stats).scaled(torch.ones(K)).values * found.pre_scale, x
    ) < error(values, x)


def quantized(config, data=None):
    model = lm()
    report = quantize_(model, config, but_head, calibration_data=data)
    return model, report


def test_language_model():
    """Better and better: what each recipe is for, on a model as a whole."""
    cal, test = batches(8), batches(4, seed=2)
    config = {name: UIntXWeightOnlyConfig(torch.uint3, 32, algorithm=name) for name in ("rtn", "hqq", "gptq")}
    config["plain"] = UIntXWeightOnlyConfig(torch.uint3, 32, algorithm=PLAIN)
    kl = {}
    for name, each in config.items():
        model, report = quantized(each, cal)
        assert len(report) == 14 and report.notes == []
        kl[name] = divergence(model, lm(), test)
    assert kl["hqq"] < 0.9 * kl["rtn"]
    assert kl["gptq"] < 0.7 * kl["plain"] < 0.5 * kl["rtn"]


def test_awq_on_language_models():
    """Over several models: on a single one the luck of rounding is as large as what AWQ wins back."""
    kl = dict.fromkeys(("rtn", "awq"), 0.0)
    for blocks in (1, 2, 3):
        reference = lm(blocks)
        for name in kl:
            model = copy.deepcopy(reference)
            config = UIntXWeightOnlyConfig(torch.uint3, 32, algorithm=name)
            report = quantize_(model, config, but_head, calibration_data=batches(4))
            assert len(report) == 7 * blocks and report.notes == []
            kl[name] += divergence(model, reference, batches(4, seed=2))
    assert kl["awq"] < 0.95 * kl["rtn"]


def test_forms_of_batches():
    ids = batches(2)
    reference, _ = quantized(Int4WeightOnlyConfig(32, algorithm="gptq"), ids)
    for form in ([(b,) for b in ids], [{"ids": b} for b in ids], (b for b in ids)):
        model, _ = quantized(Int4WeightOnlyConfig(32, algorithm="gptq"), form)
        assert torch.equal(model(ids[0]), reference(ids[0]))
    with pytest.raises(TypeError, match="put it in a list"):
        quantized(Int4WeightOnlyConfig(32, algorithm="gptq"), ids[0])
    with pytest.raises(ValueError, match="has no batches"):
        quantized(Int4WeightOnlyConfig(32, algorithm="gptq"), [])


def test_a_failed_call_leaves_the_model_as_it_was():
    model = lm().train()
    before = dict(model.named_parameters())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    good, bad = batches(1)[0], torch.full((1, 4), VOCAB)
    for data in ([good, bad], [bad]):
        with pytest.raises(ValueError, match="does not run through the model: index out of range"):
            quantize_(model, Int4WeightOnlyConfig(32, algorithm="gptq"), but_head, calibration_data=data)
        assert all(p is before[name] for name, p in model.named_parameters())
        assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert model.training and all(m.training for m in model.modules())
        assert not any("forward" in m.__dict__ for m in model.modules())
    assert model(good).shape == (4, 32, VOCAB)


def test_needs_calibration():
    for algorithm in ("gptq", "awq", "bias_correction"):
        with pytest.raises(ValueError, match=rf"q_proj.weight: algorithm='{algorithm}' needs calibration"):
            quantize_(lm(), Int4WeightOnlyConfig(32, algorithm=algorithm), but_head)


def test_calibrated_beforehand():
    model, cal, test = lm(), batches(8), batches(4, seed=2)
    config = Int4WeightOnlyConfig(32, algorithm="gptq")
    with ao.calibrate(model, config, but_head) as found:
        for ids in cal:
            model(ids)
    assert len(found) == 14 and all(set(s.observers) == {"hessian"} for s in found.values())
    quantize_(model, config, but_head)
    assert divergence(model, lm(), test) < 0.7 * divergence(quantized(Int4WeightOnlyConfig(32))[0], lm(), test)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_(model, config, but_head)


def test_rules_mix_recipes():
    rules = FqnToConfig(
        {
            "re:.*self_attn.*": Int8WeightOnlyConfig(),
            "re:.*mlp.*": SpecConfig(NF4_32, algorithm="gptq"),
            "model.embed_tokens": IntxWeightOnlyConfig(torch.int4, PerGroup(32), algorithm="hqq"),
            "lm_head": IntxWeightOnlyConfig(torch.int4, PerGroup(32), algorithm="hqq"),
        }
    )
    model = lm()
    report = quantize_(model, rules, calibration_data=batches(2))
    assert len(report) == 15 and model.lm_head.weight is model.model.embed_tokens.weight
    assert {row.algorithm for row in report.rows} == {"rtn", "gptq", "hqq"} and ", gptq" in str(report)
    assert isinstance(model.model.layers[1].mlp.up_proj.weight, QTensor)


NF4_32 = ao.dtypes.Codebook("nf4", (1, 32))


def test_plain_models_without_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    reference = copy.deepcopy(model)
    cal, x = [torch.randn(64, 64) for _ in range(4)], torch.randn(64, 64)
    quantize_(model, Intx(3, (1, 32)))
    rtn = (model(x) - reference(x)).norm()
    model = copy.deepcopy(reference)
    quantize_(model, SpecConfig(Intx(3, (1, 32)), algorithm="gptq"), calibration_data=cal)
    assert (model(x) - reference(x)).norm() < 0.85 * rtn


class Experts(nn.Module):
    """Routes each token to one of its experts; the last never gets any."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(4))

    def forward(self, x):
        choice = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts[:3]):
            picked = choice == i
            if picked.any():
                out[picked] = expert(x[picked])
        return x + out


def test_experts():
    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Experts())
    report = quantize_(
        model, Int4WeightOnlyConfig(32, algorithm="gptq"), calibration_data=[torch.randn(32, 64) for _ in range(3)]
    )
    assert len(report) == 16 and sum("no data came to it" in note for note in report.notes) == 4
    assert model(torch.randn(8, 64)).isfinite().all()


def test_bias_correction_restores_the_mean():
    torch.manual_seed(0)
    layer = nn.Linear(K, N, bias=False)
    reference, x = copy.deepcopy(layer), data() + 2
    quantize_(
        nn.ModuleList([layer])[0],
        SpecConfig(Intx(3, (1, 32)), algorithm="bias_correction"),
        lambda m, n: True,
        calibration_data=[x],
    )
    assert layer.bias is not None and torch.allclose(layer(x).mean(0), reference(x).mean(0), atol=1e-3)
    model, test = nn.Sequential(nn.Linear(K, N), nn.ReLU()), data() + 2
    reference = copy.deepcopy(model)
    quantize_(model, SpecConfig(Intx(2, (1, 32)), algorithm="bias_correction+gptq"), calibration_data=[x])
    assert torch.allclose(model[0](test).mean(0), reference[0](test).mean(0), atol=1e-3)


def test_smoothquant_helps_activations_with_outliers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N)).requires_grad_(False)
    reference, x = copy.deepcopy(model), torch.randn(256, K)
    x[:, 11] *= 80
    errors = {}
    for algorithm in ("rtn", "smoothquant", "smoothquant+gptq"):
        each = copy.deepcopy(reference)
        quantize_(each, Int8DynamicActivationInt8WeightConfig(algorithm=algorithm), calibration_data=[x])
        errors[algorithm] = float((each(x) - reference(x)).norm())
    assert errors["smoothquant"] < 0.5 * errors["rtn"] and errors["smoothquant+gptq"] < errors["smoothquant"]
    with pytest.raises(ValueError, match="for formats that quantize activations"):
        quantize_(copy.deepcopy(reference), Int4WeightOnlyConfig(32, algorithm="smoothquant"), calibration_data=[x])


def test_where_a_recipe_cannot_apply():
    embedding, conv = nn.Sequential(nn.Embedding(8, 64)), nn.Sequential(nn.Conv2d(32, 32, 3))
    for model in (embedding, conv):
        with pytest.raises(ValueError, match="needs the inputs of a linear layer"):
            quantize_(
                model, Int4WeightOnlyConfig(32, algorithm="gptq"), lambda m, n: True, calibration_data=[torch.zeros(1)]
            )
        quantize_(
            model,
            IntxWeightOnlyConfig(torch.int4, algorithm="hqq"),
            lambda m, n: isinstance(m, (nn.Embedding, nn.Conv2d)),
        )
    assert isinstance(conv[0].weight, QTensor)
    with pytest.raises(ValueError, match="HQQ finds scales"):
        quantize_(nn.Sequential(nn.Linear(256, 16)), SpecConfig(ao.dtypes.Flat(Intx(8, (1, 256))), algorithm="hqq"))


def test_names():
    assert parse_recipe("awq+gptq") == AWQ(GPTQ()) and parse_recipe("bias_correction+smoothquant") == BiasCorrection(
        SmoothQuant()
    )
    assert Int8WeightOnlyConfig(algorithm=GPTQ(damping=0.1)).recipe == GPTQ(damping=0.1)
    with pytest.raises(TypeError, match="Int8WeightOnlyConfig: algorithm must be a name such as 'gptq' or a Recipe"):
        Int8WeightOnlyConfig(algorithm=["awq"])
    with pytest.raises(
        ValueError, match="algorithm must be among awq, bias_correction, clip, gptq, hqq, magnitude, rtn, smoothquant"
    ):
        Int4WeightOnlyConfig(algorithm="gtpq")
    with pytest.raises(ValueError, match="'gptq' decides the codes, and must come last"):
        Int4WeightOnlyConfig(algorithm="gptq+awq")
    with pytest.raises(ValueError, match="give use_hqq=True or algorithm='gptq'"):
        Int4WeightOnlyConfig(use_hqq=True, algorithm="gptq")
    with pytest.raises(ValueError, match="damping must be positive"):
        GPTQ(damping=0)
    assert Int4WeightOnlyConfig(use_hqq=True).recipe == HQQ()


def test_zero_points_of_recipes():
    """A fraction and 16 bits where nothing is asked for, which is less memory than an integer and float32."""
    for config in (Int4WeightOnlyConfig, lambda size, **k: UIntXWeightOnlyConfig(torch.uint4, size, **k)):
        usual, found = config(32).weight((64, 64)), config(32, algorithm="hqq").weight((64, 64))
        assert (usual.zero_point, usual.scale_dtype) == ("int", "float32")
        assert (found.zero_point, found.scale_dtype) == ("float", "bfloat16")
        assert found.quantize(weight()).nbytes_packed < usual.quantize(weight()).nbytes_packed
        asked = config(32, algorithm="hqq", zero_point_domain=ZeroPointDomain.INT).weight((64, 64))
        assert (asked.zero_point, asked.scale_dtype) == ("int", "float32")
    signed = IntxWeightOnlyConfig(torch.int3, PerGroup(32), MappingType.ASYMMETRIC, algorithm="gptq").weight((64, 64))
    assert signed == Intx(3, (1, 32), zero_point="float", scale_dtype="bfloat16")
    assert Int8DynamicActivationInt4WeightConfig(algorithm="gptq").weight((64, 64)) == Intx(4, (1, 32), symmetric=True)


def groups_of_one_number() -> torch.Tensor:
    """Groups of 32 that are one number, or one but for little."""
    w = 0.05 * weight()
    for row, (value, spread) in enumerate(
        [(0.5, 0), (-0.3, 0), (0.7, 1e-6), (-0.2, 1e-5), (0.5, 1e-4), (1.0, 1e-3), (-1.0, 1e-2), (3e4, 0)]
    ):
        w[row, :32] = value * (1 + spread * weight()[row, :32])
    return w


UNUSUAL = {
    "groups of one number": groups_of_one_number(),
    "ones": torch.ones(N, K),
    "one number": torch.full((N, K), -0.3),
    "zeros": torch.zeros(N, K),
    "a group of zeros": weight().index_fill(1, torch.arange(32), 0.0),
    "an outlier of 1e6": weight().index_put((torch.tensor(2), torch.tensor(2)), torch.tensor(1e6)),
    "an outlier of -1e30": weight().index_put((torch.tensor(2), torch.tensor(2)), torch.tensor(-1e30)),
    **{f"{size:g}": weight() * size for size in (1e-30, 1e-20, 1e-7, 1e6, 1e30)},
    "rows from 1e-30 to 1e30": weight() * torch.logspace(-30, 30, N)[:, None],
}


def decibels(values: torch.Tensor, error: torch.Tensor) -> float:
    return math.inf if not error.any() else 20 * math.log10(float(values.norm() / error.norm()))


def unusual(name: str, dtype: torch.dtype, config, algorithm: str) -> tuple[float, float]:
    """Quantize an unusual weight. The decibels by which weight and output are kept."""
    w, x = UNUSUAL[name].to(dtype), data(128).to(dtype)
    model = nn.Sequential(nn.Linear(K, N, bias=False, dtype=dtype))
    model[0].weight = nn.Parameter(w.clone())
    quantize_(model, config(algorithm), calibration_data=[x[:64], x[64:]])
    found, bias = model[0].weight.dequantize().double(), model[0].bias
    assert found.isfinite().all() and (bias is None or bias.isfinite().all())
    exact = x.double() @ w.double().t()
    lost = x.double() @ (found - w.double()).t() + (0 if bias is None else bias.double())
    return decibels(w.double(), found - w.double()), decibels(exact, lost)


def kinds(bits: int):
    unsigned, signed = getattr(torch, f"uint{bits}"), getattr(torch, f"int{bits}")
    return [
        lambda a: UIntXWeightOnlyConfig(unsigned, 32, algorithm=a),
        lambda a: IntxWeightOnlyConfig(signed, PerGroup(32), MappingType.ASYMMETRIC, algorithm=a),
        lambda a: IntxWeightOnlyConfig(signed, PerGroup(32), algorithm=a),
    ]


def rounded(name: str, dtype: torch.dtype, config, algorithm: str) -> tuple[float, float]:
    """`unusual` of round-to-nearest, in the Spec that an algorithm stores: its zero point is a fraction where that of "rtn" is
    an integer, which with one bit is 3 dB worse."""
    w, x = UNUSUAL[name].to(dtype), data(128).to(dtype).double()
    found = config(algorithm).weight((N, K)).quantize(w).dequantize().double()
    return decibels(w.double(), found - w.double()), decibels(x @ w.double().t(), x @ (found - w.double()).t())


def check_unusual(name: str, dtype: torch.dtype, config) -> None:
    """Every algorithm is finite, and as good as round-to-nearest, up to what a scale of 8 significant bits can tell."""
    assert min(unusual(name, dtype, config, "rtn")) > -4
    assert unusual(name, dtype, config, "hqq")[0] > min(rounded(name, dtype, config, "hqq")[0] - 1, 42)
    for algorithm in ("gptq", "awq", "awq+gptq", "bias_correction"):
        least = min(rounded(name, dtype, config, algorithm)[1] - 1, 42)
        assert unusual(name, dtype, config, algorithm)[1] > least, algorithm


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_weights(name):
    check_unusual(name, torch.float32, kinds(4)[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_weights_of_every_kind(name, bits, dtype):
    w = UNUSUAL[name].to(dtype)
    if (
        w.isfinite().all() and w.abs().max() > torch.finfo(dtype).smallest_normal
    ):  # else it has a few steps of the dtype
        for config in kinds(bits):
            check_unusual(name, dtype, config)


@pytest.mark.parametrize("algorithm", ["hqq", "gptq", "awq", "bias_correction"])
@pytest.mark.parametrize("value, spread", [(0.5, 0.0), (1.0, 0.0), (0.5, 1e-6), (0.5, 1e-5), (0.5, 1e-4), (-0.75, 0.0)])
def test_a_group_of_one_number(algorithm, value, spread):
    w = 0.1 * weight()
    w[3, :32] = value + spread * weight()[3, :32]
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    model[0].weight = nn.Parameter(w)
    quantize_(model, Int4WeightOnlyConfig(32, algorithm=algorithm), calibration_data=[data(64)])
    assert model[0].weight.dequantize()[3, :32].mean() == pytest.approx(value, rel=4e-3)


@pytest.mark.parametrize("size", [1e-20, 1e30])
def test_smoothquant_of_unusual_weights(size):
    """The scales adapt to the size of the weight, and to that of the input."""
    x = torch.randn(256, K)
    x[:, 3] *= 60
    results = []
    for w, inputs in ((weight(), x), (weight() * size, x), (weight(), x * 1e-12)):
        model = nn.Sequential(nn.Linear(K, N, bias=False))
        model[0].weight = nn.Parameter(w.clone())
        quantize_(model, Int8DynamicActivationInt8WeightConfig(algorithm="smoothquant"), calibration_data=[inputs])
        exact = inputs.double() @ w.double().t()
        results.append(decibels(exact, model(inputs).double() - exact))
    assert max(results) - min(results) < 1.5 and min(results) > 35


@pytest.mark.parametrize("algorithm", ["rtn", "clip", "hqq", "gptq", "awq", "bias_correction"])
def test_numbers_beyond_float32_are_refused(algorithm):
    """Every algorithm computes in float32, where they would be infinite."""
    model = nn.Sequential(nn.Linear(K, N, dtype=torch.float64))
    model[0].weight.data *= 1e100
    before = model[0].weight
    data = [torch.randn(8, K, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(ValueError, match="0.weight: .*beyond (its|the) range"):
        quantize_(model, Int4WeightOnlyConfig(group_size=32, algorithm=algorithm), calibration_data=data)
    assert model[0].weight is before


def test_float16_scales_that_do_not_fit_are_refused():
    config = IntxWeightOnlyConfig(torch.int4, PerGroup(32), scale_dtype=torch.float16)
    for size in (1e-8, 1e6):
        model = nn.Sequential(nn.Linear(K, N), nn.Linear(K, N))
        model[1].weight.data *= size * 10
        before = dict(model.named_parameters())
        with pytest.raises(ValueError, match="1.weight: .*float16 holds 1e-6 to 65504; use scale_dtype='bfloat16'"):
            quantize_(model, config)
        assert all(p is before[name] for name, p in model.named_parameters())
    quantize_(nn.Sequential(nn.Linear(K, N)), config)


@pytest.mark.parametrize("algorithm", ["rtn", "hqq", "awq"])
def test_the_largest_numbers_of_float16(algorithm):
    model = nn.Sequential(nn.Linear(K, N, bias=False, dtype=torch.float16))
    model[0].weight = nn.Parameter((weight() * 2e4).clamp(-65504, 65504).half())
    quantize_(model, Int4WeightOnlyConfig(32, algorithm=algorithm), calibration_data=[data(32).half()])
    assert model[0].weight.dequantize().isfinite().all()


@pytest.mark.parametrize(
    "algorithm", ["awq+gptq", GPTQ(damping=0.1, act_order=False), AWQ(GPTQ(rounds=2), steps=5), HQQ(2.0)], ids=repr
)
def test_json(algorithm):
    config = Int4WeightOnlyConfig(algorithm=algorithm)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@dataclass(frozen=True)
class Halved(Recipe):
    """A recipe of somebody else, whose fields have names that configs use too."""

    name: ClassVar[str] = "halved"
    value: float = 0.5
    type: str = "x"
    rounding: Recipe = GPTQ()

    def quantize(self, weight, spec, seen):
        qparams = spec.choose_qparams(weight.float() * self.value, spec.grid(weight.shape))
        return Rounded(spec.round(weight.float() * self.value, **qparams), qparams)


def test_json_of_a_recipe_defined_elsewhere():
    config = Int4WeightOnlyConfig(algorithm=Halved(value=0.25, rounding=HQQ(2.0)))
    data = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(data) == config
    rules = FqnToConfig({"0": SpecConfig(Intx(3), algorithm=AWQ(Halved()))})
    assert config_from_dict(json.loads(json.dumps(config_to_dict(rules)))) == rules
    data["algorithm"] |= {"module": "their.recipes", "class": "Theirs"}
    with pytest.raises(
        ValueError, match="a config has Theirs of their.recipes, which is not imported; import their.recipes"
    ):
        config_from_dict(data)
    with pytest.raises(ValueError, match="unknown 'Theirs' in a config"):
        config_from_dict({"type": "Int4WeightOnlyConfig", "algorithm": {"value": "Theirs"}})


def test_prepacked_layout():
    model = nn.Sequential(nn.Linear(64, 64))
    reference, x = copy.deepcopy(model), torch.randn(64, 64) @ torch.randn(64, 64)
    config = Int4WeightOnlyConfig(32, Int4CPULayout(), algorithm="gptq")
    quantize_(model, config, calibration_data=[x])
    rtn = copy.deepcopy(reference)
    quantize_(rtn, Int4WeightOnlyConfig(32, Int4CPULayout()))
    assert (model(x) - reference(x)).norm() < 0.8 * (rtn(x) - reference(x)).norm()


def test_compiled_model():
    model = lm(1)
    model.model.layers[0].compile(backend="eager")
    whole = torch.compile(model, backend="eager")
    ids = batches(1)[0]
    whole(ids)
    quantize_(
        whole,
        Int4WeightOnlyConfig(32, algorithm="gptq"),
        lambda m, n: but_head(m, n.removeprefix("_orig_mod.")),
        calibration_data=[ids],
    )
    plain = lm(1)
    quantize_(plain, Int4WeightOnlyConfig(32, algorithm="gptq"), but_head, calibration_data=[ids])
    assert torch.equal(whole(ids), plain(ids))


def test_float8():
    model, _ = quantized(SpecConfig(Float8(block=(1, 32)), algorithm="gptq"), batches(4))
    rtn, _ = quantized(Float8(block=(1, 32)))
    assert divergence(model, lm(), batches(2, seed=3)) < divergence(rtn, lm(), batches(2, seed=3))


@pytest.mark.gpu
def test_device():
    model = lm()
    quantize_(model, Int4WeightOnlyConfig(32, algorithm="gptq"), but_head, device="cuda", calibration_data=batches(4))
    assert all(p.device.type == "cuda" for p in model.parameters())
    here = lm().cuda()
    quantize_(
        here, Int4WeightOnlyConfig(32, algorithm="gptq"), but_head, calibration_data=[b.cuda() for b in batches(4)]
    )
    assert divergence(model, here, [b.cuda() for b in batches(2)]) < 0.01


def test_device_meta_of_moves():
    """A device asked for is where everything ends up, also the blocks that were moved for the run only."""
    model = lm()
    quantize_(model, Int4WeightOnlyConfig(32, algorithm="gptq"), but_head, device="cpu", calibration_data=batches(2))
    assert torch.equal(
        model(batches(1)[0]), quantized(Int4WeightOnlyConfig(32, algorithm="gptq"), batches(2))[0](batches(1)[0])
    )


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 64, 96, 384, 896, 43])
def test_hadamard(n):
    h = random_hadamard(n)
    assert torch.allclose(h @ h.t(), torch.eye(n, dtype=torch.float64), atol=1e-9)
    assert n == 43 or torch.allclose(h.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize(("tied", "block"), [(True, None), (False, None), (True, 32)])
def test_rotation_changes_nothing_but_the_weights(tied, block):
    model, ids = lm(2, tied), batches(1)[0]
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.bias = nn.Parameter(torch.randn(64))
        model.model.layers[0].self_attn.v_proj.bias = nn.Parameter(torch.randn(32))
        expected = model(ids)
        weight = model.model.layers[0].mlp.down_proj.weight.clone()
        report = rotate_(model, block=block)
        assert torch.allclose(model(ids), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    assert not torch.allclose(model.model.layers[0].mlp.down_proj.weight, weight, atol=0.1)
    assert (model.model.norm.weight == 1).all() and bool(report.notes) == tied
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_rotation_in_blocks_stays_in_them():
    model = lm(2)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:32] = 0
        rotate_(model, block=32)
    assert (model.model.layers[0].mlp.down_proj.weight[:32] == 0).all()
    with pytest.raises(ValueError, match="block must divide the width 64"):
        rotate_(model, block=48)


def test_rotation_spreads_outliers():
    kl = {}
    for turned in (False, True):
        model = lm()
        with torch.no_grad():
            for block in model.model.layers:
                for norm, part in (
                    (block.input_layernorm, block.self_attn),
                    (block.post_attention_layernorm, block.mlp),
                ):
                    norm.weight[5] /= 12
                    for name, layer in part.named_children():
                        if name not in ("o_proj", "down_proj"):
                            layer.weight[:, 5] *= 12  # one weight of each row makes its range
        reference = copy.deepcopy(model)
        if turned:
            rotate_(model)
        quantize_(model, Intx(3), but_head)
        kl[turned] = divergence(model, reference, batches(2))
    assert kl[True] < 0.8 * kl[False]


def test_rotation_of_unknown_models():
    with pytest.raises(ValueError, match="the model has no embed_tokens; give a RotationPlan"):
        rotate_(nn.Sequential(nn.Linear(4, 4)))
    model = lm(1)
    model.model.layers[0].pre_feedforward_layernorm = nn.Identity()
    with pytest.raises(ValueError, match=r"layers.0 has .*pre_feedforward_layernorm"):
        rotate_(model)
    model = lm(1)
    model.model.norm = nn.LayerNorm(64)
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(ValueError, match="model.norm must be an RMSNorm"):
        rotate_(model)
    model = lm(1)
    quantize_(model, Intx(4), but_head)
    with pytest.raises(ValueError, match="q_proj is quantized already; rotate first|o_proj is quantized already"):
        rotate_(model)
    assert torch.equal(model.model.embed_tokens.weight, before)
