"""`LowBitOptimizer`: a torch optimizer for any update rule, whose states are quantized tensors.

A rule is a plain function of a parameter, its gradient and its states (kernel.py); a subclass names the states, their
formats and the hyperparameters. From that follows the rest, once: param groups, state dicts, conversion from and to
torch.optim, DTensor parameters, stochastic rounding, and the compiled step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ao.dtypes import Flat, FlatTensor, QTensor, Spec

from .kernel import Fields, Plan, field_names, has_compiler, row, run_compiled, run_eager
from .sharded import grad_like, is_dtensor, local, shard_like

SMALL = 4096
"""A parameter with fewer elements keeps full-precision states: they take little, and biases and norms are sensitive."""

JOINED = 2**16
"""Full-precision parameters with at most so many elements are joined and updated as one."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TORCH_ONLY = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")
"""Settings of torch's optimizers that choose an implementation there."""

FullPrecision = nn.Module | Tensor | Iterable[nn.Module | Tensor]
Formats = Mapping[str, Callable[[int], Spec]]


@dataclass
class _Item:
    """One parameter in a step, as rows of blocks, or of single elements where its states are in full precision; or as it is,
    where it is going to be joined with others."""

    param: Tensor
    grad: Tensor
    states: list[Fields]


@dataclass(frozen=True)
class _Kept:
    """A loaded value that torch's load_state_dict shall not touch: it would cast a float32 state to bfloat16."""

    value: Any


