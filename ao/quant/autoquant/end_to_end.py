"""The recorded calls of a model, timed end to end with one set of weights and with another, in interleaved rounds."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..benchmark import interleave, noise, seconds
from ..compiled import unwrapped
from ..report import progress
from .recording import Call


@dataclass(frozen=True)
class Comparison:
    """Milliseconds per call, before and after.

    tolerance: the part of `before` by which the two may differ for no reason: twice their standard error, at least 1 %.
    """

    before: float
    after: float
    tolerance: float

    @property
    def slower(self) -> bool:
        """Whether `after` is slower beyond what chance explains."""
        return self.after > self.before * (1 + self.tolerance)


def compare(
    model: nn.Module,
    calls: Sequence[Call],
    devices: Collection[torch.device],
    before: Callable[[], None],
    after: Callable[[], None],
) -> Comparison:
    """Time the model as `before()` leaves it and as `after()` leaves it. Leaves it as `after()` does.

    It runs as it is, compiled or not, and calls that compiled code around it made are made by such code. Its buffers and the
    state of the random number generators are put back.
    """
    import torch._dynamo.config as dynamo

    # Two sets of weights make two graphs where there would be one, and both must stay.
    limit = max(64, dynamo.recompile_limit)
    with dynamo.patch(recompile_limit=limit), _restored(unwrapped(model), devices):
        repeats = dict.fromkeys(calls, 1)
        warm_ups = [(install, call) for install in (before, after) for call in calls]
        for install, call in progress(warm_ups, "autoquant: warm up the whole model"):
            install()
            once = [_timed(model, call, devices, 1) for _ in range(3)][-1]  # the first ones compile and capture
            if call.plain:
                repeats[call] = max(repeats[call], min(100, math.ceil(5e-3 / max(once, 1e-9))))

        def timer(install: Callable[[], None]) -> Callable[[], float]:
            def measure() -> float:
                install()
                total = 0.0
                for call in calls:
                    _timed(model, call, devices, 1)
                    total += call.count * _timed(model, call, devices, repeats[call])
                return 1e3 * total / sum(call.count for call in calls)

            return measure

        samples = interleave({"before": timer(before), "after": timer(after)}, limit=4.0)
        after()
    tolerance = max(0.01, 2 * math.hypot(noise(samples["before"]), noise(samples["after"])))
    return Comparison(statistics.median(samples["before"]), statistics.median(samples["after"]), tolerance)


def _timed(model: nn.Module, call: Call, devices: Collection[torch.device], repeats: int) -> float:
    """Seconds per call."""
    run = model if call.caller is None else call.caller
    calls = [call.fresh() for _ in range(repeats)]

    def all_of_them() -> None:
        for one in calls:
            torch.compiler.cudagraph_mark_step_begin()
            one(run)

    with call.modes():
        return seconds(all_of_them, *devices) / repeats


@contextlib.contextmanager
def _restored(model: nn.Module, devices: Collection[torch.device]) -> Iterator[None]:
    buffers = [
        (m, name, b, b.detach().clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None
    ]
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        try:
            yield
        finally:
            with torch.inference_mode():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer
                    buffer.detach().copy_(value)
