"""The name of the layer that computes just now, for a message: found on the stack, so that it costs nothing before."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn


def running_layer(holds: Callable[[Tensor], bool]) -> str | None:
    """The innermost module on the stack that has a parameter or buffer of its own that `holds`; None where there is none.

    Named as in the outermost module on the stack that has it, and by its class where it is that module itself.
    """
    if torch.compiler.is_dynamo_compiling():
        return None  # it cannot look at the stack
    layer, name = None, None
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if layer is None and any(holds(t) for t in own):
                layer, name = module, ""
            elif layer is not None:
                name = next((n for n, m in module.named_modules() if m is layer), name)
        frame = frame.f_back  # type: ignore[assignment]
    return None if layer is None else f"{name} ({type(layer).__name__})" if name else type(layer).__name__
