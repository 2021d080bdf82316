"""LAMB: AdamW, each parameter's update no larger than the parameter (arXiv:1904.00962)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ao.dtypes import DynamicTree

from .layerwise import LayerwiseOptimizer
from .optimizer import FullPrecision


def lamb(
    param: Tensor, grad: Tensor, states: Mapping[str, Tensor], h: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    u = m / correction1 / (sqrt(v) / correction2 + eps)

    with correction1 = 1 - beta1**t and correction2 = sqrt(1 - beta2**t), or both 1.
    """
    m = states["exp_avg"]
    m = m + h["one_minus_beta1"] * (grad - m)
    v = states["exp_avg_sq"] * h["beta2"] + h["one_minus_beta2"] * grad * grad
    update = m * h["one_over_correction1"] / (v.sqrt() * h["one_over_correction2"] + h["eps"])
    return update, {"exp_avg": m, "exp_avg_sq": v}


class LAMB8bit(LayerwiseOptimizer):
    """LAMB with 8-bit states: 2.03 bytes per parameter.

    param = param * (1 - lr * weight_decay) - lr * min(1, max_unorm * |param| / |u|) * u, with u of Adam.

    bias_correction: whether the means are corrected for their start at 0.
    max_unorm: how large u may be, as a multiple of the parameter's norm; 0 for any size. The paper has the weight decay in u,
        and makes a small u as large as the parameter too; this one, as bitsandbytes', shrinks one that is larger.

    See `Adam8bit` for the others and the formats. Raises ValueError for settings out of range.
    """

    update = staticmethod(lamb)
    formats = {
        "exp_avg": lambda n: DynamicTree(8, True, (1, n)),
        "exp_avg_sq": lambda n: DynamicTree(8, False, (1, n)),
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_unorm: float = 1.0,
        *,
        block_size: int = 256,
        bf16_stochastic_round: bool = False,
        maximize: bool = False,
        full_precision: FullPrecision = (),
        compile: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_unorm": max_unorm,
            "block_size": block_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "maximize": maximize,
        }
        super().__init__(params, defaults, full_precision=full_precision, compile=compile)

    def decay(self, group: dict[str, Any]) -> float:
        return float(group["weight_decay"])

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def scalars(self, group: dict[str, Any], lr: float | Tensor, step: float) -> dict[str, float | Tensor]:
        beta1, beta2 = map(float, group["betas"])
        corrected = bool(group["bias_correction"])
        return {
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "one_over_correction1": 1 / (1 - beta1**step) if corrected else 1.0,
            "one_over_correction2": (1 - beta2**step) ** -0.5 if corrected else 1.0,
            "eps": float(group["eps"]),
        }
