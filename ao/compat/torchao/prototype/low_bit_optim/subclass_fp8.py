"""torchao.prototype.low_bit_optim.subclass_fp8."""

from ...optim.subclass_fp8 import (
    OptimStateFp8,
)

__all__ = [
    "OptimStateFp8",
]
