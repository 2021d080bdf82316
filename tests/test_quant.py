"""`quantize_`, its configs and its report."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

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
from ao.quant.qat import QATConfig
from ao.quant.quantize import jobs_by_name

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
    (UIntXWeightOnlyConfig(torch.uint7), Intx(7, (1, 64), signed=False), 33),
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
        "skipped 1: 4.weight: filter_fn leaves it out\n"
        "quantized: 88.0% of the 297,728 bytes of the model"
    )
    assert report.model_bytes == get_model_size_in_bytes(network())


@pytest.mark.parametrize("config", ["int8-dynamic", "int8"])
def test_a_report_says_where_activations_stay(config):
    """Layers that are no nn.Linear take the weight half of a format."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    report = quantize_(nn.Sequential(conv1d(64, 64), conv1d(64, 64), nn.Linear(64, 64)), config)
    note = "Conv1D: its weights alone are quantized; Int8DynamicActivationInt8WeightConfig quantizes activations"
    assert len(report) == 3 and [n.startswith(note) for n in report.notes] == [True] * (config == "int8-dynamic")


@pytest.mark.parametrize("config", ["float8-dynamic", "int8-int4", "int4"])
def test_a_long_format_makes_nothing_wide(config):
    """Not the table of a report, which says it once for layers that follow each other, and not a printed model."""
    model = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 2048))
    report = str(ao.quantize_(model, config))
    spec = repr(model[0].weight.spec)
    assert max(map(len, report.splitlines())) <= 100 and report.count(spec) == (2 if len(spec) < 44 else 1)
    assert max(map(len, str(model).splitlines())) <= 120 and str(model).count(spec) == 2


def test_nothing_to_quantize():
    """A filter that takes nothing is a mistake, at every door, and changes nothing; a model may have no linear layer."""
    model = network()
    for config in (Int8WeightOnlyConfig(), QATConfig(Int8WeightOnlyConfig()), "int4-g32+gptq"):
        with pytest.raises(ValueError, match="filter_fn takes no layer with a weight; .* '0', '2', '4'"):
            quantize_(model, config, filter_fn=lambda m, name: name == "5")
    for config in (None, "int4-g32+gptq"):
        with (
            pytest.raises(ValueError, match="filter_fn takes no layer"),
            ao.calibrate(model, config, lambda m, n: False),
        ):
            pass
    assert not any(isinstance(p, QTensor) for p in model.parameters())
    report = quantize_(nn.Sequential(nn.Conv2d(3, 8, 3)), Int8WeightOnlyConfig())
    assert not report.rows and "nothing was quantized: by default linear layers are; filter_fn" in str(report)


def test_layers_of_few_outputs_or_inputs_stay_unless_asked():
    """At each door; a filter or a rule by name asks, and so does who gives the layer itself."""
    why = "fewer than 16 save nothing and decide much; filter_fn or a rule by its name (FqnToConfig) takes it"
    told = {"0.weight": f"of 8 inputs: {why}", "2.weight": f"of 2 outputs, such as a classifier or a router: {why}"}

    def small():
        return nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 2))

    for config in (Int8WeightOnlyConfig(), FqnToConfig({"_default": Intx(8)}), QATConfig(Int8WeightOnlyConfig())):
        report = quantize_(small(), config)
        assert [row.name for row in report.rows] == ["1.weight"] and report.skipped == told
    model = ao.autoquant(small(), manual=True)
    model(torch.randn(4, 8))
    assert ao.finalize_autoquant(model).skipped == {name.removesuffix(".weight"): why for name, why in told.items()}
    assert len(quantize_(small(), Intx(8), ao.is_linear)) == 3
    assert [row.name for row in quantize_(small(), FqnToConfig({"2": Intx(8)})).rows] == ["2.weight"]
    assert len(quantize_(nn.Linear(64, 2), Intx(8))) == 1


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
        FqnToConfig({"a": 4})


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
    linears = (None, lambda m, n: isinstance(m, nn.Linear), lambda m, n: n == "head")
    for filter_fn in linears:  # a tie is never undone
        model = tied()
        report = quantize_(model, Int8WeightOnlyConfig(), filter_fn)
        assert type(model["embed"].weight) is nn.Parameter and model["head"].weight is model["embed"].weight
        assert report.skipped["head.weight"].startswith("tied to embed.weight, which stays as it is: an embedding")
    for name in ("head", "embed.weight", "re:h.*"):  # named, it is quantized as one
        model = tied()
        report = quantize_(model, FqnToConfig({name: Intx(8)}))
        assert isinstance(model["head"].weight, QTensor) and model["head"].weight is model["embed"].weight
        assert len(report) == 1 and "quantized as one" in report.notes[0] and not report.skipped
    assert quantize_(tied(), FqnToConfig({"_default": Intx(8), "embed": None})).rows == []
    for rules in ({"embed": Intx(8), "head": Intx(4)}, {"re:.*": Intx(8), "head": None}):
        with pytest.raises(ValueError, match="one tied parameter and must have the same config"):
            quantize_(tied(), FqnToConfig(rules))
    both = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    both["a"].weight = both["b"].weight
    report = quantize_(both, Int8WeightOnlyConfig())
    assert len(report) == 1 and both["a"].weight is both["b"].weight and isinstance(both["a"].weight, QTensor)


