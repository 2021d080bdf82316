"""torchao.float8.fsdp_utils: weights that FSDP2 gathers in float8."""

from __future__ import annotations

from typing import Any

from ao.train import precompute_float8_dynamic_scale_for_fsdp

from ..kinds import Kind

__all__ = ["WeightWithDynamicFloat8CastTensor", "precompute_float8_dynamic_scale_for_fsdp"]


class WeightWithDynamicFloat8CastTensor(metaclass=Kind):
    """What `enable_fsdp_float8_all_gather=True` makes of a weight."""

    @staticmethod
    def holds(x: Any) -> bool:
        """Whether `x` is one."""
        return type(x).__name__ == "CastOnGather"
