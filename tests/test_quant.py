"""`quantize_`, its configs and its report."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import ao
from ao.dtypes import (
    NF4,
    Codebook,
    Float8,
    Int4CPULayout,
    Int4Prepacked,
    Int4XPULayout,
    Intx,
    PlainLayout,
    QTensor,
    TensorCoreTiledLayout,
    nf4_spec,
)
from ao.quant import (
    Config,
    Float8DynamicActivationFloat8WeightConfig,
    Float8StaticActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    GemliteUIntXWeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt4WeightConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    ModuleFqnToConfig,
    NF4WeightOnlyConfig,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    UIntXWeightOnlyConfig,
    ZeroPointDomain,
    compute_error,
    config_from_dict,
    config_to_dict,
    dequantize_,
    get_model_size_in_bytes,
    quantize_,
)
from ao.quant.jobs import planned_specs

UINT4 = Intx(4, (1, 128), signed=False)
# config -> the weight's Spec, and the error in dB that a small network must stay above
CONFIGS: list[tuple[Config, object, float]] = [
    (Int8WeightOnlyConfig(), Intx(8), 38),
    (Int8WeightOnlyConfig(group_size=64), Intx(8, (1, 64)), 39),
    (Int8WeightOnlyConfig(granularity=PerTensor()), Intx(8, (-1, -1)), 36),
    (Int4WeightOnlyConfig(), UINT4, 15),
    (Int4WeightOnlyConfig(group_size=32), Intx(4, (1, 32), signed=False), 15),
    (Int4WeightOnlyConfig(zero_point_domain=ZeroPointDomain.FLOAT), Intx(4, (1, 128), signed=False, zero_point="float"), 15),
    (Int4WeightOnlyConfig(layout=Int4CPULayout()), Int4Prepacked("cpu", (1, 128)), 15),
    (Int4WeightOnlyConfig(layout=Int4XPULayout()), UINT4, 15),
    (Int8DynamicActivationInt8WeightConfig(), Intx(8, act=Intx(8)), 33),
    (
        Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC, granularity=(PerTensor(), PerRow())),
        Intx(8, act=Intx(8, (-1, -1), symmetric=False)),
        33,
    ),
    (Int8DynamicActivationInt4WeightConfig(), Intx(4, (1, 32), symmetric=True, act=Intx(8, symmetric=False)), 15),
    (Int8DynamicActivationInt4WeightConfig(group_size=None), Intx(4, symmetric=True, act=Intx(8, symmetric=False)), 14),
    (Float8WeightOnlyConfig(), Float8(), 25),
    (Float8WeightOnlyConfig(torch.float8_e5m2, PerBlock((32, 32))), Float8("e5m2", (32, 32)), 20),
    (Float8DynamicActivationFloat8WeightConfig(), Float8(block=(-1, -1), act=Float8(block=(-1, -1))), 20),
    (Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), Float8(act=Float8()), 20),
    (Float8StaticActivationFloat8WeightConfig(torch.tensor(0.01)), Float8(block=(-1, -1), act=Float8(block=(-1, -1))), 20),
    (IntxWeightOnlyConfig(torch.int6, PerGroup(32)), Intx(6, (1, 32), symmetric=True), 26),
    (IntxWeightOnlyConfig(torch.int5, PerAxis(1), MappingType.SYMMETRIC_NO_CLIPPING_ERR, torch.bfloat16),
     Intx(5, (-1, 1), symmetric=True, clip=False, scale_dtype="bfloat16"), 18),
    (UIntXWeightOnlyConfig(torch.uint3), Intx(3, (1, 64), signed=False), 8),
    (GemliteUIntXWeightOnlyConfig(), UINT4, 15),
    (GemliteUIntXWeightOnlyConfig(group_size=None, bit_width=8, mode="dynamic"), Intx(8, act=Intx(8)), 33),
    (NF4WeightOnlyConfig(), NF4, 15),
    (NF4WeightOnlyConfig(32, 4), nf4_spec((256, 128), 32, 4), 15),
]  # fmt: skip
IDS = [repr(config) for config, _, _ in CONFIGS]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128), nn.LayerNorm(128), nn.Linear(128, 64))


@pytest.mark.parametrize("config, spec, quality", CONFIGS, ids=IDS)
def test_configs(config, spec, quality, device):
    model = network().to(device)
    x = torch.randn(16, 128).to(device)
    expected = model(x)
    if isinstance(getattr(config, "layout", None), Int4CPULayout) and device != "cpu":
        with pytest.raises(TypeError, match="lays out weights for cpu"):
            quantize_(model, config)
        return
    report = quantize_(model, config)
    assert len(report) == 3 and isinstance(model[0].weight, nn.Parameter) and not model[0].weight.requires_grad
    assert model[0].weight.spec == spec
    assert type(model[3].weight) is nn.Parameter  # the norm is left alone
    assert compute_error(expected, model(x)) > quality
    assert report.bytes_after == sum(model[i].weight.nbytes_packed for i in (0, 2, 4))
    dequantize_(model)
    assert type(model[0].weight) is nn.Parameter and model(x).shape == (16, 64)


@pytest.mark.parametrize("config, spec, quality", CONFIGS, ids=IDS)
def test_configs_round_trip_through_json(config, spec, quality):
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    rules = FqnToConfig({"0": config, "re:.*2": None, "_default": spec})
    assert config_from_dict(json.loads(json.dumps(config_to_dict(rules)))) == rules


def test_json_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown config type 'Int2000Config'"):
        config_from_dict({"type": "Int2000Config"})
    with pytest.raises(ValueError, match="newer version"):
        config_from_dict({"type": "Int8WeightOnlyConfig", "shiny": 1})


def test_a_spec_is_a_config():
    model = network()
    quantize_(model, Intx(bits=3, block=(1, 64)))
    assert model[2].weight.spec == Intx(3, (1, 64))
    quantize_(model := network(), Codebook())
    assert isinstance(model[0].weight, QTensor)


def test_filter_and_report():
    model = network()
    report = quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "4"
    )
    assert [row.name for row in report.rows] == ["0.weight", "2.weight"]
    assert report.skipped == {"4.weight": "filter_fn leaves it out"}
    assert str(report) == (
        "format        shape      layers  bytes before  bytes after  ratio\n"
        "-----------------------------------------------------------------\n"
        "Intx(bits=8)  256 x 128       1       131,072       33,792  0.258\n"
        "Intx(bits=8)  128 x 256       1       131,072       33,280  0.254\n"
        "total                         2       262,144       67,072  0.256\n"
        "skipped 1: 4.weight: filter_fn leaves it out"
    )


def test_attention_projection_is_left_alone():
    model = nn.TransformerEncoderLayer(64, 4, 128)
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.self_attn.out_proj.weight) is nn.Parameter and isinstance(model.linear1.weight, QTensor)
    assert model(torch.randn(3, 2, 64)).shape == (3, 2, 64)


def test_device(device):
    model = network()
    quantize_(model, Int4WeightOnlyConfig(group_size=32), device=device)
    assert {p.device.type for p in model.parameters()} == {device}
    assert model(torch.randn(2, 128, device=device)).device.type == device


def test_meta_model():
    with torch.device("meta"):
        model = nn.Linear(128, 64)
    quantize_(model, Int4WeightOnlyConfig())
    assert model.weight.is_meta and model.weight.qdata.shape == (64, 64)


def test_a_root_linear_and_embeddings_and_convolutions():
    root = nn.Linear(128, 64)
    quantize_(root, Int8WeightOnlyConfig())
    assert isinstance(root.weight, QTensor)
    table = nn.Sequential(nn.Embedding(50, 64))
    quantize_(table, IntxWeightOnlyConfig(torch.int4, PerGroup(32)), filter_fn=lambda m, n: isinstance(m, nn.Embedding))
    assert table(torch.tensor([[1, 2]])).shape == (1, 2, 64)
    conv = nn.Conv2d(16, 32, 3)
    x = torch.randn(1, 16, 8, 8)
    expected = conv(x)
    quantize_(conv, IntxWeightOnlyConfig(torch.int8), filter_fn=lambda m, n: True)
    assert conv.weight.scale.shape == (32, 1, 1, 1) and compute_error(expected, conv(x)) > 35


class Experts(nn.Module):
    """3-D expert weights, as mixture-of-experts models have them, beside a router."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 4)
        self.w1 = nn.Parameter(torch.randn(4, 128, 64))

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        return torch.einsum("te,teo->to", scores, torch.stack([x @ self.w1[e].t() for e in range(4)], 1))


