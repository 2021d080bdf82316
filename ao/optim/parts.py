"""Parts: the parameters of a group that step together, with all that a step needs to know of them, found once and kept.

A step comes thousands of times, and between two of them nothing changes but the gradients. So lists of tensors, rows and fields
are made at the first step, and again where the parameters that have a gradient, their dtypes, their states or their memory are
others. What is asked at each step is one comparison per tensor.

`Large` has parameters that each take a kernel, or a share of one. `Joined` has small ones as one long one: a model has hundreds
of norms and biases, and a kernel for each would cost more than all of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ao.dtypes import FlatTensor, QTensor, Spec

from .rows import Fields, Rows, planes_of, state_fields, to_planes
from .sharded import grad_like, is_dtensor, local, shard_like

JOINED = 2**14
"""Parameters with at most so many elements are joined."""

Used = Sequence[tuple[Tensor, dict[str, Any]]]
"""Parameters that have a gradient, each with its states."""


class Part:
    """Parameters of one device, dtype, dtype of gradients, formats and number of steps.

    names: of the states. specs: of the rows of the states; None for one in full precision.
    steps: a float32 for each parameter, on the CPU; `step` in their states is a view of it.
    """

    def __init__(self, names: Sequence[str], used: Used, specs: tuple[Spec | None, ...]) -> None:
        self.names, self.specs = tuple(names), specs
        self.params = [p for p, _ in used]
        self.states = [state for _, state in used]
        self.locals = [local(p).detach() for p in self.params]
        mine, grad = self.locals[0], self.params[0].grad
        assert grad is not None
        self.device, self.dtype, self.grad_dtype = mine.device, mine.dtype, grad.dtype
        self.planes = planes_of(specs)
        self.steps = torch.stack([state["step"] for state in self.states])
        self._plain = not any(is_dtensor(p) for p in self.params)
        self._addresses = [_address(p) for p in self.params]
        self._known: dict[str, list[Tensor]] = {name: [state[name] for state in self.states] for name in names}
        self._set("step", list(self.steps.unbind()))

    def _set(self, name: str, values: list[Tensor]) -> None:
        """Give the states of all parameters other tensors."""
        for state, value in zip(self.states, values):
            state[name] = value
        self._known[name] = values

    def fits(self, names: Sequence[str], now: Mapping[int, dict[str, Any]]) -> bool:
        """Whether it still is about these parameters: nobody has replaced a state, their memory or the dtype of their
        gradients, or counted steps of some of them. now: the states by the id of the parameter."""
        if tuple(names) != self.names:
            return False
        for p, state, address in zip(self.params, self.states, self._addresses):
            if now.get(id(p)) is not state or p.grad is None:
                return False
            if p.grad.dtype != self.grad_dtype or _address(p) != address:
                return False
        for name, known in self._known.items():
            for state, t in zip(self.states, known):
                if state[name] is not t:
                    return False
        return bool((self.steps == self.steps[0]).all())

    def grads(self) -> list[Any]:
        """The local gradients."""
        return [p.grad if self._plain else grad_like(p) for p in self.params]

    @property
    def kernels(self) -> int:
        """How many `rows` there are."""
        return len(self.params)

    def rows(self) -> list[Rows]:
        """What a step reads and writes."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write what `rows` had copied, and count the step."""
        raise NotImplementedError


