"""Quantization-aware training: what is trained is what is stored, bit for bit."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from lm import batches, but_head, divergence, lm
from ranks import spawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ao
from ao.dtypes import Codebook, Float8, Intx, QTensor
from ao.matmul import layer_class
from ao.matmul.kernels.device import FLOATS
from ao.quant import (
    GPTQ,
    Float8DynamicActivationFloat8WeightConfig,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationTernaryWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    MXDynamicActivationMXWeightConfig,
    MXFPWeightOnlyConfig,
    NF4WeightOnlyConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
    PerAxis,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
    SpecConfig,
    UIntXWeightOnlyConfig,
    config_from_dict,
    config_to_dict,
    quantize_,
)
from ao.quant.qat import (
    FakeQuantizeConfig,
    FakeQuantizedEmbedding,
    FakeQuantizedLinear,
    FromIntXQuantizationAwareTrainingConfig,
    IntxFakeQuantizeConfig,
    IntXQuantizationAwareTrainingConfig,
    QATConfig,
    disable_fake_quantize,
    distillation_loss,
    enable_fake_quantize,
    learned_fake_quantize,
    parameter_groups,
)


def network(dtype=torch.float32, bias=True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=bias), nn.GELU(), nn.Linear(96, 32, bias=bias)).to(dtype)


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2) -> list[float]:
    g = torch.Generator().manual_seed(3)
    parameter = next(model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, lr / 10))
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 64, generator=g).to(parameter)
        loss = F.mse_loss(model(x), x[:, :32].roll(3, 1) * 2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


EXACT = [
    Int4WeightOnlyConfig(32),
    UIntXWeightOnlyConfig(torch.uint3, 32),
    UIntXWeightOnlyConfig(torch.uint2, 32, algorithm="hqq"),
    IntxWeightOnlyConfig(torch.int4, PerGroup(32), MappingType.SYMMETRIC_NO_CLIPPING_ERR),
    IntxWeightOnlyConfig(torch.int2, PerAxis(0)),
    Int8WeightOnlyConfig(),
    Int8DynamicActivationInt4WeightConfig(32),
    Int8DynamicActivationInt8WeightConfig(),
    Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC, granularity=(PerRow(), PerTensor())),
    Float8DynamicActivationFloat8WeightConfig(),
    Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    NF4WeightOnlyConfig(32),
    Float8(),
    SpecConfig(Float8(block=(1, 32)), algorithm="hqq"),
    NVFP4WeightOnlyConfig(),
    MXFPWeightOnlyConfig(),
    NVFP4DynamicActivationNVFP4WeightConfig(),
    MXDynamicActivationMXWeightConfig("e2m1"),
    Int8DynamicActivationTernaryWeightConfig("bits"),
]


def same_product(model, x, expected):
    """The outputs are equal where activations are quantized and where the weights are decoded for the product, and near where
    a path reads the codes."""
    rows = x.numel() if not x.is_floating_point() else x.numel() // x.shape[-1]
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and isinstance(m.weight, QTensor)]
    paths = {ao.path_name(torch.empty(rows, w.shape[1], dtype=expected.dtype, device=w.device), w) for w in weights}
    in_hardware = expected.dtype in FLOATS and expected.dtype != torch.float16  # else a CPU multiplies in float32
    decoded = paths <= {"dequantize", "pieces"} and (in_hardware or expected.is_cuda)
    if expected.dtype == torch.bfloat16 and any(w.spec == ao.NVFP4 for w in weights):
        decoded = False  # a compiler need not round its numbers to bfloat16 on the way to a product
    if decoded or all(w.spec.act is not None for w in weights):
        assert torch.equal(model(x), expected)
    else:
        tolerance = 3e-3 if expected.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(model(x), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("learning", [False, True], ids=["follows", "learned"])
@pytest.mark.parametrize("config", EXACT, ids=lambda c: repr(c)[:70])
def test_converted_is_what_was_trained(config, learning, dtype, device):
    model = network(dtype).to(device)
    quantize_(model, QATConfig(config, step="prepare", range_learning=learning))
    assert type(model[0]) is FakeQuantizedLinear and (model[0].weight_scale is not None) == learning
    before = model[0].weight.detach().clone()
    train(model)
    assert not torch.equal(model[0].weight, before)
    x = torch.randn(16, 64, dtype=dtype, device=device)
    expected, weight = model(x), model[0].fake_quantized_weight()
    report = quantize_(model, QATConfig(config, step="convert"))
    assert len(report) == 2 and report.bytes_after < report.bytes_before
    assert (
        layer_class(model[0]) is nn.Linear
        and isinstance(model[0].weight, QTensor)
        and not model[0].weight.requires_grad
    )
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(model[0].weight.dequantize(), weight)
    same_product(model, x, expected)


@pytest.mark.parametrize("spec", [ao.NVFP4, ao.MXFP4], ids=["NVFP4", "MXFP4"])
def test_distilled(spec):
    """Trained to say what the original says, on inputs alone, a model gets nearer to it than rounding leaves it."""
    teacher = network(bias=False)
    student = copy.deepcopy(teacher)
    quantize_(student, QATConfig(spec))
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    target = teacher(x)
    before = distillation_loss(student(x), target)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / 60)
        distillation_loss(student(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    quantize_(student, QATConfig(step="convert"))
    assert distillation_loss(student(x), target) < 0.8 * before


def test_distillation_loss():
    """KL(p || q) of a token by hand; none for the same logits; nothing flows to the teacher."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    logits, target = q.log().requires_grad_(), (p.log() + 3).requires_grad_()
    loss = distillation_loss(logits, target)
    torch.testing.assert_close(loss.item(), 0.25 * torch.tensor(2.0).log().item())
    loss.backward()
    assert target.grad is None and logits.grad is not None
    assert distillation_loss(target, target, 2.0).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        distillation_loss(logits, target[:, :2])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        distillation_loss(logits, target, 0)


