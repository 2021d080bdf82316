"""Quantized caches under `generate` of transformers: growing and static, padded, with beams, drafts and windows."""

from __future__ import annotations

import pytest
import torch
import transformers
from hf_models import IDS, SIZES, TOKENS, llama, whisper

import ao
from ao.integrations.transformers import QuantizedCache, enable_quantized_kv_cache
from ao.quant.kv_cache import KV_CACHES, KVCacheConfig

NEAR = KVCacheConfig(ao.Float8(), ao.Intx(8, (1, 8)))
"""Keys and values by Specs of their own."""


@pytest.fixture(scope="module")
def model():
    """Of weights so large that its texts are no repetition of one token, and rounding does not change them."""
    torch.manual_seed(0)
    made = llama(tie_word_embeddings=False, head_dim=32).eval().requires_grad_(False)
    for layer in made.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.normal_(std=layer.in_features**-0.5)
    return made


def text(model, **kwargs):
    kwargs = {"attention_mask": torch.ones_like(IDS), "inputs": IDS, "max_new_tokens": 12, "do_sample": False} | kwargs
    return model.generate(**kwargs, eos_token_id=None, pad_token_id=0)


@pytest.mark.parametrize("length", [None, 32])
def test_generate(model, length):
    """Text of the exact cache, where nothing but 8 bits is between; and all presets give some."""
    assert torch.equal(text(model), text(model, past_key_values=QuantizedCache(model.config, "int8", length)))
    texts = [
        text(model, past_key_values=QuantizedCache(model.config, s, length)) for s in (*KV_CACHES, NEAR, ao.Intx(8))
    ]
    assert all(t.shape == (1, IDS.shape[1] + 12) for t in texts)
    all_first = QuantizedCache(
        model.config, KVCacheConfig(ao.Intx(4), ao.Intx(4), first=8, full_layers=(0, -1)), length
    )
    assert torch.equal(text(model), text(model, past_key_values=all_first))  # both layers are full


