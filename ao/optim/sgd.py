"""SGD with momentum, by the formulas of torch.optim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ao.dtypes import DynamicTree

from .optimizer import FullPrecision, LowBitOptimizer


def sgd(
    param: Tensor, grad: Tensor, states: Mapping[str, Tensor], h: Mapping[str, Tensor], *, nesterov: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    g = grad + weight_decay * param
    b = momentum * b + (1 - dampening) * g          b = g at the first step
    param = param - lr * (g + momentum * b if nesterov else b)
    """
    grad = grad + h["weight_decay"] * param
    if not states:
        return param - h["lr"] * grad, {}
    buffer = h["momentum"] * states["momentum_buffer"] + h["weight"] * grad
    direction = grad + h["momentum"] * buffer if nesterov else buffer
    return param - h["lr"] * direction, {"momentum_buffer": buffer}


class SGD8bit(LowBitOptimizer):
    """SGD with momentum in 8 bits: 1.02 bytes per parameter.

    momentum, dampening, nesterov: as in torch.optim.SGD; momentum=0 keeps no state. See `Adam8bit` for the others.
    """

    update = staticmethod(sgd)
    formats = {"momentum_buffer": lambda n: DynamicTree(8, True, (1, n))}
    torch_class = torch.optim.SGD
    torch_states = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        block_size: int = 256,
        bf16_stochastic_round: bool = False,
        maximize: bool = False,
        full_precision: FullPrecision = (),
        compile: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "block_size": block_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "maximize": maximize,
        }
        super().__init__(params, defaults, full_precision=full_precision, compile=compile)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("SGD8bit: nesterov needs momentum > 0 and dampening = 0")

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"nesterov": bool(group["nesterov"])}

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def scalars(self, group: dict[str, Any], lr: float | Tensor, step: float) -> dict[str, float | Tensor]:
        return {
            "lr": lr,
            "weight_decay": float(group["weight_decay"]),
            "momentum": float(group["momentum"]),
            "weight": 1.0 if step == 1 else 1 - float(group["dampening"]),
        }
