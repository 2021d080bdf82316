"""Sparse weights in folders of transformers and on the command line."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402

import ao  # noqa: E402
from ao.dtypes import Float8, Intx, MarlinSparseLayout, Sparse24  # noqa: E402
from ao.integrations.command_line.program import main  # noqa: E402
from ao.integrations.model_folder import load_model  # noqa: E402
from ao.integrations.transformers import AoConfig  # noqa: E402
from ao.quant.sparse_presets import two_of_four  # noqa: E402
from ao.sparsity import prune_  # noqa: E402

CONFIG = ao.Int4WeightOnlyConfig(group_size=-1, layout=MarlinSparseLayout())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    hf_models.llama(tie_word_embeddings=False, num_hidden_layers=1).bfloat16().save_pretrained(folder)
    hf_models.add_words(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(hf_models.IDS).logits


def test_a_pruned_checkpoint_loads_saves_and_loads_again(source, tmp_path):
    model = load_model(source)
    prune_(model)
    model.save_pretrained(tmp_path / "pruned")
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "pruned", quantization_config=AoConfig(CONFIG))
    assert loaded.model.layers[0].mlp.up_proj.weight.spec == Sparse24(
        Intx(4, (1, -1), symmetric=True, scale_dtype="bfloat16")
    )
    loaded.save_pretrained(tmp_path / "sparse")
    again = auto.from_pretrained(tmp_path / "sparse")
    for name, p in loaded.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    assert torch.equal(logits(loaded), logits(again)) and ao.compute_error(logits(model), logits(again)) > 12
    with pytest.raises(RuntimeError):  # the loader's, which shows in its report how many groups of four are not 2:4
        auto.from_pretrained(source, quantization_config=AoConfig(CONFIG))


@pytest.mark.parametrize("recipe", ["magnitude", "sparsegpt"])
def test_the_command(recipe, source, tmp_path, capsys):
    words = ["--recipe", recipe, "--data", str(source / "texts.json"), "--window", "16", "--samples", "4"]
    words = words if recipe == "sparsegpt" else []
    config = "Int4WeightOnlyConfig(group_size=-1)"
    command = [
        "quantize",
        str(source),
        str(tmp_path / "out"),
        "--config",
        config,
        "--sparsity",
        "2:4",
        "--json",
        *words,
    ]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["algorithm"] for row in printed["layers"]} == {recipe}
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "Sparse24(values=Intx(bits=4" in capsys.readouterr().out
    weight = load_model(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    assert isinstance(weight.spec, Sparse24) and float((weight.dequantize() == 0).float().mean()) >= 0.5


def test_what_the_command_refuses(source, tmp_path, capsys):
    start = ["quantize", str(source), str(tmp_path / "out"), "--config", "int8"]
    for words, message in (
        (["--recipe", "wanda"], "say how with --sparsity"),
        (["--sparsity", "2:4", "--recipe", "sparsegpt"], "needs texts"),
    ):
        assert main([*start, *words]) != 0
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_of_four_of_any_config():
    assert two_of_four(None).weight((64, 64)) == Sparse24()
    assert two_of_four(ao.NF4).weight((64, 64)) == Sparse24(ao.NF4)
    assert two_of_four(Float8(act=Float8())).weight((64, 64)) == Sparse24(Float8(), act=Float8())
    assert two_of_four(ao.Int4WeightOnlyConfig()).layout == MarlinSparseLayout()
    for config in (ao.Int4WeightOnlyConfig(group_size=32), ao.Int8DynamicActivationInt4WeightConfig()):
        made = two_of_four(config).weight((64, 64))
        assert made == Sparse24(config.weight((64, 64)), act=config.act())
    with pytest.raises(ValueError, match="static activations"):
        two_of_four(ao.Int8StaticActivationInt8WeightConfig(scale=1.0))
