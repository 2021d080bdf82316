"""torchao.prototype.low_bit_optim.subclass_8bit."""

from ...optim.subclass_8bit import (
    OptimState8bit,
)

__all__ = [
    "OptimState8bit",
]