@pytest.mark.parametrize("length", [None, 32])
@pytest.mark.parametrize("name", ["int8", "kivi4"])
def test_batches_beams_and_drafts(model, name, length):
    """One sequence alone, padded on the left beside another, with beams, and with drafts that are taken back."""
    cache = lambda: QuantizedCache(model.config, name, length)  # noqa: E731
    alone = text(model, past_key_values=cache())
    ids = torch.cat([IDS, torch.cat([torch.zeros(1, 4, dtype=torch.int64), IDS[:, :6] + 20], 1)])
    padded = text(model, inputs=ids, attention_mask=(ids > 0).long(), past_key_values=cache())
    assert torch.equal(padded[0], alone[0])
    short = text(model, inputs=ids[1:, 4:], attention_mask=torch.ones(1, 6, dtype=torch.int64), past_key_values=cache())
    assert torch.equal(padded[1, 4:], short[0])
    beams = text(model, num_beams=3, past_key_values=cache())
    exact = text(model, num_beams=3)
    assert name != "int8" or torch.equal(beams, exact)
    assert torch.equal(beams, text(model, num_beams=3, past_key_values=QuantizedCache(model.config, name, 40)))
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        assert torch.equal(text(model, **drafts, past_key_values=cache()), alone)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_that_reads_and_that_does_not(model, implementation):
    """Codes or numbers: the same logits."""
    found = []
    for use in ("sdpa", implementation):
        model.set_attn_implementation(use)
        cache = QuantizedCache(
            model.config, KVCacheConfig(ao.Intx(8), ao.Intx(8), rotate=True, first=2, residual=4), 24
        )
        with torch.no_grad():
            logits = [model(IDS, past_key_values=cache).logits]
            logits += [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
        found.append(torch.cat(logits, 1))
    model.set_attn_implementation("sdpa")
    assert ao.compute_error(*found) > 60


@pytest.mark.parametrize("ahead", [False, True])
def test_first_tokens_in_a_graph(model, ahead):
    """As `generate` reads a long prompt in chunks: the memory is no part of the graph, which may then take it for static."""
    torch.compiler.reset()
    caches = [QuantizedCache(model.config, "int8", 32) for _ in range(2)]
    if ahead:
        caches[1].initialize_for(model)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        for part in IDS.split(5, 1):
            found = [call(part, past_key_values=cache).logits for call, cache in zip((model, compiled), caches)]
            assert ao.compute_error(*found) > 100
    assert all(hasattr(t, "_dynamo_static_input_type") for t in caches[1].layers[0].kv.tensors())
    assert (len(graphs) == 1) == ahead


def test_prompts_in_chunks(model):
    """The same text, also of more sequences than the memory was made for."""
    chunks = {"cache_implementation": "static", "prefill_chunk_size": 4}
    enable_quantized_kv_cache(model, "int8")
    try:
        for more in ({}, {"num_beams": 3}):
            assert torch.equal(text(model, **chunks, **more), text(model, cache_implementation="static", **more))
    finally:
        enable_quantized_kv_cache(model)
    cache = QuantizedCache(model.config, "int8", 32).initialize_for(model, 7)
    assert torch.equal(
        text(model, past_key_values=cache), text(model, past_key_values=QuantizedCache(model.config, "int8", 32))
    )


def test_too_long(model):
    """Before anything is written."""
    cache = QuantizedCache(model.config, "int8", 12)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        before = [t.clone() for t in cache.layers[0].kv.tensors()]
        with pytest.raises(ValueError, match="10 tokens and 10 more are longer than max_length=12"):
            model(IDS, past_key_values=cache)
    assert all(map(torch.equal, before, cache.layers[0].kv.tensors()))
    with pytest.raises(ValueError, match="10 tokens are more than max_cache_len=4"):
        text(model, past_key_values=QuantizedCache(model.config, "int8", 4))


def test_enable(model):
    exact = text(model)
    assert enable_quantized_kv_cache(model, "int8") is model
    out = text(model, return_dict_in_generate=True)
    assert torch.equal(out.sequences, exact) and isinstance(out.past_key_values, QuantizedCache)
    static = text(model, return_dict_in_generate=True, cache_implementation="static")
    assert torch.equal(static.sequences, exact) and static.past_key_values.is_compileable
    enable_quantized_kv_cache(model)
    assert not isinstance(text(model, return_dict_in_generate=True).past_key_values, QuantizedCache)
    with pytest.raises(ValueError, match="unknown KV cache 'int7'; there are int8, "):
        enable_quantized_kv_cache(model, "int7")


@pytest.mark.parametrize("length", [None, 32])
def test_windows(length):
    """Layers that see a window keep it as it is; the others are quantized. Mistral's, and Gemma's with soft caps."""
    torch.manual_seed(0)
    sizes = {**SIZES, **TOKENS, "num_key_value_heads": 2, "sliding_window": 8, "head_dim": 16}
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()
    config = transformers.Gemma2Config(**sizes, layer_types=["sliding_attention", "full_attention"])
    gemma = transformers.Gemma2ForCausalLM(config).eval()
    cache = QuantizedCache(mistral.config, "int8", length)
    assert torch.equal(text(mistral), text(mistral, past_key_values=cache))
    exact = text(gemma)
    assert torch.equal(exact, text(gemma, past_key_values=QuantizedCache(gemma.config, "int8", length)))


def test_encoder_decoder():
    with pytest.raises(ValueError, match="whisper has an encoder"):
        QuantizedCache(whisper().config, "int8")


def test_graph(model):
    """A step is one graph, whose cache is written in place."""
    outs = []
    for compiled in (False, True):
        cache = QuantizedCache(model.config, "int4", 16)
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with torch.no_grad():
            model(IDS, past_key_values=cache)
            outs.append([step(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(3)])
    torch.compiler.reset()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*outs))