@pytest.mark.parametrize("config", EXACT[:3] + EXACT[6:11], ids=lambda c: repr(c)[:70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prepared_is_what_quantizing_gives(config, dtype):
    model, quantized = network(dtype), network(dtype)
    quantize_(model, QATConfig(config))
    quantize_(quantized, config)
    x = torch.randn(16, 64, dtype=dtype)
    same_product(quantized, x, model(x))


@pytest.mark.parametrize("config", EXACT[6:11], ids=lambda c: repr(c)[:70])
def test_quantized_activations_under_autocast(config):
    """The prepared layer rounds what autocast gives it, as the converted layer does, for any number of tokens."""
    model, x = network(), torch.randn(3, 5, 64)
    quantize_(model, QATConfig(config))
    with torch.autocast("cpu", torch.bfloat16):
        expected = [model(x[:n]) for n in (1, 3)]
        quantize_(model, QATConfig(step="convert"))
        found = [model(x[:n]) for n in (1, 3)]
    for a, b in zip(expected, found):
        assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b)


def test_gradients_with_quantized_activations():
    """Those of the product of the rounded numbers."""
    model = network(bias=False)[:1]
    quantize_(model, QATConfig(Int8DynamicActivationInt8WeightConfig()))
    x, g = torch.randn(4, 6, 64, requires_grad=True), torch.randn(4, 6, 96)
    model(x).backward(g)
    act, weight = model[0].spec.act.fake_quantize(x.detach()), model[0].fake_quantized_weight().detach()
    assert torch.allclose(x.grad, g @ weight, atol=1e-5)
    assert torch.allclose(model[0].weight.grad, torch.einsum("abn,abk->nk", g, act), atol=1e-4)


def test_embedding_tied_to_a_head():
    model = lm(1)
    config = IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    quantize_(model, QATConfig(config, range_learning=True), lambda m, name: name in ("lm_head", "model.embed_tokens"))
    assert type(model.model.embed_tokens) is FakeQuantizedEmbedding
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale
    model.lm_head.weight.requires_grad_()
    ids = batches(1)[0]
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0 and model.lm_head.weight_scale.grad.abs().sum() > 0
    expected = model(ids)
    quantize_(model, QATConfig(step="convert"))
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model(ids), expected)


