"""Folders that other libraries have quantized: loaded as they are stored, converted, and what is wrong with them said."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ao
from ao.dtypes import NVFP4, Float8, Intx, QTensor
from ao.integrations.command_line.inspect_checkpoint import inspect
from ao.integrations.command_line.program import main
from ao.integrations.foreign.convert import convert_folder
from ao.integrations.foreign.export import export_folder
from ao.integrations.foreign.gguf_file import convert_gguf
from ao.integrations.foreign.words import from_words, to_words
from ao.integrations.transformers import AoConfig

GROUP = 32


def gptq(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight in GPTQ's form, 4 bits in groups, and what they decode to."""
    blocks = w.float().unflatten(1, (-1, GROUP))
    lo, hi = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scale = ((hi - lo) / 15).half().float()
    zero = (-lo / scale).round().clamp(1, 15)
    codes = (blocks / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    dense = ((codes - zero[..., None]) * scale[..., None]).flatten(1)
    return {
        "qweight": to_words(codes.flatten(1).to(torch.uint8), 4).t().contiguous(),
        "qzeros": to_words((zero.t() - 1).to(torch.uint8).contiguous(), 4),
        "scales": scale.t().contiguous().half(),
        "g_idx": (torch.arange(w.shape[1]) // GROUP).int(),
    }, dense


def blocks_of_float8(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """DeepSeek's form, in blocks of 32 x 32."""
    blocks = w.float().reshape(w.shape[0] // 32, 32, w.shape[1] // 32, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    q = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    dense = (q.float() * scale[:, None, :, None]).reshape(w.shape)
    return {"weight": q.reshape(w.shape), "weight_scale_inv": scale}, dense


def packed(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors' pack-quantized, symmetric, 4 bits per row."""
    scale = (w.float().abs().amax(1, keepdim=True) / 7).bfloat16()
    codes = (w.float() / scale.float()).round().clamp(-8, 7)
    return {
        "weight_packed": to_words((codes + 8).to(torch.uint8), 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(w.shape),
    }, codes * scale.float()


KINDS: dict[str, Any] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
    "fp8": (blocks_of_float8, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}),
    "compressed-tensors": (
        packed,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "version": "0.12.2",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
            "ignore": ["lm_head"],
        },
    ),
}


def make(folder: Path, kind: str) -> nn.Module:
    """Write a Llama in the form of another library, and return the model with the weights that it decodes to."""
    torch.manual_seed(0)
    pack, config = KINDS[kind]
    model = hf_models.llama().bfloat16().eval()
    stored: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_proj.weight"):
                parts, dense = pack(p)
                p.copy_(dense)
                stored |= {f"{name.removesuffix('weight')}{part}": t for part, t in parts.items()}
            else:
                stored[name] = p.detach().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    return model


def awq(w: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same numbers as `gptq`, in AWQ's form."""
    parts, dense = gptq(w)
    codes = from_words(parts["qweight"].t().contiguous(), 4, w.shape[1]).t()  # (K, N)
    zeros = from_words(parts["qzeros"], 4, w.shape[0]) + 1
    words = [to_words(t.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4) for t in (codes, zeros)]
    return {"qweight": words[0], "qzeros": words[1], "scales": parts["scales"]}, dense


MIXTURES: dict[str, Any] = {
    "gptq": KINDS["gptq"],
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "fp8": KINDS["fp8"],
    "compressed-tensors": KINDS["compressed-tensors"],
}


def make_mixture(folder: Path, kind: str) -> nn.Module:
    """`make` for a Mixtral, whose files have an expert's weights by themselves, under other names."""
    torch.manual_seed(0)
    pack, config = MIXTURES[kind]
    model = hf_models.mixtral().bfloat16().eval()
    stored: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            parts: list[tuple[str, Tensor]] = [(name, p)]
            place = name.replace("mlp", "block_sparse_moe").rpartition(".")[0]
            if name.endswith("gate_up_proj"):
                halves = enumerate(p.chunk(2, 1))
                parts = [(f"{place}.{e}.w{3 if i else 1}.weight", t) for i, half in halves for e, t in enumerate(half)]
            elif name.endswith("experts.down_proj"):
                parts = [(f"{place}.{e}.w2.weight", t) for e, t in enumerate(p)]
            elif not name.endswith("_proj.weight"):
                stored[name.replace("mlp", "block_sparse_moe")] = p.detach().clone()
                continue
            for part, t in parts:
                fields, dense = pack(t)
                t.copy_(dense)
                stored |= {f"{part.removesuffix('weight')}{field}": f for field, f in fields.items()}
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {**model.config.to_dict(), "architectures": ["MixtralForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    return model


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts(kind, tmp_path):
    """Each is stored by itself, and the model has one tensor of all."""
    dense = make_mixture(tmp_path / "theirs", kind)
    model = load(tmp_path / "theirs", quantization_config=AoConfig("as_stored"))
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--json"]) == 0
    again = load(tmp_path / "ours")
    for name, p in dense.named_parameters():
        for mine in (model.get_parameter(name), again.get_parameter(name)):
            assert isinstance(mine, QTensor) == name.endswith(("_proj", "_proj.weight"))
            assert torch.equal(mine.dequantize() if isinstance(mine, QTensor) else mine, p), name
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert experts.shape == (4, 256, 64) and experts.spec.act is None
    if kind == "fp8":
        return  # the activations of its other layers are quantized
    with torch.no_grad():
        assert ao.compute_error(dense(hf_models.IDS).logits, model(hf_models.IDS).logits) > 35
    assert model.generate(hf_models.IDS, max_new_tokens=4, do_sample=False).shape == (1, 14)


def test_experts_that_differ(tmp_path):
    """One without zero points among others, and what cannot be joined."""
    dense = make_mixture(tmp_path / "theirs", "gptq")
    name = "model.layers.0.block_sparse_moe.experts.2.w1"
    middle = to_words(torch.full((2, 128), 7, dtype=torch.uint8), 4)
    change(tmp_path / "theirs", **{f"{name}.qzeros": middle})
    model = load(tmp_path / "theirs", quantization_config=AoConfig("as_stored"))
    joined, p = model.model.layers[0].mlp.experts.gate_up_proj, dense.model.layers[0].mlp.experts.gate_up_proj
    assert (joined.zero_point[2, :128] == 8).all() and torch.equal(joined.dequantize()[3], p[3])
    order = {f"{name}.g_idx": (torch.arange(64) % 2).int()}
    for tensors, why in (
        ({f"{name}.{part}": None for part in ("qweight", "qzeros", "scales", "g_idx")}, "cannot be joined"),
        (order, r"gate_up_proj: model\.layers\.0.* and 7 more cannot be joined"),
    ):
        folder = tmp_path / f"{len(tensors)}"
        make_mixture(folder, "gptq")
        change(folder, **tensors)
        with pytest.raises(ValueError, match=why):
            convert_folder(folder, tmp_path / "out")
        with pytest.raises(RuntimeError):
            load(folder, quantization_config=AoConfig("as_stored"))
        assert not (tmp_path / "out").exists()


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_as_stored(kind, tmp_path):
    dense = make(tmp_path / "theirs", kind)
    model = load(tmp_path / "theirs", quantization_config=AoConfig("as_stored"))
    plain = dict(dense.named_parameters())
    packed_names = [n for n, p in model.named_parameters() if isinstance(p, QTensor)]
    assert packed_names == [n for n in plain if n.endswith("_proj.weight")]
    for name, p in model.named_parameters():
        assert torch.equal(p.dequantize() if isinstance(p, QTensor) else p, plain[name]), name
    if kind == "fp8":
        assert model.model.layers[0].mlp.up_proj.weight.spec == Float8("e4m3", (32, 32), act=Float8("e4m3", (1, 128)))
        return  # its activations are quantized
    with torch.no_grad():
        ours, theirs = model(hf_models.IDS).logits, dense(hf_models.IDS).logits
    assert ao.compute_error(theirs, ours) > 35
    words = model.generate(hf_models.IDS, max_new_tokens=8, do_sample=False)
    assert words.shape == (1, 18)
    model.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(hf_models.IDS).logits, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_convert(kind, tmp_path, capsys):
    dense = make(tmp_path / "theirs", kind)
    (tmp_path / "theirs" / "quantize_config.json").write_text("{}")
    (tmp_path / "theirs" / "LICENSE").write_text("theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    sizes = [sum(layer[key] for layer in told["layers"]) for key in ("bytes_before", "bytes_after")]
    assert len(told["layers"]) == 14 and sizes[1] < 1.03 * sizes[0]
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["LICENSE", "config.json", "model.safetensors"]
    rows = {row.name: row for row in inspect(tmp_path / "theirs")}
    assert set(rows) == {name for name, _ in dense.named_parameters()}
    told = rows["model.layers.0.mlp.up_proj.weight"]
    assert told.format.startswith(f"{kind}: ") and told.shape == (128, 64) and told.bits < 10
    model = load(tmp_path / "ours")
    for name, p in dense.named_parameters():
        mine = model.get_parameter(name)
        assert torch.equal(mine.dequantize() if isinstance(mine, QTensor) else mine, p), name


EXPORTED = {
    "int4": ("compressed-tensors", ao.Int4WeightOnlyConfig(group_size=32)),
    "int4-symmetric": ("compressed-tensors", Intx(4, (1, 32), symmetric=True, scale_dtype="bfloat16")),
    "int8": ("compressed-tensors", ao.Int8WeightOnlyConfig()),
    "int8-dynamic": ("compressed-tensors", ao.Int8DynamicActivationInt8WeightConfig()),
    "int3": ("compressed-tensors", Intx(3, (1, 32))),
    "float8": ("compressed-tensors", ao.Float8WeightOnlyConfig()),
    "float8-dynamic": ("compressed-tensors", ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())),
    "float8-dynamic-tensor": (
        "compressed-tensors",
        ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerTensor()),
    ),
    "nvfp4": ("compressed-tensors", ao.NVFP4WeightOnlyConfig()),
    "nvfp4-power-of-two": ("compressed-tensors", replace(NVFP4, scale_spec=Float8(block=(-1, -1), power_of_two=True))),
    "mxfp4": ("compressed-tensors", ao.MXFPWeightOnlyConfig()),
    "mxfp8": ("compressed-tensors", ao.MXFPWeightOnlyConfig("e4m3")),
    "gptq-int4": ("gptq", ao.Int4WeightOnlyConfig(group_size=32)),
    "gptq-int8": ("gptq", Intx(8, (1, 32))),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_export_and_back(name, tmp_path):
    """What is written reads as what it was."""
    form, config = EXPORTED[name]
    torch.manual_seed(0)
    hf_models.llama().bfloat16().save_pretrained(tmp_path / "plain")
    ours = load(tmp_path / "plain", quantization_config=AoConfig(config))
    ours.save_pretrained(tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", form, "--json"]) == 0
    told = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]
    assert told["quant_method"] == form
    again = load(tmp_path / "theirs", quantization_config=AoConfig("as_stored"))
    for key, p in ours.named_parameters():
        other = again.get_parameter(key)
        if not isinstance(p, QTensor):
            assert torch.equal(p, other)
        elif form == "gptq":  # whose scales are rounded
            assert torch.allclose(p.decode(), other.decode(), rtol=2**-10, atol=1e-7)
        elif name == "nvfp4" and (
            joined := re.search("(q|k|v|gate|up)_proj", key)
        ):  # whose scales are rounded once more
            assert ao.compute_error(p.decode(), other.decode()) > 28, joined
        elif name == "nvfp4":  # whose second scale is inverted
            assert torch.allclose(p.decode(), other.decode(), rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(p.decode(), other.decode()) and p.spec.act == other.spec.act


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-power-of-two"])
def test_layers_that_engines_join_share_their_second_scale(name, tmp_path):
    """An engine that makes one layer of q_proj, k_proj and v_proj takes one second scale, and multiplies all of them by it."""
    torch.manual_seed(0)
    plain = hf_models.llama()
    for layer in plain.model.layers:
        layer.self_attn.q_proj.weight.data *= 3
        layer.mlp.up_proj.weight.data.zero_()
    plain.save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", quantization_config=AoConfig(EXPORTED[name][1])).save_pretrained(tmp_path / "ours")
    report = export_folder(tmp_path / "ours", tmp_path / "theirs")
    assert len(report.notes) == 1 and "scales of 6 NVFP4 layers are rounded to float8" in report.notes[0]
    stored = load_file(tmp_path / "theirs/model.safetensors")
    seconds = {key: t for key, t in stored.items() if key.endswith("weight_global_scale")}
    assert len(seconds) == 14 and all(t.isfinite() for t in seconds.values())
    for layer in ("model.layers.0.", "model.layers.1."):
        for joined in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({float(seconds[f"{layer}{leaf}.weight_global_scale"]) for leaf in joined}) == 1
    own = seconds["model.layers.0.self_attn.o_proj.weight_global_scale"]
    assert own != seconds["model.layers.0.self_attn.q_proj.weight_global_scale"]


def test_codes_of_3_bits_are_packed_without_gaps(tmp_path):
    """As compressed-tensors has it since 0.18, and vLLM: 3 words for 32 of them."""
    hf_models.llama().save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", quantization_config=AoConfig(EXPORTED["int3"][1])).save_pretrained(tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs/model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight_packed"].shape == (64, 128 * 3 // 32)
    assert stored["model.layers.0.mlp.down_proj.weight_zero_point"].shape == (64 * 3 // 32, 128 // 32)
    told = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]
    assert told["version"] == "0.18.0"


def test_gptq_names_the_layers_that_stay_as_they_are(tmp_path):
    """In the words of GPTQModel, which would look for codes of all layers of a block."""
    hf_models.llama().save_pretrained(tmp_path / "plain")
    rules = ao.FqnToConfig({"re:.*layers.0.mlp.*": None, "_default": Intx(4, (1, 32))})
    load(tmp_path / "plain", quantization_config=AoConfig(rules)).save_pretrained(tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "theirs", "gptq")
    told = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]
    names = [f"model.layers.{i}.mlp.{leaf}_proj" for i in (0, 1) for leaf in ("gate", "up", "down")]
    left_out = [re.compile(rule.removeprefix("-:")) for rule in told["dynamic"]]
    assert [any(rule.match(name) for rule in left_out) for name in names] == [True] * 3 + [False] * 3
    again = load(tmp_path / "theirs", quantization_config=AoConfig("as_stored"))
    assert [isinstance(again.get_parameter(f"{name}.weight"), QTensor) for name in names] == [False] * 3 + [True] * 3


def test_compressed_tensors_reads_what_is_exported(tmp_path):
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    hf_models.llama().bfloat16().save_pretrained(tmp_path / "plain")
    for name in (
        "int4-symmetric",
        "int8",
        "float8",
    ):  # transformers cannot load zero points, also of that library's own
        ours = load(tmp_path / "plain", quantization_config=AoConfig(EXPORTED[name][1]))
        ours.save_pretrained(tmp_path / name)
        assert main(["export", str(tmp_path / name), str(tmp_path / f"{name}-theirs"), "--json"]) == 0
        theirs = load(tmp_path / f"{name}-theirs")
        with torch.no_grad():
            assert ao.compute_error(ours(hf_models.IDS).logits, theirs(hf_models.IDS).logits) > 30


@pytest.mark.parametrize("name", [name for name, (form, _) in EXPORTED.items() if form == "compressed-tensors"])
def test_compressed_tensors_decodes_what_is_exported(name, tmp_path):
    """Each weight, by the library's own decoder, is what ours is."""
    library = pytest.importorskip("compressed_tensors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    if name == "int3" and tuple(map(int, library.__version__.split(".")[:2])) < (0, 18):
        pytest.skip("compressed-tensors packs 3 bits in another way since 0.18")
    torch.manual_seed(0)
    hf_models.llama(num_hidden_layers=1).bfloat16().save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", quantization_config=AoConfig(EXPORTED[name][1])).save_pretrained(tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "theirs")
    again = load(tmp_path / "theirs", quantization_config=AoConfig("as_stored"))  # NVFP4's scales are rounded in export
    told = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]
    (group,) = quantization.QuantizationConfig.model_validate(told).config_groups.values()
    decoder = library.BaseCompressor.get_value_from_registry(group.format)
    stored = load_file(tmp_path / "theirs/model.safetensors")
    quantized = {key: p for key, p in again.named_parameters() if isinstance(p, QTensor)}
    assert len(quantized) == 7
    for key, p in quantized.items():
        module = key.removesuffix("weight")
        parts = {name.removeprefix(module): t for name, t in stored.items() if name.startswith(module)}
        got = decoder.decompress(parts, group)["weight"]
        rounding = 2**-7 if name.startswith("nvfp4") else 0  # of its scales, to bfloat16
        assert torch.allclose(got, p.decode(got.dtype), rtol=rounding, atol=0), key


def test_export_refuses(tmp_path):
    hf_models.llama().save_pretrained(tmp_path / "plain")
    rules = ao.FqnToConfig(
        {"model.layers.0.mlp.up_proj": ao.NF4WeightOnlyConfig(), "_default": ao.Int8WeightOnlyConfig()}
    )
    load(tmp_path / "plain", quantization_config=AoConfig(rules)).save_pretrained(tmp_path / "ours")
    for form, why in (
        ("compressed-tensors", r"layers.0.mlp.up_proj.weight: NF4 has no form in compressed-tensors"),
        ("gptq", r"layers.0.mlp.up_proj.weight: NF4 has no form in GPTQ"),
        ("awq", "form must be one of compressed-tensors, gptq, got 'awq'"),
    ):
        with pytest.raises(ValueError, match=why):
            export_folder(tmp_path / "ours", tmp_path / "out", form)
    with pytest.raises(ValueError, match="no folder that ao has quantized"):
        export_folder(tmp_path / "plain", tmp_path / "out")
    rules = ao.FqnToConfig({"model.layers.0.mlp.up_proj": Intx(4, (1, 32)), "_default": Intx(8, (1, 32))})
    load(tmp_path / "plain", quantization_config=AoConfig(rules)).save_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match="differ in bits or groups"):
        export_folder(tmp_path / "mixed", tmp_path / "out", "gptq")
    export_folder(tmp_path / "mixed", tmp_path / "out")
    again = load(tmp_path / "out", quantization_config=AoConfig("as_stored"))
    assert {p.spec.bits for p in again.parameters() if isinstance(p, QTensor)} == {4, 8}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            ao.Int4WeightOnlyConfig(group_size=32, algorithm="gptq"),
            "zero points are fractions; quantize with whole ones",
        ),
        (
            ao.SpecConfig(Intx(4, (1, 32), symmetric=True), algorithm="awq"),
            "its recipe scales the channels of the input",
        ),
        (ao.Int8StaticActivationInt8WeightConfig(), "its activations have a static scale"),
        (ao.NVFP4DynamicActivationNVFP4WeightConfig(), "with activations of NVFP4; its weights alone are exported"),
    ],
)
def test_what_recipes_leave_beside_the_codes_is_not_lost(tmp_path, config, why):
    """These have no place in the form: written without them, the model would compute something else."""
    model = hf_models.llama()
    ao.quantize_(model, config, calibration_data=[hf_models.IDS])
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=f"layers.0.*{why}"):
        export_folder(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compiled_as_eager(tmp_path):
    make(tmp_path / "theirs", "gptq")
    part = load(tmp_path / "theirs", quantization_config=AoConfig("as_stored")).model.layers[0].mlp
    x = torch.randn(1, 3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert ao.compute_error(part(x), torch.compile(part, fullgraph=True)(x)) > 35


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Put tensors in place of others, or take them out."""
    stored = load_file(folder / "model.safetensors")
    for name, t in tensors.items():
        stored.pop(name, None)
        if t is not None:
            stored[name] = t
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def test_bad_folders_leave_nothing(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    make(theirs, "gptq")
    name = "model.layers.1.mlp.up_proj"
    good = load_file(theirs / "model.safetensors")
    for tensors, why in (
        ({f"{name}.scales": None}, rf"{name}.weight: cannot read its gptq tensors .*'scales'"),
        ({f"{name}.scales": torch.ones(3, 5)}, "scales of shape"),
        ({f"{name}.qweight": good[f"{name}.qweight"][:4].contiguous()}, "up_proj.weight: cannot read"),
    ):
        save_file(good, theirs / "model.safetensors", metadata={"format": "pt"})
        change(theirs, **tensors)
        with pytest.raises(ValueError, match=why):
            convert_folder(theirs, ours)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]
        with pytest.raises(RuntimeError):
            load(theirs, quantization_config=AoConfig("as_stored"))
    (theirs / "model.safetensors").write_bytes((theirs / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is cut short"):
        convert_folder(theirs, ours)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


def test_what_is_not_for_it(tmp_path):
    hf_models.llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="is not quantized; use `ao quantize`"):
        convert_folder(tmp_path / "plain", tmp_path / "out")
    with pytest.raises(ValueError, match="'as_stored' is for checkpoints that another library has quantized"):
        load(tmp_path / "plain", quantization_config=AoConfig("as_stored"))
    make(tmp_path / "theirs", "gptq")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config["quantization_config"]["quant_method"] = "aqlm"
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="and this one is of 'aqlm'"):
        convert_folder(tmp_path / "theirs", tmp_path / "out")
    stored = load_file(tmp_path / "theirs/model.safetensors")
    (tmp_path / "theirs/model.safetensors").unlink()
    torch.save(stored, tmp_path / "theirs/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is no safetensors file, and ao reads no others"):
        load(tmp_path / "theirs", quantization_config=AoConfig("as_stored"))
    with pytest.raises(FileNotFoundError, match="which is a pickle, and ao reads none"):
        convert_folder(tmp_path / "theirs", tmp_path / "out")
    load(tmp_path / "plain", quantization_config=AoConfig(Intx(8))).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="a folder of ao's already"):
        convert_folder(tmp_path / "ours", tmp_path / "out")
    assert isinstance(
        load(tmp_path / "ours", quantization_config=AoConfig("as_stored")).model.layers[0].mlp.up_proj.weight, QTensor
    )


def test_gguf_file(tmp_path, capsys):
    """A file of two types: rows of attention in llama.cpp's order come back, and one type is stored decoded."""
    gguf = pytest.importorskip("gguf")
    model = hf_models.llama(hidden_size=256, intermediate_size=256, num_key_value_heads=2, head_dim=64)
    path = tmp_path / "model.gguf"
    write_gguf(gguf, path, model, {"ffn_down": "TQ2_0"})
    assert main(["convert", str(path), str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["layers"]) == 13 and "stored decoded, in bfloat16: TQ2_0: blk.0.ffn_down.weight" in told["notes"][0]
    theirs = load(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ours = load(tmp_path / "out")
    direct = load(tmp_path, gguf_file=path.name, quantization_config=AoConfig("as_stored"))
    assert "TQ2_0: blk.0.ffn_down.weight" in direct.hf_quantizer.report.notes[0]
    for name, p in theirs.named_parameters():
        for mine in (ours.get_parameter(name), direct.get_parameter(name)):
            assert torch.equal(mine.decode(), p) if isinstance(mine, QTensor) else torch.equal(mine, p.bfloat16()), name
    assert torch.equal(ours(hf_models.IDS).logits, direct(hf_models.IDS).logits)
    direct.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(hf_models.IDS).logits, direct(hf_models.IDS).logits)
    with pytest.raises(ValueError, match="a GGUF file is quantized already"):
        load(tmp_path, gguf_file=path.name, quantization_config=AoConfig("int4"))


def test_bad_gguf_files(tmp_path):
    gguf = pytest.importorskip("gguf")
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    model = hf_models.llama(hidden_size=256, intermediate_size=256, num_key_value_heads=2, head_dim=64)
    write_gguf(gguf, good, model, {})
    octets = good.read_bytes()
    model.config.intermediate_size = 512
    write_gguf(gguf, tmp_path / "other.gguf", model, {})
    for content, why in (
        (octets[:-1000], "is cut short"),
        (octets[:100], "is no GGUF file, or is cut short"),
        (b"GGML" + octets[4:], "is no GGUF file"),
        ((tmp_path / "other.gguf").read_bytes(), r"blk\.0\.ffn_gate\.weight is of shape \(256, 256\)"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=why):
            convert_gguf(bad, tmp_path / "out")
        with pytest.raises(Exception):  # noqa: B017  of transformers, which reads the config first
            load(tmp_path, gguf_file="bad.gguf", quantization_config=AoConfig("as_stored"))
        assert not (tmp_path / "out").exists()


def write_gguf(gguf: Any, path: Path, model: nn.Module, kinds: dict[str, str]) -> None:
    """The model as llama.cpp has it: Q4_0, or `kinds` by part."""
    c: Any = model.config
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("tiny")
    for add, value in (
        (w.add_block_count, c.num_hidden_layers), (w.add_context_length, 128), (w.add_embedding_length, c.hidden_size),
        (w.add_feed_forward_length, c.intermediate_size), (w.add_head_count, c.num_attention_heads),
        (w.add_head_count_kv, c.num_key_value_heads), (w.add_layer_norm_rms_eps, c.rms_norm_eps),
        (w.add_rope_freq_base, 10000.0), (w.add_vocab_size, c.vocab_size), (w.add_rope_dimension_count, c.head_dim),
        (w.add_key_length, c.head_dim), (w.add_value_length, c.head_dim),
    ):  # fmt: skip
        add(value)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"w{i}" for i in range(c.vocab_size)])
    w.add_token_scores([0.0] * c.vocab_size)
    w.add_token_types([1] * c.vocab_size)
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for i in range(c.num_hidden_layers):
        names |= {f"model.layers.{i}.{a}.weight": f"blk.{i}.{b}.weight" for a, b in parts.items()}
    for name, p in model.named_parameters():
        t = p.detach().float()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            t = t.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        array = t.contiguous().numpy()
        if array.ndim == 1:
            w.add_tensor(names[name], array)
            continue
        kind = next((k for part, k in kinds.items() if part in names[name]), "Q4_0")
        form = gguf.GGMLQuantizationType[kind]
        w.add_tensor(names[name], gguf.quantize(array, form), raw_dtype=form)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
