"""Adam and AdamW (arXiv:1412.6980, arXiv:1711.05101), by the formulas of torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ao.dtypes import DynamicTree, Float8, PositiveSteps, Spec

from .optimizer import FullPrecision, LowBitOptimizer


def adam(
    param: Tensor,
    grad: Tensor,
    states: Mapping[str, Tensor],
    h: Mapping[str, Tensor],
    *,
    decoupled: bool,
    amsgrad: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    g = grad (+ weight_decay * param if not decoupled)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    param = param * (1 - lr * weight_decay if decoupled) - lr / correction1 * m / (sqrt(v) / correction2 + eps)

    with correction1 = 1 - beta1**t and correction2 = sqrt(1 - beta2**t); amsgrad takes the largest v so far.
    """
    if decoupled:
        param = param * h["decay"]
    else:
        grad = grad + h["weight_decay"] * param
    m = states["exp_avg"]
    m = m + h["one_minus_beta1"] * (grad - m)
    v = states["exp_avg_sq"] * h["beta2"] + h["one_minus_beta2"] * grad * grad
    new = {"exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        v = new["max_exp_avg_sq"] = torch.maximum(states["max_exp_avg_sq"], v)
    denominator = v.sqrt() * h["one_over_correction2"] + h["eps"]
    return param - h["step_size"] * (m / denominator), new


_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _formats(first: Callable[[int], Spec], second: Callable[[int], Spec]) -> dict[str, Callable[[int], Spec]]:
    return dict(zip(_STATES, (first, second, second)))


_8BIT = _formats(lambda n: DynamicTree(8, True, (1, n)), lambda n: DynamicTree(8, False, (1, n)))
# Without a zero: a second moment that is rounded to zero would make the update explode.
_4BIT = _formats(lambda n: DynamicTree(4, True, (1, n)), lambda n: PositiveSteps(4, (1, n)))
_FP8 = _formats(lambda n: Float8("e4m3", (1, n)), lambda n: Float8("e4m3", (1, n)))


class _Adam(LowBitOptimizer):
    update = staticmethod(adam)
    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.Adam
    torch_states = ("step", *_STATES)
    decoupled = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        block_size: int | None = None,
        bf16_stochastic_round: bool = False,
        maximize: bool = False,
        full_precision: FullPrecision = (),
        compile: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "block_size": self.block_size if block_size is None else block_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "maximize": maximize,
        }
        super().__init__(params, defaults, full_precision=full_precision, compile=compile)

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"decoupled": self.decoupled, "amsgrad": bool(group["amsgrad"])}

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return _STATES if group["amsgrad"] else _STATES[:2]

    def scalars(self, group: dict[str, Any], lr: float | Tensor, step: float) -> dict[str, float | Tensor]:
        beta1, beta2 = map(float, group["betas"])
        weight_decay = float(group["weight_decay"])
        return {
            **({"decay": 1 - lr * weight_decay} if self.decoupled else {"weight_decay": weight_decay}),
            "step_size": lr / (1 - beta1**step),
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "one_over_correction2": (1 - beta2**step) ** -0.5,
            "eps": float(group["eps"]),
        }


class Adam8bit(_Adam):
    """Adam with 8-bit states: 2.03 bytes per parameter in place of 8 (arXiv:2110.02861).

    params: parameters, (name, parameter) pairs, or dicts with settings of their own, `block_size` among them.
    lr: a number, or a tensor of one element. A number may be assigned to `group["lr"]` at any time.
    betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.Adam.
    block_size: elements that share a scale; by default 256, and 128 for the 4-bit optimizers.
    bf16_stochastic_round: round bfloat16 parameters stochastically (stochastic_rounding.py). The seeds are drawn from
        torch's generator of the CPU: torch.manual_seed makes a run reproducible, and ranks that hold replicas of a
        parameter must be seeded alike.
    full_precision: parameters, or modules whose parameters, keep float32 states; give the embeddings here.
    compile: run the step in compiled graphs where a compiler is found.

    The first moment is in the signed dynamic tree map, the second in the unsigned one. Raises ValueError for settings out
    of range, TypeError for parameters of another dtype than float32, bfloat16 and float16.
    """

    formats = _8BIT


class Adam4bit(_Adam):
    """Adam with 4-bit states: 1.06 bytes per parameter (arXiv:2309.01507, without its rank-1 scales).

    The first moment is in the signed dynamic tree map, the second in 16 even steps without zero.
    See `Adam8bit` for the parameters.
    """

    formats = _4BIT
    block_size = 128
    block_multiple = 8


class AdamFp8(_Adam):
    """Adam with float8 e4m3 states: 2.03 bytes per parameter. See `Adam8bit` for the parameters.

    The second moment is rounded stochastically, by a hash of the number, and never to zero (stochastic_rounding.py).
    """

    formats = _FP8


class _AdamW(_Adam):
    torch_class = torch.optim.AdamW
    decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        block_size: int | None = None,
        bf16_stochastic_round: bool = False,
        maximize: bool = False,
        full_precision: FullPrecision = (),
        compile: bool = True,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            block_size=block_size,
            bf16_stochastic_round=bf16_stochastic_round,
            maximize=maximize,
            full_precision=full_precision,
            compile=compile,
        )


class AdamW8bit(_AdamW):
    """AdamW with 8-bit states: a drop-in for torch.optim.AdamW at 2.03 bytes of state per parameter.

    See `Adam8bit` for the parameters.
    """

    formats = _8BIT


class AdamW4bit(_AdamW):
    """AdamW with 4-bit states: 1.06 bytes per parameter. See `Adam4bit` for the formats, `Adam8bit` for the parameters."""

    formats = _4BIT
    block_size = 128
    block_multiple = 8


class AdamWFp8(_AdamW):
    """AdamW with float8 e4m3 states: 2.03 bytes per parameter. See `Adam8bit` for the parameters."""

    formats = _FP8


class AdamW(_AdamW):
    """AdamW with float32 states, and stochastic rounding of bfloat16 parameters. See `Adam8bit` for the parameters.

    There is nothing to share a scale: block_size and full_precision change nothing.
    """