@pytest.mark.parametrize(
    "spec", [Intx(4, (1, 32)), Intx(4, (1, -1)), Codebook("nf4", (1, 32)), Intx(4, (8, 32))], ids=repr
)
@pytest.mark.parametrize("learning", [False, True])
def test_embedding_rows_are_rows_of_the_table(spec, learning):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 64, padding_idx=2))
    quantize_(model, QATConfig(spec, range_learning=learning), lambda m, name: isinstance(m, nn.Embedding))
    ids = torch.tensor([[1, 2, 3], [3, 3, 15]])
    expected = F.embedding(ids, model[0].fake_quantized_weight())
    assert torch.equal(model(ids), expected)
    model(ids).square().sum().backward()
    rows = model[0].weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == [1, 3, 15]
    quantize_(model, QATConfig(spec, step="convert"), lambda m, name: True)
    assert torch.equal(model(ids), expected)


def test_straight_through():
    spec, w = Intx(3, (1, 32)), torch.randn(8, 64, requires_grad=True)
    g = torch.randn(8, 64)
    spec.fake_quantize(w).backward(g)
    assert torch.equal(w.grad, g)


@pytest.mark.parametrize("zero", [False, True])
def test_learned_gradients(zero):
    """Against the formulas of LSQ, written with differentiable rounding."""
    spec = Intx(3, (1, 32), zero_point="float") if zero else Intx(3, (1, 32), symmetric=True)
    w = torch.randn(8, 64)
    qparams = {name: t * 0.7 for name, t in spec.choose_qparams(w, (8, 2)).items()}  # so that some numbers clip

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, g):
            return g

    inputs = [w.clone().requires_grad_(), *(t.clone().requires_grad_() for t in qparams.values())]
    x, s = inputs[0].view(8, 2, 32), inputs[1][..., None]
    z = inputs[2][..., None] if zero else 0.0
    lo, hi = (spec.qmin - z) * s, (spec.qmax - z) * s
    reference = (Round.apply(torch.clamp(x, lo, hi) / s + z) - z) * s
    g = torch.randn(8, 64)
    reference.reshape(8, 64).backward(g)
    ours = [t.detach().clone().requires_grad_() for t in inputs]
    out = learned_fake_quantize(ours[0], spec, *ours[1:])
    assert torch.allclose(out, reference.reshape(8, 64), atol=1e-6)
    out.backward(g)
    for a, b in zip(ours, inputs):
        assert torch.allclose(a.grad, b.grad, atol=1e-4)


def test_learning_ranges_helps():
    """Fine-tuning at 2 bits: with the ranges trained along, the loss is lower."""
    final = {}
    for learning in (False, True):
        model = network()
        train(model, 60)
        quantize_(model, QATConfig(Intx(2, (1, 32), zero_point="float"), range_learning=learning))
        final[learning] = sum(train(model, 40, 3e-3)[-10:])
    assert final[True] < 0.95 * final[False]