def test_rules():
    model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "moe": Experts(), "head": nn.Linear(64, 32)})
    x = torch.randn(5, 64)
    expected = model["moe"](x)
    rules = FqnToConfig(
        {
            "moe.w1": Int8WeightOnlyConfig(),
            "re:.*rout.*": None,
            "embed": IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
            "_default": Intx(6, (1, 64)),
        }
    )
    report = quantize_(model, rules)
    assert model["moe"].w1.spec == Intx(8) and model["moe"].w1.scale.shape == (4, 128, 1)
    assert type(model["moe"].router.weight) is nn.Parameter
    assert model["embed"].weight.spec.bits == 4 and model["head"].weight.spec.bits == 6
    assert report.skipped == {"moe.router.weight": "the rule 're:.*rout.*' says None"}
    assert compute_error(expected, model["moe"](x)) > 35


def test_rule_precedence():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    bits = {name: Intx(b) for name, b in zip("abcdef", (8, 7, 6, 5, 4, 3))}
    rules = {"re:a.weight": bits["a"], "a": bits["b"], "a.weight": bits["c"]}
    rules |= {"re:b": bits["d"], "re:b.weight": bits["e"], "_default": bits["f"]}
    quantize_(model, ModuleFqnToConfig(rules))
    assert [model[k].weight.spec.bits for k in "abc"] == [6, 4, 3]


