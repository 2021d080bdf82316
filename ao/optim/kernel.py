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

from ao.dtypes import Spec

from .parts import Large, Part
from .rows import Rows, field_names, in_memory, planes_of, read, reading, scales, to_planes, write
from .stochastic_rounding import stochastic_round


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
    def planes(self) -> int:
        """In how many planes the parameters come."""
        return planes_of(tuple(spec for _, spec in self.states))

    @functools.cached_property
    def by_row(self) -> tuple[bool, ...]:
        """Which of `Rows.tensors` have one entry per row, the others being shared by all rows."""
        flags = [True] * (2 * self.planes)
        for _, spec in self.states:
            flags += [True] if spec is None else [spec.tensor_type.roles[f] != "shared" for f in field_names(spec)]
        return (*flags, False) if self.stochastic else tuple(flags)

    def rows(self, tensors: Iterable[Tensor]) -> Rows:
        """The inverse of `Rows.tensors`."""
        it = iter(tensors)
        params, grads = ([next(it) for _ in range(self.planes)] for _ in range(2))
        states = [tuple(next(it) for _ in (field_names(spec) if spec else ("",))) for _, spec in self.states]
        return Rows(params, grads, states, next(it) if self.stochastic else None)


def update_rows(plan: Plan, rows: Rows, h: Mapping[str, Tensor]) -> None:
    """The step of one parameter, in place."""
    states = [read(spec, fields, rows.params) for (_, spec), fields in zip(plan.states, rows.states)]
    new: list[Tensor] = []
    new_states: list[list[Tensor]] = [[] for _ in states]
    for i in range(plan.planes):
        grad = -rows.grads[i].float() if plan.maximize else rows.grads[i].float()
        values = {name: state[i] for (name, _), state in zip(plan.states, states)}
        made, made_states = plan.update(rows.params[i].float(), grad, values, h, **dict(plan.options))
        new.append(made)
        for (name, _), made_state in zip(plan.states, new_states):
            made_state.append(made_states[name])
    # On a CPU in two loops: one over what is read, which gives the new states and their largest numbers, one that gives the
    # codes and the parameters. So neither waits for long chains of operators, and nothing is computed twice.
    states = [v if spec is None else [in_memory(x) for x in v] for (_, spec), v in zip(plan.states, new_states)]
    quantized = [x for (_, spec), v in zip(plan.states, states) if spec is not None for x in v]
    known = [
        {} if spec is None else scales(spec, [reading(x, quantized) for x in v])
        for (_, spec), v in zip(plan.states, states)
    ]
    new = [reading(x, [k["inverse"] for k in known if "inverse" in k]) for x in new]
    for (name, spec), fields, wide, qparams in zip(plan.states, rows.states, states, known):
        write(spec, fields, wide, qparams, slow=name == "exp_avg_sq")
    if rows.noise is not None:
        seed, start = rows.noise.unbind()
        count, width = rows.shape
        index = torch.arange(count * width, dtype=torch.int32, device=seed.device) + start
        places = to_planes(index, width, plan.planes) if plan.planes > 1 else [index.view_as(new[0])]
        new = [stochastic_round(value, seed, place) for value, place in zip(new, places)]
    for target, value in zip(rows.params, new):
        target.copy_(value)


EAGER_PIECE = {"cpu": 2**18, "cuda": 2**24}
"""The elements at a time without a compiler, by kind of device, which bounds the temporaries."""

COMPILED_PIECE = {"cpu": 2**18, "cuda": 2**30}
"""The same with one. A CPU keeps the values before rounding in its cache: so many per thread. 32-bit indices for a GPU."""


def run(plan: Plan, part: Part, hyper: Tensor, noise: Tensor | None, compile: bool) -> None:
    """The step of a part, compiled or eagerly. noise: a row for each of its rows, where parameters are rounded at random."""
    kind = hyper.device.type
    launch = None
    if compile and kind == "cuda" and isinstance(part, Large) and has_compiler(kind):
        launch = _launch(plan, part)
    if launch is not None:
        launch(part.grads(), hyper, noise)
        part.finish()
        return
    if compile and kind == "cpu":
        from .cpu_step import cpu_step  # which writes C++

        step = cpu_step(plan, part.dtype, part.grad_dtype)
        if step is not None:
            for i, rows in enumerate(part.rows()):
                step(rows, hyper, None if noise is None else noise[i])
            part.finish()
            return
    compile = compile and has_compiler(kind)
    size = (COMPILED_PIECE if compile else EAGER_PIECE).get(kind, 2**24)
    if kind == "cpu":
        size *= torch.get_num_threads()
    items = part.rows()
    if noise is not None:
        for rows, each in zip(items, noise):
            rows.noise = each
    steps: dict[bool, Callable[..., None]] = {}
    for tensors in itertools.chain.from_iterable(_pieces(plan, item, size) for item in items):
        # One row is another graph: a compiler takes a size of 1 for a fact.
        single = tensors[0].shape[0] == 1
        if single not in steps:
            eagerly = functools.partial(_step_eagerly, plan)
            steps[single] = _step(plan, single, [hyper, *tensors]) if compile else eagerly
        steps[single](hyper, *tensors)
    part.finish()


