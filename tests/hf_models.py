"""Tiny models of transformers, made from their configs, with an input each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import ao

IDS = torch.arange(1, 11)[None]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FORMATS: dict[str, Any] = {
    "int8": ao.Int8WeightOnlyConfig(),
    "int4": ao.Int4WeightOnlyConfig(group_size=32),
    "int3": ao.Intx(3, (1, 32)),
    "float8": ao.Float8WeightOnlyConfig(),
    "nf4": ao.NF4WeightOnlyConfig(block_size=32),
    "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
    "mixed": ao.FqnToConfig(
        {"re:.*(mlp|fc1|intermediate|up_proj).*": ao.Intx(4, (1, 32)), "_default": ao.Int8WeightOnlyConfig()}
    ),
}


def llama(**kwargs: Any) -> nn.Module:
    """With an embedding that is tied to the head."""
    settings = {**SIZES, **TOKENS, "num_key_value_heads": 2, "tie_word_embeddings": True, **kwargs}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def mixtral() -> nn.Module:
    """Four experts, of which two work on a token."""
    config = transformers.MixtralConfig(**SIZES, **TOKENS, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def bert() -> nn.Module:
    """An encoder."""
    return transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=96))


def vit() -> nn.Module:
    """Images of 32 x 32."""
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=32, patch_size=8))


def whisper() -> nn.Module:
    """Encoder, decoder, convolutions."""
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
    }
    config = transformers.WhisperConfig(
        d_model=64, **sides, **TOKENS, num_mel_bins=16, max_source_positions=32, max_target_positions=32,
        decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def add_words(folder: Path) -> None:
    """A tokenizer of the words w0 to w95, and texts: three in texts.json, the first of them in text.txt."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = [" ".join(f"w{(7 * i * i + j) % 96}" for i in range(30)) for j in range(3)]
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "text.txt").write_text(texts[0])


MODELS = {"llama": llama, "mixtral": mixtral, "bert": bert, "vit": vit, "whisper": whisper}


def inputs(name: str) -> dict[str, Tensor]:
    """Arguments of a call."""
    g = torch.Generator().manual_seed(0)
    if name == "vit":
        return {"pixel_values": torch.randn(1, 3, 32, 32, generator=g).bfloat16()}
    if name == "whisper":
        return {"input_features": torch.randn(1, 16, 64, generator=g).bfloat16(), "decoder_input_ids": IDS}
    return {"input_ids": IDS}


@torch.no_grad()
def output(name: str, model: nn.Module) -> Tensor:
    """The logits, or the last hidden state."""
    out = model(**inputs(name))
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


def generated(name: str, model: Any) -> Tensor | None:
    """Four greedy tokens, from a model that generates."""
    if name not in ("llama", "mixtral"):
        return None
    tokens: Tensor = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    return tokens
