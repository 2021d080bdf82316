"""The Llama architecture in plain PyTorch: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The three projections of attention are one layer, and so are the gate and up projections of the feed-forward network, so
that a token costs four products per block. For generation, keys and values go to a cache of fixed length, written in place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from ao.quant.kv_cache import KVCache


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model.

    dim: of the residual stream. hidden: of the feed-forward network. heads and kv_heads, each of head_dim.
    rope_scaling: None, or the parameters of rope_type "llama3" or "linear", named as in a Hugging Face config.json.
    tied: whether the output head is the embedding.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    end: tuple[int, ...] = ()

    @staticmethod
    def from_hf(data: Mapping[str, Any]) -> LlamaConfig:
        """The config of a Hugging Face config.json. Raises ValueError for another architecture."""
        if data.get("model_type") != "llama":
            raise ValueError(f"config.json must say model_type 'llama', got {data.get('model_type')!r}")
        if data.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {data['hidden_act']!r}")
        heads = data["num_attention_heads"]
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"rope_type must be 'default', 'linear' or 'llama3', got {kind!r}")
        end = data.get("eos_token_id")
        return LlamaConfig(
            dim=data["hidden_size"],
            layers=data["num_hidden_layers"],
            heads=heads,
            kv_heads=data.get("num_key_value_heads") or heads,
            head_dim=data.get("head_dim") or data["hidden_size"] // heads,
            hidden=data["intermediate_size"],
            vocab=data["vocab_size"],
            rope_theta=rope.get("rope_theta") or data.get("rope_theta") or 10000.0,
            rope_scaling=None if kind == "default" else tuple(sorted({**rope, "rope_type": kind}.items())),
            norm_eps=data.get("rms_norm_eps", 1e-6),
            tied=data.get("tie_word_embeddings", False),
            attention_bias=data.get("attention_bias", False),
            mlp_bias=data.get("mlp_bias", False),
            end=() if end is None else tuple(end) if isinstance(end, list) else (end,),
        )


_LLAMA3 = (
    ("factor", 8.0),
    ("high_freq_factor", 4.0),
    ("low_freq_factor", 1.0),
    ("original_max_position_embeddings", 8192),
    ("rope_type", "llama3"),
)
_LLAMA3_SMALL = tuple((name, 32.0 if name == "factor" else value) for name, value in _LLAMA3)

SHAPES = {
    "llama-3.1-8b": LlamaConfig(4096, 32, 32, 8, 128, 14336, 128256, 500000.0, _LLAMA3),
    "llama-3.2-1b": LlamaConfig(2048, 16, 32, 8, 64, 8192, 128256, 500000.0, _LLAMA3_SMALL, tied=True),
    "llama-2-7b": LlamaConfig(4096, 32, 32, 32, 128, 11008, 32000),
    "llama-0.3b": LlamaConfig(1024, 16, 16, 8, 64, 4096, 32000),
    "tiny": LlamaConfig(128, 2, 4, 2, 32, 256, 512, tied=True),
}
"""Shapes of known models, by name, a small one for CPUs, and one for tests."""


def rotary(config: LlamaConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, (length, head_dim) float32 each: frequencies once for either half."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequency = config.rope_theta**-exponent  # (head_dim / 2,)
    scaling = dict(config.rope_scaling or ())
    if scaling.get("rope_type") == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        # Slow frequencies are divided by the factor, fast ones kept, those between them mixed.
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    angle = torch.outer(torch.arange(length, device=device).float(), frequency)
    angle = torch.cat([angle, angle], -1)  # (length, head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim / 2]). x: (B, S, heads, head_dim); cos, sin: (S, head_dim) float32."""
    low, high = x.float().chunk(2, -1)
    turned = torch.cat([-high, low], -1)
    return (x.float() * cos[:, None] + turned * sin[:, None]).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + eps) * weight, over the last dim, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """Causal attention. A call has the first tokens of a text, or, with a cache, one token at any position, or a chunk of a
    prompt from `start` on.

    cache: a quantized cache in place of `keys` and `values`, which knows by itself how far it is.
    """

    keys: Tensor
    values: Tensor
    cache: KVCache | None = None
    start = 0

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.qkv = nn.Linear(
            config.dim, (config.heads + 2 * config.kv_heads) * config.head_dim, bias=config.attention_bias
        )
        self.out = nn.Linear(config.heads * config.head_dim, config.dim, bias=config.attention_bias)

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, -1, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 2)  # (B, S, heads, head_dim)
        q = rotate(q, cos, sin)
        k, v = rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)  # (B, kv_heads, S, head_dim)
        cached = "keys" in self._buffers
        if self.cache is not None:
            self.cache.update(k, v, check=False)
            return self.out(self.cache.attend(q.transpose(1, 2)).transpose(1, 2).reshape(batch, tokens, -1))
        if cached:
            self.keys.index_copy_(2, positions, k)
            self.values.index_copy_(2, positions, v)
        if cached and tokens == 1:
            out = self.one(q, positions)
        elif cached and self.start:
            k, v = (t[:, :, : self.start + tokens] for t in (self.keys, self.values))
            # No mask of tokens x positions is made where a kernel knows the bias by its name.
            bias: Any = causal_lower_right(tokens, self.start + tokens)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=bias, enable_gqa=True)
            out = out.transpose(1, 2)
        else:
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True)
            out = out.transpose(1, 2)  # (B, S, heads, head_dim)
        return self.out(out.reshape(batch, tokens, -1))

    def one(self, q: Tensor, positions: Tensor) -> Tensor:
        """Attention of one token to the cache. The heads that share keys are the rows of one product."""
        q = q.reshape(q.shape[0], self.kv_heads, -1, self.head_dim)  # (B, kv_heads, heads / kv_heads, head_dim)
        scores = (q @ self.keys.transpose(-1, -2)).float() * self.head_dim**-0.5
        ahead = torch.arange(self.keys.shape[2], device=q.device) > positions
        weights = scores.masked_fill(ahead, -torch.inf).softmax(-1).to(q.dtype)
        return weights @ self.values  # as q


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden, bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each on the normed sum of all before it.

    The last sum is left to the next block: a block that is compiled on its own can then add and norm in one kernel.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, more: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x + more is the input, (B, S, dim); so is the sum of the two results the output."""
        x = x + more
        x = x + self.attention(self.attention_norm(x), positions, cos, sin)
        return x, self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """A causal language model. Before the first call, give it a cache, or `make_rotary` to do without."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def make_cache(self, batch: int, length: int, quantized: str | None = None) -> None:
        """Room for the keys and values of `batch` sequences of `length` tokens, in the dtype of the norms, or `quantized`."""
        self.make_rotary(length)
        device, dtype = self.norm.weight.device, self.norm.weight.dtype
        for block in self.blocks:
            if quantized is not None:
                kv_heads, head_dim = self.config.kv_heads, self.config.head_dim
                cache = KVCache(quantized, batch, kv_heads, length, head_dim, dtype=dtype, device=device)
                for t in cache.tensors():
                    torch._dynamo.mark_static_address(t)
                block.attention.cache = cache  # type: ignore[union-attr]
                continue
            for name in ("keys", "values"):
                shape = (batch, self.config.kv_heads, length, self.config.head_dim)
                room = torch.zeros(shape, device=device, dtype=dtype)
                block.attention.register_buffer(name, room, persistent=False)  # type: ignore[union-attr]

    def start_at(self, position: int) -> None:
        """Say where the tokens of the next calls begin; at 0, quantized caches forget what they hold."""
        for block in self.blocks:
            attention: Any = block.attention
            attention.start = position
            if position == 0 and attention.cache is not None:
                attention.cache.reset()

    def make_rotary(self, length: int) -> None:
        """The rotations of `length` positions."""
        cos, sin = rotary(self.config, length, self.norm.weight.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, last: bool = False) -> Tensor:
        """Logits (B, S, vocab), or (B, 1, vocab) with `last`.

        ids: (B, S). positions: (S,), 0 to S - 1, or the position of a single token; those before it are in the cache.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        x = self.embed(ids)  # (B, S, dim)
        more = torch.zeros_like(x)
        for block in self.blocks:
            x, more = block(x, more, positions, cos, sin)
        x = x + more
        if last and x.shape[1] > 1:
            x = x[:, -1:].clone(memory_format=torch.contiguous_format)  # strides as those of a single token
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        """Logits of the last block's output. x: (B, S, dim)."""
        return self.head(self.norm(x))


