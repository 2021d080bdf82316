"""torchao.quantization.granularity: which elements share a scale."""

from ao import Granularity, PerAxis, PerBlock, PerGroup, PerRow, PerTensor, PerToken

__all__ = ["Granularity", "PerAxis", "PerBlock", "PerGroup", "PerRow", "PerTensor", "PerToken"]
