"""PEFT: LoRA over quantized layers, trained, saved, loaded, merged and unmerged."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import ao

transformers = pytest.importorskip("transformers", reason="needs transformers")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'ao-lowbit[peft]'")

import hf_models  # noqa: E402
from hf_models import FORMATS, IDS  # noqa: E402

from ao.integrations.folder_quantizer import quantize_folder  # noqa: E402
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


# Every method of PEFT.

TARGETS = ["up_proj", "down_proj"]


def lora(**kwargs):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **kwargs)


METHODS = {
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "pissa_niter_4": lambda: lora(init_lora_weights="pissa_niter_4"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "eva": lambda: lora(init_lora_weights="eva"),
    "rslora": lambda: lora(use_rslora=True),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["up_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS),
    "adalora": lambda: peft.AdaLoraConfig(r=4, target_modules=TARGETS, total_step=20),
    "c3a": lambda: peft.C3AConfig(block_size=8, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS, use_cayley_neumann=False),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=TARGETS),
    "vblora": lambda: peft.VBLoRAConfig(r=4, target_modules=TARGETS, vector_length=16, num_vectors=16),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=TARGETS),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2, 90], target_modules=["embed_tokens"]),
    "lora and tokens": lambda: lora(trainable_token_indices=[1, 2, 90]),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head", "embed_tokens"]),
    "the head": lambda: peft.LoraConfig(r=4, target_modules=["lm_head", "up_proj"]),
}
RANDOM = {"c3a", "fourierft", "vblora"}  # do not begin as nothing
SLOW = {"c3a", "pissa_niter_4", "orthogonal", "rslora", "lokr", "boft", "fourierft", "vblora"}  # much like another one


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in METHODS])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about its methods
def test_methods(method, untied, tmp_path):
    """Begin as nothing, train, are saved, loaded, copied, merged and unmerged, over a weight that stays what it is."""
    embedding = method in ("tokens", "lora and tokens", "modules_to_save", "the head")
    base = load(untied, "nf4", include_embedding=embedding)
    plain, count = logits(base), sum(isinstance(p, ao.QTensor) for p in base.parameters())
    torch.manual_seed(0)
    model = peft.get_peft_model(base, METHODS[method]())
    takes = (
        method.startswith("pissa") or method == "olora"
    )  # its part out of the weight, and the rest is quantized again
    floor = -9 if method in RANDOM else 25 if takes else 90
    assert ao.compute_error(plain, logits(model)) > floor
    assert sum(isinstance(p, ao.QTensor) for n, p in model.named_parameters() if "modules_to_save" not in n) == count
    frozen = {n: p.clone() for n, p in model.named_parameters() if isinstance(p, ao.QTensor)}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted = logits(model.eval())
    assert ao.compute_error(plain, adapted) < 70
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert torch.equal(logits(copy.deepcopy(model)), adapted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), adapted)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(load(untied, "nf4", include_embedding=embedding), tmp_path)
    assert torch.equal(logits(again), adapted)
    model.merge_adapter()
    assert ao.compute_error(adapted, logits(model)) > 90
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    merged = model.merge_and_unload()
    assert ao.compute_error(adapted, logits(merged)) > 90
    left = sum(isinstance(p, ao.QTensor) for p in merged.parameters())
    assert 0 < left < count and merged.is_quantized


@pytest.mark.parametrize("form", ["int8", "int3", "nf4"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_taken_out_of_a_weight(form, init, folder):
    """W is D(q) + scaling * B A, where q is what is left of W, in the same format."""
    base = load(folder, form)
    before = base.model.layers[0].mlp.up_proj.weight
    model = peft.get_peft_model(base, lora(init_lora_weights=init))
    after, values = layer(model).base_layer.weight, before.dequantize()
    assert after.spec == before.spec and after.dtype == before.dtype and not after.requires_grad
    assert not torch.equal(after, before)
    delta = layer(model).get_delta_weight("default").detach()
    assert ao.compute_error(before.spec.quantize(values - delta).dequantize(), after.dequantize()) > 50
    if init == "pissa":
        u, s, v = torch.linalg.svd(values)
        assert ao.compute_error(u[:, :4] * s[:4] @ v[:4], delta) > 80


def test_loftq(folder):
    """The best approximation to what quantizing lost, in the rank of the adapter, over any format."""
    original = transformers.LlamaForCausalLM.from_pretrained(folder).float()
    expected = original.model.layers[0].mlp.up_proj.weight
    model = peft.get_peft_model(load(folder, "nf4"), lora())
    peft.replace_lora_weights_loftq(model, folder / "model.safetensors")
    values = layer(model).base_layer.weight.dequantize()
    u, s, v = torch.linalg.svd(expected - values)
    assert torch.allclose(layer(model).get_delta_weight("default"), u[:, :4] * s[:4] @ v[:4], atol=1e-5)
    assert ao.compute_error(expected, layer(model)(torch.eye(64)).T) > ao.compute_error(expected, values) + 0.3
    before = layer(model).lora_A["default"].weight.clone()
    with torch.no_grad():
        before = layer(model).lora_A["default"].weight.fill_(0.5).clone()
    peft.replace_lora_weights_loftq(model, str(folder), callback=lambda model, name: False)
    assert torch.equal(layer(model).lora_A["default"].weight, before)


def test_merged_models_are_plain(folder, tmp_path):
    """What is saved after merging does not say that it is quantized, and can be quantized anew in every way."""
    model = peft.get_peft_model(load(folder, "nf4"), peft.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        layer(model).lora_B["default"].weight.normal_(std=0.05)
    adapted = logits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert model.base_model.model.is_quantized
    merged = model.merge_and_unload()
    assert not merged.is_quantized and not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path / "merged")
    assert merged.half().dtype == torch.float16
    assert json.loads((tmp_path / "merged" / "config.json").read_text()).get("quantization_config") is None
    assert ao.compute_error(adapted, logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged"))) > 90
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", quantization_config=AoConfig(ao.Intx(8)))
    assert layer_weight(again).spec == ao.Intx(8) and ao.compute_error(adapted, logits(again)) > 25
    quantize_folder(tmp_path / "merged", tmp_path / "int8", ao.Intx(8))
    assert layer_weight(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "int8")).spec == ao.Intx(8)


def test_models_that_are_merged_in_part(folder, tmp_path):
    model = peft.get_peft_model(load(folder, "nf4"), lora(init_lora_weights=False))
    adapted = logits(model)
    merged = model.merge_and_unload()
    assert merged.is_quantized and type(layer_weight(merged)) is nn.Parameter
    merged.save_pretrained(tmp_path / "merged")
    saved = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"} < set(saved["modules_to_not_convert"])
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert ao.compute_error(adapted, logits(again)) > 90 and torch.equal(logits(again), logits(merged))
    assert type(layer_weight(again)) is nn.Parameter and isinstance(
        again.model.layers[0].mlp.gate_proj.weight, ao.QTensor
    )
    unloaded = peft.get_peft_model(load(folder, "nf4"), peft.LoraConfig(r=4, target_modules="all-linear")).unload()
    assert unloaded.is_quantized and isinstance(layer_weight(unloaded), ao.QTensor)


def layer_weight(model):
    return model.model.layers[0].mlp.up_proj.weight
