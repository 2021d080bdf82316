"""torchao.optim.subclass_4bit."""

from .states import OptimState4bit

__all__ = ["OptimState4bit"]
