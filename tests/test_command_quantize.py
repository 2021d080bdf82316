"""`ao quantize` with recipes, in memory, and what it measures."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch

transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402

import ao  # noqa: E402
from ao.integrations.command_line import format_names, quantize_command  # noqa: E402
from ao.integrations.command_line.program import main  # noqa: E402
from ao.integrations.folder_quantizer import quantize_folder, quantize_folder_in_memory  # noqa: E402
from ao.integrations.html_report import Measure  # noqa: E402
from ao.integrations.model_folder import calibration_batches, load_model  # noqa: E402
from ao.integrations.transformers import AoConfig  # noqa: E402
from ao.quant.config import RECIPES  # noqa: E402

INT3 = ao.Intx(3, (1, 32))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    hf_models.llama(tie_word_embeddings=False, num_hidden_layers=1).bfloat16().save_pretrained(
        folder, max_shard_size="100KB"
    )
    hf_models.add_words(folder)
    return folder


@pytest.fixture(scope="module")
def batches(source):
    texts = json.loads((source / "texts.json").read_text())
    return calibration_batches(source, texts, 16, 4)


def logits(model):
    with torch.no_grad():
        return model(hf_models.IDS).logits


def command(source, out, *words):
    return main(["quantize", str(source), str(out), *map(str, words)])


def test_hqq_needs_no_data_and_streams(source, tmp_path, capsys):
    assert (
        command(source, tmp_path / "out", "--config", "Intx(bits=3, block=(1, 32))", "--recipe", "hqq", "--json") == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert {row["algorithm"] for row in printed["layers"]} == {"hqq"} and len(printed["layers"]) == 7
    ours = load_model(tmp_path / "out")
    theirs = load_model(source)
    ao.quantize_(
        theirs, ao.SpecConfig(INT3, algorithm="hqq"), lambda m, name: ao.is_linear(m, name) and name != "lm_head"
    )
    loaded = load_model(source, ao.SpecConfig(INT3, algorithm="hqq"))
    for name, p in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), p) and torch.equal(loaded.get_parameter(name), p), name
    plain = load_model(source, INT3).model.layers[0].mlp.up_proj.weight
    assert not torch.equal(plain, ours.model.layers[0].mlp.up_proj.weight)
    stored = AoConfig.from_dict(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    assert stored.quant_type.algorithm == "hqq" and stored.modules_to_not_convert == ["lm_head"]


@pytest.mark.parametrize("recipe", ["gptq", "awq+gptq", "smoothquant", "bias_correction"])
def test_recipes_with_data(recipe, source, batches, tmp_path):
    """The folder holds, bit for bit, what `quantize_` makes of the model."""
    config = ao.SpecConfig(INT3, algorithm=recipe)
    if recipe == "smoothquant":
        config = ao.Int8DynamicActivationInt8WeightConfig(algorithm=recipe)
    report = quantize_folder_in_memory(
        source, tmp_path / "out", config, calibration_data=batches, max_shard_bytes=20_000
    )
    assert len(report) == 7 and {row.algorithm for row in report.rows} == {recipe}
    assert report.skipped.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "model.safetensors.index.json", "config.json"} <= names
    expected = load_model(source)
    ao.quantize_(expected, config, lambda m, n: ao.is_linear(m, n) and n != "lm_head", calibration_data=batches)
    made = load_model(tmp_path / "out")
    assert torch.equal(logits(made), logits(expected))
    made.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(expected))
    if recipe == "bias_correction":
        assert made.model.layers[0].mlp.up_proj.bias.abs().max() > 0


def test_the_command_calibrates(source, tmp_path, capsys):
    page = tmp_path / "report.html"
    words = [
        "--config",
        "int4-g32",
        "--recipe",
        "gptq",
        "--data",
        source / "texts.json",
        "--window",
        16,
        "--samples",
        3,
    ]
    assert command(source, tmp_path / "out", *words, "--text", source / "text.txt", "--report", page, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    checkpoint, perplexity = printed["measures"]
    assert checkpoint["before"] > checkpoint["after"] and perplexity["name"] == "perplexity"
    assert main(["eval", str(tmp_path / "out"), "--text", str(source / "text.txt"), "--window", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["perplexity"] == perplexity["after"] != perplexity["before"]
    data = json.loads(re.search(r'id="data">(.*)</script>', page.read_text())[1])
    assert [m["name"] for m in data["measures"]] == ["checkpoint", "perplexity"] and len(data["layers"]) == 7
    assert data["subtitle"].startswith("Intx(bits=4") and data["subtitle"].endswith(", gptq")
    assert data["facts"] == {
        "calibration": "3 windows of at most 16 tokens",
        "perplexity": "28 tokens, in windows of 16",
    }
    assert all(layer["sqnr"] > 10 for layer in data["layers"])


def test_experts_are_joined_in_memory(tmp_path):
    """A mixture's checkpoint has its experts apart, and transformers joins them."""
    torch.manual_seed(0)
    hf_models.mixtral().bfloat16().save_pretrained(tmp_path / "mixtral")
    config = ao.FqnToConfig({"re:.*experts.*": ao.Intx(4, (1, 32)), "_default": ao.Int8WeightOnlyConfig()})
    with pytest.raises(ValueError, match="transformers renames or joins some .* use --in-memory"):
        quantize_folder(tmp_path / "mixtral", tmp_path / "out", config)
    seen = {}
    quantize_folder_in_memory(
        tmp_path / "mixtral", tmp_path / "out", config, watch=lambda n, w, q: seen.update({n: (w, q)})
    )
    model = load_model(tmp_path / "out")
    assert torch.equal(logits(model), logits(load_model(tmp_path / "mixtral", config)))
    name = "model.layers.0.mlp.experts.down_proj"
    w, q = seen[name]
    assert type(w) is torch.Tensor and w.shape == q.shape == (4, 64, 128)
    assert torch.equal(model.get_parameter(name), q)


