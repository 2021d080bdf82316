"""Observers, `calibrate`, and static activation scales."""

from __future__ import annotations

import copy

import pytest
import torch
from lm import batches, but_head, lm
from torch import nn

import ao
from ao.dtypes import Float8, Intx
from ao.quant import (
    Float8StaticActivationFloat8WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    PerTensor,
    calibrate,
    compute_error,
    quantize_,
    sensitivity,
)
from ao.quant.calibration.observers import Channels, Hessian, Histogram, MinMax, MovingAverage
from ao.quant.calibration.statistics import ATTRIBUTE, OBSERVERS, Statistics, act_scale

STATIC = [Int8StaticActivationInt8WeightConfig, Float8StaticActivationFloat8WeightConfig]


def parts(count: int = 5) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(40, 16, generator=g) * (i + 1) for i in range(count)]


def fed(observer):
    for x in parts():
        observer.observe(x)
    return observer


def test_observers_agree_with_all_data_at_once(device):
    x = torch.cat(parts())
    seen = fed(MinMax())
    assert torch.equal(seen.lo, x.min()) and torch.equal(seen.hi, x.max()) and torch.equal(seen.amax(), x.abs().max())
    channels = fed(Channels())
    assert torch.equal(channels.amax, x.abs().amax(0)) and torch.allclose(channels.mean, x.mean(0), atol=1e-5)
    assert torch.allclose(channels.mean_abs, x.abs().mean(0))
    hessian = fed(Hessian())
    assert torch.allclose(hessian.matrix(), x.t() @ x, rtol=1e-4, atol=1e-3) and hessian.tokens == 200
    average = None
    for part in parts():
        amax = part.abs().max()
        average = amax if average is None else 0.9 * average + 0.1 * amax
    assert torch.allclose(fed(MovingAverage()).amax(), average)


def test_the_hessian_survives_its_factor():
    hessian, again = fed(Hessian()), fed(Hessian())
    assert hessian.factored(True, 0.01) is hessian.factored(True, 0.01) and hessian.total is None
    assert torch.allclose(hessian.matrix(), again.matrix(), rtol=1e-4, atol=1e-3)
    assert torch.allclose(hessian.diagonal(), again.diagonal(), rtol=1e-4)
    assert hessian.factored(False, 0.1) is not None
    fed(hessian)
    assert torch.allclose(hessian.matrix(), 2 * again.matrix(), rtol=1e-4, atol=1e-3)
    factor = torch.rand(16) + 0.5
    expected = Hessian()
    for x in parts():
        expected.observe(x * factor)
    assert torch.allclose(again.scaled(factor).matrix(), expected.matrix(), rtol=1e-4, atol=1e-3)


def test_histogram_grows():
    seen = fed(Histogram(512))
    x = torch.cat(parts()).abs().flatten()
    assert seen.counts.sum() == x.numel() and seen.counts.shape == (512,) and seen.top >= x.max()
    for fraction in (0.5, 0.9, 0.999, 1.0):
        assert abs(seen.percentile(fraction) - torch.quantile(x, fraction)) <= 2 * seen.top / 512 + 1e-6
    zeros = Histogram()
    zeros.observe(torch.zeros(3))
    zeros.observe(torch.ones(1))
    assert zeros.counts.sum() == 4 and zeros.percentile(0.5) < 1e-2


@pytest.mark.parametrize(
    "spec", [Intx(8, (-1, -1)), Intx(4, (-1, -1), symmetric=True), Float8(block=(-1, -1))], ids=repr
)
def test_the_range_of_least_error(spec):
    x = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)), torch.tensor([60.0])])[None]
    seen = Histogram()
    seen.observe(x)
    error = {}
    for name, amax in {"minmax": x.max(), "mse": seen.best(spec)}.items():
        error[name] = float((spec.round(x, scale=act_scale(spec, amax).reshape(1, 1)) - x).square().sum())
    assert error["mse"] <= error["minmax"] * 1.001
    if spec == Intx(4, (-1, -1), symmetric=True):
        assert error["mse"] < 0.8 * error["minmax"]


def test_memory_does_not_grow():
    def size(statistics: Statistics) -> int:
        tensors = [t for o in statistics.observers.values() for t in vars(o).values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    statistics = Statistics({name: make() for name, make in OBSERVERS.items()})
    sizes = []
    for x in parts(3):
        statistics.observe(x)
        sizes.append(size(statistics))
    assert sizes[0] == sizes[1] == sizes[2] and statistics.calls == 3


def test_calibrate_watches_and_leaves():
    model = lm(1)
    with calibrate(model, filter_fn=but_head) as seen:
        for ids in batches(2):
            model(ids)
    assert set(seen) == {name for name, m in model.named_modules() if but_head(m, name)}
    assert all(set(s.observers) == set(OBSERVERS) and s.calls == 2 for s in seen.values())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any("statistics" in key for key in model.state_dict())
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].mlp.up_proj.__dict__[ATTRIBUTE].calls == 2
    with pytest.raises(RuntimeError, match="stop"), calibrate(model, filter_fn=but_head):
        raise RuntimeError("stop")
    assert not any(m._forward_pre_hooks for m in model.modules())
    with (
        pytest.raises(ValueError, match="calibrate: observers must be among .*; got hesian"),
        calibrate(model, observers=["hesian"]),
    ):
        pass


