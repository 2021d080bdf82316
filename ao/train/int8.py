"""int8 training: products of int8 over weights in floating point, or weights that are int8 themselves.

Mixed precision quantizes the operands of the three products by row, and keeps weights, gradients and optimizer as they
are (Jetfire, arXiv:2403.12422; SwitchBack, arXiv:2304.13013). Weight-only keeps the weight as int8 with one scale per row: a
quarter to a half of the memory, and an optimizer step rounds stochastically, so that updates smaller than a step arrive
on average (arXiv:1502.02551).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ao.dtypes import Intx, Spec

from .recipe import Gemm, Recipe
from .training_config import TrainingConfig


@dataclass(frozen=True)
class Int8MixedPrecisionTrainingConfig(TrainingConfig):
    """int8 products in linear layers, each operand with one scale per row of the product: scale = max|row| / 127.

    output, grad_input, grad_weight: which of the three products are int8; the others stay in floating point.
    rounding: "nearest" or "stochastic", of gradients; inputs and weights are rounded to nearest, for which there is no bias to
        take out: rounding them anew at every step is noise in the forward pass.

    Raises ValueError when no product is left, and for another rounding.
    """

    output: bool = True
    grad_input: bool = True
    grad_weight: bool = True
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if not (self.output or self.grad_input or self.grad_weight):
            raise ValueError("Int8MixedPrecisionTrainingConfig: one of output, grad_input and grad_weight must be True")
        self.recipe()

    def recipe(self) -> Recipe:
        """The recipe of the layers."""
        row = Intx(8, narrow=True)
        grad = replace(row, rounding=self.rounding)
        return Recipe(
            Gemm(row, row) if self.output else Gemm(),
            Gemm(grad, row) if self.grad_input else Gemm(),
            Gemm(grad, row) if self.grad_weight else Gemm(),
        )


@dataclass(frozen=True)
class Int8WeightOnlyQuantizedTrainingConfig(TrainingConfig):
    """Trained weights that are int8 with one float32 scale per row, written with stochastic rounding.

    group_size: None for one scale per row, else one per so many elements of it. It must divide in_features.

    Gradients have the dtype that the weight had. The optimizer must write a parameter by in-place ops, as `ao.optim` and
    those of `torch.optim` do, also with `foreach` and `fused`. The state dict of the model has the values of the weights, and
    loading one rounds them to nearest; with `keep_vars=True`, and where they are sharded, it has the weights as they are.
    """

    group_size: int | None = None

    def weight(self) -> Spec:
        """The Spec of the weights."""
        return Intx(8, (1, -1 if self.group_size is None else self.group_size), narrow=True, rounding="stochastic")


int8_mixed_precision_training = Int8MixedPrecisionTrainingConfig
int8_weight_only_quantized_training = Int8WeightOnlyQuantizedTrainingConfig
