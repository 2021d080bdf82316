"""The two halves of a Llama block, small, for the tests of training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, dim: int = 128, hidden: int = 256) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Gate(nn.Module):
    """x + silu(gate(norm(x))): one layer, which compiles in a third of the time of three."""

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.gate = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.gate(self.norm(x)))


class Attention(nn.Module):
    """x + out(causal attention of norm(x))."""

    def __init__(self, dim: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return x + self.out(mixed.flatten(-2))


def block(dim: int = 128, hidden: int = 256) -> nn.Sequential:
    """Both, with the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(Attention(dim), FeedForward(dim, hidden))


def gradients(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output, the gradient of the input and those of the parameters, by name."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = model(x)
    out.backward(grad)
    assert x.grad is not None
    found = {"output": out.detach(), "input": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
