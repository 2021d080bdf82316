"""`calibrate`: watch what goes into the layers of a model, for the recipes and the static scales that need to know.

    with calibrate(model, config):
        for batch in batches:
            model(batch)
    quantize_(model, config)

`quantize_(model, config, calibration_data=batches)` does this and more: recipes then see each block's input as the quantized
blocks before it leave it (sequential.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...dtypes import Spec
from ..choice import Filter, nothing_taken
from ..config import Config
from ..quantize import jobs_of
from ..read_format import read_format
from ..report import Report
from .statistics import ATTRIBUTE, OBSERVERS, Statistics, check_finite_inputs, first_tensor


@contextmanager
def calibrate(
    model: nn.Module,
    config: Config | Spec | str | None = None,
    filter_fn: Filter | None = None,
    observers: Iterable[str] | None = None,
) -> Iterator[Mapping[str, Statistics]]:
    """While the context is open, watch the inputs of the model's layers. `quantize_` then finds what was seen.

    What `torch.compile` made runs eagerly in the context, so that nothing passes unseen.

    config: watch what this config, or the format of this name, needs, in the layers that it would quantize; None watches
        everything.
    filter_fn: `(module, fully qualified name) -> bool`, which layers to watch; by default those that `quantize_`
        takes and, without a config, every `nn.Linear`.
    observers: names of `OBSERVERS` instead: "minmax", "moving_average", "histogram" (percentile and MSE), "channels" and
        "hessian".

    Yields the statistics by the layers' names. Memory does not grow with the data: a few KiB per layer and, for the Hessian,
    4 * K**2 bytes for a layer of K inputs. The numbers stay with the model until it is quantized or calibrated anew; they
    are not part of its `state_dict`.

    Raises ValueError for an unknown observer and, from the model's call, for a layer whose inputs are not finite; then
    nothing that was seen is kept.
    """
    if isinstance(config, str):
        config = read_format(config, who="calibrate")
    unknown = sorted(set(observers or ()) - OBSERVERS.keys())
    if unknown:
        raise ValueError(f"calibrate: observers must be among {', '.join(OBSERVERS)}; got {', '.join(unknown)}")
    if config is not None:
        jobs = jobs_of(model, config, filter_fn, Report())
        wanted = {owner: job.needs for job in jobs if job.needs for owner in job.owners}
    else:
        keep = filter_fn or (lambda module, _: isinstance(module, nn.Linear))
        wanted = {module: frozenset(OBSERVERS) for name, module in model.named_modules() if keep(module, name)}
        if filter_fn is not None and not wanted:
            raise ValueError(
                nothing_taken([name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
            )
    if observers is not None:
        wanted = dict.fromkeys(wanted, frozenset(observers))
    seen: dict[nn.Module, Statistics] = {}
    for module, needed in wanted.items():
        seen[module] = Statistics({name: OBSERVERS[name]() for name in OBSERVERS if name in needed})
    names_of = {module: name for name, module in model.named_modules()}
    # Compiled code of the model may be from before, without the hooks, and may be called from anywhere.
    with torch.compiler.set_stance("force_eager"), watching(seen, names_of):
        yield {names_of[module]: statistics for module, statistics in seen.items()}
    for module, statistics in seen.items():
        if statistics.calls:
            module.__dict__[ATTRIBUTE] = statistics


@contextmanager
def watching(seen: Mapping[nn.Module, Statistics], names: Mapping[nn.Module, str]) -> Iterator[None]:
    """Give each layer's input to its statistics, as long as the context is open."""

    def watch(statistics: Statistics) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                x = first_tensor(args, kwargs).detach()
                check_finite_inputs(x, names[module], f"its call number {statistics.calls + 1} under calibrate()")
                statistics.observe(x)

        return hook

    handles = [m.register_forward_pre_hook(watch(s), with_kwargs=True) for m, s in seen.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
