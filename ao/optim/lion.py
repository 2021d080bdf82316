"""Lion (arXiv:2302.06675)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ao.dtypes import DynamicTree

from .optimizer import FullPrecision, LowBitOptimizer


def lion(
    param: Tensor, grad: Tensor, states: Mapping[str, Tensor], h: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    param = param * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * grad)
    m = beta2 * m + (1 - beta2) * grad
    """
    m = states["exp_avg"]
    direction = (m + h["one_minus_beta1"] * (grad - m)).sign()
    # The sign of NaN is 0, which would hide it.
    direction = direction + (grad - grad)
    return param * h["decay"] - h["lr"] * direction, {"exp_avg": m + h["one_minus_beta2"] * (grad - m)}


class Lion8bit(LowBitOptimizer):
    """Lion with an 8-bit state: 1.02 bytes per parameter.

    See `Adam8bit` for the parameters. Lion wants a 3 to 10 times smaller lr than AdamW, and a larger weight_decay.
    """

    update = staticmethod(lion)
    formats = {"exp_avg": lambda n: DynamicTree(8, True, (1, n))}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        block_size: int = 256,
        bf16_stochastic_round: bool = False,
        maximize: bool = False,
        full_precision: FullPrecision = (),
        compile: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "block_size": block_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "maximize": maximize,
        }
        super().__init__(params, defaults, full_precision=full_precision, compile=compile)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def scalars(self, group: dict[str, Any], lr: float | Tensor, step: float) -> dict[str, float | Tensor]:
        beta1, beta2 = map(float, group["betas"])
        return {
            "lr": lr,
            "decay": 1 - lr * float(group["weight_decay"]),
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta2": 1 - beta2,
        }
