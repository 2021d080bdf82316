"""push_to_hub and `cache_implementation` of transformers with quantized models, without a network."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import ao

transformers = pytest.importorskip("transformers", reason="needs transformers")

import hf_models  # noqa: E402
import huggingface_hub  # noqa: E402
from hf_models import IDS  # noqa: E402
from huggingface_hub.errors import EntryNotFoundError  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers.utils import hub  # noqa: E402

from ao.integrations.transformers import AoConfig  # noqa: E402
from ao.integrations.transformers_cache import AoQuantizedLayer, is_ours  # noqa: E402


class Hub(huggingface_hub.HfApi):
    """Takes what would be sent."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.commits = folder, []

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, commit_message, **kwargs):
        self.commits.append((repo_id, commit_message))
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.folder / operation.path_in_repo)
        return f"https://hub/{repo_id}"


@pytest.fixture
def sent(tmp_path, monkeypatch):
    def no_card(*args, **kwargs):
        raise EntryNotFoundError("there is none")

    folder = tmp_path / "sent"
    folder.mkdir()
    api = Hub(folder)
    monkeypatch.setattr(hub, "_hf_api", api)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    return api


def quantized(how, tmp_path):
    hf_models.llama(num_hidden_layers=1).save_pretrained(tmp_path / "plain")
    if how == "loaded":
        config = AoConfig("int4-g32")
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    ao.quantize_(model, "int4-g32", lambda m, name: ao.is_linear(m, name) and name != "lm_head")
    return model


@pytest.mark.parametrize("how", ["loaded", "in place"])
def test_push_to_hub(how, sent, tmp_path):
    model = quantized(how, tmp_path)
    assert model.push_to_hub("somebody/llama-int4", tags=["ao"]) == "https://hub/somebody/llama-int4"
    assert len(sent.commits) == 1 and sent.commits[0][0] == "somebody/llama-int4"
    files = {path.name for path in sent.folder.iterdir()}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    saved = json.loads((sent.folder / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "ao"
    with safe_open(sent.folder / "model.safetensors", framework="pt") as opened:
        held = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    assert "U8" in held
    assert "- ao" in (sent.folder / "README.md").read_text()
    again = transformers.LlamaForCausalLM.from_pretrained(sent.folder)
    assert torch.equal(hf_models.output("llama", again), hf_models.output("llama", model))


def test_push_in_shards(sent, tmp_path):
    quantized("loaded", tmp_path).push_to_hub("somebody/llama-int4", max_shard_size="20KB")
    names = {path.name for path in sent.folder.iterdir()}
    assert "model.safetensors.index.json" in names and sum(name.endswith(".safetensors") for name in names) > 1
    again = transformers.LlamaForCausalLM.from_pretrained(sent.folder)
    assert isinstance(again.model.layers[0].mlp.up_proj.weight, ao.QTensor)


def test_save_pretrained_that_pushes(sent, tmp_path):
    quantized("loaded", tmp_path).save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="somebody/llama")
    assert {path.name for path in sent.folder.iterdir()} >= {"config.json", "model.safetensors"}


def generated(model, **settings):
    out = model.generate(
        IDS, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True, **settings
    )
    return out.past_key_values, torch.stack(out.logits), out.sequences


@pytest.mark.parametrize("backend", ["ao", "quanto", "hqq"])
@pytest.mark.parametrize(("nbits", "axis"), [(8, 0), (4, 0), (4, -1), (2, 0)])
def test_quantized_cache(backend, nbits, axis):
    if not is_ours(backend):
        pytest.skip(f"{backend} is installed")
    model = hf_models.llama(num_hidden_layers=2).eval()
    settings = {
        "backend": backend, "nbits": nbits, "axis_key": axis, "axis_value": 0, "q_group_size": 16, "residual_length": 4
    }  # fmt: skip
    cache, logits, _ = generated(model, cache_implementation="quantized", cache_config=settings)
    layer = cache.layers[0]
    assert isinstance(layer, AoQuantizedLayer) and layer._quantized_keys.spec.bits == nbits
    assert layer._quantized_keys.spec.block == (
        (1, 1, layer._quantized_keys.spec.block[2], 1) if axis == -1 else (1, 1, 1, 16)
    )
    plain = generated(model)[1]
    assert ao.compute_error(plain[:2], logits[:2]) > {8: 30, 4: 12, 2: 3}[nbits]  # before the sequences part


@pytest.mark.parametrize("name", ["dynamic", "static", "offloaded_static", "offloaded"])
def test_other_caches(name, tmp_path):
    if name.startswith("offloaded") and not torch.cuda.is_available():
        pytest.skip("transformers offloads from an accelerator")
    model = quantized("loaded", tmp_path)
    assert torch.equal(generated(model, cache_implementation=name, disable_compile=True)[2], generated(model)[2])


def test_a_config_of_the_cache_that_makes_no_sense():
    model = hf_models.llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        generated(model, cache_implementation="quantized", cache_config={"backend": "ao", "nbits": 16})
    with pytest.raises(ValueError, match="Unknown quantization backend"):
        generated(model, cache_implementation="quantized", cache_config={"backend": "none"})