def test_training_beats_rounding():
    reference, cal = lm(1), batches(8)
    config = UIntXWeightOnlyConfig(torch.uint2, 32)
    rounded, tuned = copy.deepcopy(reference), {}
    quantize_(rounded, config, but_head)
    for start in (config, UIntXWeightOnlyConfig(torch.uint2, 32, algorithm=GPTQ(rounds=1))):
        model = copy.deepcopy(reference).requires_grad_()
        quantize_(model, QATConfig(start), but_head, calibration_data=cal)
        assert (model.model.layers[0].mlp.up_proj.weight_scale is not None) == (start is not config)
        if start is not config:
            # Training starts where the algorithm ended.
            found = copy.deepcopy(reference)
            quantize_(found, start, but_head, calibration_data=cal)
            assert torch.equal(found(cal[0]), model(cal[0]))
        optimizer = torch.optim.Adam(parameter_groups(model, 2e-3, 1e-4))
        for ids in cal * 2:
            with torch.no_grad():
                target = reference(ids).softmax(-1)
            F.cross_entropy(model(ids).flatten(0, 1), target.flatten(0, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        quantize_(model, QATConfig(start, step="convert"), but_head)
        tuned[start.recipe.name] = divergence(model, reference, batches(3, seed=5))
    assert tuned["rtn"] < 0.8 * divergence(rounded, reference, batches(3, seed=5)) and tuned["gptq"] < tuned["rtn"]


def test_two_configs():
    """The names and the order of calls of other libraries."""
    model, plain = network(), network()
    activation = FakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = FakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(model, IntXQuantizationAwareTrainingConfig(activation, weight))
    x = torch.randn(8, 64)
    quantize_(plain, Int8DynamicActivationInt4WeightConfig(group_size=32))
    assert torch.equal(model(x), plain(x))
    train(model)
    expected = model(x)
    with pytest.raises(ValueError, match="0.weight is prepared for quantization-aware training"):
        quantize_(model, Int8DynamicActivationInt4WeightConfig(group_size=32))
    quantize_(model, FromIntXQuantizationAwareTrainingConfig())
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    quantize_(model, Int8DynamicActivationInt4WeightConfig(group_size=32))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("config, spec", [
    (FakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False), Intx(8, symmetric=False)),
    (FakeQuantizeConfig(torch.int4, group_size=32), Intx(4, (1, 32), symmetric=True)),
    (FakeQuantizeConfig(torch.int4, "per_group", group_size=64), Intx(4, (1, 64), symmetric=True)),
    (IntxFakeQuantizeConfig(torch.uint3, PerGroup(32), MappingType.ASYMMETRIC), Intx(3, (1, 32), signed=False)),
    (FakeQuantizeConfig(torch.int8, PerToken()), Intx(8)),
    (FakeQuantizeConfig(torch.int8, "per_channel", MappingType.SYMMETRIC_NO_CLIPPING_ERR), Intx(8, clip=False)),
    (FakeQuantizeConfig(torch.int8, "per_token", is_dynamic=False), Intx(8, (-1, -1))),
])  # fmt: skip
def test_fake_quantize_config(config, spec):
    assert config.spec() == spec


def test_adapters():
    model = network()
    config = QATConfig(Int4WeightOnlyConfig(32), lora_rank=4, lora_alpha=8)
    plain = network()
    quantize_(plain, Int4WeightOnlyConfig(32))
    quantize_(model, config)
    x = torch.randn(8, 64)
    assert torch.equal(model(x), plain(x))  # B is zero at first
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.{name}" for i in (0, 2) for name in ("bias", "lora_a", "lora_b")}
    frozen = model[0].weight.detach().clone()
    losses = train(model, 20)
    assert losses[-1] < losses[0] and torch.equal(model[0].weight, frozen) and model[0].weight.grad is None
    # What is kept for training: Adam's two states and a gradient of each adapter, against those and float32 of the weight.
    large = nn.Sequential(nn.Linear(512, 512, bias=False))
    quantize_(large, QATConfig(Int4WeightOnlyConfig(32), lora_rank=8))
    cost = sum(p.numel() * (16 if p.requires_grad else 4) for p in large.parameters())
    assert cost * 3 < 512 * 512 * 16
    expected, weight = model(x), model[0].fake_quantized_weight()
    quantize_(model, QATConfig(Int4WeightOnlyConfig(32), step="convert"))
    assert torch.equal(model[0].weight.dequantize(), weight)
    same_product(model, x, expected)


def test_adapters_with_learned_ranges_from_gptq():
    model = lm(1).requires_grad_()
    config = QATConfig(UIntXWeightOnlyConfig(torch.uint3, 32, algorithm=GPTQ(rounds=1)), lora_rank=2)
    quantize_(model, config, but_head, calibration_data=batches(2))
    ids = batches(1)[0]
    model(ids).square().mean().backward()
    layer = model.model.layers[0].mlp.down_proj
    assert layer.weight_scale.grad is not None and layer.lora_b.grad.abs().sum() > 0 and layer.weight.grad is None
    expected = model(ids)
    quantize_(model, QATConfig(step="convert"), but_head)
    assert torch.equal(model(ids), expected)


def test_static_activations_are_calibrated_and_trained():
    weight = FakeQuantizeConfig(torch.int8, "per_channel")
    config = QATConfig(
        activation_config=FakeQuantizeConfig(torch.int8, "per_token", is_dynamic=False), weight_config=weight
    )
    with pytest.raises(ValueError, match="0.weight: a static activation needs calibration"):
        quantize_(network(), config)
    model = network()
    quantize_(model, config, calibration_data=[torch.randn(64, 64)])
    start = model[0].act_scale.detach().clone()
    train(model)
    assert model[0].act_scale != start
    x = torch.randn(8, 64)
    expected = model(x)
    quantize_(model, QATConfig(step="convert"))
    assert model[0].weight.act_scale is not None
    assert ao.compute_error(expected, model(x)) > 60  # the product runs on integers
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_delayed_start():
    model, plain = network(), network()
    quantize_(model, QATConfig(Intx(2, (1, 32))))
    x = torch.randn(4, 64)
    disable_fake_quantize(model)
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    enable_fake_quantize(model)
    assert (model(x) - plain(x)).norm() > 0.1


def test_rules_and_other_layers():
    model = lm(1)
    rules = FqnToConfig(
        {
            "re:.*mlp.*": Int4WeightOnlyConfig(32),
            "model.embed_tokens": Int8WeightOnlyConfig(),
            "lm_head": Int8WeightOnlyConfig(),
        }
    )
    report = quantize_(model, QATConfig(rules))
    assert len(report) == 4 and "qat" in str(report)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    expected = model(batches(1)[0])
    quantize_(model, QATConfig(rules, step="convert"))
    same_product(model, batches(1)[0], expected)
    assert type(model.model.layers[0].self_attn.q_proj.weight) is nn.Parameter


def test_save_and_load_while_training():
    config = QATConfig(Int4WeightOnlyConfig(32), range_learning=True)
    model, again = network(), network()
    quantize_(model, config)
    train(model)
    quantize_(again, config)
    again.load_state_dict(model.state_dict())
    twin, x = copy.deepcopy(model), torch.randn(4, 64)
    assert torch.equal(again(x), model(x)) and torch.equal(twin(x), model(x))


def test_compiled():
    """The compiled step rounds to the bits of the eager one; only sums may differ."""
    model = network(bias=False)[:2]
    quantize_(model, QATConfig(Int8DynamicActivationInt4WeightConfig(32), range_learning=True))
    compiled = copy.deepcopy(model)
    step, x = (
        torch.compile(lambda x: (compiled(x), compiled[0].fake_quantized_weight()), fullgraph=True),
        torch.randn(16, 64),
    )
    out, weight = step(x)
    assert torch.equal(weight, model[0].fake_quantized_weight())
    out.square().sum().backward()
    model(x).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), compiled.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-3 * a.grad.abs().max()), name