def test_rules_that_do_not_fit():
    with pytest.raises(ValueError, match="the rule '4.weigth' matches no layer; the nearest names are 4.weight"):
        quantize_(network(), FqnToConfig({"4.weigth": Int8WeightOnlyConfig()}))
    with pytest.raises(ValueError, match="filter_fn must be None"):
        quantize_(network(), FqnToConfig({"_default": None}), filter_fn=lambda m, n: True)
    with pytest.raises(ValueError, match="not two that differ"):
        FqnToConfig({"a": None}, {"b": None})
    with pytest.raises(TypeError, match="must map to a config"):
        FqnToConfig({"a": "int4"})


def test_tied_weights():
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "head": nn.Linear(64, 32, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    model = tied()
    report = quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, n: True)
    assert model["head"].weight is model["embed"].weight and len(report) == 1 and not report.notes
    dequantize_(model)
    assert model["head"].weight is model["embed"].weight
    model = tied()
    report = quantize_(model, Int8WeightOnlyConfig())
    assert type(model["embed"].weight) is nn.Parameter and isinstance(model["head"].weight, QTensor)
    assert report.notes == ["head.weight was tied to embed.weight, which stays as it is: the tie is undone"]
    with pytest.raises(ValueError, match="one tied parameter and must have the same config"):
        quantize_(tied(), FqnToConfig({"embed": Intx(8), "head": Intx(4)}))


def test_a_failed_call_leaves_the_model_as_it_was():
    model = network()
    model.add_module("odd", nn.Linear(100, 64))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        quantize_(model, Int4WeightOnlyConfig(group_size=32))
    assert str(error.value) == (
        "odd.weight: Intx(bits=4, block=(1, 32), signed=False): dim 1 of shape (64, 100) is not a multiple of its block 32; "
        "use block=(1, 4), -1 for the whole dim, or leave this tensor out"
    )
    assert all(type(p) is nn.Parameter and torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="0.weight: the weight has NaN"):
        quantize_(model, Int8WeightOnlyConfig())
    assert type(model[4].weight) is nn.Parameter


