"""torchao.prototype.awq.core."""

from . import AWQObservedLinear

__all__ = ["AWQObservedLinear"]
