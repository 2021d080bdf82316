"""torchao.prototype.smoothquant.core."""

from . import (
    SmoothQuantObservedLinear,
    SmoothQuantStep,
)

__all__ = ["SmoothQuantObservedLinear", "SmoothQuantStep"]
