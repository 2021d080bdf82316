"""torchao.float8.config: the recipes of float8 training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

import ao.train as train
from ao.train import CastConfig, Float8GemmConfig, Float8LinearRecipeName, ScalingGranularity, ScalingType

__all__ = [
    "CastConfig",
    "Float8GemmConfig",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "ScalingGranularity",
    "ScalingType",
    "e4m3_dtype",
    "e5m2_dtype",
    "recipe_name_to_linear_config",
]

e4m3_dtype = torch.float8_e4m3fn
e5m2_dtype = torch.float8_e5m2


@dataclass(frozen=True)
class Float8LinearConfig(train.Float8LinearConfig):
    """`ao.train.Float8LinearConfig`. force_recompute_fp8_weight_in_bwd: accepted; weights are always cast anew in backward."""

    force_recompute_fp8_weight_in_bwd: bool = False

    @staticmethod
    def from_recipe_name(recipe_name: str | Float8LinearRecipeName) -> Float8LinearConfig:
        """A recipe by name."""
        ours = train.Float8LinearConfig.from_recipe_name(recipe_name)
        return Float8LinearConfig(**{f.name: getattr(ours, f.name) for f in dataclasses.fields(ours)})


recipe_name_to_linear_config = Float8LinearConfig.from_recipe_name
