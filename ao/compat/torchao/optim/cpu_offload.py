"""torchao.optim.cpu_offload."""

from . import CPUOffloadOptimizer

__all__ = ["CPUOffloadOptimizer"]