MISUSE = [
    (lambda: QATConfig(), "needs base_config or weight_config"),
    (lambda: QATConfig(Int8WeightOnlyConfig(), weight_config=Intx(8)), "not both"),
    (lambda: QATConfig(weight_config=Intx(8), step="convert"), "step='convert' takes base_config or nothing"),
    (lambda: QATConfig(FakeQuantizeConfig(torch.int4, group_size=32)), "base_config is a config for quantize_"),
    (lambda: QATConfig(Int8WeightOnlyConfig(), step="train"), "step must be 'prepare' or 'convert'"),
    (lambda: QATConfig(Int8WeightOnlyConfig(), lora_rank=0), "lora_rank must be positive"),
    (lambda: FakeQuantizeConfig(torch.int4), "give a granularity, or group_size"),
    (lambda: FakeQuantizeConfig(torch.int4, "per_tokn"), "granularity must be one of"),
    (lambda: FakeQuantizeConfig(torch.int4, "per_token", group_size=32), "not both"),
    (lambda: FakeQuantizeConfig(torch.int4, "per_token", MappingType.ASYMMETRIC, is_symmetric=True), "contradict"),
    (lambda: FakeQuantizeConfig(torch.float16, "per_token"), "dtype must be torch.int1 to int8"),
]


@pytest.mark.parametrize("make, why", MISUSE)
def test_misuse(make, why):
    with pytest.raises(ValueError, match=why):
        make()


