"""BitNet b1.58 training (arXiv:2402.17764): ternary weights and int8 activations in forward, floating point in backward.

    w ~ mean|w| * clamp(round(w / mean|w|), -1, 1),     x ~ max|row| / 127 * round(x * 127 / max|row|)

The gradient passes straight through both. The mean is over the whole weight: FSDP2 then gathers two bits per number.
"""

from __future__ import annotations

from dataclasses import dataclass

from ao.dtypes import Intx

from .recipe import Gemm, Recipe
from .training_config import TrainingConfig

TERNARY = Intx(2, (-1, -1), symmetric=True, narrow=True)


@dataclass(frozen=True)
class BitNetTrainingConfig(TrainingConfig):
    """Ternary weights with one scale, int8 activations with one scale per token.

    enable_fsdp_ternary_all_gather: under FSDP2, round weights before they are gathered, which moves an eighth of the bytes of
        bfloat16. Call `precompute_bitnet_scale_for_fsdp` after each optimizer step. Needs in_features in multiples of 8.
    """

    enable_fsdp_ternary_all_gather: bool = True

    def recipe(self) -> Recipe:
        """The recipe of the layers."""
        return Recipe(
            output=Gemm(Intx(8, narrow=True), TERNARY),
            grad_input=Gemm(None, TERNARY),
            gather=TERNARY if self.enable_fsdp_ternary_all_gather else None,
        )


bitnet_training = BitNetTrainingConfig
