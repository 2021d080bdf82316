"""Many small parameters with full-precision states, updated as one long one: a model has hundreds of norms and biases, and a
kernel for each would cost more than all of the rest.

Their states, `step` among them, are views of one buffer, so that they need no gathering; parameters and gradients, which
belong to others, are gathered to buffers and the parameters scattered back, by a kernel for hundreds of tensors each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sharded import grad_like, is_dtensor, local, shard_like

JOINED = 2**14
"""Parameters with at most so many elements are joined."""


Used = Sequence[tuple[Tensor, dict[str, Any]]]
"""Parameters that have a gradient, each with its states."""


class Joined:
    """The parameters `used`, of one device, dtype, dtype of gradients and number of steps, end to end.

    param, grad: (n,) buffers. states: (n,) float32 each, in the order of `names`; making this object moves the states of
        the parameters there. steps: a float32 for each parameter, on the CPU.
    """

    def __init__(self, names: Sequence[str], used: Used) -> None:
        self.names = tuple(names)
        self.params = [p for p, _ in used]
        mine = [local(p).detach() for p in self.params]
        self.param, self._param_parts = _buffer(mine, mine[0].dtype)
        self.grad, self._grad_parts = _buffer(mine, _grad(self.params[0]).dtype)
        self.steps = torch.stack([state["step"] for _, state in used])
        self.states: list[Tensor] = []
        self._views: dict[str, list[Tensor]] = {"step": list(self.steps.unbind())}
        for name in names:
            buffer, parts = _buffer(mine, torch.float32)
            torch._foreach_copy_(parts, [local(state[name]) for _, state in used])
            self.states.append(buffer)
            self._views[name] = [shard_like(part, p) for part, p in zip(parts, self.params)]
        for name, views in self._views.items():
            for (_, state), view in zip(used, views):
                state[name] = view
        self._sharded = any(is_dtensor(p) for p in self.params)

    @property
    def count(self) -> float:
        """The steps so far."""
        return self.steps[0].item()

    def fits(self, names: Sequence[str], used: Used) -> bool:
        """Whether it still is about the parameters `used`: nobody has replaced a state, or counted steps of some of them."""
        if len(used) != len(self.params) or tuple(names) != self.names:
            return False
        dtype = self.grad.dtype
        if any(p is not mine or _grad(p).dtype != dtype for (p, _), mine in zip(used, self.params)):
            return False
        for name, views in self._views.items():
            if any(state[name] is not view for (_, state), view in zip(used, views)):
                return False
        return bool((self.steps == self.steps[0]).all())

    def gather(self) -> None:
        """Read the parameters and their gradients."""
        torch._foreach_copy_(self._param_parts, self._locals())
        torch._foreach_copy_(self._grad_parts, [grad_like(p) for p in self.params])

    def scatter(self) -> None:
        """Write the parameters, and count the step."""
        torch._foreach_copy_(self._locals(), self._param_parts)
        self.steps += 1

    def _locals(self) -> list[Tensor]:
        return [local(p) for p in self.params] if self._sharded else self.params


def joined(known: Sequence[Joined], names: Sequence[str], used: Used) -> Sequence[Joined]:
    """The parameters `used` in joined form: `known` if that still fits, else made anew."""
    owner = {id(p): i for i, part in enumerate(known) for p in part.params}
    parts: dict[Any, list[tuple[Tensor, dict[str, Any]]]] = {}
    for p, state in used:
        parts.setdefault(owner.get(id(p)), []).append((p, state))
    if len(parts) == len(known) and all(i is not None and known[i].fits(names, part) for i, part in parts.items()):
        return known
    parts = {}
    for p, state in used:
        parts.setdefault((local(p).device, p.dtype, _grad(p).dtype, state["step"].item()), []).append((p, state))
    return [Joined(names, part) for part in parts.values()]


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def _buffer(like: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Memory for all of `like`, and its parts of their shapes."""
    sizes = [t.numel() for t in like]
    buffer = torch.empty(sum(sizes), dtype=dtype, device=like[0].device)
    return buffer, [part.view(t.shape) for part, t in zip(buffer.split(sizes), like)]
