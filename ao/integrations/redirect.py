"""Functions of other libraries, put right for quantized tensors where a library has no place to say how.

Many modules import such a function by its name, most of them before they import us. So the function itself is changed, not
the name in its module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any


def redirect(function: Any, to: Callable[..., Any]) -> Callable[..., Any]:
    """Let calls of `function` be calls of `to`. Returns what it did before.

    function: written in Python; of a decorated one, that which is decorated. It has no closure.
    """
    function = inspect.unwrap(function)
    original = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    original.__kwdefaults__, original.__annotations__ = function.__kwdefaults__, function.__annotations__
    function.__code__ = _call.__code__
    function.__defaults__, function.__kwdefaults__ = None, {"_to": to}
    function.__wrapped__ = original  # has the signature
    return original


def _call(*args: Any, _to: Callable[..., Any], **kwargs: Any) -> Any:
    return _to(*args, **kwargs)
