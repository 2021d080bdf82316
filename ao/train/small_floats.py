"""Training with the products of MX and NVFP4 numbers: all three products of a linear layer, over weights in floating point.

Blackwell has such products; elsewhere the same numbers are multiplied in floating point, which is slower than no quantization:
to see what a run will come to, and to train a model for such a chip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ao.dtypes import NVFP4, FloatX

from .recipe import Gemm, Recipe
from .training_config import TrainingConfig


@dataclass(frozen=True)
class MXFP8TrainingConfig(TrainingConfig):
    """MXFP8 products: every operand is e4m3 in blocks of 32 along the sum, which share a power of two (arXiv:2506.08027).

    scale_rule: how the power of two is found (`FloatX`): with "rceil" no number saturates.

    in_features and out_features must be multiples of 32; tokens are filled up.
    """

    scale_rule: Literal["floor", "ceil", "rceil", "even"] = "rceil"

    def recipe(self) -> Recipe:
        """The recipe of the layers."""
        each = FloatX(4, 3, scale_rule=self.scale_rule)
        return Recipe(Gemm(each, each), Gemm(each, each), Gemm(each, each), pad=True)


@dataclass(frozen=True)
class MXFP4TrainingConfig(TrainingConfig):
    """MXFP4 products: every operand is e2m1 in blocks of 32 along the sum, which share a power of two (arXiv:2502.20586).

    rounding: of gradients. "stochastic" keeps their mean; a power of two is then the next one above, so that none saturates.
    hadamard: points of the Hadamard matrix that turns both operands of the weight's gradient: 0, 16 or 32.

    in_features and out_features must be multiples of 32; tokens are filled up. Raises ValueError for other parameters.
    """

    rounding: Literal["nearest", "stochastic"] = "stochastic"
    hadamard: int = 32

    def __post_init__(self) -> None:
        _check(self)

    def recipe(self) -> Recipe:
        """The recipe of the layers."""
        each = FloatX(2, 1, scale_rule="even")
        grad = FloatX(2, 1, scale_rule="rceil", rounding="stochastic") if self.rounding == "stochastic" else each
        return Recipe(Gemm(each, each), Gemm(grad, each), Gemm(grad, each, hadamard=self.hadamard), pad=True)


@dataclass(frozen=True)
class NVFP4TrainingConfig(TrainingConfig):
    """NVFP4 products (arXiv:2509.25149): e2m1 with a scale in e4m3 per 16 numbers along the sum and a float32 per operand.

    rounding: of gradients; "stochastic" keeps their mean.
    hadamard: points of the Hadamard matrix that turns both operands of the weight's gradient: 0 or 16.
    square_weights: scales of weights belong to squares of 16 x 16, so that forward and backward see the same weight.

    The paper keeps the last layers of a model, some 15 %, in bfloat16, and the head: choose them by module_filter_fn.
    in_features and out_features must be multiples of 16; tokens are filled up. Raises ValueError for other parameters.
    """

    rounding: Literal["nearest", "stochastic"] = "stochastic"
    hadamard: int = 16
    square_weights: bool = True

    def __post_init__(self) -> None:
        _check(self)

    def recipe(self) -> Recipe:
        """The recipe of the layers."""
        grad = replace(NVFP4, rounding=self.rounding)
        weight = replace(NVFP4, block=(16, 16)) if self.square_weights else NVFP4
        return Recipe(Gemm(NVFP4, weight), Gemm(grad, weight), Gemm(grad, NVFP4, hadamard=self.hadamard), pad=True)


def _check(config: MXFP4TrainingConfig | NVFP4TrainingConfig) -> None:
    who = type(config).__name__
    if config.rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{who}: rounding must be 'nearest' or 'stochastic', got {config.rounding!r}")
    if config.hadamard not in (0, 16, 32):
        raise ValueError(f"{who}: hadamard must be 0, 16 or 32, got {config.hadamard!r}")