def test_calibrate_watches_what_a_config_needs():
    for config, names in (
        (Int8StaticActivationInt8WeightConfig(), {"minmax"}),
        (Int8StaticActivationInt8WeightConfig(range_method="percentile"), {"histogram"}),
        (Int8StaticActivationInt8WeightConfig(algorithm="gptq"), {"minmax", "hessian"}),
        (Int4WeightOnlyConfig(32, algorithm="awq"), {"channels", "hessian"}),
    ):
        with calibrate(lm(1), config, but_head) as seen:
            pass
        assert all(set(s.observers) == names for s in seen.values())
    with calibrate(lm(1), Int4WeightOnlyConfig(32)) as seen:
        pass
    assert not seen


@pytest.mark.parametrize("method", ["minmax", "moving_average", "percentile", "mse"])
@pytest.mark.parametrize("config", STATIC)
def test_static_activations(config, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).requires_grad_(False)
    reference, data, x = copy.deepcopy(model), [torch.randn(64, 64) for _ in range(4)], torch.randn(64, 64)
    with calibrate(model, config(range_method=method)):
        for each in data:
            model(each)
    quantize_(model, config(range_method=method))
    assert model[0].weight.act_scale.shape == () and model[0].weight.act_scale != model[2].weight.act_scale
    assert compute_error(reference(x), model(x)) > (22 if config is Float8StaticActivationFloat8WeightConfig else 30)
    assert not any(ATTRIBUTE in m.__dict__ for m in model.modules())
    again = copy.deepcopy(reference)
    quantize_(again, config(range_method=method), calibration_data=data)
    assert compute_error(reference(x), again(x)) > (22 if config is Float8StaticActivationFloat8WeightConfig else 30)
    if method == "minmax":
        amax = torch.cat(data).abs().max()
        top = 448 if config is Float8StaticActivationFloat8WeightConfig else 127.5
        assert torch.allclose(again[0].weight.act_scale, amax / top)


@pytest.mark.parametrize("config", STATIC)
def test_refuses_without_calibration(config):
    model = nn.Sequential(nn.Linear(64, 64))
    before = model[0].weight
    with pytest.raises(ValueError, match="0.weight: a static activation needs calibration .*calibration_data"):
        quantize_(model, config())
    with calibrate(model, config()):
        pass  # nothing was run
    with pytest.raises(ValueError, match="needs calibration"):
        quantize_(model, config())
    with calibrate(model, observers=["channels"]):
        model(torch.randn(2, 64))
    with pytest.raises(ValueError, match=r"needs calibration \(minmax\)"):
        quantize_(model, config())
    assert model[0].weight is before
    quantize_(model, config(scale=0.1))
    assert model[0].weight.act_scale == 0.1


def test_a_layer_that_never_ran_is_refused():
    model = nn.ModuleDict({"used": nn.Linear(64, 64), "idle": nn.Linear(64, 64)})
    model.forward = lambda x: model["used"](x)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="idle.weight: .*no data came to this layer"):
        quantize_(model, Int8StaticActivationInt8WeightConfig(), calibration_data=[torch.randn(4, 64)])
    assert all(p is before[name] for name, p in model.named_parameters())


def test_static_scales_of_smoothed_activations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
    reference, x = copy.deepcopy(model), torch.randn(256, 64)
    x[:, 3] *= 60
    quantize_(model, Int8StaticActivationInt8WeightConfig(algorithm="smoothquant"), calibration_data=[x])
    dynamic = copy.deepcopy(reference)
    quantize_(dynamic, Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()))
    assert (model(x) - reference(x)).norm() < 0.5 * (dynamic(x) - reference(x)).norm()
    scaled = (x * model[0].weight.pre_scale).abs().max()
    assert torch.allclose(model[0].weight.act_scale, scaled / 127.5, rtol=1e-5)
    for method in ("percentile", "mse", "moving_average"):
        with pytest.raises(ValueError, match="range_method='minmax'"):
            quantize_(
                copy.deepcopy(reference),
                Int8StaticActivationInt8WeightConfig(algorithm="smoothquant", range_method=method),
                calibration_data=[x],
            )


