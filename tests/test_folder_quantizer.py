"""`ao quantize`: a model folder, shard by shard, equal to what `from_pretrained` quantizes, there whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402

import ao  # noqa: E402
from ao.integrations.command_line.program import main  # noqa: E402
from ao.integrations.command_line.quantize_command import size  # noqa: E402
from ao.integrations.folder_quantizer import quantize_folder, quantize_folder_in_memory  # noqa: E402
from ao.integrations.transformers import AoConfig  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("old")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_equals_what_from_pretrained_quantizes(source, tmp_path):
    before = contents(source)
    config = ao.FqnToConfig({"re:.*mlp.*": ao.Intx(3, (1, 32)), "_default": ao.Int8WeightOnlyConfig()})
    seen = []
    report = quantize_folder(
        source, tmp_path / "out", config, max_shard_bytes=30_000, watch=lambda *each: seen.append(each)
    )
    assert contents(source) == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names and "pytorch_model.bin" not in names and len(names) > 5
    assert [name for name, _, _ in seen] == [row.name for row in report.rows] and len(report) == 14
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=AoConfig(config))
    assert isinstance(ours.model.layers[1].mlp.up_proj.weight, ao.QTensor)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    for name, t in theirs.state_dict().items():
        assert torch.equal(t, ours.state_dict()[name]), name


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_is_not_weights_is_copied(in_memory, source, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(source, model)
    kept = {
        "1_Pooling/config.json": "pooling",
        "2_Dense/model.safetensors": "a part of the model",
        "2_Dense/deeper/config.json": "dense",
        "code/nested/module.py": "code",
        "LICENSE": "licence",
    }
    left_out = (
        "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.bin", "original/nested/consolidated.00.pth",
        ".cache/huggingface/state", "model.Q4_K_M.gguf", "tf_model.h5", "onnx_model.onnx_data", "openvino_model.xml",
    )  # fmt: skip
    for name, text in {**kept, **dict.fromkeys(left_out, "another form")}.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)
    modules = [{"idx": i, "name": str(i), "path": path} for i, path in enumerate(["", "1_Pooling", "2_Dense"])]
    (model / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file.txt").write_text("linked")
    (model / "link").symlink_to(tmp_path / "elsewhere")
    (model / "linked.txt").symlink_to(tmp_path / "elsewhere" / "file.txt")
    quantize = quantize_folder_in_memory if in_memory else quantize_folder
    quantize(model, tmp_path / "out", ao.Intx(8))
    found = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert all(found[name].read_text() == text for name, text in kept.items())
    assert found["link/file.txt"].read_text() == found["linked.txt"].read_text() == "linked"
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert not found.keys() & {*left_out, "pytorch_model.bin"}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").is_quantized


def test_a_model_without_its_head(tmp_path):
    """The file of a bare model, whose names lack the prefix, under the config of one with a head."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path / "bare")
    data = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps({**data, "architectures": ["LlamaForCausalLM"]}))
    quantize_folder(tmp_path / "bare", tmp_path / "out", ao.Intx(4, (1, 32)), include_embedding=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.lm_head.weight, ao.QTensor) and model.lm_head.weight is model.model.embed_tokens.weight


def test_refusals_leave_nothing_behind(source, tmp_path):
    (tmp_path / "there").mkdir()
    for folder, out, config, error, reason in (
        (tmp_path / "absent", "out", ao.NF4, FileNotFoundError, "has no config.json"),
        (source, "there", ao.NF4, FileExistsError, "exists already"),
        (source, "out", ao.Intx(4, (1, 48)), ValueError, "block 48"),
        (source, "out", ao.FqnToConfig({"model.layers.7": ao.NF4}), ValueError, "matches no layer"),
    ):
        with pytest.raises(error, match=reason):
            quantize_folder(folder, tmp_path / out, config)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    quantize_folder(source, tmp_path / "out", ao.Intx(8))
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_folder(tmp_path / "out", tmp_path / "again", ao.Intx(8))


def test_not_a_number_is_refused(source, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bad"
    folder.mkdir()
    for name, data in contents(source).items():
        (folder / name).write_bytes(data)
    name = "model.layers.1.mlp.down_proj.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}: the weight has NaN"):
        quantize_folder(folder, tmp_path / "out", ao.Intx(8))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