class LowBitOptimizer(torch.optim.Optimizer):
    """The optimizer that a subclass describes by `update`, `scalar_names`, `formats`, `options`, `state_names`, `scalars`.

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

    scalar_names: ClassVar[tuple[str, ...]]
    """The hyperparameters that the rule reads; the first one is "lr"."""

    formats: ClassVar[Formats] = {}
    """The Spec of the rows of each quantized state, given the block size."""

    block_multiple: ClassVar[int] = 1
    """What block_size must be a multiple of."""

    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = None
    """The optimizer of torch.optim with the same formula."""

    torch_states: ClassVar[tuple[str, ...]] = ()
    """The states that `torch_class` knows."""

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """What specializes the rule: a change compiles another graph."""
        return {}

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The states that the rule needs."""
        raise NotImplementedError

    def scalars(self, group: dict[str, Any], step: float) -> dict[str, float]:
        """The values of `scalar_names` at a step, counted from 1, except for lr."""
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
        p = group["params"][index]
        n = local(p).numel()
        size = group.get("block_size", 1)
        quantized = n >= SMALL and n % size == 0 and index not in group["full_precision"]
        return tuple(
            (name, self.formats[name](size) if quantized and name in self.formats else None)
            for name in self.state_names(group)
        )

    def _zero_state(self, p: Tensor, spec: Spec | None) -> Tensor:
        mine = local(p)
        if spec is None:
            state: Tensor = torch.zeros(mine.shape, dtype=torch.float32, device=mine.device)
        else:
            state = self._zero_blocks(mine, spec)
        return shard_like(state, p)

    def _zero_blocks(self, p: Tensor, spec: Spec) -> Tensor:
        one = row(spec, p.device)
        block = one.shape[-1]
        rows = p.numel() // block
        shared = self.__dict__.setdefault("_shared", {})
        fields = {}
        for name, t in one.fields().items():
            if one.roles[name] == "shared":  # one table for all states
                fields[name] = shared.setdefault((spec, p.device, name), t)
            else:
                fields[name] = t.expand(rows, -1).contiguous()
        blocks = spec.wrap(fields, torch.float32, (rows, block))
        return Flat(spec).wrap({"blocks": blocks}, torch.float32, p.shape)

    def _init_state(self, p: Tensor, specs: tuple[tuple[str, Spec | None], ...]) -> dict[str, Any]:
        """The states of a parameter before the first step."""
        state = {"step": torch.zeros((), dtype=torch.float32)}
        return {**state, **{name: self._zero_state(p, spec) for name, spec in specs}}

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns the loss of `closure`, which recomputes it, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._check_grad(p)
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _check_grad(self, p: Tensor) -> None:
        grad = p.grad
        assert grad is not None
        if grad.is_sparse or grad.layout is not torch.strided:
            raise RuntimeError(
                f"{type(self).__name__} does not take sparse gradients, and the parameter of shape {tuple(p.shape)} has one; "
                "use nn.Embedding(..., sparse=False), or give this parameter to torch.optim.SparseAdam"
            )

    def _step_group(self, group: dict[str, Any]) -> None:
        names = self.state_names(group)
        used = [(index, p) for index, p in enumerate(group["params"]) if p.grad is not None]
        for index, p in used:
            state = self.state[p]
            if not state or any(name not in state for name in names):  # the first step, or amsgrad was switched on
                sizes = [t.spec.block_size for t in map(local, state.values()) if isinstance(t, FlatTensor)]
                made_as = {**group, "block_size": sizes[0]} if sizes else group
                self.state[p] = {**self._init_state(p, self.specs(made_as, index)), **state}
        if not used:
            return
        steps = [self.state[p]["step"] for _, p in used]
        counts = (torch.stack(steps) + 1).tolist()
        round_bf16 = bool(group["bf16_stochastic_round"])
        written: list[tuple[Tensor, Tensor]] = []
        buckets: dict[Any, list[_Item]] = {}
        for (_, p), count in zip(used, counts):
            mine = local(p)
            if mine.numel() == 0:
                continue
            states = [local(self.state[p][name]) for name in names]
            specs = tuple(t.spec.inner if isinstance(t, FlatTensor) else None for t in states)
            joined = not any(specs) and mine.numel() <= JOINED and not isinstance(mine, QTensor)
            if joined:
                item = _Item(mine, grad_like(p), [(t,) for t in states])
            else:
                item = _item(p, mine, states, specs, written)
            rows = 0 if joined else item.param.shape[0]
            stochastic = round_bf16 and item.param.dtype == torch.bfloat16
            key = (rows, count, specs, stochastic, mine.device, item.param.dtype, item.grad.dtype)
            buckets.setdefault(key, []).append(item)
        hypers: dict[Any, Tensor] = {}
        # The largest first: the compiler tunes a kernel for the first size that it sees.
        for key in sorted(buckets, key=lambda key: -key[0]):
            rows, count, specs, stochastic, device, *_ = key
            plan = Plan(
                type(self).update,
                tuple(self.options(group).items()),
                self.scalar_names,
                tuple(zip(names, specs)),
                bool(group["maximize"]),
                stochastic,
            )
            if (count, device) not in hypers:
                hypers[count, device] = self._hyper(group, count, device)
            self._run(plan, buckets[key], hypers[count, device], joined=rows == 0)
        for target, values in written:
            target.copy_(values.view(target.shape))
        torch._foreach_add_(steps, 1.0)

    def _hyper(self, group: dict[str, Any], step: float, device: torch.device) -> Tensor:
        lr = group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        values = {**self.scalars(group, step), "lr": 0.0 if on_device else float(lr)}
        hyper = torch.tensor([values[name] for name in self.scalar_names], dtype=torch.float32)
        hyper = hyper.to(device, non_blocking=True)
        if on_device:  # without waiting for the device
            hyper[0].copy_(lr.detach().squeeze())
        return hyper

    def _run(self, plan: Plan, items: list[_Item], hyper: Tensor, joined: bool) -> None:
        run = run_compiled if self.compile and has_compiler(hyper.device.type) else run_eager
        params = [item.param for item in items]
        grads = [item.grad for item in items]
        states = [item.states for item in items]
        count = 1 if joined else len(items)
        seeds: tuple[Tensor, ...] = ()
        if plan.stochastic:
            seeds = torch.randint(2**31 - 1, (count,)).to(hyper.device, non_blocking=True).unbind()
        if not joined:
            run(plan, params, grads, states, hyper, seeds)
            return
        of_state = [[state[k][0] for state in states] for k in range(len(plan.states))]
        whole = [_flatten_dense_tensors(tensors) for tensors in (params, grads, *of_state)]
        run(plan, whole[:1], whole[1:2], [[(t,) for t in whole[2:]]], hyper, seeds)
        for targets, t in zip((params, *of_state), (whole[0], *whole[2:])):
            torch._foreach_copy_(targets, _unflatten_dense_tensors(t, targets))

    # State dicts.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here, in an optimizer of another format, or in torch.optim.

        States of the same format are copied bit for bit, others are converted. Param groups bring their settings along, as
        in torch.optim; settings that a torch optimizer does not have stay as they are. Raises ValueError, and changes
        nothing, where groups, states or shapes do not fit.
        """
        handle = self.register_load_state_dict_pre_hook(_keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        loaded = state.get("state", {})
        if any(isinstance(kept, _Kept) for kept in loaded.values()):
            groups = state["param_groups"]
            for new, old in zip(groups, self.param_groups):
                for name in _TORCH_ONLY:
                    if name not in old:
                        new.pop(name, None)
                for name, value in old.items():
                    new.setdefault(name, value)
                self.check_group(new)
            made = type(self.state)(dict)
            for group in groups:
                for index, p in enumerate(group["params"]):
                    if p in loaded:
                        made[p] = self._load(p, loaded[p].value, group, index)
            made.update({k: kept.value for k, kept in loaded.items() if not isinstance(k, Tensor)})
            state = {**state, "state": made}
        super().__setstate__(state)
        self.__dict__.setdefault("_excluded", set())
        self.__dict__.setdefault("compile", True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compile": self.compile}

    def _load(self, p: Tensor, saved: Mapping[str, Any], group: dict[str, Any], index: int) -> dict[str, Any]:
        if not saved:
            return {}
        specs = self.specs(group, index)
        unknown = saved.keys() - {"step", *(name for name, _ in specs)}
        missing = {name for name, _ in specs} - saved.keys()
        who = f"{type(self).__name__}.load_state_dict: the parameter {index} of its group, of shape {tuple(p.shape)},"
        if missing or unknown:
            raise ValueError(
                f"{who} needs the states {sorted(name for name, _ in specs)} and was given {sorted(saved.keys())}; "
                "load the state dict of an optimizer with the same states"
            )
        state = self._init_state(p, specs)
        # torch.optim.SGD counts no steps; that its state exists says that there was one.
        state["step"].fill_(float(saved.get("step", 1.0)))
        for name, _ in specs:
            value = saved[name]
            if not isinstance(value, Tensor) or value.shape != p.shape:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{who} cannot take the state {name!r}: it has {got}")
            mine, given = local(state[name]), local(_placed_like(value, p))
            if isinstance(given, FlatTensor) and isinstance(mine, FlatTensor) and given.spec == mine.spec:
                mine.blocks.copy_(given.blocks)
            else:
                mine.copy_(given)
        return state

    def torch_state_dict(self) -> dict[str, Any]:
        """The state dict that the optimizer of torch.optim with the same formula loads, with all states in float32.

        Raises TypeError where torch.optim has no such optimizer.
        """
        if self.torch_class is None:
            raise TypeError(f"torch.optim has no counterpart of {type(self).__name__}")
        defaults = _defaults(self.torch_class)
        packed = self.state_dict()
        keep = ("params", "param_names", "initial_lr")
        groups = [
            {**defaults, **{k: v for k, v in group.items() if k in defaults or k in keep}}
            for group in packed["param_groups"]
        ]
        states = {
            k: {name: _dequantized(t) for name, t in state.items() if name in self.torch_states}
            for k, state in packed["state"].items()
        }
        return {"state": states, "param_groups": groups}

    @property
    def state_nbytes(self) -> int:
        """The bytes of all states on this rank."""
        total, seen = 0, set()
        for state in self.state.values():
            for t in state.values():
                for leaf in _leaves(local(t)):
                    if id(leaf) not in seen:  # a table is shared
                        total += leaf.numel() * leaf.element_size()
                        seen.add(id(leaf))
        return total


def _item(
    p: Tensor,
    mine: Tensor,
    states: list[Tensor],
    specs: tuple[Spec | None, ...],
    written: list[tuple[Tensor, Tensor]],
) -> _Item:
    """The parameter `p`, of which this rank holds `mine`, as rows.

    written: gets (parameter, new values) where the rows are a copy, since the parameter is quantized or not contiguous.
    """
    spec = next((spec for spec in specs if spec is not None), None)
    shape = (-1,) if spec is None else (-1, spec.block[-1])  # type: ignore[attr-defined]
    values = mine.detach()
    if isinstance(values, QTensor):
        values = values.to(torch.float32).dequantize()
    values = values.contiguous()
    if isinstance(mine, QTensor) or not mine.is_contiguous():
        written.append((mine.detach(), values))
    fields: list[Fields] = []
    for spec, t in zip(specs, states):
        if spec is None:
            fields.append((t.view(-1),))
        else:
            fields.append(tuple(getattr(t.blocks, name) for name in field_names(spec)))  # type: ignore[attr-defined]
    return _Item(values.view(shape), grad_like(p).contiguous().view(shape), fields)


def _keep(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "state": {k: _Kept(v) for k, v in state_dict["state"].items()}}


def _defaults(torch_class: Any) -> dict[str, Any]:
    """The settings of an optimizer of torch.optim."""
    return torch_class([torch.zeros(1)]).defaults


def _leaves(t: Tensor) -> Iterable[Tensor]:
    if isinstance(t, QTensor):
        for field in t.fields().values():
            yield from _leaves(field)
    else:
        yield t


def _dequantized(t: Any) -> Any:
    """A state in full precision, as a new tensor."""
    if not isinstance(t, Tensor):
        return t
    mine = local(t)
    values = mine.dequantize() if isinstance(mine, QTensor) else mine.clone()
    return shard_like(values, t)


def _placed_like(value: Tensor, p: Tensor) -> Tensor:
    """A loaded state with the placements of `p`. It stays quantized where the shards fall between its blocks."""
    if is_dtensor(value) and is_dtensor(p) and value.placements == p.placements:  # type: ignore[attr-defined]
        return value
    if not is_dtensor(value):
        try:
            return shard_like(value, p, whole=True)
        except ValueError:  # a block would be cut
            pass
    return shard_like(_dequantized(value), p, whole=True)


def _parameter_ids(items: FullPrecision) -> set[int]:
    if isinstance(items, (nn.Module, Tensor)):
        items = [items]
    return {id(p) for item in items for p in (item.parameters() if isinstance(item, nn.Module) else [item])}
