"""torchao.prototype.low_bit_optim.cpu_offload."""

from ...optim.cpu_offload import (
    CPUOffloadOptimizer,
)

__all__ = [
    "CPUOffloadOptimizer",
]
