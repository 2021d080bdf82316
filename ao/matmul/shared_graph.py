"""Functions that a traced graph holds once, however many layers call them.

A product that is written out for the compiler is dozens of operators, times the pieces of the weight, and a compiler takes as
long for the hundredth layer as for the first. But a model has layers of few shapes. So what they compute becomes a subgraph
(PyTorch's invoke_subgraph), which is compiled once per shape and called by each layer.

Only for inference: the compiler cuts a graph with a backward into two, and may want to look into what it cuts. An exported
graph holds plain operators, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..dtypes.base import QTensor
from .form import form_of, key_of, leaves, made

try:
    from torch._higher_order_ops.invoke_subgraph import invoke_subgraph_infer

    _invoke: Any = invoke_subgraph_infer
except ImportError:  # before torch 2.13
    _invoke = None

_inline = ContextVar("inline", default=False)


@dataclass
class _Subgraph:
    """What calls with arguments of one form share in a graph that is being traced.

    function: of plain tensors; the compiler knows the subgraph again by it. result: shape, strides and dtype of each tensor that
    it gives, if they are known.
    """

    function: Callable[..., tuple[Tensor, ...]]
    result: list[tuple[Any, Any, torch.dtype]] | None = None


_subgraphs: WeakKeyDictionary[Any, dict[Any, _Subgraph]] = WeakKeyDictionary()


def shared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, whose calls in a traced graph share a subgraph where their arguments are alike but for the numbers in tensors.

    function: of tensors, QTensors and hashable constants; what it returns shares no memory with them.
    """
    several = shared_tuple(lambda *args: (function(*args),))

    @functools.wraps(function)
    def call(*args: Any) -> Tensor:
        return several(*args)[0]

    return call


def shared_tuple(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`shared`, of a function that returns several tensors."""

    @functools.wraps(function)
    def call(*args: Any) -> tuple[Tensor, ...]:
        context = torch._guards.TracingContext.try_get()
        inline = _invoke is None or context is None or _inline.get() or torch.is_grad_enabled()
        if inline or torch.compiler.is_exporting() or _in_region():
            return function(*args)
        assert context is not None
        from torch.fx.experimental.symbolic_shapes import free_symbols  # sympy: only where something is traced

        subgraphs = _subgraphs.setdefault(context, {})
        operands = [t for a in args for t in leaves(a)]
        symbols = free_symbols(operands)
        key = (function, *symbols, *map(key_of, args))
        subgraph = subgraphs.setdefault(key, _Subgraph(_of_operands(function, args)))
        if get_proxy_mode() is None and subgraph.result is not None:
            # Nothing is recorded: the compiler asks what the result looks like, and does so several times for each call.
            first = operands[0]
            return tuple(
                first.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in subgraph.result
            )
        # A compiled subgraph knows of the symbols in shapes, such as of b * n rows, only those that it is given.
        env: Any = context.fake_mode and context.fake_mode.shape_env
        sizes = [env.create_symintnode(symbol, hint=None) for symbol in symbols]
        out = tuple(_invoke(subgraph.function, *operands, *sizes))
        subgraph.result = [(t.shape, t.stride(), t.dtype) for t in out]
        return out

    return call


def _in_region() -> bool:
    """Whether a subgraph is being traced that is not ours, such as one of `torch.compiler.nested_compile_region`: PyTorch does
    not decompose the operators of a subgraph in a subgraph."""
    from torch.fx.experimental import proxy_tensor

    tracer = proxy_tensor._CURRENT_MAKE_FX_TRACER
    return tracer is not None and tracer.is_hop_subgraph_tracer()


@contextmanager
def inlined() -> Iterator[None]:
    """Calls of shared functions inside are written out."""
    token = _inline.set(True)
    try:
        yield
    finally:
        _inline.reset(token)


def _of_operands(
    function: Callable[..., tuple[Tensor, ...]], args: tuple[Any, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    """`function` of the plain tensors in `args`, and of symbols that need no place: they are in the shapes."""

    def call(*operands: Any) -> tuple[Tensor, ...]:
        rest = iter(operands)
        with inlined():  # a subgraph holds no other
            return function(*(_filled(a, rest) for a in args))

    return call


def _filled(a: Any, operands: Iterator[Tensor]) -> Any:
    """`a` with other tensors in it."""
    if isinstance(a, QTensor):
        return made(form_of(a), operands)
    return next(operands) if isinstance(a, Tensor) else a
