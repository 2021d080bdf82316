"""torchao.optim.subclass_8bit."""

from .states import OptimState8bit

__all__ = ["OptimState8bit"]