class Standardized(nn.Conv2d):
    """Changes its weight before it is used."""

    def forward(self, x):
        w = self.weight
        return nn.functional.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True))


class Equalized(nn.Linear):
    """So does this one."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.pow(2), self.bias)


class Padded(nn.Conv2d):
    """Only its input is changed."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Buffered(nn.Linear):
    """The weight is no parameter."""

    def __init__(self):
        super().__init__(64, 64)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


COMPUTED = {
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), "remove_parametrizations"),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64)), "remove_parametrizations"),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(64, 64)), "remove_parametrizations"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(64, 64)), "remove_spectral_norm"),
    "pruned": (lambda: pruned(nn.Linear(64, 64)), "prune.remove"),
    "buffer": (Buffered, "a buffer; make it an nn.Parameter"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_are_computed(name):
    make, fix = COMPUTED[name]
    model = nn.Sequential(make(), nn.Linear(64, 64))
    before, x = dict(model.named_parameters()), torch.randn(2, 64)
    for config, filter_fn in ((Intx(8), lambda m, n: isinstance(m, nn.Linear)), (FqnToConfig({"0": Intx(8)}), None)):
        with pytest.raises(ValueError, match=rf"0.weight: .*{fix}"):
            quantize_(model, config, filter_fn)
    assert all(p is before[n] for n, p in model.named_parameters())
    report = quantize_(model, Int8WeightOnlyConfig())
    assert [row.name for row in report.rows] == ["1.weight"] and model(x).isfinite().all()
    assert report.skipped and all(fix in why for why in report.skipped.values())


def test_layers_that_cannot_compute_with_a_quantized_weight(device):
    """What a filter or a rule asks for works, or is refused before anything changes."""
    ids, x = torch.randint(50, (3, 7), device=device), torch.randn(1, 5, 64, device=device)
    image = torch.randn(1, 64, 9, 9, device=device)
    cases = {
        "standardized": (Standardized(64, 8, 3), (image,), False),
        "padded": (Padded(64, 8, 3), (image,), True),
        "transposed": (nn.ConvTranspose2d(64, 8, 3), (image,), True),
        "equalized": (Equalized(64, 64), (x,), False),
        "embedding": (nn.Embedding(50, 64), (ids,), True),
        "embedding with a norm": (nn.Embedding(50, 64, max_norm=1.0), (ids,), None),
        "embedding bag": (nn.EmbeddingBag(50, 64), (ids,), None),
        "bilinear": (nn.Bilinear(64, 64, 8), (x, x), None),
        "LSTM": (nn.LSTM(64, 64), (x,), None),
        "GRU": (nn.GRU(64, 64), (x,), None),
        "LSTM cell": (nn.LSTMCell(64, 64), (x[0],), None),
    }
    for name, (layer, args, works) in cases.items():
        model = nn.Sequential(nn.Linear(64, 64), layer).to(device)
        rule = next(n for n, p in model[1].named_parameters() if p.dim() > 1)
        with torch.random.fork_rng(devices=[]):
            state = torch.random.get_rng_state()
            try:
                report = quantize_(model, FqnToConfig({f"1.{rule}": Intx(8)}))
            except ValueError as error:
                assert works is not True and f"1.{rule}: {type(layer).__name__} does with its {rule}" in str(error), (
                    name
                )
                assert not any(isinstance(p, QTensor) for p in model.parameters())
                skips = IntxWeightOnlyConfig(unsupported="skip")
                assert f"1.{rule}" in quantize_(model, FqnToConfig({f"1.{rule}": skips})).skipped
            else:
                assert works is not False and len(report) == 1, name
                model[1](*args)
            assert torch.equal(torch.random.get_rng_state(), state)
    # By default such a layer is left alone, and the report says so.
    model = nn.Sequential(Equalized(64, 64), nn.Linear(64, 64)).to(device)
    report = quantize_(model, Int8WeightOnlyConfig())
    assert len(report) == 1 and "Equalized does with its weight" in report.skipped["0.weight"]
    assert model(x).isfinite().all()


class MixtureOfExperts(nn.Module):
    """Experts in a 3-D parameter, known by the name of their class."""

    def __init__(self):
        super().__init__()
        self.experts = Experts()
        self.norm = nn.LayerNorm(2000)
        self.mix = nn.Parameter(torch.ones(1, 1, 64))


def test_what_is_left_alone_is_told():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(50, 64), "conv": nn.Conv2d(64, 64, 3), "lstm": nn.LSTM(64, 64, 2), "linear": nn.Linear(64, 64),
            "attention": nn.MultiheadAttention(64, 4), "moe": MixtureOfExperts(), "bilinear": nn.Bilinear(64, 64, 8),
        }
    )  # fmt: skip
    report = quantize_(model, Int8WeightOnlyConfig())
    done = {"linear.weight", "moe.experts.w1"}
    assert {row.name for row in report.rows} == done
    large = {n for n, p in model.named_parameters() if p.numel() > 1000 and not isinstance(p, QTensor)}
    assert large <= report.skipped.keys() and not (done | {"moe.mix"}) & report.skipped.keys()
    for name, why in (("embed.weight", "embedding"), ("conv.weight", "a convolution (Conv2d)"), ("moe.norm.weight", "vector"),
                      ("lstm.weight_ih_l1", "recurrent layer (LSTM)"), ("attention.in_proj_weight", "attention"),
                      ("bilinear.weight", "not a linear layer (Bilinear)"),
                      ("moe.experts.router.weight", "of 4 outputs, such as a classifier or a router")):  # fmt: skip
        assert why in report.skipped[name]
    lines = str(report).splitlines()
    quantized = sum(p.numel() * 4 for p in model.parameters() if isinstance(p, QTensor))
    assert (
        lines[-1] == f"quantized: {quantized / report.model_bytes:.1%} of the {report.model_bytes:,} bytes of the model"
    )
    assert len([line for line in lines if line.startswith("skipped")]) == 7
    again = quantize_(model, IntxWeightOnlyConfig(), lambda m, n: n == "embed")
    assert again.quantized_bytes == report.quantized_bytes + 4 * 50 * 64 and "linear.weight" not in again.skipped
    # Experts take the weight half; calibration is for linear layers, and the fix is named.
    half = MixtureOfExperts()
    quantize_(half, FqnToConfig(dict.fromkeys(["_default", "experts.router"], Int8DynamicActivationInt8WeightConfig())))
    assert half.experts.w1.spec == Intx(8) and half.experts.router.weight.spec == Intx(8, act=Intx(8))
    data = [torch.randn(4, 64)]
    with pytest.raises(ValueError, match="experts.w1: algorithm='gptq' needs the inputs of a linear layer.*is_linear"):
        quantize_(MixtureOfExperts(), Int4WeightOnlyConfig(32, algorithm="gptq"), calibration_data=data)