def test_skipping_on_request():
    model = nn.Sequential(nn.Linear(100, 64), nn.Linear(64, 64))
    report = quantize_(model, Int4WeightOnlyConfig(group_size=32, unsupported="skip"))
    assert len(report) == 1 and "not a multiple" in report.skipped["0.weight"]


def test_misuse():
    with pytest.raises(TypeError, match="call it first"):
        quantize_(network(), Int8WeightOnlyConfig)
    with pytest.raises(TypeError, match="takes a config"):
        quantize_(network(), "int4_weight_only")
    model = network()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="0.weight: it is quantized already, by Intx"):
        quantize_(model, Int4WeightOnlyConfig())
    with pytest.raises(ValueError, match="only nn.Linear layers"):
        quantize_(nn.Embedding(8, 64), Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, n: True)
    with pytest.raises(ValueError, match="float zero points"):
        Int4WeightOnlyConfig(layout=TensorCoreTiledLayout(), zero_point_domain=ZeroPointDomain.INT)
    with pytest.raises(ValueError, match="weight_dtype must be torch.int1 to torch.int8, got uint4"):
        IntxWeightOnlyConfig(torch.uint4)
    with pytest.raises(ValueError, match="layout must be one of PlainLayout"):
        Int8DynamicActivationInt8WeightConfig(layout=Int4CPULayout())
    with pytest.raises(ValueError, match="granularity must be PerTensor"):
        Float8DynamicActivationFloat8WeightConfig(granularity=PerGroup(32))
    with pytest.raises(TypeError, match="lays out weights for cuda"):
        quantize_(network(), Int4WeightOnlyConfig(layout=TensorCoreTiledLayout()))
    assert PlainLayout() == Int4WeightOnlyConfig().layout


def test_conversions_of_the_module():
    model = network()
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    model = copy.deepcopy(model).bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert model(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_model_size():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64, bias=False))
    assert get_model_size_in_bytes(model) == 4 * (640 + 4096)
    assert get_model_size_in_bytes(model, ignore_embeddings=True) == 4 * 4096
    quantize_(model, Int8WeightOnlyConfig())
    assert get_model_size_in_bytes(model) == 4 * 640 + 4096 + 4 * 64


def test_quantized_model_compiles_as_a_whole():
    model = network()
    quantize_(model, Int4WeightOnlyConfig(group_size=32))
    x = torch.randn(4, 128)
    with torch.no_grad():
        assert compute_error(model(x), torch.compile(model, fullgraph=True, backend="aot_eager")(x)) > 60


def test_public_names():
    for name in ao.__all__:
        assert getattr(ao, name) is not None
        value = getattr(ao, name)
        assert not callable(value) or value.__doc__, f"{name} has no docstring"


def test_planned_specs():
    """What quantize_ would do, from a model without weights, which stays as it is."""
    with torch.device("meta"):
        model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "up": nn.Linear(64, 128), "head": nn.Linear(64, 32)})
    model["head"].weight = model["embed"].weight
    rules = FqnToConfig({"re:embed|head": Intx(8), "_default": Int4WeightOnlyConfig(group_size=32)})
    specs, report = planned_specs(model, rules)
    assert {name: planned.spec for name, planned in specs.items()} == {
        "embed.weight": Intx(8),
        "head.weight": Intx(8),
        "up.weight": Intx(4, (1, 32), signed=False),
    }
    assert not len(report) and not any(isinstance(p, QTensor) for p in model.parameters())
    specs, report = planned_specs(model, Intx(8), lambda module, name: name == "up")
    assert list(specs) == ["up.weight"] and "head.weight" in report.skipped
    with pytest.raises(ValueError, match="up.weight.*block"):
        planned_specs(model, Intx(4, (1, 48)), lambda module, name: name == "up")