def test_a_tied_head_in_memory(tmp_path):
    torch.manual_seed(0)
    hf_models.llama().bfloat16().save_pretrained(tmp_path / "tied")
    quantize_folder_in_memory(tmp_path / "tied", tmp_path / "out", ao.Intx(8), include_embedding=True)
    model = load_model(tmp_path / "out")
    assert isinstance(model.lm_head.weight, ao.QTensor) and model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(
        logits(model),
        logits(
            transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "tied", quantization_config=AoConfig(ao.Intx(8), include_embedding=True)
            )
        ),
    )


def test_refusals(source, batches, tmp_path, capsys):
    data = ["--data", source / "texts.json"]
    for words, reason in (
        (["--config", "int8", "--recipe", "gptq"], "--recipe gptq needs texts to calibrate on; give --data FILE"),
        (["--config", "Int8StaticActivationInt8WeightConfig()"], "needs texts to calibrate on"),
        (["--config", "int8", "--recipe", "gtpq"], "--recipe must be among awq, bias_correction, clip, gptq, hqq"),
        (["--config", "int8", "--recipe", "gptq+awq", *data], "must come last"),
        (["--config", "int8", "--recipe", "hqq", *data], "--data is for recipes that calibrate"),
        (["--config", "int8", "--recipe", "gptq", "--data", tmp_path / "absent"], "absent"),
        (["--config", "bf16"], "quantizes nothing"),
        (["--config", "Intx(4, (1, 48))", "--recipe", "gptq", *data], "block 48"),
        (["--config", "int8", "--include-embedding", "--recipe", "gptq", *data], "use algorithm='hqq' for it"),
    ):
        late = "block 48" in reason or "algorithm='hqq'" in reason  # of the model, which is read by then
        assert command(source, tmp_path / "out", *words) == (1 if late else 2)
        assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    for word in ("0", "some"):
        with pytest.raises(SystemExit):
            command(source, tmp_path / "out", "--config", "int8", "--samples", word)
    with pytest.raises(ValueError, match="needs calibration_data"):
        quantize_folder_in_memory(source, tmp_path / "out", ao.SpecConfig(INT3, algorithm="gptq"))
    for config in (ao.SpecConfig(INT3, algorithm="gptq"), ao.Int8StaticActivationInt8WeightConfig()):
        with pytest.raises(ValueError, match="needs calibration, and a model that loads has no data; run `ao quantize"):
            load_model(source, config)


def test_a_failure_while_saving_leaves_nothing(source, batches, tmp_path, monkeypatch):
    config = ao.SpecConfig(INT3, algorithm="gptq")
    rename = os.rename

    def fails(a, b):
        if b == tmp_path / "out":
            raise OSError("no space left on device")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no space"):
        quantize_folder_in_memory(source, tmp_path / "out", config, calibration_data=batches)
    assert list(tmp_path.iterdir()) == []


