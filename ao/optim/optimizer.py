"""`LowBitOptimizer`: a torch optimizer for any update rule, whose states are quantized tensors.

A rule is a plain function of a parameter, its gradient and its states (kernel.py); a subclass names the states, their
formats and the hyperparameters. From that follows the rest, once: param groups, DTensor parameters, stochastic rounding,
the step in compiled graphs, state dicts and their conversion from and to torch.optim (conversion.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ao.dtypes import Flat, FlatTensor, QTensor, Spec

from .conversion import Kept, keep, kept_states, torch_form
from .kernel import Plan, run
from .parts import Part, parts_of
from .rows import row
from .sharded import local, shard_like

SMALL = 4096
"""A parameter with fewer elements keeps full-precision states: they take little, and biases and norms are sensitive."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FullPrecision = nn.Module | Tensor | Iterable[nn.Module | Tensor]
Formats = Mapping[str, Callable[[int], Spec]]


class LowBitOptimizer(torch.optim.Optimizer):
    """The optimizer that a subclass describes by `update`, `formats`, `options`, `state_names`, `scalars`.

    A state is a `FlatTensor` with the shape of its parameter, quantized in blocks of `block_size` elements that follow one
    another in memory, or a float32 tensor: if the parameter has fewer than 4096 elements or no multiple of `block_size`, or
    is excluded by `full_precision`. Under DTensor (FSDP2, tensor parallelism) this is about the local shard, and the state
    is a DTensor of the parameter's placements. `state[p]["step"]` is a float32 scalar on the CPU, as in torch.optim.

    The arithmetic is in float32; the update uses the new states before they are quantized. With `compile` the step runs in
    a few compiled graphs; where no compiler is found, and with `compile=False`, it runs eagerly, with the same formulas.

    Parameters may be float32, bfloat16, float16, or themselves quantized. Raises TypeError for other dtypes. `step` raises
    RuntimeError for a sparse gradient. It does so, and checks everything else, before it changes anything.
    """

    update: ClassVar[Any]
    """The rule (kernel.Update)."""

    formats: ClassVar[Formats] = {}
    """The Spec of the rows of each quantized state, given the block size."""

    block_size: ClassVar[int] = 256
    """The elements that share a scale, where no other number is asked for."""

    block_multiple: ClassVar[int] = 1
    """What block_size must be a multiple of."""

    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = None
    """The optimizer of torch.optim with the same formula."""

    torch_states: ClassVar[tuple[str, ...]] = ()
    """The states that `torch_class` knows."""

    alone: ClassVar[type[Part] | None] = None
    """The kind of part that each parameter is, where none steps together with others."""

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """What specializes the rule: a change compiles another graph."""
        return {}

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The states that the rule needs."""
        raise NotImplementedError

    def scalars(self, group: dict[str, Any], lr: float | Tensor, step: float) -> dict[str, float | Tensor]:
        """The numbers that the rule reads, at a step counted from 1. lr is a tensor if it is one on a device."""
        raise NotImplementedError

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        full_precision: FullPrecision = (),
        compile: bool = True,
    ) -> None:
        self.compile = compile
        self._excluded = _parameter_ids(full_precision)
        super().__init__(params, {**defaults, "full_precision": ()})
        known = {id(p) for group in self.param_groups for p in group["params"]}
        if self._excluded and not self._excluded & known:
            raise ValueError(
                f"{type(self).__name__}: full_precision matches none of the parameters; give modules or parameters "
                "that are among `params`"
            )

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own, as in torch.optim.

        The key "full_precision" takes what the constructor's argument of that name takes.
        """
        before = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            excluded = self._excluded | _parameter_ids(group["full_precision"])
            group["full_precision"] = [i for i, p in enumerate(group["params"]) if id(p) in excluded]
            self.check_group(group)
        except Exception:
            del self.param_groups[before:]
            raise

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError for settings that make no sense."""
        who = type(self).__name__
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"{who}: lr must be a number or a tensor of one element, got {tuple(group['lr'].shape)}")
        for name in ("lr", "eps", "weight_decay", "momentum"):
            if name in group and not isinstance(group[name], Tensor) and not group[name] >= 0:
                raise ValueError(f"{who}: {name} must not be negative, got {group[name]!r}")
        if "betas" in group and not all(0 <= float(b) < 1 for b in group["betas"]):
            raise ValueError(f"{who}: betas must be at least 0 and below 1, got {group['betas']!r}")
        if self.formats:
            size = group["block_size"]
            if not isinstance(size, int) or size < 1 or size % self.block_multiple:
                raise ValueError(
                    f"{who}: block_size must be a positive multiple of {self.block_multiple}, got {size!r}"
                )
        for p in group["params"]:
            if p.dtype not in _DTYPES:
                raise TypeError(
                    f"{who} takes float32, bfloat16 and float16 parameters, got one of {p.dtype} and shape "
                    f"{tuple(p.shape)}; give it to an optimizer of torch.optim"
                )

    # States.

    def specs(self, group: dict[str, Any], index: int) -> tuple[tuple[str, Spec | None], ...]:
        """The states of the group's parameter `index`, each with the Spec of its rows or None for float32."""
        n = local(group["params"][index]).numel()
        size = group.get("block_size", 1)
        quantized = n >= SMALL and n % size == 0 and index not in group["full_precision"]
        return tuple(
            (name, self.formats[name](size) if quantized and name in self.formats else None)
            for name in self.state_names(group)
        )

    def new_state(self, p: Tensor, specs: Iterable[tuple[str, Spec | None]]) -> dict[str, Any]:
        """The states of a parameter before the first step."""
        state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        return {**state, **{name: self._zeros(p, spec) for name, spec in specs}}

    def _zeros(self, p: Tensor, spec: Spec | None) -> Tensor:
        mine = local(p)
        if spec is None:
            return shard_like(torch.zeros(mine.shape, dtype=torch.float32, device=mine.device), p)
        one = row(spec, mine.device)
        block = one.shape[-1]
        rows = mine.numel() // block
        shared = self.__dict__.setdefault("_shared", {})
        fields = {}
        for name, t in one.fields().items():
            if one.roles[name] == "shared":  # one table for all states
                fields[name] = shared.setdefault((spec, mine.device, name), t)
            else:
                fields[name] = t.expand(rows, -1).contiguous()
        blocks = spec.wrap(fields, torch.float32, (rows, block))
        return shard_like(Flat(spec).wrap({"blocks": blocks}, torch.float32, mine.shape), p)

    @property
    def state_nbytes(self) -> int:
        """The bytes of all states on this rank."""
        leaves = {
            id(leaf): leaf.numel() * leaf.element_size()  # a table is shared
            for state in self.state.values()
            for t in state.values()
            for leaf in _leaves(local(t))
        }
        return sum(leaves.values())

    # The step.

    @_disable_dynamo  # a step that a user's graph reaches brings its own graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns the loss of `closure`, which recomputes it, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not take sparse gradients, and the parameter of shape {tuple(p.shape)} "
                    "has one; use nn.Embedding(..., sparse=False), or give this parameter to torch.optim.SparseAdam"
                )
        parts = [(group, part) for i, group in enumerate(self.param_groups) for part in self._parts(i, group)]
        for group, part in parts:
            self._update(group, part)
        return loss

    def _parts(self, index: int, group: dict[str, Any]) -> Sequence[Part]:
        """The parameters of a group that have a gradient, with their states, which are made here at the first step."""
        names = self.state_names(group)
        used: list[tuple[Tensor, dict[str, Any]]] = []
        for i, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            state = self.state.get(p)
            if not state or any(name not in state for name in names):  # the first step, or amsgrad was switched on
                state = self.state[p] = self._with_states(p, i, group, state or {})
            used.append((p, state))
        kept: dict[int, Sequence[Part]] = self.__dict__.setdefault("_kept", {})
        kept[index] = parts_of(kept.get(index, ()), names, used, self.alone)
        return kept[index]

    def _with_states(self, p: Tensor, index: int, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """`state` with what it lacks, in blocks as large as those that it has."""
        sizes = [t.spec.block_size for t in map(local, state.values()) if isinstance(t, FlatTensor)]
        made_as = {**group, "block_size": sizes[0]} if sizes else group
        return {**self.new_state(p, self.specs(made_as, index)), **state}

    def _update(self, group: dict[str, Any], part: Part) -> None:
        """The step of a part, by the settings that its group has now."""
        lr = group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        scalars = self.scalars(group, lr.detach().squeeze() if on_device else float(lr), part.steps[0].item() + 1)
        stochastic = bool(group["bf16_stochastic_round"]) and part.dtype == torch.bfloat16
        plan = Plan(
            type(self).update,
            tuple(self.options(group).items()),
            tuple(scalars),
            tuple(zip(part.names, part.specs)),
            bool(group["maximize"]),
            stochastic,
        )
        values = [0.0 if isinstance(value, Tensor) else value for value in scalars.values()]
        hyper = torch.tensor(values, dtype=torch.float32, device="cpu").to(part.device, non_blocking=True)
        for i, value in enumerate(scalars.values()):
            if isinstance(value, Tensor):  # without waiting for the device
                hyper[i].copy_(value)
        noise = None
        if stochastic:
            noise = torch.zeros(part.kernels, 2, dtype=torch.int32, device="cpu")
            noise[:, 0] = torch.randint(2**31 - 1, (part.kernels,), device="cpu")
            noise = noise.to(part.device, non_blocking=True)
        run(plan, part, hyper, noise, self.compile)

    # State dicts: conversion.py has what is done with them.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here, in an optimizer of another format, or in torch.optim.

        States of the same format are copied bit for bit, others are converted. Param groups bring their settings along, as
        in torch.optim; settings that a torch optimizer does not have stay as they are. Raises ValueError, and changes
        nothing, where groups, states or shapes do not fit.
        """
        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if any(isinstance(kept, Kept) for kept in state.get("state", {}).values()):
            state = {**state, "state": kept_states(self, state)}
        super().__setstate__(state)
        self.__dict__.setdefault("_excluded", set())
        self.__dict__.setdefault("compile", True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compile": self.compile}

    def torch_state_dict(self) -> dict[str, Any]:
        """The state dict that the optimizer of torch.optim with the same formula loads, with all states in float32.

        Raises TypeError where torch.optim has no such optimizer.
        """
        if self.torch_class is None:
            raise TypeError(f"torch.optim has no counterpart of {type(self).__name__}")
        return torch_form(self.state_dict(), self.torch_class, self.torch_states)


def _leaves(t: Tensor) -> Iterable[Tensor]:
    if isinstance(t, QTensor):
        for field in t.fields().values():
            yield from _leaves(field)
    else:
        yield t


def _parameter_ids(items: FullPrecision) -> set[int]:
    if isinstance(items, (nn.Module, Tensor)):
        items = [items]
    return {id(p) for item in items for p in (item.parameters() if isinstance(item, nn.Module) else [item])}
