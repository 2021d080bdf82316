"""A tiny causal language model and data for it, for tests that need blocks, glue between them and correlated activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, DIM, HIDDEN, HEADS = 64, 64, 96, 2


class Norm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.k_proj = nn.Linear(DIM, DIM // 2, bias=False)
        self.v_proj = nn.Linear(DIM, DIM // 2, bias=False)
        self.o_proj = nn.Linear(DIM, DIM, bias=False)
        self.head_dim = DIM // HEADS

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            layer(x).view(b, t, -1, self.head_dim).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q * (1 + 0.1 * positions[:, None])
        return self.o_proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        )


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(DIM, HIDDEN, bias=False)
        self.up_proj = nn.Linear(DIM, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Takes its positions by keyword and returns a tuple, as blocks of some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(DIM), Norm(DIM)
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor, *, positions: Tensor) -> tuple[Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), positions)
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class Inner(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = Norm(DIM)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed_tokens(ids)
        for block in self.layers:
            (x,) = block(x, positions=positions)
        return self.norm(x)


class LM(nn.Module):
    """ids (B, T) -> logits (B, T, VOCAB)."""

    def __init__(self, blocks: int = 2, tied: bool = True) -> None:
        super().__init__()
        self.model = Inner(blocks)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


def lm(blocks: int = 2, tied: bool = True) -> LM:
    """Random weights, the same each time, with a few large input channels as trained models have."""
    torch.manual_seed(0)
    model = LM(blocks, tied).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=layer.in_features**-0.5)
        for block in model.model.layers:
            block.input_layernorm.weight[::16] *= 3
            block.post_attention_layernorm.weight[3::16] *= 3
    return model.requires_grad_(False)


def batches(count: int = 4, size: int = 4, length: int = 32, seed: int = 1) -> list[Tensor]:
    """Token ids of a skewed distribution."""
    g = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, VOCAB + 1).float()
    return [torch.multinomial(weights, size * length, True, generator=g).view(size, length) for _ in range(count)]


def but_head(module: nn.Module, name: str) -> bool:
    """The linear layers, other than the head."""
    return isinstance(module, nn.Linear) and name != "lm_head"


def divergence(model: nn.Module, reference: nn.Module, data: list[Tensor]) -> float:
    """Mean KL of the next token's distribution from that of a reference."""
    with torch.no_grad():
        pairs = [(F.log_softmax(model(ids), -1), F.log_softmax(reference(ids), -1)) for ids in data]
    return sum(float(F.kl_div(q, p, reduction="batchmean", log_target=True)) / q.shape[1] for q, p in pairs) / len(
        pairs
    )