def test_misuse_of_models():
    model = network()
    with pytest.raises(ValueError, match="no layer is prepared"):
        quantize_(model, QATConfig(step="convert"))
    with pytest.raises(ValueError, match="not from 'awq"):
        quantize_(model, QATConfig(Int4WeightOnlyConfig(32, algorithm="awq")), calibration_data=[torch.randn(4, 64)])
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="takes nn.Linear and nn.Embedding, and this is Conv2d"):
        quantize_(nn.Sequential(nn.Conv2d(8, 8, 3)), QATConfig(Intx(8)), lambda m, name: True)
    with pytest.raises(ValueError, match="only nn.Linear layers do that"):
        quantize_(
            nn.Sequential(nn.Embedding(8, 64)), QATConfig(Int8DynamicActivationInt4WeightConfig()), lambda m, name: True
        )
    quantize_(model, QATConfig(Int4WeightOnlyConfig(32), range_learning=True))
    with pytest.raises(ValueError, match="prepared for quantization-aware training"):
        quantize_(model, QATConfig(Int4WeightOnlyConfig(32)))
    with pytest.raises(ValueError, match="was trained for Intx.*; convert with the config"):
        quantize_(model, QATConfig(Int8WeightOnlyConfig(), step="convert"))
    with pytest.raises(ValueError, match="its scales were trained too"):
        quantize_(model, FromIntXQuantizationAwareTrainingConfig())
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="0.weight: the weight has NaN"):
        quantize_(model, QATConfig(step="convert"))
    assert type(model[0]) is FakeQuantizedLinear
    with pytest.raises(TypeError, match="give it the rules"):
        FqnToConfig({"0": QATConfig(Int4WeightOnlyConfig(32))})


def fsdp(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for config in (
        QATConfig(Int8DynamicActivationInt4WeightConfig(32)),
        QATConfig(UIntXWeightOnlyConfig(torch.uint3, 32, algorithm="hqq")),
        QATConfig(Int4WeightOnlyConfig(32), lora_rank=4, range_learning=True),
    ):
        single, sharded = network(), network()
        for model in (single, sharded):
            quantize_(model, config)
        sharded.load_state_dict(single.state_dict())
        for part in (sharded[0], sharded[2], sharded):
            fully_shard(part, mesh=mesh)
        losses = [train(model, 4, 1e-3) for model in (single, sharded)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        with pytest.raises(ValueError, match=r"0.weight is sharded; gather"):
            quantize_(sharded, QATConfig(step="convert"))
        whole = {name: t.full_tensor() for name, t in sharded.state_dict().items()}
        again = network()
        quantize_(again, config)
        again.load_state_dict(whole)
        quantize_(again, QATConfig(step="convert"))
        quantize_(single, QATConfig(step="convert"))
        assert ao.compute_error(single[0].weight.dequantize(), again[0].weight.dequantize()) > 30


def test_fsdp():
    with warnings.catch_warnings():
        spawn(fsdp, 2)


@pytest.mark.gpu
def test_a_model_on_a_gpu():
    model = lm(1).cuda().requires_grad_()
    quantize_(
        model,
        QATConfig(UIntXWeightOnlyConfig(torch.uint3, 32, algorithm="gptq")),
        but_head,
        calibration_data=[b.cuda() for b in batches(2)],
    )
    compiled, ids = torch.compile(model), batches(1)[0].cuda()
    compiled(ids).square().mean().backward()
    expected = model(ids)
    quantize_(model, QATConfig(step="convert"), but_head)
    assert torch.equal(model(ids), expected)
