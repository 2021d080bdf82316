"""Statistics: what was seen of the input of a layer.

Data that is not finite is refused, by one rule for all that looks at it: `check_finite_inputs`. A mean, a range or a Hessian
that took in one NaN would say nothing of all the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...dtypes import Spec, is_finite
from .observers import Channels, Hessian, Histogram, MinMax, MovingAverage, RangeMethod, Target

OBSERVERS: dict[str, Callable[[], Any]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "histogram": Histogram,
    "channels": Channels,
    "hessian": Hessian,
}
"""What can be remembered of a layer's input, by name."""

RANGES: dict[RangeMethod, str] = {
    "minmax": "minmax",
    "moving_average": "moving_average",
    "percentile": "histogram",
    "mse": "histogram",
}
"""The observer that a way to choose a static range needs."""

ATTRIBUTE = "_ao_statistics"


@dataclass
class Statistics:
    """What was seen of the input of one layer.

    observers: by their name in `OBSERVERS`.
    calls: how many batches came by.
    target: set by `quantize_` where the outputs of the original model are known.
    """

    observers: dict[str, Any] = field(default_factory=dict)
    calls: int = 0
    target: Target | None = None

    def observe(self, x: Tensor) -> None:
        """x: (..., K)."""
        if x.numel():
            self.calls += 1
            for observer in self.observers.values():
                observer.observe(x)

    def lacks(self, names: Iterable[str]) -> list[str]:
        """Which of the observers of `names` are not there, or saw nothing."""
        return [name for name in names if name not in self.observers or not self.calls]

    def amax(self, method: RangeMethod, act: Spec, percentile: float = 0.9999) -> Tensor:
        """The largest magnitude that a static activation of Spec `act` should represent, a float32 scalar."""
        observer = self.observers[RANGES[method]]
        if method == "percentile":
            return observer.percentile(percentile)
        return observer.best(act) if method == "mse" else observer.amax()


def check_finite_inputs(x: Tensor, layer: str, batch: str) -> None:
    """Raise ValueError for NaN and infinite values among the inputs of a layer. batch: which one, as the user knows it."""
    if not is_finite(x):
        raise ValueError(
            f"{layer}: {batch} gives this layer NaN or infinite inputs, which say nothing of its range or error; leave it "
            "out, or find out where they come from"
        )


def act_scale(act: Spec, amax: Tensor) -> Tensor:
    """The scale with which `act`, one per tensor and symmetric, reaches `amax`: a float32 tensor of one element."""
    qparams = act.choose_qparams(amax.float().abs().reshape(1, 1), (1, 1))
    if set(qparams) != {"scale"}:
        raise ValueError(f"a static activation is symmetric, and {act} has a zero point; use MappingType.SYMMETRIC")
    return qparams["scale"].reshape(())


def statistics_of(module: nn.Module) -> Statistics | None:
    """What `calibrate` saw of the input of a layer, or None."""
    return module.__dict__.get(ATTRIBUTE)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer: its first argument, positional or by name."""
    return next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
