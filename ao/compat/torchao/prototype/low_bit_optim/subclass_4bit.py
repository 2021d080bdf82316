"""torchao.prototype.low_bit_optim.subclass_4bit."""

from ...optim.subclass_4bit import (
    OptimState4bit,
)

__all__ = [
    "OptimState4bit",
]
