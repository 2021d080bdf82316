"""torchao.optim.subclass_fp8."""

from .states import OptimStateFp8

__all__ = ["OptimStateFp8"]
