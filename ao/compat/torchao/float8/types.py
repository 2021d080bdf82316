"""torchao.float8.types."""

from ao import PerGroup, PerRow, PerTensor

__all__ = ["FP8Granularity"]

FP8Granularity = PerTensor | PerRow | PerGroup