def test_quantization_aware_training_takes_linear_layers():
    """Of what is quantized by default it prepares those, and says so of the others."""
    model = MixtureOfExperts()
    model.experts.router = nn.Linear(64, 16)
    report = quantize_(model, QATConfig(Int8WeightOnlyConfig()))
    assert [row.name for row in report.rows] == ["experts.router.weight"]
    assert report.skipped["experts.w1"] == "quantization-aware training takes nn.Linear and nn.Embedding"
    quantize_(model, QATConfig(Int8WeightOnlyConfig(), step="convert"))
    assert isinstance(model.experts.router.weight, QTensor) and not isinstance(model.experts.w1, QTensor)


def test_a_plan_asks_once_per_shape(monkeypatch):
    asked = []
    choose = Intx.choose_qparams
    monkeypatch.setattr(Intx, "choose_qparams", lambda *args: asked.append(1) or choose(*args))
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(96, 72) for _ in range(6)])
    planned, _ = jobs_by_name(model, Intx(5, (1, 24)))
    assert len(planned) == 6 and len(asked) == 1
    with pytest.raises(ValueError, match=r"^0.weight: Intx\(bits=5, block=\(1, 7\)\): dim 1 of shape \(72, 96\)"):
        jobs_by_name(model, Intx(5, (1, 7)))


