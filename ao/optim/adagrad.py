"""Adagrad (Duchi, Hazan and Singer, JMLR 12, 2011), by the formulas of torch.optim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ao.dtypes import DynamicTree, Spec

from .optimizer import FullPrecision, LowBitOptimizer
from .sharded import local


def adagrad(
    param: Tensor, grad: Tensor, states: Mapping[str, Tensor], h: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    g = grad + weight_decay * param
    s = s + g**2
    param = param - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
    """
    grad = grad + h["weight_decay"] * param
    total = states["sum"] + grad * grad
    return param - h["step_size"] * (grad / (total.sqrt() + h["eps"])), {"sum": total}


class Adagrad8bit(LowBitOptimizer):
    """Adagrad with an 8-bit state: 1.02 bytes per parameter.

    lr_decay, weight_decay, initial_accumulator_value, eps: as in torch.optim.Adagrad. See `Adam8bit` for the others.

    The sum of squares is in the unsigned dynamic tree map. It stops growing where a square is less than half a step of the
    map, about a hundredth of the sum: later steps are then larger than those of float32.
    """

    update = staticmethod(adagrad)
    formats = {"sum": lambda n: DynamicTree(8, False, (1, n))}
    torch_class = torch.optim.Adagrad
    torch_states = ("step", "sum")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        block_size: int = 256,
        bf16_stochastic_round: bool = False,
        maximize: bool = False,
        full_precision: FullPrecision = (),
        compile: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "block_size": block_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "maximize": maximize,
        }
        super().__init__(params, defaults, full_precision=full_precision, compile=compile)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        for name in ("lr_decay", "initial_accumulator_value"):
            if not group[name] >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {group[name]!r}")

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    def new_state(self, p: Tensor, specs: Iterable[tuple[str, Spec | None]]) -> dict[str, Any]:
        """The states of a parameter before the first step."""
        state = super().new_state(p, specs)
        group = next(group for group in self.param_groups if any(p is each for each in group["params"]))
        start = float(group["initial_accumulator_value"])
        if start:
            total = local(state["sum"])
            total.copy_(torch.full(total.shape, start, dtype=torch.float32, device=total.device))
        return state

    def scalars(self, group: dict[str, Any], lr: float | Tensor, step: float) -> dict[str, float | Tensor]:
        return {
            "step_size": lr / (1 + (step - 1) * float(group["lr_decay"])),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
        }
