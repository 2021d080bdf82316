"""`benchmark_model`, and what every measurement here is made of: interleaved rounds, medians and their noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Key = TypeVar("Key", bound=Hashable)


def benchmark_model(
    model: nn.Module | Callable[..., Any],
    num_runs: int,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    device_type: str | None = None,
) -> float:
    """The time of `model(*args, **kwargs)` in milliseconds, on every device: the median of `num_runs` runs, after three
    that do not count (the first of which compiles a compiled model).

    model: a module, or any function.
    num_runs: at least 1.
    device_type: "cpu", "cuda", ...; by default the device of the first tensor among the arguments, or of the model.

    A run is timed from its call until the device has finished it. Gradients are recorded or not as the caller has it, so
    call it under `torch.no_grad()` to measure inference. Raises ValueError for `num_runs` below 1.
    """
    if num_runs < 1:
        raise ValueError(f"benchmark_model: num_runs must be at least 1, got {num_runs}")
    device = _device(model, args, kwargs) if device_type is None else torch.device(device_type)
    arguments = dict(kwargs or {})
    for _ in range(3):
        model(*args, **arguments)
    return 1e3 * statistics.median(seconds(lambda: model(*args, **arguments), device) for _ in range(num_runs))


def seconds(run: Callable[[], object], *devices: torch.device) -> float:
    """The wall-clock time of one run, until the devices have finished it."""
    synchronize(*devices)
    start = time.perf_counter()
    run()
    synchronize(*devices)
    return time.perf_counter() - start


def synchronize(*devices: torch.device) -> None:
    """Wait until the devices have nothing to do."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def interleave(
    timers: Mapping[Key, Callable[[], float]], limit: float, least: int = 5, most: int = 40
) -> dict[Key, list[float]]:
    """Call every timer once per round, so that what disturbs one disturbs all, and return what each said.

    limit: seconds after which no further round starts, once there were `least` rounds; `most` is the most there will be.
    """
    samples: dict[Key, list[float]] = {key: [] for key in timers}
    order = list(timers)
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > limit:
            break
        for key in order:
            samples[key].append(timers[key]())
        order = order[1:] + order[:1]  # the next round starts with another
    return samples


def noise(samples: Sequence[float]) -> float:
    """The standard error of the median, as a part of it: 1.25 * 1.48 * median|x - median| / sqrt(n) / median."""
    middle = statistics.median(samples)
    spread = statistics.median(abs(x - middle) for x in samples)
    return 1.25 * 1.48 * spread / len(samples) ** 0.5 / middle


def _device(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> torch.device:
    tensors = [t for t in tree_leaves((list(args), dict(kwargs or {}))) if isinstance(t, Tensor)]
    if isinstance(model, nn.Module):
        tensors += [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
