"""Whether and how a model is compiled: its wrapper taken off, and its settings, so that other code can run alike."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Function = Callable[..., Any]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of what `torch.compile(module)` returns, or the model itself."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is compiled: by `torch.compile(module)`, `module.compile()`, or as `forward`."""
    return bool(_compiled_functions(model))


@dataclass(frozen=True)
class Compiler:
    """Compiles a function as some model is compiled, or leaves it as it is.

    key: the settings as text, under which timings can be kept; None for a backend that cannot be described.
    compile: the function that compiles.
    is_eager: whether it leaves functions as they are.
    """

    key: str | None
    compile: Callable[[Function], Function]
    is_eager: bool = False


def compiler_of(model: nn.Module) -> Compiler:
    """The compiler of a model: the same mode and options without CUDA graphs, which whoever measures brings along. Of a
    model that is not compiled, one that leaves functions as they are."""
    functions = _compiled_functions(model)
    if not functions and model is unwrapped(model):
        return Compiler("eager", lambda function: function, is_eager=True)
    import torch._inductor.config as inductor

    config = functions[0].get_compiler_config() if functions else {}  # type: ignore[attr-defined]
    if config is None and model is not unwrapped(model):
        return Compiler(None, model.dynamo_ctx)  # type: ignore[arg-type]  # a backend other than Inductor
    usual = inductor.get_config_copy() if config else {}
    options = {k: v for k, v in (config or {}).items() if v != usual.get(k) and not k.startswith("triton.cudagraph")}

    def compile(function: Function) -> Function:
        return torch.compile(function, dynamic=False, options=options or None)

    return Compiler(json.dumps(options, sort_keys=True, default=str), compile)


def compiled_caller(model: nn.Module) -> nn.Module | None:
    """The model as compiled code that is calling it now has it: the wrapper of `torch.compile(model)`, or, where a function
    around it is compiled, a new wrapper with the settings of that. None where nothing compiled is among the callers."""
    from torch._dynamo.eval_frame import OptimizedModule

    around: Any = None
    frame: Any = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, OptimizedModule) and unwrapped(owner) is model:
            return owner
        # What `torch.compile(function)` returns, which has the settings as `self`.
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == OptimizedModule.__module__:
            around = owner
        frame = frame.f_back
    return None if around is None else around(model)


def _compiled_functions(model: nn.Module) -> list[Function]:
    functions = []
    for module in dict.fromkeys([model, *unwrapped(model).modules()]):
        for function in (module.__dict__.get("forward"), module._compiled_call_impl):
            if hasattr(function, "get_compiler_config"):
                functions.append(function)
    return functions  # type: ignore[return-value]
