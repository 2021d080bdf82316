"""The names of formats: the same ones in `quantize_`, in rules, in training and in the configs of other libraries."""

from __future__ import annotations

import inspect
import json
from enum import Enum

import pytest
import torch
from cases import CASES
from torch import nn

import ao
from ao.quant import format_syntax
from ao.quant.config import ENUMS, VALUES
from ao.quant.config import RECIPES as KNOWN
from ao.quant.format_names import ALIASES, FORMATS, RECIPES, split_recipe
from ao.quant.qat import QATConfig
from ao.quant.read_format import config_classes, read_format

KNOWN_CLASSES = [
    (name, cls)
    for name, cls in {**ao.Config.registry, **ao.Spec.registry, **VALUES, **ENUMS}.items()
    if cls.__module__.startswith(("ao.quant.", "ao.dtypes.")) and ".qat." not in cls.__module__
    if name not in ("Granularity", "Layout", "ModelConfig")
]


@pytest.mark.parametrize(
    "name", [*FORMATS, *ALIASES, "INT8", "int8_weight_only", "Int4WeightOnlyConfig", "uintx_weight_only"]
)
def test_every_name_quantizes(name):
    model = nn.Sequential(nn.Linear(256, 128))
    report = ao.quantize_(model, name)
    assert len(report.rows) == 1 and isinstance(model[0].weight, ao.QTensor)
    assert repr(model[0].weight.spec) in repr(model)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("int8", ao.Int8WeightOnlyConfig()),
        ("int4", ao.Int4WeightOnlyConfig()),
        ("int4-g32+gptq", ao.Int4WeightOnlyConfig(group_size=32, algorithm="gptq")),
        ("nf4+hqq", ao.SpecConfig(ao.NF4, algorithm="hqq")),
        ("nf4", ao.NF4),
        ("Intx(bits=3, block=(1, 64))+awq+gptq", ao.SpecConfig(ao.Intx(3, (1, 64)), algorithm="awq+gptq")),
        ("int8_dynamic_activation_int8_weight", ao.Int8DynamicActivationInt8WeightConfig()),
        ("float8_dynamic_activation_float8_weight", ao.Float8DynamicActivationFloat8WeightConfig()),
        ("uintx_weight_only", ao.UIntXWeightOnlyConfig(torch.uint4)),
        ("int3-g32", ao.UIntXWeightOnlyConfig(torch.uint3, 32)),
        ("int4-g64+hqq", ao.Int4WeightOnlyConfig(group_size=64, algorithm="hqq")),
        ("float8dq_e4m3_row", ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())),
    ],
)
def test_what_a_name_is(name, config):
    assert read_format(name) == config


def test_parameters_of_a_name():
    assert read_format("int4", {"group_size": 32}) == ao.Int4WeightOnlyConfig(group_size=32)
    assert read_format("fpx_weight_only", {"ebits": 3, "mbits": 2}) == ao.FPXWeightOnlyConfig(3, 2)
    with pytest.raises(TypeError, match="group_sice"):
        read_format("int4", {"group_sice": 32})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("itn8", "quantize_: unknown format 'itn8', and near to int8"),
        ("bf16", "nothing is quantized by it"),
        ("int4-g128+foo", "unknown format"),
        ("int4-g128++gptq", "unknown format"),
        ("__import__('os').system('true')", "cannot be called here"),
        ("QATConfig()", "format 'QATConfig"),
        ("Int8WeightOnlyConfig(group=3)", "has no parameter 'group'; near to it is group_size. It has group_size, "),
        ("FPXWeightOnlyConfig(3)", "FPXWeightOnlyConfig needs mbits"),
        ("FPXWeightOnlyConfig(3, 2, 1)", "takes 2 arguments without a name at most, got 3"),
        ("FPXWeightOnlyConfig(3, 2, ebits=3)", "got two values for ebits"),
    ],
)
def test_what_is_no_name(wrong, said):
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=said):
        ao.quantize_(model, wrong)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("name", [name for name, _ in KNOWN_CLASSES])
def test_sources_tell_what_classes_are(name):
    """The command line reads the sources; Python imports them."""
    cls, read = dict(KNOWN_CLASSES)[name], format_syntax.known(name)
    assert read is not None
    if issubclass(cls, Enum):
        assert read.members == tuple(cls.__members__)
        return
    parameters = inspect.signature(cls).parameters.values()
    assert [(p.name, p.required, p.positional) for p in read.parameters] == [
        (p.name, p.default is p.empty, p.kind is not p.KEYWORD_ONLY) for p in parameters
    ]


