"""RMSprop, by the formulas of torch.optim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ao.dtypes import DynamicTree

from .optimizer import FullPrecision, LowBitOptimizer


def rmsprop(
    param: Tensor, grad: Tensor, states: Mapping[str, Tensor], h: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    g = grad + weight_decay * param
    v = alpha * v + (1 - alpha) * g**2
    u = g / (sqrt(v) + eps)
    b = momentum * b + u, where there is momentum
    param = param - lr * (b or u)
    """
    grad = grad + h["weight_decay"] * param
    v = h["alpha"] * states["square_avg"] + h["one_minus_alpha"] * grad * grad
    new = {"square_avg": v}
    update = grad / (v.sqrt() + h["eps"])
    if "momentum_buffer" in states:
        update = new["momentum_buffer"] = h["momentum"] * states["momentum_buffer"] + update
    return param - h["lr"] * update, new


class RMSprop8bit(LowBitOptimizer):
    """RMSprop with 8-bit states: 1.02 bytes per parameter, and 2.03 with momentum.

    alpha, eps, weight_decay, momentum: as in torch.optim.RMSprop; momentum=0 keeps no buffer. There is no `centered`: what
    a mean in 8 bits leaves of a variance is rounding. See `Adam8bit` for the others.

    The mean of squares is in the unsigned dynamic tree map, the momentum in the signed one. Raises ValueError for an alpha
    that is not above 0 and below 1.
    """

    update = staticmethod(rmsprop)
    formats = {
        "square_avg": lambda n: DynamicTree(8, False, (1, n)),
        "momentum_buffer": lambda n: DynamicTree(8, True, (1, n)),
    }
    torch_class = torch.optim.RMSprop
    torch_states = ("step", "square_avg", "momentum_buffer")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        *,
        block_size: int = 256,
        bf16_stochastic_round: bool = False,
        maximize: bool = False,
        full_precision: FullPrecision = (),
        compile: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "block_size": block_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "maximize": maximize,
        }
        super().__init__(params, defaults, full_precision=full_precision, compile=compile)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not 0 < group["alpha"] < 1:
            raise ValueError(f"{type(self).__name__}: alpha must be above 0 and below 1, got {group['alpha']!r}")
        if group.get("centered"):
            raise ValueError(f"{type(self).__name__} has no centered=True; use torch.optim.RMSprop for it")

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("square_avg", "momentum_buffer") if group["momentum"] else ("square_avg",)

    def scalars(self, group: dict[str, Any], lr: float | Tensor, step: float) -> dict[str, float | Tensor]:
        alpha = float(group["alpha"])
        return {
            "lr": lr,
            "alpha": alpha,
            "one_minus_alpha": 1 - alpha,
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "momentum": float(group["momentum"]),
        }
