"""PEFT: LoRA over quantized layers, trained, saved, loaded, merged and unmerged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ao

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'ao[peft]'")

import hf_models  # noqa: E402
from hf_models import FORMATS, IDS  # noqa: E402

from ao.integrations.peft import QuantizedEmbedding, QuantizedLinear  # noqa: E402
from ao.integrations.transformers import AoConfig  # noqa: E402

every = pytest.mark.parametrize("form", FORMATS)
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    ),  # peft, of transformers
]


def saved(folder, **kwargs):
    torch.manual_seed(0)
    hf_models.llama(**kwargs).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """Of a model whose embedding is its own."""
    return saved(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


def load(folder, form, **kwargs):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=AoConfig(FORMATS[form], **kwargs))
    return peft.prepare_model_for_kbit_training(model)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model, steps=8, lr=1e-2):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    return model.eval()


def layer(model):
    return model.base_model.model.model.layers[0].mlp.up_proj


@every
def test_lora(form, folder, tmp_path):
    base = load(folder, form)
    plain = logits(base)
    frozen = {n: p.clone() for n, p in base.named_parameters() if isinstance(p, ao.QTensor)}
    model = trained(peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")))
    assert isinstance(layer(model), QuantizedLinear)
    adapted = logits(model)
    assert ao.compute_error(adapted, plain) < 20
    assert all(torch.equal(p, frozen[n.removeprefix("base_model.model.").replace(".base_layer", "")])
               for n, p in model.named_parameters() if isinstance(p, ao.QTensor))  # fmt: skip

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder, form), tmp_path)
    assert torch.equal(logits(again), adapted)
    again = load(folder, form)
    again.load_adapter(tmp_path)  # transformers' own
    assert torch.equal(logits(again), adapted)

    floor = 30 if form == "int8-dynamic" else 100  # a merged layer quantizes no activation
    quantized = layer(model).base_layer.weight
    for _ in range(2):
        model.merge_adapter()
        assert type(layer(model).base_layer.weight) is nn.Parameter
        assert ao.compute_error(adapted, logits(model)) > floor
        model.unmerge_adapter()
        assert torch.equal(layer(model).base_layer.weight, quantized)
        assert torch.equal(logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    merged = model.merge_and_unload(safe_merge=True)
    assert ao.compute_error(adapted, logits(merged)) > floor
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


@every
def test_preparing_does_no_harm(form, folder):
    """What prepare_model_for_kbit_training casts to float32 is what the weights dequantize to."""
    before = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=AoConfig(FORMATS[form]))
    after = load(folder, form)
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        if isinstance(p, ao.QTensor):
            assert q.dtype == torch.float32 and q.nbytes_packed == p.nbytes_packed, name
            assert torch.equal(q.to(p.dtype), p), name
    assert ao.compute_error(logits(before), logits(after)) > 30


def test_a_model_quantized_in_place_and_two_adapters(untied):
    base = transformers.LlamaForCausalLM.from_pretrained(untied)
    ao.quantize_(base, FORMATS["nf4"], lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    assert isinstance(layer(model), QuantizedLinear)
    trained(model, lr=5e-2)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    adapted, quantized = logits(model), layer(model).base_layer.weight
    model.merge_adapter(["default", "second"])
    assert ao.compute_error(adapted, logits(model)) > 30
    model.unmerge_adapter()
    assert torch.equal(layer(model).base_layer.weight, quantized) and torch.equal(logits(model), adapted)


def test_an_embedding(untied):
    model = peft.get_peft_model(
        load(untied, "int4", include_embedding=True), peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    )
    assert isinstance(model.base_model.model.model.embed_tokens, QuantizedEmbedding)
    adapted = logits(trained(model, lr=5e-2))
    model.merge_adapter()
    assert ao.compute_error(adapted, logits(model)) > 100
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)


def test_a_merge_that_fails_changes_nothing(folder):
    model = peft.get_peft_model(load(folder, "int4"), peft.LoraConfig(r=2, target_modules=["up_proj"]))
    quantized = layer(model).base_layer.weight
    with torch.no_grad():
        layer(model).lora_B["default"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert layer(model).base_layer.weight is not None and torch.equal(layer(model).base_layer.weight, quantized)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_dora(form, folder, tmp_path):
    base = load(folder, form)
    plain = logits(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)
    model = peft.get_peft_model(base, config)
    assert ao.compute_error(plain, logits(model)) > 90  # an adapter begins as nothing
    adapted = logits(trained(model))
    assert ao.compute_error(adapted, plain) < 20
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(folder, form), tmp_path)), adapted)
    quantized = layer(model).base_layer.weight
    model.merge_adapter()
    assert ao.compute_error(adapted, logits(model)) > 90
    model.unmerge_adapter()
    assert torch.equal(layer(model).base_layer.weight, quantized)
    assert ao.compute_error(adapted, logits(model)) > 90


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft, of transformers
def test_adapters_on_experts(tmp_path):
    hf_models.mixtral().save_pretrained(tmp_path)
    config = peft.LoraConfig(r=4, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])

    def mixtral(**kwargs):
        return transformers.MixtralForCausalLM.from_pretrained(
            tmp_path, quantization_config=AoConfig(hf_models.FORMATS["int8"], **kwargs)
        )

    with pytest.raises(NotImplementedError, match="which is quantized, .* leave it out when quantizing"):
        peft.get_peft_model(mixtral(), config)
    trained(peft.get_peft_model(mixtral(modules_to_not_convert=["experts", "lm_head"]), config))
