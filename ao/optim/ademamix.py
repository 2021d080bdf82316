"""AdEMAMix: Adam with a second, slow mean of the gradients (arXiv:2409.03137)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ao.dtypes import DynamicTree

from .optimizer import FullPrecision, LowBitOptimizer


def ademamix(
    param: Tensor, grad: Tensor, states: Mapping[str, Tensor], h: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    m = beta1 * m + (1 - beta1) * grad                    the fast mean
    s = beta3 * s + (1 - beta3) * grad                    the slow one
    v = beta2 * v + (1 - beta2) * grad**2
    param = param * (1 - lr * weight_decay) - lr * (m / correction1 + alpha * s) / (sqrt(v) / correction2 + eps)

    with correction1 = 1 - beta1**t and correction2 = sqrt(1 - beta2**t).
    """
    m, slow = states["exp_avg"], states["exp_avg_slow"]
    m = m + h["one_minus_beta1"] * (grad - m)
    slow = slow + h["one_minus_beta3"] * (grad - slow)
    v = states["exp_avg_sq"] * h["beta2"] + h["one_minus_beta2"] * grad * grad
    direction = (m * h["one_over_correction1"] + h["alpha"] * slow) / (v.sqrt() * h["one_over_correction2"] + h["eps"])
    return param * h["decay"] - h["lr"] * direction, {"exp_avg": m, "exp_avg_slow": slow, "exp_avg_sq": v}


class AdEMAMix8bit(LowBitOptimizer):
    """AdEMAMix with 8-bit states: 3.05 bytes per parameter in place of 12.

    betas: of the fast mean, of the squares, and of the slow mean.
    alpha: how much the slow mean counts, beside 1 for the fast one.
    t_alpha, t_beta3: the steps in which alpha grows from 0, and beta3 from beta1, to their values: alpha by a straight line,
        beta3 so that the half-life of the slow mean does. None: from the first step on.

    See `Adam8bit` for the others. The means are in the signed dynamic tree map, the squares in the unsigned one. Raises
    ValueError for settings out of range.
    """

    update = staticmethod(ademamix)
    formats = {
        "exp_avg": lambda n: DynamicTree(8, True, (1, n)),
        "exp_avg_slow": lambda n: DynamicTree(8, True, (1, n)),
        "exp_avg_sq": lambda n: DynamicTree(8, False, (1, n)),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "block_size": block_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "maximize": maximize,
        }
        super().__init__(params, defaults, full_precision=full_precision, compile=compile)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        who = type(self).__name__
        if len(group["betas"]) != 3:
            raise ValueError(f"{who}: betas must be three numbers, got {group['betas']!r}")
        if not group["alpha"] >= 0:
            raise ValueError(f"{who}: alpha must not be negative, got {group['alpha']!r}")
        for name in ("t_alpha", "t_beta3"):
            if group[name] is not None and not group[name] > 0:
                raise ValueError(f"{who}: {name} must be above 0, or None, got {group[name]!r}")

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_slow", "exp_avg_sq")

    def scalars(self, group: dict[str, Any], lr: float | Tensor, step: float) -> dict[str, float | Tensor]:
        beta1, beta2, beta3 = map(float, group["betas"])
        alpha = float(group["alpha"])
        if group["t_alpha"] is not None:
            alpha *= min(step / group["t_alpha"], 1.0)
        if group["t_beta3"] is not None and step < group["t_beta3"]:
            beta3 = _warmed(beta1, beta3, step / group["t_beta3"])
        return {
            "lr": lr,
            "decay": 1 - lr * float(group["weight_decay"]),
            "alpha": alpha,
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta3": 1 - beta3,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "one_over_correction1": 1 / (1 - beta1**step),
            "one_over_correction2": (1 - beta2**step) ** -0.5,
            "eps": float(group["eps"]),
        }


def _warmed(start: float, end: float, part: float) -> float:
    """The decay whose half-life, -1 / log(decay), lies at `part` of the way between those of `start` and `end`."""
    if not start or not end:
        return end  # a decay of 0 has no half-life
    inverse = (1 - part) / math.log(start) + part / math.log(end)
    return min(math.exp(1 / inverse), end)