def _launch(plan: Plan, part: Large) -> Any:
    """One launch for all parameters of a part (adam_kernel.py), kept by it; None where no such kernel is for them."""
    if part.launch is None or part.launch[0] != plan:
        made = None
        if torch.version.hip is None and torch.cuda.get_device_capability(part.device) >= (8, 0):
            from . import adam_kernel  # which needs Triton

            made = adam_kernel.AdamLaunch(plan, part) if adam_kernel.takes(plan, part) else None
        part.launch = plan, made
    return part.launch[1]


def _pieces(plan: Plan, item: Rows, size: int) -> Iterable[Sequence[Tensor]]:
    """The tensors of `item`, cut into pieces of at most `size` elements, all about as long."""
    tensors = item.tensors()
    rows, width = item.shape
    count = math.ceil(rows / max(size // width, 1)) if rows else 1
    if count == 1:
        return [tensors]
    length = math.ceil(rows / count)
    starts = range(0, rows, length)
    parts = [t.split(length) if by_row else [t] * len(starts) for t, by_row in zip(tensors, plan.by_row)]
    if item.noise is not None:
        positions = [(start * width + 2**31) % 2**32 - 2**31 for start in starts]  # they wrap around
        moved = torch.tensor([[0, position] for position in positions], dtype=torch.int32, device="cpu")
        parts[-1] = (item.noise + moved.to(item.noise.device)).unbind()
    return zip(*parts)


def _step_eagerly(plan: Plan, hyper: Tensor, *tensors: Tensor) -> None:
    update_rows(plan, plan.rows(tensors), dict(zip(plan.scalars, hyper.unbind())))


def _step(plan: Plan, single: bool, args: Sequence[Tensor]) -> Callable[..., None]:
    """`_step_eagerly`, compiled for parameters like the one given."""
    param, grad = args[1], args[1 + plan.planes]
    threads = torch.get_num_threads() if param.device.type == "cpu" else 1
    key = (plan, single, param.device, param.dtype, grad.dtype, threads)
    if key not in _compiled:
        _compiled[key] = _compile(plan, args)
    return _compiled[key]


_compiled: dict[Any, Callable[..., None]] = {}


def _compile(plan: Plan, args: Sequence[Tensor]) -> Callable[..., None]:
    """Trace `_step_eagerly` to plain operators, rows symbolic and all else as it is, and compile these.

    The graph goes to Inductor directly: the key above is all that there is to guard, and Dynamo's checks would take longer
    than a kernel. No piece is too large for 32-bit indices, so that sizes need no check either.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env):
        rows = _symbolic_size(shape_env, args[1].shape[0])
        by_row = (False, *plan.by_row)
        shapes = [(rows, *t.shape[1:]) if symbolic else t.shape for t, symbolic in zip(args, by_row)]
        fakes: list[Any] = [
            torch.empty_strided(shape, t.stride(), dtype=t.dtype, device=t.device) for t, shape in zip(args, shapes)
        ]
        step = functools.partial(_step_eagerly, plan)
        cpu = args[0].device.type == "cpu"
        graph = make_fx(step, decomposition_table={} if cpu else _ON_GPU, tracing_mode="symbolic")(*fakes)
    graph.shape_env = None  # which the compiler's cache on disk would take for a part of the program, and not read
    options: dict[str, Any] = {}  # with checks of sizes: without them torch 2.14 forgets the number of rows
    if cpu:
        options["cpp.enable_floating_point_contract_flag"] = "fast"  # products and sums in one instruction
        # What shall be in memory is said by `in_memory`: values in between are not, however long it takes to compute them.
        for limit in ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"):
            options[limit] = 10**6
    else:
        options["coordinate_descent_tuning"] = True  # tries rows and warps of a program, for a sixth of the time
    compiled: Any = torch._inductor.compile(graph, fakes, options=options)
    assert not shape_env.replacements, "the number of rows has become a constant"
    return compiled


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    root = y.abs().rsqrt()
    return x * root * root.copysign(y)


# Correctly rounded, these take a branch per element on a GPU; so they are off by three units in the last place at most.
_ON_GPU: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.sqrt.default: lambda x: x * (x + torch.finfo(torch.float32).tiny).rsqrt(),
    torch.ops.aten.div.Tensor: _quotient,
}


def _symbolic_size(shape_env: Any, size: int) -> Any:
    """A size that graphs are made for whatever it is; `size` now. One is a fact."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    if size == 1:
        return 1
    source = ConstantSource("rows")
    symbol = shape_env.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return shape_env.create_symintnode(symbol, hint=size, source=source)


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
