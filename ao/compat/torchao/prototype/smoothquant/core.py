"""torchao.prototype.smoothquant.core."""

from . import (
    RunningAbsMaxSmoothQuantObserver,
    SmoothQuantObservedLinear,
    SmoothQuantObserver,
    SmoothQuantStep,
)

__all__ = ["RunningAbsMaxSmoothQuantObserver", "SmoothQuantObservedLinear", "SmoothQuantObserver", "SmoothQuantStep"]
