"""Words to whoever traces: whether one is there, which of our functions it takes for programs, what it knows of a shape, and
what its graph may hold.

ONNX's operators see numbers, not bits: nothing there reads a float32 as an integer, and none of a compiler's own operators has
a translation. So code that does either asks here, and writes plain arithmetic instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

_F = TypeVar("_F", bound=Callable[..., Any])


def passed_over(function: _F) -> _F:
    """`function`, which Dynamo looks into where a program that it traces calls it, and never takes for a program itself.

    It passes over the layers of torch.nn when they are compiled in place, and would go on to compile the Python below them,
    call by call: with a plain weight there is none, with a quantized one there are dozens of small functions.
    """
    strategy = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)  # the function, and what it calls
    set_code_exec_strategy(function.__code__, strategy)
    return function


@contextmanager
def unrecorded() -> Iterator[None]:
    """torch.jit.trace records nothing inside. It would keep a QTensor whose shape is asked for as a constant of the graph."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def fresh(t: torch.Tensor) -> torch.Tensor:
    """What an autograd.Function returns, while a program is traced as a tensor that nothing wrote to in place: of others
    TorchDynamo of PyTorch 2.11 loses the gradient (pytorch/pytorch#180642). A compiler fuses the copy away."""
    return t.clone() if torch.compiler.is_compiling() else t


def is_eager(x: torch.Tensor, or_recorded: bool = True, on_meta: bool = False) -> bool:
    """Whether ops on `x` run at once and on memory: nothing is being traced, and `x` is neither a subclass nor on meta, nor
    one of torch.func's.

    or_recorded: also where torch.jit.trace records what runs. on_meta: whether that holds of an `x` on meta, where there is no
    memory.
    """
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter) or x.is_meta is not on_meta:
        return False
    if not or_recorded and torch._C._is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return torch._guards.TracingContext.try_get() is None


def exporting() -> bool:
    """Whether `torch.onnx.export(..., dynamo=True)` is tracing."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def reads_no_bits() -> bool:
    """Whether a graph is traced that cannot take the bits of an integer for a float: for ONNX, or by torch.jit.trace."""
    return exporting() or torch._C._get_tracing_state() is not None


def known(condition: bool | torch.SymBool | torch.Tensor, otherwise: bool = False) -> bool:
    """Whether a condition on shapes holds; `otherwise` where they depend on data, so that a graph cannot ask."""
    if isinstance(condition, (bool, torch.Tensor)):  # torch.jit.trace takes the sizes of a shape for tensors
        return bool(condition)
    from torch.fx.experimental import symbolic_shapes  # sympy: only where something is traced

    return symbolic_shapes.guard_or_true(condition) if otherwise else symbolic_shapes.guard_or_false(condition)