KILLED = """
import os, signal, sys
from pathlib import Path
import ao
from ao.integrations import folder_quantizer
source, out = Path(sys.argv[1]), Path(sys.argv[2])
moments = 21 + 2  # tensors, and before and after the end

def die(): os.kill(os.getpid(), signal.SIGKILL)

for moment in range(moments):
    child = os.fork()
    if child == 0:
        left = moment
        def tick(*_):
            global left
            left -= 1
            if left < 0: die()
        rename = os.rename
        def at_the_end(*args):
            last = args[1] == out
            if last and moment == moments - 2: die()
            rename(*args)
            if last and moment == moments - 1: die()
        os.rename = at_the_end
        folder_quantizer.quantize_folder(
            source, out, ao.Intx(8), max_shard_bytes=20_000, progress=tick if moment < moments - 2 else None
        )
        os._exit(7)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
    assert out.exists() == (moment == moments - 1), moment
print("whole")
"""


def test_killed_at_any_moment(source, tmp_path):
    before, out = contents(source), tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", KILLED, source, out], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "whole\n", run.stderr
    assert contents(source) == before
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model.model.layers[1].mlp.up_proj.weight, ao.QTensor)
    assert len(list(tmp_path.iterdir())) > 1  # what killed runs left
    ao_out = tmp_path / "out2"
    out.rename(ao_out)
    quantize_folder(source, out, ao.Intx(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out2"]


def test_the_command(source, tmp_path, capsys):
    out, page = tmp_path / "out", tmp_path / "report.html"
    words = [
        "quantize",
        str(source),
        str(out),
        "--config",
        "int8",
        "--report",
        str(page),
        "--json",
        "--shard-size",
        "1MB",
    ]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["layers"]) == 14 and "lm_head.weight" in printed["skipped"]
    assert printed["bytes_after"] == (out / "model.safetensors").stat().st_size
    assert "layers.1.mlp.up_proj" in page.read_text()
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
    assert main(["quantize", str(source), str(tmp_path / "x"), "--config", "bf16"]) == 2
    assert main(["inspect", str(out), "--summary"]) == 0 and "uint8" not in capsys.readouterr().out


def test_sizes():
    assert (size("2GB"), size("500MiB"), size("1.5 kB"), size("77")) == (2 * 10**9, 500 * 2**20, 1500, 77)


@pytest.fixture(scope="module")
def language_model(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    for name, data in contents(source).items():
        (folder / name).write_bytes(data)
    hf_models.add_words(folder)
    return folder


def test_eval(language_model, capsys):
    words = ["eval", str(language_model), "--text", str(language_model / "texts.json"), "--window", "16"]
    assert main([*words, "--configs", "bf16", "int8", "Intx(bits=2, block=(1, 32))", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model)
    losses = []
    for start in (0, 16):
        ids = torch.tensor([[(7 * i * i) % 96 for i in range(30)][start : start + 16]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert (
        main(["eval", str(language_model), "--text", str(language_model / "text.txt"), "--window", "16", "--json"]) == 0
    )
    (stored,) = json.loads(capsys.readouterr().out)
    assert stored["tokens"] == 28 and stored["perplexity"] == pytest.approx(
        torch.cat(losses).mean().exp().item(), rel=1e-5
    )
    assert [row["tokens"] for row in rows] == [84] * 3 and rows[0]["perplexity"] != rows[2]["perplexity"]
    assert rows[0]["bytes"] > rows[1]["bytes"] > rows[2]["bytes"]
    (language_model / "broken.json").write_text('{"not": "a list"}')
    assert main(["eval", str(language_model), "--text", str(language_model / "broken.json")]) == 2
    assert "must hold a JSON list" in capsys.readouterr().err


def test_bench(language_model, capsys):
    words = ["bench", str(language_model), "--configs", "bf16", "int8", "--tokens", "1", "3", "--runs", "2", "--eager"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["format"], row["tokens"]) for row in rows] == [("bf16", 1), ("bf16", 3), ("int8", 1), ("int8", 3)]
    assert all(row["ms"] > 0 for row in rows)
    assert main(words) == 0 and "3 tokens, ms" in capsys.readouterr().out


@pytest.mark.slow
def test_autoquant(language_model, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    assert main(["autoquant", str(language_model), "--plan", str(plan), "--tokens", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == str(plan)
    assert isinstance(ao.load_plan(plan), ao.FqnToConfig)
