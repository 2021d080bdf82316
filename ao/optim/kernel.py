"""The step of a few parameters as one function, which the compiler turns into one kernel per parameter.

The function gets plain tensors: parameters and gradients as rows of one block each, and the fields of the quantized
states. What the rows belong to, their shapes and names, and all hyperparameters stay outside: the number of rows is
symbolic and the hyperparameters are the elements of a tensor. So one graph serves every parameter of a dtype, every
learning rate and every step.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ao.dtypes import QTensor, Spec

from .stochastic_rounding import stochastic_round

Fields = tuple[Tensor, ...]
"""A state: itself if it is in full precision, else the fields of its QTensor of shape (rows, block)."""


class Update(Protocol):
    """An update rule, all in float32: the new parameter and the new states, from tensors and scalar tensors."""

    def __call__(
        self, param: Tensor, grad: Tensor, states: Mapping[str, Tensor], h: Mapping[str, Tensor], **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Plan:
    """What a step does, apart from tensors: the static half of its arguments.

    update: the rule.
    options: keyword arguments of the rule.
    scalars: the names of the elements of `hyper`.
    states: the names of the states, each with the Spec of its rows or None for full precision.
    maximize: whether to climb.
    stochastic: whether parameters are rounded to bfloat16 stochastically.
    """

    update: Update
    options: tuple[tuple[str, Any], ...]
    scalars: tuple[str, ...]
    states: tuple[tuple[str, Spec | None], ...]
    maximize: bool
    stochastic: bool


Step = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Sequence[Fields]], Tensor, Sequence[Tensor], int], None]


def make_step(plan: Plan) -> Step:
    """The function that updates parameters and states in place."""
    specs = [(name, spec, () if spec is None else field_names(spec)) for name, spec in plan.states]
    options = dict(plan.options)

    def step(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Fields]],
        hyper: Tensor,
        seeds: Sequence[Tensor],
        start: int,
    ) -> None:
        h = {name: hyper[i] for i, name in enumerate(plan.scalars)}
        for i in range(len(params)):
            param, grad = params[i], grads[i].float()
            values = {}
            for (name, spec, names), fields in zip(specs, states[i]):
                if spec is None:
                    values[name] = fields[0]
                else:
                    values[name] = spec.wrap(dict(zip(names, fields)), torch.float32, param.shape).decode()
            new, new_values = plan.update(param.float(), -grad if plan.maximize else grad, values, h, **options)
            for (name, spec, names), fields in zip(specs, states[i]):
                if spec is None:
                    fields[0].copy_(new_values[name])
                    continue
                q = spec.quantize(new_values[name])
                for field, target in zip(names, fields):
                    if spec.tensor_type.roles[field] != "shared":
                        target.copy_(getattr(q, field))
            param.copy_(stochastic_round(new, seeds[i], start) if plan.stochastic else new)

    return step


@functools.cache
def field_names(spec: Spec) -> tuple[str, ...]:
    """The fields of rows that `spec` quantizes."""
    return tuple(row(spec, torch.device("cpu")).fields())


def row(spec: Spec, device: torch.device) -> QTensor:
    """One row of zeros."""
    return spec.quantize(torch.zeros(1, spec.block[-1], device=device))  # type: ignore[attr-defined]


def run_eager(
    plan: Plan,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Fields]],
    hyper: Tensor,
    seeds: Sequence[Tensor],
) -> None:
    """The step without a compiler: one parameter after another, in pieces that bound the temporaries."""
    step = make_step(plan)
    for i, (param, grad) in enumerate(zip(params, grads)):
        rows = max(_PIECE // max(param.stride(0), 1), 1) if param.numel() else 1
        for a in range(0, param.shape[0], rows):
            fields = [
                tuple(t if t.shape[0] != param.shape[0] else t[a : a + rows] for t in state) for state in states[i]
            ]
            piece = slice(a, a + rows)
            step([param[piece]], [grad[piece]], [fields], hyper, seeds[i : i + 1], a * param.stride(0))


_PIECE = 2**22

CHUNKS = {"cpu": (1,), "cuda": (8, 1)}
"""How many parameters of one size may share a graph, by kind of device. A CPU has no launches to save."""


def run_compiled(
    plan: Plan,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Fields]],
    hyper: Tensor,
    seeds: Sequence[Tensor],
) -> None:
    """The step in compiled graphs. The parameters have one size and one dtype, and so do the gradients."""
    sizes = CHUNKS.get(params[0].device.type, CHUNKS["cuda"])
    start = 0
    while start < len(params):
        size = next(s for s in sizes if s <= len(params) - start)
        part = slice(start, start + size)
        key = (plan, size, params[0].dtype, grads[0].dtype, params[0].device)
        args = _flatten(params[part], grads[part], states[part], hyper, seeds[part])
        call = _compiled.get(key)
        if call is None:
            by_row = _by_row(plan, size)
            call = _compile(plan, size, args, by_row)
            call(*(_mark(t) if symbolic else t for t, symbolic in zip(args, by_row)))
            _compiled[key] = call
        else:
            call(*args)
        start += size


_compiled: dict[Any, Callable[..., Any]] = {}


def _flatten(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Fields]],
    hyper: Tensor,
    seeds: Sequence[Tensor],
) -> list[Tensor]:
    return [hyper, *params, *grads, *seeds, *(t for state in states for fields in state for t in fields)]


def _by_row(plan: Plan, size: int) -> list[bool]:
    """Which of the flattened arguments have one entry per row: their first dim is symbolic."""
    states = []
    for _, spec in plan.states:
        states += [True] if spec is None else [spec.tensor_type.roles[f] != "shared" for f in field_names(spec)]
    return [False, *[True] * (2 * size), *[False] * (size if plan.stochastic else 0), *states * size]


def _compile(plan: Plan, size: int, args: Sequence[Tensor], by_row: Sequence[bool]) -> Callable[..., Any]:
    """Trace the step of `size` parameters to plain operators, rows symbolic, and compile these."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    step = make_step(plan)

    def flat(*args: Tensor) -> None:
        it = iter(args)
        hyper = next(it)
        params, grads = ([next(it) for _ in range(size)] for _ in range(2))
        seeds = [next(it) for _ in range(size if plan.stochastic else 0)]
        states = [
            [tuple(next(it) for _ in (field_names(spec) if spec else ("",))) for _, spec in plan.states]
            for _ in range(size)
        ]
        step(params, grads, states, hyper, seeds, 0)

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        graph = make_fx(flat, tracing_mode="symbolic")(*(_fake(mode, t, s) for t, s in zip(args, by_row)))
    return torch.compile(graph, fullgraph=True)


def _fake(mode: Any, t: Tensor, by_row: bool) -> Tensor:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    dims = [DimDynamic.DUCK if by_row and d == 0 and n > 1 else DimDynamic.STATIC for d, n in enumerate(t.shape)]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dims, constraint_sizes=[None] * t.dim())
    return mode.from_tensor(t, symbolic_context=context, source=ConstantSource(f"input_{id(t)}"))


def _mark(t: Tensor) -> Tensor:
    t = t.detach()
    torch._dynamo.maybe_mark_dynamic(t, 0)
    return t


@functools.cache
def has_compiler(kind: str) -> bool:
    """Whether code for this kind of device can be compiled here: a C++ compiler for the CPU, Triton for most others."""
    if kind == "cpu":
        try:
            from torch._inductor.cpp_builder import get_cpp_compiler

            return shutil.which(get_cpp_compiler()) is not None
        except Exception:  # each platform has its own way to say that there is none
            return False
    if kind == "mps":
        return True
    return bool(torch.utils._triton.has_triton())