def test_static_activations_are_calibrated(source, batches, tmp_path):
    config = ao.Int8StaticActivationInt8WeightConfig()
    assert quantize_command.needs_data(config) and not quantize_command.needs_data(ao.Intx(8))
    quantize_folder_in_memory(source, tmp_path / "out", config, calibration_data=batches)
    weight = load_model(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    assert weight.act_scale > 0


def test_windows_are_spread_over_the_texts(source):
    texts = [" ".join([f"w{i}"] * 8) for i in range(10)]
    found = calibration_batches(source, texts, 8, 5)
    assert [batch["input_ids"][0, 0].item() for batch in found] == [0, 2, 4, 6, 8]
    assert all(batch["use_cache"] is False for batch in found)


def test_recipe_names_are_those_of_the_library():
    assert tuple(cls.name for cls in RECIPES) == format_names.RECIPES
    rules = ao.FqnToConfig({"a": ao.NF4, "b": None, "_default": ao.Int8WeightOnlyConfig()})
    made = quantize_command.with_recipe(rules, "awq+gptq").fqn_to_config
    assert made["a"] == ao.SpecConfig(ao.NF4, algorithm="awq+gptq") and made["b"] is None
    assert made["_default"].recipe.label == "awq+gptq"


def test_latency_of_the_largest_layers(source, tmp_path, capsys, monkeypatch):
    from ao.integrations import layer_latency

    asked = []

    def time_products(product, rows, variants, compiler, model_bytes):
        asked.append((product.out_features, product.in_features, product.tokens))
        assert rows.shape == (product.tokens, product.in_features) and rows.dtype == torch.bfloat16
        assert not isinstance(variants["before"](), ao.QTensor) and isinstance(variants["after"](), ao.QTensor)
        return {"before": 2e-6, "after": "no compiler" if product.tokens == 4 else 1e-6}

    monkeypatch.setattr(layer_latency, "time_products", time_products)
    assert command(source, tmp_path / "out", "--config", "int8", "--latency", 1, 4) == 0
    assert asked[:2] == [(128, 64, 1), (128, 64, 4)] and (64, 128, 1) in asked and len(asked) == 8
    printed = capsys.readouterr().out
    assert (
        "128 x 64, 1 token: 2 µs before, 1 µs after" in printed and "128 x 64, 4 tokens, after: no compiler" in printed
    )


@pytest.mark.slow
def test_latency_is_measured():
    from ao.integrations.layer_latency import layer_latencies

    weight = torch.randn(256, 512)
    measures, notes = layer_latencies([(weight, ao.Intx(8).quantize(weight))], [1])
    assert notes == [] and measures == [Measure("256 x 512, 1 token", measures[0].before, measures[0].after, "µs")]
    assert 0 < measures[0].after < 1e6 and 0 < measures[0].before < 1e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["hqq", "gptq", "awq+gptq"])
def test_on_a_gpu(recipe, source, tmp_path):
    """Quantized there, stored for everywhere."""
    data = ["--data", source / "texts.json", "--window", 16] if recipe != "hqq" else []
    words = ["--config", "int4-g32", "--recipe", recipe, *data, "--text", source / "text.txt", "--latency", 1]
    assert command(source, tmp_path / "gpu", *words, "--device", "cuda", "--report", tmp_path / "r.html") == 0
    assert command(source, tmp_path / "cpu", *words[:4], *data) == 0
    measures = json.loads(re.search(r'id="data">(.*)</script>', (tmp_path / "r.html").read_text())[1])["measures"]
    assert len(measures) > 3 and all(measure["after"] > 0 for measure in measures)
    model = load_model(tmp_path / "gpu", device="cuda")
    with torch.no_grad():
        made = model(hf_models.IDS.cuda()).logits.cpu()
    assert (
        ao.compute_error(logits(load_model(source)), made)
        > ao.compute_error(logits(load_model(source)), logits(load_model(tmp_path / "cpu"))) - 3
    )


def test_a_disk_that_fills_up_is_told_in_one_line(source, tmp_path, monkeypatch, capsys):
    import safetensors.torch

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "serialize_file", full)
    assert command(source, tmp_path / "out", "--config", "int8") == 1
    assert "cannot be written: No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
