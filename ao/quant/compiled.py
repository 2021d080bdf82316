"""How a model is compiled: its wrapper taken off, and its settings, so that other code can be compiled alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Function = Callable[..., Any]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of what `torch.compile(module)` returns, or the model itself."""
    return model._modules.get("_orig_mod") or model


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is compiled: by `torch.compile(module)`, `module.compile()`, or as `forward`."""
    return bool(_compiled_functions(model))


@dataclass(frozen=True)
class Compiler:
    """Compiles a function as some model is compiled.

    key: the settings as text, under which timings can be kept; None for a backend that cannot be described.
    compile: the function that compiles.
    """

    key: str | None
    compile: Callable[[Function], Function]


def compiler_of(model: nn.Module) -> Compiler:
    """The compiler of a model: the same mode and options without CUDA graphs, which whoever measures brings along; the
    default mode for a model that is not compiled."""
    import torch._inductor.config as inductor

    functions = _compiled_functions(model)
    config = functions[0].get_compiler_config() if functions else {}  # type: ignore[attr-defined]
    if config is None and model is not unwrapped(model):
        return Compiler(None, model.dynamo_ctx)  # type: ignore[arg-type]  # a backend other than Inductor
    usual = inductor.get_config_copy() if config else {}
    options = {k: v for k, v in (config or {}).items() if v != usual.get(k) and not k.startswith("triton.cudagraph")}

    def compile(function: Function) -> Function:
        return torch.compile(function, dynamic=False, options=options or None)

    return Compiler(json.dumps(options, sort_keys=True, default=str), compile)


def _compiled_functions(model: nn.Module) -> list[Function]:
    functions = []
    for module in dict.fromkeys([model, *unwrapped(model).modules()]):
        for function in (module.__dict__.get("forward"), module._compiled_call_impl):
            if hasattr(function, "get_compiler_config"):
                functions.append(function)
    return functions  # type: ignore[return-value]
