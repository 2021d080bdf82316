"""Fake quantization with qparams that are trained along: learned step size quantization (LSQ, arXiv:1902.08153; zero points as
in LSQ+, arXiv:2004.09576)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dtypes import Spec, dense, fresh, in_blocks, to_blocks

BEYOND = 1e30
"""A number that every format rounds to its largest."""


def learned_fake_quantize(x: Tensor, spec: Spec, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """`spec.round(x)` under the given qparams, in the dtype of `x`, differentiable in all of them.

    scale, zero_point: of the shape of `spec.grid(x.shape)`, float32, whatever the format stores.

    With x^ = (q - z) * s the result, and inside = 1 where x lies between the smallest and the largest number of its block:

        d x^ / d x = inside,    d x^ / d s = (x^ - inside * x) / s,    d x^ / d z = -(1 - inside) * s
    """
    return _Learned.apply(x, scale, zero_point, spec)


def stored(spec: Spec, scale: Tensor, zero_point: Tensor | None) -> dict[str, Tensor]:
    """The qparams of `spec` as they are stored."""
    given = {"scale": scale.detach().float()}
    if zero_point is not None:
        given["zero_point"] = zero_point.detach().float()
    return spec.stored(**given)


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: Spec) -> Tensor:
        out = fresh(spec.round(x.detach().float(), **stored(spec, scale, zero_point)).to(x.dtype))
        ctx.spec = spec
        ctx.save_for_backward(x, out, scale, zero_point)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, out, scale, zero_point = ctx.saved_tensors
        qparams = {name: dense(t) for name, t in stored(ctx.spec, scale, zero_point).items()}
        grid = scale.shape
        lo, hi = (
            ctx.spec.round(torch.full_like(scale, end, dtype=torch.float32), **qparams) for end in (-BEYOND, BEYOND)
        )
        blocks, g = to_blocks(x.float(), grid), to_blocks(grad.float(), grid)
        inside = (blocks >= in_blocks(lo)) & (blocks <= in_blocks(hi))
        within = tuple(range(1, blocks.dim(), 2))
        grad_x = grad_scale = grad_zero = None
        if ctx.needs_input_grad[0]:
            grad_x = (g * inside).reshape(x.shape).to(x.dtype)
        s = qparams["scale"].float()
        if ctx.needs_input_grad[1]:
            slope = to_blocks(out.float(), grid) - torch.where(inside, blocks, 0.0)
            grad_scale = torch.where(s == 0, 0.0, (g * slope).sum(within) / s).to(scale.dtype)
        if zero_point is not None and ctx.needs_input_grad[2]:
            grad_zero = -((g * ~inside).sum(within) * s).to(zero_point.dtype)
        return grad_x, grad_scale, grad_zero, None
