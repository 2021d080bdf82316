"""The Llama model of llama.py for training: no cache, whole sequences, a loss. Parameters have the same names."""

from __future__ import annotations

from functools import partial

import llama
import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(llama.Attention):
    """Causal attention over the tokens of the call."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, -1, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 2)  # (B, S, heads, head_dim)
        q, k = (llama.rotate(t, cos, sin).transpose(1, 2) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).reshape(batch, tokens, -1))


class Block(nn.Module):
    """Attention and feed-forward, each on the norm of the sum of all before it."""

    def __init__(self, config: llama.LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = llama.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = llama.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = llama.FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """A causal language model that returns its loss."""

    def __init__(self, config: llama.LlamaConfig, checkpointed: bool = False) -> None:
        super().__init__()
        self.config, self.checkpointed = config, checkpointed
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = llama.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """The mean cross entropy of each token given those before it. ids: (B, S + 1)."""
        cos, sin = llama.rotary(self.config, ids.shape[1] - 1, ids.device)
        x = self.embed(ids[:, :-1])  # (B, S, dim)
        for block in self.blocks:
            x = checkpoint(block, x, cos, sin, use_reentrant=False) if self.checkpointed else block(x, cos, sin)
        return self.loss(x, ids[:, 1:])

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy of hidden states (B, S, dim)."""
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def make(
    config: llama.LlamaConfig, device: torch.device, dtype: torch.dtype, checkpointed: bool = False, seed: int = 0
) -> Llama:
    """A model of normal weights, made on the device."""
    with torch.device("meta"):
        model = Llama(config, checkpointed).to(dtype)
    llama.randomize(model, config, device, seed)
    return model


def compiled(model: Llama, name: str) -> Llama:
    """Compile the block, once for all of them, and the loss. name: of what the model is, so that its graphs are counted apart."""
    block_forward = torch.compile(measure.own_code(Block.forward, name), dynamic=False)
    for block in model.blocks:
        block.forward = partial(block_forward, block)
    model.loss = partial(torch.compile(measure.own_code(Llama.loss, name), dynamic=False), model)  # type: ignore[method-assign]
    return model