def test_a_failed_call_leaves_the_model_as_it_was():
    model = network()
    model.add_module("odd", nn.Linear(100, 64))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        quantize_(model, Int4WeightOnlyConfig(group_size=32))
    assert str(error.value) == (
        "odd.weight: Intx(bits=4, block=(1, 32), signed=False): dim 1 of shape (64, 100) is not a "
        "multiple of its block 32; use group_size=4, give unsupported='skip', or leave it out with filter_fn (--skip)"
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


def test_shapes_are_told_in_the_words_of_the_config():
    model = nn.Sequential(nn.Linear(96, 32))
    with pytest.raises(
        ValueError, match=r"0.weight: .*; use group_size=32, give unsupported='skip', or leave it out with filter_fn"
    ):
        quantize_(model, Int4WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"0.weight: .*; use block=\(1, 32\)"):
        quantize_(model, Intx(4, (1, 128)))
    for size in (None, 0, "32"):
        with pytest.raises(ValueError, match="Int4WeightOnlyConfig: group_size must be a number"):
            Int4WeightOnlyConfig(group_size=size)


def test_misuse():
    with pytest.raises(TypeError, match="call it first"):
        quantize_(network(), Int8WeightOnlyConfig)
    with pytest.raises(TypeError, match="takes a config"):
        quantize_(network(), 4)
    with pytest.raises(ValueError, match="unknown format 'int9'"):
        quantize_(network(), "int9")
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
    message = "granularity must be one of None, PerTensor, PerRow, PerToken, or a pair of them"
    for wrong in (PerGroup(32), (PerRow(), PerGroup(32)), (PerRow(),), (PerRow(),) * 3, ((PerRow(),) * 2, PerRow())):
        with pytest.raises(ValueError, match=message):
            Float8DynamicActivationFloat8WeightConfig(granularity=wrong)
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


def test_jobs_by_name():
    """What quantize_ would do, from a model without weights, which stays as it is."""
    with torch.device("meta"):
        model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "up": nn.Linear(64, 128), "head": nn.Linear(64, 32)})
    model["head"].weight = model["embed"].weight
    rules = FqnToConfig({"re:embed|head": Intx(8), "_default": Int4WeightOnlyConfig(group_size=32)})
    specs, report = jobs_by_name(model, rules)
    assert {name: planned.spec for name, planned in specs.items()} == {
        "embed.weight": Intx(8),
        "head.weight": Intx(8),
        "up.weight": Intx(4, (1, 32), signed=False),
    }
    assert not len(report) and not any(isinstance(p, QTensor) for p in model.parameters())
    specs, report = jobs_by_name(model, Intx(8), lambda module, name: name == "up")
    assert list(specs) == ["up.weight"] and "head.weight" in report.skipped
    with pytest.raises(ValueError, match="up.weight.*block"):
        jobs_by_name(model, Intx(4, (1, 48)), lambda module, name: name == "up")
