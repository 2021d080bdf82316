"""`generate` of a quantized model on a CUDA device looks one step late whether it shall stop, so that the GPU never waits for the
host: while it computes a token, the host queues the next.

transformers has such a check (`DeferredStopCheck`, of one more step of the model at the end, which it takes back), and asks for
it on other devices alone. Without it a step takes the time of the host and that of the GPU, of which quantization shortens one.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import torch
from transformers.generation import utils as generation

from ..dtypes import QTensor

_late: ContextVar[bool] = ContextVar("late", default=False)
"""Whether what samples now is a quantized model."""


def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
    """As in transformers."""
    token = _late.set(any(isinstance(p, QTensor) for p in self.parameters()))
    try:
        return _original_sample(self, *args, **kwargs)
    finally:
        _late.reset(token)


def _is_supported(device: torch.device, *args: Any, **kwargs: Any) -> bool:
    """As in transformers; a CUDA device is as one that it takes, where a quantized model samples."""
    if _late.get() and device.type == "cuda":
        device = torch.device("mps")
    return _original_is_supported(device, *args, **kwargs)


_original_sample = generation.GenerationMixin._sample
_check = getattr(generation, "DeferredStopCheck", None)  # not in all versions
if _check is not None:
    _original_is_supported = _check.is_supported
    generation.GenerationMixin._sample = functools.wraps(_original_sample)(_sample)  # type: ignore[method-assign]
    _check.is_supported = staticmethod(functools.wraps(_original_is_supported)(_is_supported))