class Large(Part):
    """Parameters that each have rows of their own."""

    def __init__(self, names: Sequence[str], used: Used, specs: tuple[Spec | None, ...]) -> None:
        # The largest first: the compiler tunes a kernel for the first size that it sees.
        super().__init__(names, sorted(used, key=lambda each: -local(each[0]).numel()), specs)
        self.width = next((spec.block[-1] for spec in specs if spec is not None), None)
        self.fields: list[list[Fields]] = []
        self.views: list[Sequence[Tensor] | None] = []
        for mine, state in zip(self.locals, self.states):
            states = [local(state[name]) for name in names]
            fields = zip(specs, states)
            self.fields.append(
                [(t.view(-1),) if spec is None else state_fields(t.blocks, self.planes) for spec, t in fields]
            )
            # One that is quantized or not contiguous is read anew at each step, and its new values are written back.
            copied = isinstance(mine, QTensor) or not mine.is_contiguous()
            self.views.append(None if copied else to_planes(mine, self.width, self.planes))
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.launch: Any = None
        """What a kernel for all of them keeps, with the plan that it is for."""

    def rows(self) -> list[Rows]:
        made = []
        for mine, views, grad, fields in zip(self.locals, self.views, self.grads(), self.fields):
            values = self._copied(mine) if views is None else views
            made.append(Rows(values, to_planes(grad.contiguous(), self.width, self.planes), fields))
        return made

    def _copied(self, mine: Tensor) -> Sequence[Tensor]:
        values = mine.to(torch.float32).dequantize() if isinstance(mine, QTensor) else mine
        values = values.contiguous()
        self._copies.append((mine, values))
        return to_planes(values, self.width, self.planes)

    def finish(self) -> None:
        for target, values in self._copies:
            target.copy_(values.view(target.shape))
        self._copies = []
        self.steps += 1


class Joined(Part):
    """Small parameters with full-precision states, end to end.

    Their states are views of one buffer each, so that they need no gathering; parameters and gradients, which belong to others,
    are gathered to buffers and the parameters scattered back, by a kernel for hundreds of tensors each.
    """

    def __init__(self, names: Sequence[str], used: Used, specs: tuple[Spec | None, ...]) -> None:
        super().__init__(names, used, specs)
        self.param, self._param_parts = _buffer(self.locals, self.dtype)
        self.grad, self._grad_parts = _buffer(self.locals, self.grad_dtype)
        self.buffers: list[Tensor] = []
        for name in names:
            buffer, parts = _buffer(self.locals, torch.float32)
            torch._foreach_copy_(parts, [local(state[name]) for state in self.states])
            self.buffers.append(buffer)
            self._set(name, [shard_like(part, p) for part, p in zip(parts, self.params)])

    @property
    def kernels(self) -> int:
        return 1

    def rows(self) -> list[Rows]:
        torch._foreach_copy_(self._param_parts, self.locals)
        torch._foreach_copy_(self._grad_parts, self.grads())
        return [Rows([self.param], [self.grad], [(t,) for t in self.buffers])]

    def finish(self) -> None:
        torch._foreach_copy_(self.locals, self._param_parts)
        self.steps += 1


def parts_of(
    known: Sequence[Part], names: Sequence[str], used: Used, alone: type[Part] | None = None
) -> Sequence[Part]:
    """The parameters `used` in parts: `known`, if those still fit, else made anew. alone: the kind of parts of one each."""
    if sum(len(part.params) for part in known) == len(used):
        now = {id(p): state for p, state in used}
        if all(part.fits(names, now) for part in known):
            return known
    found: dict[Any, list[tuple[Tensor, dict[str, Any]]]] = {}
    for p, state in used:
        t = local(p)
        if t.numel() or not isinstance(t, QTensor):
            states = [local(state[name]) for name in names]
            specs = tuple(s.spec.inner if isinstance(s, FlatTensor) else None for s in states)
            small = t.numel() <= JOINED and not isinstance(t, QTensor) and not any(specs)
            kind: type[Part] = alone or (Joined if small else Large)
            own = id(p) if alone else 0
            key = (kind, specs, own, t.device, t.dtype, p.grad.dtype, state["step"].item())  # type: ignore[union-attr]
            found.setdefault(key, []).append((p, state))
    return [kind(names, each, specs) for (kind, specs, *_), each in found.items()]


def _address(p: Tensor) -> int:
    """Where the numbers of a parameter are, unless it is quantized, and read anew each time."""
    t = local(p)
    return 0 if isinstance(t, QTensor) else t.data_ptr()


def _buffer(like: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Memory for all of `like`, and its parts of their shapes."""
    sizes = [t.numel() for t in like]
    buffer = torch.empty(sum(sizes), dtype=dtype, device=like[0].device)
    return buffer, [part.view(t.shape) for part, t in zip(buffer.split(sizes), like)]
