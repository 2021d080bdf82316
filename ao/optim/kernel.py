"""The step of a few parameters as one function, which the compiler turns into one kernel per parameter.

The function gets plain tensors: parameters and gradients as rows of one block each, and the fields of the quantized
states. What the rows belong to, their shapes and names, and all hyperparameters stay outside: the number of rows is
symbolic and the hyperparameters are the elements of a tensor. So one graph serves every parameter of a dtype, every
learning rate and every step.
"""

from __future__ import annotations

import functools
import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    @functools.cached_property
    def by_row(self) -> tuple[bool, ...]:
        """Which tensors of `Rows.tensors` have one entry per row, the others being shared by all rows."""
        flags = [True, True]
        for _, spec in self.states:
            flags += [True] if spec is None else [spec.tensor_type.roles[f] != "shared" for f in field_names(spec)]
        return (*flags, False) if self.stochastic else tuple(flags)


@dataclass
class Rows:
    """One parameter, or a piece of it, as rows of blocks, or of single elements where its states are in full precision.

    noise: int32 (seed, position of the first element), where the plan rounds stochastically.
    """

    param: Tensor
    grad: Tensor
    states: Sequence[Fields]
    noise: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of `Plan.by_row`."""
        noise = [] if self.noise is None else [self.noise]
        return [self.param, self.grad, *(t for fields in self.states for t in fields), *noise]


def rows_of(plan: Plan, tensors: Iterable[Tensor]) -> Rows:
    """The inverse of `Rows.tensors`."""
    it = iter(tensors)
    param, grad = next(it), next(it)
    states = [tuple(next(it) for _ in (field_names(spec) if spec else ("",))) for _, spec in plan.states]
    return Rows(param, grad, states, next(it) if plan.stochastic else None)


def update_rows(plan: Plan, rows: Rows, h: Mapping[str, Tensor]) -> None:
    """The step of one parameter, in place."""
    grad = rows.grad.float()
    values = {}
    for (name, spec), fields in zip(plan.states, rows.states):
        if spec is None:
            values[name] = fields[0]
        else:
            named = dict(zip(field_names(spec), fields))
            values[name] = spec.wrap(named, torch.float32, rows.param.shape).decode()
    new, new_values = plan.update(rows.param.float(), -grad if plan.maximize else grad, values, h, **dict(plan.options))
    if grad.device.type == "cpu" and rows.grad.dtype != torch.float32:
        # As memory of their own. Else each is computed again from the 16-bit gradient where it is quantized, and Inductor takes
        # 32 elements at a time where all that it reads has 16 bits: too many for it to see a number's bits in a register.
        new_values = {name: t.as_strided(t.shape, t.stride()) for name, t in new_values.items()}
    for (name, spec), fields in zip(plan.states, rows.states):
        if spec is None:
            fields[0].copy_(new_values[name])
            continue
        q = spec.quantize(new_values[name])
        for field, target in zip(field_names(spec), fields):
            if q.roles[field] != "shared":
                target.copy_(getattr(q, field))
    if rows.noise is not None:
        new = stochastic_round(new, *rows.noise.unbind())
    rows.param.copy_(new)


@functools.cache
def field_names(spec: Spec) -> tuple[str, ...]:
    """The fields of rows that `spec` quantizes."""
    return tuple(row(spec, torch.device("cpu")).fields())


def row(spec: Spec, device: torch.device) -> QTensor:
    """One row of zeros."""
    return spec.quantize(torch.zeros(1, spec.block[-1], device=device))  # type: ignore[attr-defined]


EAGER_PIECE = {"cpu": 2**18, "cuda": 2**24}
"""The elements at a time without a compiler, by kind of device, which bounds the temporaries."""

COMPILED_PIECE = {"cpu": 2**18, "cuda": 2**30}
"""The same with one. A CPU keeps the values before rounding in its cache: so many per thread. 32-bit indices for a GPU."""

TOGETHER = {"cpu": 1, "cuda": 8}
"""How many parameters of one size share a graph. A CPU has no launches to save."""


def run(plan: Plan, items: Sequence[Rows], hyper: Tensor, compile: bool) -> None:
    """The step of parameters of one dtype, in compiled graphs or eagerly."""
    kind = hyper.device.type
    size = (COMPILED_PIECE if compile else EAGER_PIECE).get(kind, 2**24)
    if kind == "cpu":
        size *= torch.get_num_threads()
    most = TOGETHER.get(kind, 8) if compile else 1
    pieces = [piece for item in items for piece in _pieces(plan, item, size)]
    for _, same in itertools.groupby(pieces, lambda tensors: tensors[0].shape):
        waiting = list(same)
        start = 0
        for count in (most, 1):
            step = _step(plan, count, hyper, waiting[0]) if compile else functools.partial(_step_eagerly, plan)
            while start + count <= len(waiting):
                step(hyper, *itertools.chain(*waiting[start : start + count]))
                start += count


def _pieces(plan: Plan, item: Rows, size: int) -> Iterable[Sequence[Tensor]]:
    """The tensors of `item`, cut into pieces of at most `size` elements, all about as long."""
    tensors = item.tensors()
    rows = item.param.shape[0]
    width = item.param.numel() // max(rows, 1)
    count = math.ceil(rows / max(size // width, 1)) if rows else 1
    if count == 1:
        return [tensors]
    length = math.ceil(rows / count)
    starts = range(0, rows, length)
    parts = [t.split(length) if by_row else [t] * len(starts) for t, by_row in zip(tensors, plan.by_row)]
    if item.noise is not None:
        positions = [(start * width + 2**31) % 2**32 - 2**31 for start in starts]  # they wrap around
        moved = torch.tensor([[0, position] for position in positions], dtype=torch.int32)
        parts[-1] = (item.noise + moved.to(item.noise.device)).unbind()
    return zip(*parts)


def _step_eagerly(plan: Plan, hyper: Tensor, *tensors: Tensor) -> None:
    """The step of one parameter or more, from the tensors of each."""
    h = dict(zip(plan.scalars, hyper.unbind()))
    width = len(plan.by_row)
    for i in range(0, len(tensors), width):
        update_rows(plan, rows_of(plan, tensors[i : i + width]), h)


def _step(plan: Plan, count: int, hyper: Tensor, like: Sequence[Tensor]) -> Callable[..., None]:
    """`_step_eagerly` for `count` parameters like the tensors given, compiled. It is compiled when it is first called."""
    param, grad = like[:2]
    threads = torch.get_num_threads() if param.device.type == "cpu" else 1
    # One row is another graph: a compiler takes a size of 1 for a fact.
    key = (plan, count, param.device, param.dtype, grad.dtype, param.shape[0] == 1, threads)
    if key not in _compiled:

        def first(*args: Tensor) -> None:
            _compiled[key] = _compile(plan, args)
            _compiled[key](*args)

        return first
    return _compiled[key]


_compiled: dict[Any, Callable[..., None]] = {}


def _compile(plan: Plan, args: Sequence[Tensor]) -> Callable[..., None]:
    """Trace `_step_eagerly` to plain operators, rows symbolic and all else as it is, and compile these.

    The graph goes to Inductor directly: the key above is all that there is to guard, and Dynamo's checks of a hundred
    tensors would take longer than a kernel. No piece is too large for 32-bit indices, so that sizes need no check either.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    by_row = itertools.chain([False], itertools.cycle(plan.by_row))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes: list[Any] = [_fake(mode, t, symbolic) for t, symbolic in zip(args, by_row)]
        graph = make_fx(functools.partial(_step_eagerly, plan), tracing_mode="symbolic")(*fakes)
    options: dict[str, Any] = {}
    if args[0].device.type == "cpu":
        options["cpp.enable_floating_point_contract_flag"] = "fast"  # products and sums in one instruction
    compiled: Any = torch._inductor.compile(graph, fakes, options=options)
    return compiled


def _fake(mode: Any, t: Tensor, by_row: bool) -> Tensor:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    dims = [DimDynamic.DUCK if by_row and d == 0 and n > 1 else DimDynamic.STATIC for d, n in enumerate(t.shape)]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dims, constraint_sizes=[None] * t.dim())
    return mode.from_tensor(t, symbolic_context=context, source=ConstantSource(f"input_{id(t)}"))


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
