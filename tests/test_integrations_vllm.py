"""The vLLM plugin against a stand-in of vLLM's interface."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
import vllm_stand_in
from cases import weight

import ao
from ao.dtypes.checkpoint import flatten

pytest.importorskip("transformers")
vllm_stand_in.install()

from ao.integrations import vllm as plugin  # noqa: E402
from ao.quant import config_to_dict  # noqa: E402

CONFIGS = [
    ao.Int8WeightOnlyConfig(),
    ao.Int4WeightOnlyConfig(group_size=32),
    ao.Intx(3, (1, 32)),
    ao.Float8WeightOnlyConfig(),
    ao.NF4WeightOnlyConfig(),
    ao.Int8DynamicActivationInt8WeightConfig(),
    ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    ao.Int8DynamicActivationInt4WeightConfig(),
    ao.Int4WeightOnlyConfig(group_size=32, algorithm="hqq"),
]
QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def config(quant_type, **kwargs):
    saved = {"quant_method": "ao", "quant_type": config_to_dict(quant_type), **kwargs}
    made = vllm_stand_in.REGISTRY["ao"].from_config(json.loads(json.dumps(saved)))
    made.packed_modules_mapping = QKV
    return made


def quantized(quant_type, shapes: dict[str, tuple[int, int]]) -> dict[str, ao.QTensor]:
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(k, n, bias=False) for name, (n, k) in shapes.items()})
    for i, layer in enumerate(layers.values()):
        layer.weight.data = weight(tuple(layer.weight.shape), i, torch.bfloat16)
    ao.quantize_(layers, quant_type)
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}


@pytest.mark.parametrize("quant_type", CONFIGS, ids=lambda c: f"{type(c).__name__}-{getattr(c, 'algorithm', '')}")
@pytest.mark.parametrize("world", [1, 2])
def test_a_fused_layer_by_rows(quant_type, world):
    """Each part of qkv on its own, stacked, and cut into ranks."""
    sizes = {"q_proj": (64, 128), "k_proj": (32, 128), "v_proj": (32, 128)}
    parts = quantized(quant_type, sizes)
    tensors, _ = flatten(parts)
    x = weight((5, 128), 9, torch.bfloat16)
    for rank in range(world):
        method = config(quant_type).get_quant_method(
            vllm_stand_in.LinearBase.__new__(vllm_stand_in.LinearBase), "model.qkv_proj"
        )
        layer = vllm_stand_in.LinearBase([n for n, _ in sizes.values()], 128, method, torch.bfloat16, rank, world)
        vllm_stand_in.load(layer, tensors, list(sizes))
        assert isinstance(layer.weight, ao.QTensor) and list(dict(layer.named_parameters())) == ["weight"]
        rows = [q.dequantize().chunk(world)[rank] for q in parts.values()]
        assert torch.equal(layer.weight.dequantize(), torch.cat(rows))
        expected = [torch.nn.functional.linear(x, q).chunk(world, -1)[rank] for q in parts.values()]
        assert ao.compute_error(torch.cat(expected, -1), layer(x)) > 40


@pytest.mark.parametrize("quant_type", CONFIGS, ids=lambda c: f"{type(c).__name__}-{getattr(c, 'algorithm', '')}")
def test_a_layer_cut_by_columns(quant_type):
    parts = quantized(quant_type, {"o_proj": (32, 256)})
    tensors, _ = flatten(parts)
    for rank in range(2):
        method = plugin.AoLinearMethod(quant_type)
        layer = vllm_stand_in.LinearBase([32], 256, method, torch.bfloat16, rank, 2, by_input=True)
        vllm_stand_in.load(layer, tensors, ["o_proj"])
        assert torch.equal(layer.weight.dequantize(), parts["o_proj.weight"].dequantize().chunk(2, 1)[rank])


def test_which_layers():
    made = config(
        ao.FqnToConfig({"re:.*mlp.*": ao.NF4, "_default": ao.Int8WeightOnlyConfig(), "a.q_proj": None}),
        modules_to_not_convert=["skipped"],
    )
    linear = vllm_stand_in.LinearBase.__new__(vllm_stand_in.LinearBase)
    assert made.get_name() == "ao" and torch.bfloat16 in made.get_supported_act_dtypes()
    assert made.get_quant_method(torch.nn.Embedding(2, 2), "embed") is None
    assert made.get_quant_method(linear, "x.mlp.up").choice == ao.NF4
    assert made.get_quant_method(linear, "x.qkv_proj").choice == ao.Int8WeightOnlyConfig()
    assert isinstance(made.get_quant_method(linear, "x.skipped"), vllm_stand_in.UnquantizedLinearMethod)
    with pytest.raises(ValueError, match=r"fuses a\.q_proj, a\.k_proj, a\.v_proj into a\.qkv_proj.*different formats"):
        made.get_quant_method(linear, "a.qkv_proj")


def test_what_it_refuses():
    for kwargs, quant_type in (({"include_embedding": True}, ao.NF4), ({}, None)):
        with pytest.raises(ValueError, match="linear layers only"):
            plugin.AoVllmConfig("autoquant" if quant_type is None else config_to_dict(quant_type), **kwargs)
    with pytest.raises(ValueError, match="algorithm='awq' scales the inputs of each layer"):
        plugin.AoLinearMethod(ao.Int4WeightOnlyConfig(algorithm="awq"))
    method = plugin.AoLinearMethod(ao.Float8DynamicActivationFloat8WeightConfig())
    with pytest.raises(ValueError, match=r"1 scales for 128 rows.*PerRow\(\)"):
        vllm_stand_in.LinearBase([64, 64], 128, method, torch.bfloat16)
    whole = vllm_stand_in.LinearBase([64], 128, method, torch.bfloat16)
    parts = quantized(ao.Float8DynamicActivationFloat8WeightConfig(), {"o_proj": (64, 128)})
    vllm_stand_in.load(whole, flatten(parts)[0], ["o_proj"])
    assert torch.equal(whole.weight.dequantize(), parts["o_proj.weight"].dequantize())


def test_entry_point():
    found = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.value.startswith("ao.")]
    if not found:
        pytest.skip("ao is not installed with its entry points")
    assert found[0].load() is plugin.register and plugin.register() is None