def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Llama:
    """A model of normal weights, made on the device."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    randomize(model, config, device, seed)
    return model.eval().requires_grad_(False)


def randomize(model: Any, config: LlamaConfig, device: torch.device, seed: int = 0) -> None:
    """Give a model of the meta device normal weights, of standard deviation 0.02, and norms of 1, on a device."""
    model.to_empty(device=device)
    tie(model, config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02, generator=generator)


def tie(model: Any, config: LlamaConfig) -> None:
    """Make head and embedding one parameter again, where they are tied."""
    if config.tied:
        model.head.weight = model.embed.weight


_NAMES = {
    "embed.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "head.weight": ["lm_head.weight"],
}
_BLOCK_NAMES = {
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "feed_forward_norm": ["post_attention_layernorm"],
    "feed_forward.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "feed_forward.down": ["mlp.down_proj"],
}


def hf_names(name: str) -> list[str]:
    """The names, in a Hugging Face checkpoint, of the tensors that are joined to our parameter `name`."""
    if name in _NAMES:
        return _NAMES[name]
    _, layer, rest = name.split(".", 2)
    module, _, parameter = rest.rpartition(".")
    return [f"model.layers.{layer}.{each}.{parameter}" for each in _BLOCK_NAMES[module]]


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Llama:
    """The model of a Hugging Face folder: config.json and *.safetensors, one tensor at a time. layers: only so many.

    Raises FileNotFoundError and ValueError, with the name that is missing.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise ImportError("loading a model needs safetensors: pip install safetensors") from None
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give a Hugging Face folder")
    config = LlamaConfig.from_hf(json.loads(path.read_text()))
    config = replace(config, layers=min(layers or config.layers, config.layers))
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{folder} has no *.safetensors; give a Hugging Face folder")
    opened = [safe_open(shard, framework="pt", device=str(device)) for shard in shards]
    where = {name: shard for shard in opened for name in shard.keys()}  # noqa: SIM118
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    state = {}
    for name in dict(model.named_parameters()):
        parts = hf_names(name)
        lacking = [part for part in parts if part not in where]
        if lacking:
            raise ValueError(f"{folder}: the checkpoint has no tensor {lacking[0]}")
        state[name] = torch.cat([where[part].get_tensor(part).to(dtype) for part in parts])
    model.load_state_dict(state, strict=False, assign=True)
    tie(model, model.config)
    return model.eval().requires_grad_(False)
