"""torchao.quantization.transform_module: how `quantize_` learns of a config of your own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = ["register_quantize_module_handler"]

HANDLERS: dict[type, Callable[..., nn.Module]] = {}
"""What `quantize_` calls for a config of this class: `(module, config) -> module`."""

Handler = TypeVar("Handler", bound=Callable[..., nn.Module])


def register_quantize_module_handler(config_type: type[Any]) -> Callable[[Handler], Handler]:
    """Have `quantize_` call the decorated `handler(module, config) -> module` for configs of this class.

    @register_quantize_module_handler(MyConfig)
    def quantize(module, config):
        module.weight = nn.Parameter(ao.Intx(bits=config.bits).quantize(module.weight), requires_grad=False)
        return module
    """

    def register(handler: Handler) -> Handler:
        HANDLERS[config_type] = handler
        return handler

    return register