def test_static_misuse():
    for config in STATIC:
        with pytest.raises(ValueError, match="range_method must be one of minmax, moving_average, percentile, mse"):
            config(range_method="max")
        with pytest.raises(ValueError, match="scale must be positive"):
            config(scale=-1.0)
        with pytest.raises(ValueError, match="scale must have one element"):
            config(scale=torch.ones(2))
    with pytest.raises(ValueError, match="a static activation is symmetric"):
        act_scale(Intx(8, (-1, -1), symmetric=False), torch.tensor(1.0))


@pytest.mark.parametrize("watched", ["the model", "what torch.compile returned"])
def test_a_model_that_was_compiled_and_run_before(watched):
    """Its graph is from before the hooks."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 16)
    compiled(x)
    target = model if watched == "the model" else compiled
    with calibrate(target, Int8StaticActivationInt8WeightConfig()) as seen:
        compiled(x)
    assert [s.calls for s in seen.values()] == [1, 1]
    quantize_(target, Int8StaticActivationInt8WeightConfig())
    assert compute_error(compiled(x), model(x)) > 60


def test_compiled_layers_are_watched():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].compile(backend="eager")
    model(torch.randn(2, 64))
    with calibrate(model, Int8StaticActivationInt8WeightConfig()) as seen:
        model(torch.ones(2, 64))
    assert seen["0"].observers["minmax"].amax() == 1
    assert ao.Statistics is Statistics


ALL_THAT_LOOK = [
    Int8StaticActivationInt8WeightConfig(),
    Int8StaticActivationInt8WeightConfig(range_method="moving_average"),
    Int8StaticActivationInt8WeightConfig(range_method="mse"),
    Float8StaticActivationFloat8WeightConfig(range_method="percentile"),
    Int8DynamicActivationInt8WeightConfig(algorithm="smoothquant"),
    *(Int4WeightOnlyConfig(group_size=32, algorithm=name) for name in ("awq", "gptq", "bias_correction", "awq+gptq")),
]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", ALL_THAT_LOOK, ids=lambda c: repr(c)[:80])
def test_data_that_is_not_finite_is_refused(config, bad):
    torch.manual_seed(0)
    data = [torch.randn(8, 64) for _ in range(3)]
    data[1][2, 3] = bad
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32))
    before = dict(model.named_parameters())
    with pytest.raises(
        ValueError, match="0.weight: batch 1 of the calibration data gives this layer NaN or infinite inputs"
    ):
        quantize_(model, config, calibration_data=data)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    with (
        pytest.raises(ValueError, match=r"0: its call number 2 under calibrate\(\) gives this layer NaN"),
        calibrate(model, config),
    ):
        for x in data:
            model(x)
    assert not any(ATTRIBUTE in m.__dict__ or m._forward_pre_hooks for m in model.modules())
    quantize_(model, config, calibration_data=[data[0], data[2]])
    assert model(data[0]).isfinite().all()


def test_a_layer_in_the_middle_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32)).half()
    with torch.no_grad():
        model[0].weight.fill_(60000)
    with pytest.raises(ValueError, match="1.weight: batch 0"):
        quantize_(model, Int4WeightOnlyConfig(32, algorithm="awq"), calibration_data=[torch.ones(8, 64).half()])


@pytest.mark.parametrize("config", ALL_THAT_LOOK, ids=lambda c: repr(c)[:80])
def test_nothing_but_zeros(config):
    """A static scale cannot be found, and is refused; an algorithm does without data, and says so."""
    model, data = nn.Sequential(nn.Linear(64, 64)), [torch.zeros(8, 64)]
    if config.act_range() is not None:
        with pytest.raises(ValueError, match="0.weight: .* nothing but zeros came to this layer"):
            quantize_(model, config, calibration_data=data)
        with calibrate(model, config):
            model(data[0])
        with pytest.raises(ValueError, match="0.weight: .* nothing but zeros came to this layer"):
            quantize_(model, config)
        return
    x = torch.randn(8, 64)
    expected = model(x)
    report = quantize_(model, config, calibration_data=data)
    assert report.notes and all("zero" in note for note in report.notes)
    assert compute_error(expected, model(x)) > 18


def test_sensitivity_refuses_what_is_not_finite():
    model, data = nn.Sequential(nn.Linear(64, 64)), [torch.randn(2, 64), torch.full((2, 64), torch.inf)]
    with pytest.raises(ValueError, match="output for batch 1 has NaN or infinite values"):
        sensitivity(model, data)
    with pytest.raises(ValueError, match="the loss of batch 0 is nan"):
        sensitivity(model, data, loss_fn=lambda model, batch: torch.tensor(torch.nan))
