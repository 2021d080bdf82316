"""float8 training: recipes, numerics, compilation, memory, and the way back."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
import torch.nn.functional as F
from llama_block import Attention, FeedForward, Gate, block, gradients
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import ao
from ao.dtypes import Float8, QTensor
from ao.quant import compute_error
from ao.train import (
    PRECISIONS,
    CastConfig,
    Float8GemmConfig,
    Float8LinearConfig,
    Float8LinearRecipeName,
    LowPrecisionLinear,
    ScalingGranularity,
    ScalingType,
    auto_module_filter,
    convert_from_low_precision_training,
    convert_to_float8_training,
    convert_to_precision,
    precompute_float8_dynamic_scale_for_fsdp,
)
from ao.train.gather import CastOnGather

RECIPES = [name.value for name in Float8LinearRecipeName]
GATHERED = dataclasses.replace(Float8LinearConfig(), enable_fsdp_float8_all_gather=True)
every = pytest.mark.parametrize("recipe", RECIPES)


def convert(model: nn.Module, recipe: str, **kwargs) -> nn.Module:
    return convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe), **kwargs)


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every
@pytest.mark.parametrize("half", [FeedForward, Attention])
def test_close_to_bfloat16(recipe, half, device):
    """Of the branch alone: what the residual adds is exact."""
    torch.manual_seed(0)
    model = half(256).to(device, torch.bfloat16)
    x, g = data(2, 128, 256).to(device), data(2, 128, 256, seed=1).to(device)
    expected = gradients(model, x, g)
    found = gradients(convert(model, recipe), x, g)
    assert found.keys() == expected.keys()
    for name, exact in {"output": x, "input": g}.items():
        expected[name], found[name] = expected[name] - exact, found[name] - exact
    errors = {name: compute_error(expected[name], found[name]).item() for name in expected}
    assert errors.pop("output") > 20
    assert min(errors.values()) > 18, errors


def test_the_formula():
    """The three products of the quantized operands, by hand."""
    layer = convert_to_float8_training(nn.Linear(32, 48, bias=False))
    x, g = data(64, 32, dtype=torch.float32), data(64, 48, seed=1, dtype=torch.float32)
    found = gradients(layer, x, g)
    e4m3, e5m2 = Float8(block=(-1, -1)), Float8("e5m2", (-1, -1))
    xq, wq, gq = (s.quantize(t.detach()).dequantize() for s, t in ((e4m3, x), (e4m3, layer.weight), (e5m2, g)))
    for name, value in (("output", xq @ wq.t()), ("input", gq @ wq), ("weight", gq.t() @ xq)):
        assert compute_error(value, found[name]) > 120
    rows = convert(nn.Linear(32, 48, bias=False), "rowwise")
    found = gradients(rows, x, g)
    spec = Float8(power_of_two=True)
    a, b = spec.quantize(g.t()).dequantize(), spec.quantize(x.t()).dequantize()
    assert compute_error(a @ b.t(), found["weight"]) > 120


def test_recipes():
    tensorwise = Float8LinearConfig.from_recipe_name("tensorwise").recipe()
    e4m3, e5m2 = Float8(block=(-1, -1)), Float8("e5m2", (-1, -1))
    assert (tensorwise.output.a, tensorwise.output.b, tensorwise.output.fast_accum) == (e4m3, e4m3, True)
    assert (tensorwise.grad_input.a, tensorwise.grad_input.b, tensorwise.grad_input.fast_accum) == (e5m2, e4m3, False)
    assert (tensorwise.grad_weight.a, tensorwise.grad_weight.b) == (e5m2, e4m3)
    hp = Float8LinearConfig.from_recipe_name(Float8LinearRecipeName.ROWWISE_WITH_GW_HP).recipe()
    assert hp.grad_weight.a is None and hp.grad_weight.b is None
    assert hp.grad_input.b == Float8(block=(-1, -1), power_of_two=True)
    blockwise = Float8LinearConfig.from_recipe_name("blockwise").recipe()
    assert blockwise.output.a.block == (1, 128) and blockwise.output.b.block == (128, 128)
    assert blockwise.grad_weight.a.block == blockwise.grad_weight.b.block == (1, 128)
    assert Float8LinearConfig().recipe() is Float8LinearConfig().recipe()  # layers share one
    assert "e5m2/tensor @ e4m3/tensor" in str(tensorwise)


def test_bad_configs():
    off = CastConfig(scaling_type=ScalingType.DISABLED)
    with pytest.raises(ValueError, match="two operands of output must both be cast or both be disabled"):
        Float8LinearConfig(cast_config_input=off)
    with pytest.raises(ValueError, match="no chip multiplies e5m2 by e5m2, as output would"):
        Float8LinearConfig(CastConfig(target_dtype=torch.float8_e5m2), None, CastConfig(target_dtype=torch.float8_e5m2))
    rows = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE)
    with pytest.raises(ValueError, match="enable_fsdp_float8_all_gather needs .* got axiswise and axiswise"):
        Float8LinearConfig(cast_config_weight=rows, enable_fsdp_float8_all_gather=True)
    with pytest.raises(ValueError, match="unknown recipe 'fast'; the recipes are tensorwise, rowwise"):
        Float8LinearConfig.from_recipe_name("fast")
    with pytest.raises(ValueError, match="target_dtype must be"):
        CastConfig(target_dtype=torch.int8)
    with pytest.raises(ValueError, match="unknown precision 'fp8'; choose one of bf16, float8-tensorwise"):
        convert_to_precision(nn.Linear(16, 16), "fp8")


def test_single_products_in_high_precision():
    off = CastConfig(scaling_type=ScalingType.DISABLED)
    config = Float8LinearConfig(
        cast_config_input_for_grad_weight=off, cast_config_grad_output_for_grad_weight=off,
        gemm_config_output=Float8GemmConfig(), round_scales_to_power_of_2=True,
    )  # fmt: skip
    assert not config.recipe().output.fast_accum and config.recipe().output.a.power_of_two
    layer = nn.Linear(64, 64)
    x, g = data(32, 64, dtype=torch.float32), data(32, 64, seed=1, dtype=torch.float32)
    expected = gradients(layer, x, g)
    found = gradients(convert_to_float8_training(layer, config=config), x, g)
    assert compute_error(expected["weight"], found["weight"]) > 100
    assert 20 < compute_error(expected["input"], found["input"]) < 60


def test_conversion_is_in_place_and_undone():
    model = block()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    calls = []
    model[1].gate.register_forward_hook(lambda *_: calls.append(1))
    layer = model[1].gate
    assert convert(model, "rowwise", module_filter_fn=lambda m, name: name != "1.down") is model
    assert model[1].gate is layer and type(layer) is LowPrecisionLinear and type(model[1].down) is nn.Linear
    assert all(p is parameters[name] for name, p in model.named_parameters()) and list(model.state_dict()) == keys
    model(data(1, 16, 128, dtype=torch.float32))
    assert calls == [1]
    again = copy.deepcopy(model)
    assert again[1].gate.recipe == layer.recipe and type(again[1].gate) is LowPrecisionLinear
    x = data(2, 16, 128, dtype=torch.float32)
    assert torch.equal(again(x), model(x))
    assert convert_from_low_precision_training(model) is model
    assert type(layer) is nn.Linear and not hasattr(layer, "recipe")
    assert torch.equal(model(x), block()(x))
    root = nn.Linear(32, 32)
    assert convert(root, "tensorwise") is root and type(root) is LowPrecisionLinear


def test_what_cannot_be_converted():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 10))
    with pytest.raises(
        ValueError, match=r"1: float8 products need multiples of 16, and the weight has shape \(10, 32\)"
    ):
        convert_to_float8_training(model)
    assert type(model[0]) is nn.Linear  # nothing has changed
    with pytest.raises(ValueError, match="no layer to convert: the model has no nn.Linear that module_filter_fn takes"):
        convert_to_float8_training(model, module_filter_fn=lambda m, name: False)
    with pytest.raises(TypeError, match="a training config is Float8LinearConfig"):
        ao.train.convert_to_low_precision_training(model, Float8())
    first = convert_to_float8_training(model, module_filter_fn=lambda m, name: name == "0")
    with pytest.raises(ValueError, match="0 trains in low precision already"):
        convert_to_float8_training(first, module_filter_fn=lambda m, name: name == "0")
    ao.quantize_(model, ao.Int8WeightOnlyConfig(), lambda m, name: name == "1")
    with pytest.raises(ValueError, match="1: the weight is quantized already"):
        convert_to_float8_training(model, module_filter_fn=lambda m, name: name == "1")
    tied = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"1: the weight is tied \(0.weight, 1.weight\), and would be untied"):
        convert_to_float8_training(tied, config=GATHERED)
    convert_to_float8_training(tied)
    assert tied[1].weight is tied[0].weight
    with pytest.raises(ValueError, match="no weight of this module is sharded and cast before it is gathered"):
        precompute_float8_dynamic_scale_for_fsdp(tied)
    with pytest.raises(ValueError, match="the input of shape .* does not fit the weight"):
        convert_to_float8_training(nn.Linear(32, 32))(torch.ones(4, 16))


def test_padding(device):
    config = Float8LinearConfig(pad_inner_dim=True)
    layer = nn.Linear(36, 10, device=device)
    x, g = data(7, 36, dtype=torch.float32).to(device), data(7, 10, seed=1, dtype=torch.float32).to(device)
    expected = gradients(layer, x, g)
    found = gradients(convert_to_float8_training(layer, config=config), x, g)
    assert all(found[name].shape == expected[name].shape for name in expected)
    assert min(compute_error(expected[name], found[name]) for name in expected) > 18


def test_shapes_that_float8_hardware_does_not_take(monkeypatch):
    """Refused in forward, before anything is computed, and the same on every rank."""
    monkeypatch.setattr("ao.train.linear.has_float8", lambda device: True)
    layer = convert_to_float8_training(nn.Linear(32, 32))
    with pytest.raises(ValueError, match="input of 7 tokens with a weight of shape .* need multiples of 16"):
        layer(torch.ones(7, 32))
    emulated = convert_to_float8_training(nn.Linear(32, 32), config=Float8LinearConfig(emulate=True))
    emulated(torch.ones(7, 32)).sum().backward()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_empty_batch(recipe, device):
    layer = convert(nn.Linear(32, 48, device=device, dtype=torch.bfloat16), recipe)
    out = layer(torch.empty(0, 32, device=device, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.shape == (0, 48) and (layer.weight.grad == 0).all()


def test_frozen_weight_and_first_layer():
    layer = convert_to_float8_training(nn.Linear(32, 32))
    layer.weight.requires_grad_(False)
    x = data(16, 32, dtype=torch.float32).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None


def test_numbers_that_are_not_finite_stay_visible():
    layer = convert_to_float8_training(nn.Linear(32, 32))
    x = torch.ones(16, 32)
    x[3, 4] = torch.nan
    assert layer(x).isnan().any()
    assert layer(torch.zeros(16, 32)).isfinite().all()


def test_autocast():
    layer = convert_to_float8_training(nn.Linear(64, 64))
    x = data(32, 64, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_gradient_accumulation_and_checkpointing():
    model = convert(block(), "tensorwise")
    x, g = data(4, 16, 128, dtype=torch.float32), data(4, 16, 128, seed=1, dtype=torch.float32)
    whole = gradients(convert_from_low_precision_training(copy.deepcopy(model)), x, g)
    model.zero_grad()
    for half, grad in zip(x.chunk(2), g.chunk(2)):
        checkpoint(model, half, use_reentrant=False).backward(grad)
    summed = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert min(compute_error(whole[name], summed[name]) for name in summed) > 15
    model.zero_grad()
    for half, grad in zip(x.chunk(2), g.chunk(2)):
        model(half).backward(grad)
    assert all(torch.equal(p.grad, summed[name]) for name, p in model.named_parameters())


@every
def test_compiled(recipe):
    """One graph without breaks, equal to eager code up to the rounding that a fused kernel leaves out."""
    model = convert(Gate(128), recipe)
    x, g = data(1, 128, 128, dtype=torch.float32), data(1, 128, 128, seed=1, dtype=torch.float32)
    expected = gradients(model, x, g)
    model.compile(fullgraph=True, backend="aot_eager")
    found = gradients(model, x, g)
    assert min(compute_error(expected[name], found[name]) for name in expected) > 60


def test_compiled_layers_share_a_graph():
    layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(12)))
    convert(layers, "tensorwise")
    counter = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(fullgraph=True, backend=counter)
        layer(data(1, 16, 32, dtype=torch.float32)).sum().backward()
    assert counter.frame_count == 1


def test_compiled_under_checkpointing_and_autocast():
    model = convert(Gate(), "rowwise")

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(model, x, use_reentrant=False)

    x = data(1, 32, 128, dtype=torch.float32).requires_grad_()
    step(x).float().square().mean().backward()
    expected, x.grad = x.grad, None
    torch.compile(step, fullgraph=True, backend="aot_eager")(x).float().square().mean().backward()
    assert compute_error(expected, x.grad) > 40


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a compiled forward pass keeps for backward, parameters aside, as the partitioner of graphs decides."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")(x)
    out.sum().backward()
    return sum(kept.values())


def test_compiled_memory():
    """No more is kept for backward than by bfloat16."""
    torch.manual_seed(0)
    model = FeedForward(64, 128).to(torch.bfloat16)
    x = data(1, 256, 64)
    least = saved_bytes(model, x)
    for recipe in ("tensorwise", "rowwise"):
        assert saved_bytes(convert(copy.deepcopy(model), recipe), x) <= least


def test_eager_memory():
    """One scale for the input: what stays is a byte per number."""
    kept = []
    layer = convert_to_float8_training(nn.Linear(64, 64, bias=False))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(data(128, 64, dtype=torch.float32).requires_grad_())
    assert (
        sum(t.nbytes for t in kept if t is not layer.weight and t.data_ptr() != layer.weight.data_ptr()) == 128 * 64 + 4
    )


@pytest.mark.parametrize("name", [*PRECISIONS, "gathered"])
def test_evaluated_in_inference_mode(name):
    """A model that is being trained, also one whose weights FSDP2 casts before it gathers them."""
    model, x = block(256).to(torch.bfloat16), data(2, 128, 256)
    if name == "gathered":
        convert_to_float8_training(model, config=GATHERED)
    else:
        convert_to_precision(model, name)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_checkpoints_are_those_of_the_plain_model():
    plain = block().to(torch.bfloat16)
    state = plain.state_dict()
    model = convert_to_float8_training(copy.deepcopy(plain), config=GATHERED)
    assert isinstance(model[1].gate.weight, CastOnGather) and isinstance(model[1].gate.weight, nn.Parameter)
    found = model.state_dict()
    assert list(found) == list(state)
    for name, t in found.items():
        assert type(t) is torch.Tensor and t.dtype == state[name].dtype and torch.equal(t, state[name])
    assert found["1.gate.weight"].data_ptr() == model[1].gate.weight.plain.data_ptr()
    for assign in (False, True):
        model.load_state_dict({name: 2 * t for name, t in state.items()}, assign=assign)
        assert isinstance(model[1].gate.weight, CastOnGather)
        assert torch.equal(model.state_dict()["1.gate.weight"], 2 * state["1.gate.weight"])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again[1].gate.weight.plain, model[1].gate.weight.plain)
    plain.load_state_dict(model.state_dict())
    convert_from_low_precision_training(model)
    assert type(model[1].gate.weight) is nn.Parameter
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in plain.state_dict().items())


@pytest.mark.parametrize("config", [Float8LinearConfig(), GATHERED], ids=["plain", "gathered"])
def test_quantize_for_inference(config):
    model = convert_to_float8_training(block(), config=config)
    x = data(1, 32, 128, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    reference = convert_from_low_precision_training(copy.deepcopy(model))
    for precision, least in ((ao.Float8DynamicActivationFloat8WeightConfig(), 25), (ao.Int8WeightOnlyConfig(), 35)):
        quantized, same = copy.deepcopy(model), copy.deepcopy(reference)
        assert len(ao.quantize_(quantized, precision)) == 7
        ao.quantize_(same, precision)
        assert isinstance(quantized[1].gate.weight, QTensor)
        with torch.no_grad():
            assert torch.equal(quantized(x), same(x))
            assert compute_error(reference(x), quantized(x)) > least


def test_filter_of_small_layers():
    shapes = {
        "big": (8192, 8192),
        "kv": (1024, 4096),
        "small": (2048, 1024),
        "odd": (4096, 4100),
        "lm_head": (8192, 8192),
    }
    with torch.device("meta"):
        layers = {name: nn.Linear(k, n) for name, (n, k) in shapes.items()}

    def kept(recipe):
        takes = auto_module_filter(recipe, exclude=["head"])
        return [name for name, layer in layers.items() if takes(layer, f"model.{name}")]

    assert kept("tensorwise") == ["big", "small"]
    assert kept("rowwise") == ["big"] and kept("blockwise") == ["big"]
    with torch.device("meta"):
        model = nn.ModuleDict(layers)
    convert(model, "tensorwise", module_filter_fn=auto_module_filter("tensorwise", exclude=["head"]))
    assert [name for name, m in model.items() if type(m) is LowPrecisionLinear] == ["big", "small"]


@pytest.mark.parametrize("precision", ["float8-tensorwise", "float8-rowwise"])
def test_learns_like_bfloat16(precision):
    """A few steps on data that can be learned; the runs of a thousand steps are in scripts/bench_training.py."""

    def final(name: str) -> float:
        model = convert_to_precision(block(64, 128).to(torch.bfloat16), name)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        losses = []
        for step in range(80):
            x = data(8, 16, 64, seed=step)
            loss = F.mse_loss(model(x).float(), x.flip(-1).float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses[-10:]) / 10

    reference = final("bf16")
    assert reference < 1.0
    assert final(precision) == pytest.approx(reference, rel=0.03)


def test_precisions_are_all_there():
    assert {"bf16", "int8-mixed", "int8-weight-only", "bitnet"} < PRECISIONS.keys()
    assert sum(name.startswith("float8-") for name in PRECISIONS) == len(RECIPES)
    model = nn.Linear(16, 16)
    assert convert_to_precision(model, "bf16") is model and type(model) is nn.Linear
