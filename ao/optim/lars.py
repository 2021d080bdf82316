"""LARS: SGD with momentum, each parameter's update no larger than a part of it (arXiv:1708.03888)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ao.dtypes import DynamicTree

from .layerwise import LayerwiseOptimizer
from .optimizer import FullPrecision


def lars(
    param: Tensor, grad: Tensor, states: Mapping[str, Tensor], h: Mapping[str, Tensor], *, nesterov: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    g = grad + weight_decay * param
    b = momentum * b + (1 - dampening) * g          b = g at the first step
    u = g + momentum * b if nesterov else b
    """
    grad = grad + h["weight_decay"] * param
    if not states:
        return grad, {}
    buffer = h["momentum"] * states["momentum_buffer"] + h["weight"] * grad
    return grad + h["momentum"] * buffer if nesterov else buffer, {"momentum_buffer": buffer}


class LARS8bit(LayerwiseOptimizer):
    """LARS with an 8-bit state: 1.02 bytes per parameter. param = param - lr * min(1, max_unorm * |param| / |u|) * u.

    max_unorm: how large an update may be, as a part of the parameter's norm; 0 for any size. The paper scales each gradient to
        that size, before the momentum and small ones too; this one, as bitsandbytes', shrinks an update that is larger.

    u is SGD's, with momentum, dampening, weight_decay and nesterov as in torch.optim.SGD. See `Adam8bit` for the others.
    Raises ValueError for settings out of range.
    """

    update = staticmethod(lars)
    formats = {"momentum_buffer": lambda n: DynamicTree(8, True, (1, n))}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
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
            "max_unorm": max_unorm,
            "block_size": block_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "maximize": maximize,
        }
        super().__init__(params, defaults, full_precision=full_precision, compile=compile)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(f"{type(self).__name__}: nesterov needs momentum > 0 and dampening = 0")

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"nesterov": bool(group["nesterov"])}

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def scalars(self, group: dict[str, Any], lr: float | Tensor, step: float) -> dict[str, float | Tensor]:
        return {
            "weight_decay": float(group["weight_decay"]),
            "momentum": float(group["momentum"]),
            "weight": 1.0 if step == 1 else 1 - float(group["dampening"]),
        }