def test_named_formats_print_as_they_are_called():
    for spec, name in ao.Spec.named.items():
        assert getattr(ao, name) == spec and repr(spec) == name == format_syntax.spec_label(spec.to_dict())
        assert read_format(name) == spec and read_format(name.lower()) == spec
    assert sorted(ao.Spec.named.values()) == list(format_syntax.named_specs())
    assert repr(ao.FPXWeightOnlyConfig(3, 2).weight((64, 64))) == "FP6"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_labels_of_stored_specs(case):
    """What `ao inspect` prints, without torch, is what Python prints; long tables are told by their length."""
    label = format_syntax.spec_label(json.loads(json.dumps(case.spec.to_dict())))
    assert label == repr(case.spec) or " numbers" in label


def test_expressions_that_python_takes_are_taken():
    for expression in [
        *(form.expression for form in FORMATS.values()),
        *(each for each in ALIASES.values() if "(" in each),
        "Float8DynamicActivationFloat8WeightConfig(granularity=(PerRow(), PerTensor()))",
        "Codebook((-1.0, 0.0, 0.5, 1.0), (1, 32))",
        "SpecConfig(NF4, algorithm='hqq')",
        "Int4WeightOnlyConfig(algorithm=AWQ(rounding=GPTQ()))",
        "Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC)",
        "Intx(bits=4, block=(1, -1), act=Intx(8))",
    ]:
        assert isinstance(read_format(expression), (ao.Config, ao.Spec))
        format_syntax.check_expression(expression)


def test_the_list():
    assert {cls.name for cls in KNOWN} == set(RECIPES)
    assert split_recipe("int4-g128+awq+gptq") == ("int4-g128", "awq+gptq") and split_recipe("a+b") == ("a+b", "")
    assert "qat" not in config_classes() and "int8weightonly" in config_classes()
    assert not [name for name in ALIASES if name in FORMATS]


def test_names_stand_where_configs_do():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(4, 64)
    rules = ao.FqnToConfig({"0": "int8", "_default": "nf4"})
    assert rules == ao.FqnToConfig({"0": ao.Int8WeightOnlyConfig(), "_default": ao.NF4})
    assert ao.config_from_dict(ao.config_to_dict(rules)) == rules
    ao.quantize_(model, rules)
    assert "weight=Intx(bits=8)" in repr(model) and "weight=NF4" in repr(model)
    model = nn.Sequential(nn.Linear(64, 64))
    with ao.calibrate(model, "int4-g32+gptq"):
        model(x)
    assert ao.quantize_(model, "int4-g32+gptq").rows[0].algorithm == "gptq"
    model = nn.Sequential(nn.Linear(64, 64))
    ao.quantize_(model, QATConfig("int8-int4", step="prepare"))
    ao.quantize_(model, QATConfig("int8-int4", step="convert"))
    plain = nn.Sequential(nn.Linear(64, 64))
    ao.quantize_(plain, ao.Int8DynamicActivationInt4WeightConfig())
    assert model[0].weight.spec == plain[0].weight.spec
    assert ao.FqnToConfig({"_default": "int8"}).with_recipe("hqq").fqn_to_config["_default"].algorithm == "hqq"


def test_layers_say_their_format():
    model = nn.Sequential(nn.Embedding(32, 64), nn.Conv1d(64, 64, 1), nn.Linear(64, 64), nn.Linear(64, 64))
    plain = repr(model)
    ao.quantize_(model, ao.FqnToConfig({"0": "int8", "1": "int8", "2": "nf4"}))
    lines = repr(model).splitlines()
    assert lines[1] == "  (0): Embedding(32, 64, weight=Intx(bits=8))"
    assert lines[2].endswith("stride=(1,), weight=Intx(bits=8, block=(1, -1, -1)))")
    assert lines[3] == "  (2): Linear(in_features=64, out_features=64, bias=True, weight=NF4)"
    assert lines[4] == "  (3): Linear(in_features=64, out_features=64, bias=True)"
    assert isinstance(model[0], nn.Embedding) and model[0].__class__.__name__ == "Embedding"
    assert repr(ao.dequantize_(model)) == plain and type(model[0]) is nn.Embedding


def test_transformers_hears_what_to_do():
    with pytest.raises(AttributeError, match=r"import ao.integrations.transformers.*AoConfig\(Int8WeightOnlyConfig"):
        _ = ao.Int8WeightOnlyConfig().quant_method
    assert not hasattr(ao.Int8WeightOnlyConfig(), "quant_method")
